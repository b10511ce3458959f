"""Causal students and teachers over correlated frames whose every answer is known in closed form. One channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.flow import TextEmbedding

from .oracles import gaussian_velocity


@dataclass
class JointGaussian:
    """Exact velocity of frames that are jointly N(mean [F], covariance [F, F]), each pixel on its own."""

    mean: Tensor
    covariance: Tensor

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: bool = False) -> Tensor:
        return gaussian_velocity(x_t_BCFHW.transpose(1, 2), sigma, self.mean, self.covariance).transpose(1, 2)


def autoregressive(frames: int, memory: float) -> Tensor:
    """[F, F] covariance of x_f = memory x_(f-1) + sqrt(1 - memory^2) e_f, every x_f of variance 1."""
    steps = torch.arange(frames)
    return torch.tensor(memory) ** (steps[:, None] - steps[None]).abs()


@dataclass
class Asked:
    """One call of a causal denoiser."""

    kind: str  # "velocity" or "commit"
    start: int
    sigma: float
    x: Tensor
    seen: int  # frames in the cache
    with_grad: bool


class FrameSum(nn.Module):
    """A stub: velocity = weight (x + sigma + mean of the cached frames). Its cache is a tuple of finished blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.calls: list[Asked] = []

    def block_velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any,
                       start_frame: int) -> Tensor:  # fmt: skip
        past = cache or ()
        self._note("velocity", x_t_BCFHW, sigma, past, start_frame)
        context = torch.cat(past, dim=2).mean(2, keepdim=True) if past else torch.zeros(())
        return self.weight * (x_t_BCFHW + sigma[:, None, None, None, None] + context)

    def commit(self, x_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any, start_frame: int) -> Any:
        self._note("commit", x_BCFHW, sigma, cache or (), start_frame)
        return (*(cache or ()), x_BCFHW)

    def _note(self, kind: str, x: Tensor, sigma: Tensor, past: tuple[Tensor, ...], start: int) -> None:
        seen = sum(part.shape[2] for part in past)
        self.calls.append(Asked(kind, start, float(sigma[0]), x.detach(), seen, torch.is_grad_enabled()))


class AffineCausalStudent(nn.Module):
    """One rung: x0_f = scale_f x_f + sum over earlier frames of memory_fg x0_g + offset_f."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((frames,), 0.5))
        self.memory = nn.Parameter(torch.zeros(frames, frames))
        self.offset = nn.Parameter(torch.zeros(frames))

    def block_velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any,
                       start_frame: int) -> Tensor:  # fmt: skip
        assert x_t_BCFHW.shape[2] == 1, "written for blocks of one frame"
        x0 = self.scale[start_frame] * x_t_BCFHW + self.offset[start_frame]
        if cache:
            past = torch.cat(cache, dim=2)
            x0 = x0 + torch.einsum("f,bcfhw->bchw", self.memory[start_frame, : past.shape[2]], past)[:, :, None]
        return (x_t_BCFHW - x0) / sigma[:, None, None, None, None]

    def commit(self, x_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any, start_frame: int) -> Any:
        return (*(cache or ()), x_BCFHW)

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: bool = False) -> Tensor:
        raise AssertionError("self-forcing never runs the student over a whole clip")

    @torch.no_grad()
    def distribution(self) -> tuple[Tensor, Tensor]:
        """Mean [F] and covariance [F, F] of its clips from noise."""
        solved = torch.linalg.inv(torch.eye(len(self.scale)) - self.memory.tril(-1))
        mixing = solved * self.scale
        return solved @ self.offset, mixing @ mixing.T


@dataclass
class CausalOracleCritic:
    """What a critic trained to the end would say of an AffineCausalStudent: it judges the clip as a whole."""

    student: AffineCausalStudent

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: bool = False) -> Tensor:
        return JointGaussian(*self.student.distribution()).velocity(x_t_BCFHW, sigma, text)
