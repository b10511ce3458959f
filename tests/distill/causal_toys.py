"""Causal students and teachers over correlated frames whose every answer is known in closed form. One channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.flow import Routing, TextEmbedding

from .oracles import gaussian_velocity


@dataclass
class JointGaussian:
    """Exact velocity of frames that are jointly N(mean [F], covariance [F, F]), each pixel on its own."""

    mean: Tensor
    covariance: Tensor

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
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
    """At every rung x0_f = scale_f x_f + sum over earlier frames of memory_fg x0_g + offset_f, each rung its own."""

    def __init__(self, frames: int, ladder: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.ladder, rungs = torch.tensor(ladder), len(ladder)
        self.scale = nn.Parameter(torch.full((rungs, frames), 0.5))
        self.memory = nn.Parameter(torch.zeros(rungs, frames, frames))
        self.offset = nn.Parameter(torch.zeros(rungs, frames))

    def block_velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any,
                       start_frame: int) -> Tensor:  # fmt: skip
        assert x_t_BCFHW.shape[2] == 1, "written for blocks of one frame"
        rung = int((self.ladder - sigma[0]).abs().argmin())
        x0 = self.scale[rung, start_frame] * x_t_BCFHW + self.offset[rung, start_frame]
        if cache:
            past = torch.cat(cache, dim=2)
            weights = self.memory[rung, start_frame, : past.shape[2]]
            x0 = x0 + torch.einsum("f,bcfhw->bchw", weights, past)[:, :, None]
        return (x_t_BCFHW - x0) / sigma[:, None, None, None, None]

    def commit(self, x_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any, start_frame: int) -> Any:
        return (*(cache or ()), x_BCFHW)

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        raise AssertionError("self-forcing never runs the student over a whole clip")

    @torch.no_grad()
    def conditional(self, rung: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a block that leaves at `rung` ("sde"): memory [F, F] of earlier frames, variance [F], offset [F]."""
        memory, variance, offset = torch.zeros(self.memory.shape[1:]), torch.ones(()), torch.zeros(())
        for at in range(rung + 1):
            s = self.ladder[at]
            kept = self.scale[at] * (1 - s)  # of the x0 before; sigma 1 keeps nothing of it
            memory = self.memory[at].tril(-1) + kept[:, None] * memory
            variance = kept**2 * variance + (self.scale[at] * s) ** 2
            offset = self.offset[at] + kept * offset
        return memory, variance, offset

    @torch.no_grad()
    def distribution(self, rung: int = 0) -> tuple[Tensor, Tensor]:
        """Mean [F] and covariance [F, F] of its clips whose every block leaves at `rung`."""
        memory, variance, offset = self.conditional(rung)
        solved = torch.linalg.inv(torch.eye(len(memory)) - memory)
        return solved @ offset, solved * variance @ solved.T


@dataclass
class CausalOracleCritic:
    """What a critic trained to the end would say of an AffineCausalStudent: it judges the clip as a whole.

    Clips leave the ladder at every rung equally often, all blocks at the same one: a mixture of Gaussians.
    """

    student: AffineCausalStudent

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        velocities, densities = [], []
        for rung in range(len(self.student.ladder)):
            mean, covariance = self.student.distribution(rung)
            s = sigma[:, None, None]
            marginal = (1 - s) ** 2 * covariance + s**2 * torch.eye(len(mean))
            centred = x_t_BCFHW[:, 0, :, :, :].flatten(2) - (1 - s) * mean[:, None]
            exponent = (centred * torch.linalg.solve(marginal, centred)).sum((1, 2))
            densities.append(-0.5 * (exponent + centred.shape[2] * torch.logdet(marginal)))
            velocities.append(JointGaussian(mean, covariance).velocity(x_t_BCFHW, sigma, text))
        share = torch.stack(densities).softmax(0)[..., None, None, None, None]
        return (share * torch.stack(velocities)).sum(0)
