"""Where on the noise scale a loss looks: the distributions from which sigma is drawn, and the shift that warps them.

Every draw is a function of (seed, step, position): one uniform or normal number per sample, turned into a noise level
by a formula, so that nothing depends on how often a sampler was called before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from simpletuner_dmd.flow import ALL_NOISE, NoiseRange, shifted, unshifted
from simpletuner_dmd.randomness import RandomStream


class Draw(Protocol):
    """A distribution on [0, 1]."""

    takes_shift: bool

    def levels(self, stream: RandomStream, purpose: str) -> Tensor:
        """[B] fp64 on the CPU, one number per sample."""
        ...

    def between(self, stream: RandomStream, purpose: str, low: float, high: float) -> Tensor:
        """As `levels`, given that the number lies in [low, high). Raises ValueError where none can."""
        ...


@dataclass(frozen=True)
class LogitNormal:
    """logit(u) ~ N(mean, scale^2) (Stable Diffusion 3, arXiv 2403.03206, section 3.1).

    On the scale s / (1 - s) of noise over signal this is the log-normal draw of EDM, with the same mean and scale.
    """

    mean: float = 0.0
    scale: float = 1.0
    takes_shift = True

    def levels(self, stream: RandomStream, purpose: str) -> Tensor:
        return torch.sigmoid(self.mean + self.scale * stream.normal((), purpose).double())

    def between(self, stream: RandomStream, purpose: str, low: float, high: float) -> Tensor:
        ends = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64).logit() - self.mean) / self.scale)
        share = torch.lerp(ends[0], ends[1], stream.uniform(purpose))
        return torch.sigmoid(self.mean + self.scale * torch.special.ndtri(share)).clamp(low, high)


@dataclass(frozen=True)
class Uniform:
    """u ~ U[0, 1)."""

    takes_shift = True

    def levels(self, stream: RandomStream, purpose: str) -> Tensor:
        return stream.uniform(purpose)

    def between(self, stream: RandomStream, purpose: str, low: float, high: float) -> Tensor:
        return low + (high - low) * stream.uniform(purpose)


@dataclass(frozen=True)
class Beta:
    """u ~ Beta(alpha, beta), by the inverse of its distribution function.

    t = logit(u) has the density sigmoid(t)^alpha sigmoid(-t)^beta up to a constant: smooth, without the poles that
    Beta has at 0 and 1 for parameters below 1, and with exponential tails. Its integral is tabulated once and inverted
    by linear interpolation; the error is below 1e-4 in u.
    """

    alpha: float = 2.0
    beta: float = 2.0
    takes_shift = True

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """t on a grid, and the probability below each."""
        # Tails fall as exp(-alpha |t|) and exp(-beta |t|), the bulk is about sqrt(1/alpha + 1/beta) wide.
        middle = math.log(self.alpha / self.beta)
        reach = 37 / min(self.alpha, self.beta) + 10 * math.sqrt(1 / self.alpha + 1 / self.beta)
        t = middle + torch.linspace(-reach, reach, 1 << 15, dtype=torch.float64)
        log_density = self.alpha * torch.nn.functional.logsigmoid(t) + self.beta * torch.nn.functional.logsigmoid(-t)
        below = torch.cumulative_trapezoid(torch.exp(log_density - log_density.max()), t)
        return t, torch.cat([torch.zeros(1, dtype=torch.float64), below / below[-1]])

    def levels(self, stream: RandomStream, purpose: str) -> Tensor:
        return self.quantile(stream.uniform(purpose))

    def between(self, stream: RandomStream, purpose: str, low: float, high: float) -> Tensor:
        t, below = self._table
        ends = torch.tensor([low, high], dtype=torch.float64).logit().clamp(float(t[0]), float(t[-1]))
        right = torch.searchsorted(t, ends).clamp(1, len(t) - 1)
        share = (ends - t[right - 1]) / (t[right] - t[right - 1])
        first, last = torch.lerp(below[right - 1], below[right], share)
        return self.quantile(torch.lerp(first, last, stream.uniform(purpose))).clamp(low, high)

    def quantile(self, u: Tensor) -> Tensor:
        """The level below which a share u lies; fp64."""
        t, below = self._table
        right = torch.searchsorted(below, u, right=True).clamp(1, len(t) - 1)
        share = (u - below[right - 1]) / (below[right] - below[right - 1])
        return torch.sigmoid(torch.lerp(t[right - 1], t[right], share))


@dataclass(frozen=True)
class Listed:
    """One of the given sigmas, each as likely as the others; they are meant literally, so no shift acts on them."""

    sigmas: tuple[float, ...]
    takes_shift = False

    def levels(self, stream: RandomStream, purpose: str) -> Tensor:
        place = (stream.uniform(purpose) * len(self.sigmas)).long()  # a uniform below 1 never reaches the length
        return torch.tensor(self.sigmas, dtype=torch.float64)[place]

    def between(self, stream: RandomStream, purpose: str, low: float, high: float) -> Tensor:
        known = NoiseRange(low, high)
        chosen = tuple(sigma for sigma in self.sigmas if sigma in known)
        if not chosen:
            raise ValueError(f"none of the listed timesteps is between {1000 * low:g} and {1000 * high:g}")
        return Listed(chosen).levels(stream, purpose)


# The linear rule of FLUX.1 between two image sizes (black-forest-labs/flux, `get_lin_function`; diffusers,
# `calculate_shift`): mu is 0.5 at 256 tokens and 1.15 at 4096, and the shift is exp(mu).
FEW_TOKENS, MANY_TOKENS = 256, 4096
FEW_MU, MANY_MU = 0.5, 1.15
TOKEN_SIDE = 2  # latent cells along one side of a token


def automatic_shift(latent_shape: Sequence[int]) -> float:
    """The shift for a latent of (C, F, H, W): exp(mu), mu linear in the tokens of *one frame*.

    The rule was made for images. Counted over all frames of a clip it would be far outside the sizes it was fitted on:
    81 frames of 832x480 are 32760 tokens, which gives 403, practically noise alone; one of their frames gives 2.06.
    """
    tokens = (latent_shape[-2] // TOKEN_SIDE) * (latent_shape[-1] // TOKEN_SIDE)
    return math.exp(FEW_MU + (MANY_MU - FEW_MU) * (tokens - FEW_TOKENS) / (MANY_TOKENS - FEW_TOKENS))


@dataclass(frozen=True)
class NoiseLevels:
    """A draw and its warp by k u / (1 + (k - 1) u). shift: k; None is no warp. automatic: k follows the size instead.
    known: only sigmas of this range are drawn, as often relative to each other as without it.

    Raises ValueError where both shifts are asked for.
    """

    draw: Draw = LogitNormal()
    shift: float | None = None
    automatic: bool = False
    known: NoiseRange = ALL_NOISE

    def __post_init__(self) -> None:
        if self.automatic and self.shift is not None:
            raise ValueError("a fixed shift and one that follows the size exclude each other")

    def sigma(self, stream: RandomStream, latent_shape: Sequence[int], purpose: str = "sigma") -> Tensor:
        """[B] fp32 on the CPU, computed in fp64."""
        shift = automatic_shift(latent_shape) if self.automatic else self.shift
        if shift is None or not self.draw.takes_shift:
            shift = 1.0
        if self.known == ALL_NOISE:
            u = self.draw.levels(stream, purpose)
        else:
            low, high = unshifted(self.known.low, shift), unshifted(self.known.high, shift)
            u = self.draw.between(stream, purpose, low, high)
        sigma = u if shift == 1.0 else shifted(u, shift)
        assert isinstance(sigma, Tensor)
        return sigma.float()
