"""Networks whose every answer is known in closed form, and the tiny students and critics that are trained against them.

Data N(m, S) gives x_s ~ N((1 - s) m, C_s) with C_s = (1 - s)^2 S + s^2 I, hence
    E[x0 | x_s] = m + (1 - s) S C_s^-1 (x_s - (1 - s) m),    E[e | x_s] = s C_s^-1 (x_s - (1 - s) m),
and the end of the probability-flow ODE, per direction of variance l, f*(x, s) = m + sqrt(l / C_s) (x - (1 - s) m).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simpletuner_dmd.flow import Batch, Denoiser, Routing, TextEmbedding
from simpletuner_dmd.randomness import RandomStream, generator

CPU = torch.device("cpu")


class FastStream(RandomStream):
    """A RandomStream that draws a whole batch at once: for toys of hundreds of samples and thousands of steps."""

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        return torch.randn(len(self.positions), *shape, generator=generator(self.seed, self.step, purpose))

    def uniform(self, purpose: str) -> Tensor:
        seeded = generator(self.seed, self.step, purpose)
        return torch.rand(len(self.positions), dtype=torch.float64, generator=seeded)


def text_of(value: float, count: int = 1) -> TextEmbedding:
    """An embedding that says one number."""
    return TextEmbedding(torch.full((count, 2, 3), value))


def number_said(text: TextEmbedding) -> Tensor:
    """[B]"""
    return text.rows_BLD[:, 0, 0]


def make_batch(count: int, shape: tuple[int, int, int, int], latents: Tensor | None = None) -> Batch:
    """Prompts say 1, the negative prompt says 0."""
    return Batch(tuple(range(count)), text_of(1.0, count), text_of(0.0), shape, latents)


@dataclass
class Call:
    """What a denoiser was asked, and whether a graph was being recorded."""

    sigma: Tensor
    said: Tensor
    x_t: Tensor
    with_grad: bool
    routed: bool


@dataclass
class Spy:
    """Passes a call on to a denoiser and keeps note of it."""

    inner: Denoiser
    calls: list[Call] = field(default_factory=list)

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        said = number_said(text)
        self.calls.append(Call(sigma, said, x_t_BCFHW.detach(), torch.is_grad_enabled(), routed is not None))
        return self.inner.velocity(x_t_BCFHW, sigma, text, routed=routed)


def gaussian_velocity(x_t: Tensor, sigma_B: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """The exact velocity of N(mean, covariance) over channels: mean [C] or [B, C], covariance [C, C]."""
    s = sigma_B.double()[:, None, None]
    covariance, identity = covariance.double(), torch.eye(len(covariance), dtype=torch.float64)
    marginal = (1 - s) ** 2 * covariance + s**2 * identity
    gain = (s * identity - (1 - s) * covariance) @ torch.linalg.inv(marginal)
    mean_BC = mean.double().expand(len(x_t), -1)
    mean_BCFHW = mean_BC[:, :, None, None, None]
    centred = x_t.double() - (1 - s[..., None, None]) * mean_BCFHW
    return (torch.einsum("bij,bjfhw->bifhw", gain, centred) - mean_BCFHW).to(x_t.dtype)


@dataclass
class GaussianTeacher:
    """Exact velocity of N(m, S), the same at every position; m moves with the number the text says, S does not."""

    mean_prompt: Tensor
    covariance: Tensor
    mean_negative: Tensor | None = None

    def mean_of(self, text: TextEmbedding) -> Tensor:
        negative = self.mean_prompt if self.mean_negative is None else self.mean_negative
        return negative + number_said(text)[:, None] * (self.mean_prompt - negative)

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        return gaussian_velocity(x_t_BCFHW, sigma, self.mean_of(text), self.covariance)


class AffineStudent(nn.Module):
    """x0 = A x + b with its own A, b at every rung: the best student of a Gaussian is among these."""

    def __init__(self, ladder: Sequence[float], channels: int, scale: float = 0.5) -> None:
        super().__init__()
        self.ladder = torch.tensor(ladder)
        self.matrix = nn.Parameter(scale * torch.eye(channels).repeat(len(ladder), 1, 1))
        self.offset = nn.Parameter(torch.zeros(len(ladder), channels))

    def rung_of(self, sigma: Tensor) -> int:
        distance = (self.ladder - sigma[0]).abs()
        assert float(distance.min()) < 1e-6, f"sigma {float(sigma[0])} is not on the ladder"
        return int(distance.argmin())

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        rung = self.rung_of(sigma)
        x0 = torch.einsum("ij,bjfhw->bifhw", self.matrix[rung], x_t_BCFHW) + self.offset[rung, :, None, None, None]
        return (x_t_BCFHW - x0) / sigma[:, None, None, None, None]


@dataclass
class OracleCritic:
    """What a critic trained to the end would say of a one-rung AffineStudent: the velocity of N(b, A A^T)."""

    student: AffineStudent

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        matrix, offset = self.student.matrix[0].detach(), self.student.offset[0].detach()
        return gaussian_velocity(x_t_BCFHW, sigma, offset, matrix @ matrix.T)


class AffineCritic(nn.Module):
    """v = a(s) x + b(s) per channel, a and b linear between `knots` noise levels: learned, not told."""

    def __init__(self, channels: int, knots: int = 8) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(knots, channels))
        self.offset = nn.Parameter(torch.zeros(knots, channels))

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        place = sigma * (len(self.gain) - 1)
        below = place.long().clamp(max=len(self.gain) - 2)
        share = (place - below)[:, None]
        gain = torch.lerp(self.gain[below], self.gain[below + 1], share)
        offset = torch.lerp(self.offset[below], self.offset[below + 1], share)
        return gain[:, :, None, None, None] * x_t_BCFHW + offset[:, :, None, None, None]


@dataclass
class Mixture:
    """Exact velocity of a one-dimensional mixture of Gaussians, applied to every element on its own."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        x, s = x_t_BCFHW[..., None], sigma[:, None, None, None, None, None]
        marginal = (1 - s) ** 2 * self.variances + s**2
        centred = x - (1 - s) * self.means
        share = torch.softmax(self.weights.log() - 0.5 * marginal.log() - centred**2 / (2 * marginal), dim=-1)
        velocity = (s - (1 - s) * self.variances) / marginal * centred - self.means
        return (share * velocity).sum(-1)


class Particles(nn.Module):
    """A one-step student that is nothing but its samples, [B, C, F, H, W]."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.samples = nn.Parameter(samples)

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        return x_t_BCFHW - self.samples
