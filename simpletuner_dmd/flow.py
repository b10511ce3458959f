"""Flow-matching arithmetic, and the few words in which algorithms and models speak to each other.

    x_s = (1 - s) x0 + s e        s in [0, 1] is sigma, e ~ N(0, I); s = 1 is pure noise
    v   = e - x0                  what Wan predicts; dx/ds = v, so sampling integrates s from 1 to 0
    t   = 1000 s                  the number the network receives: a float, never rounded, never looked up

Sigmas are Python floats or fp32 tensors made by formula. In bf16 only 39 of the 50 values of a shift-17 grid
are distinct, so nothing here ever computes a sigma in half precision.

Shapes: B batch, C channels, F latent frames, H W latent height and width, L text rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

TIMESTEPS = 1000.0


@dataclass(frozen=True)
class TextEmbedding:
    """Prompt embeddings as the transformer takes them.

    rows_BLD: [B, L, D], real rows first, then zeros up to the L of the run (Wan has no text mask).
    """

    rows_BLD: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbedding:
        return TextEmbedding(self.rows_BLD.to(device=device, dtype=dtype))

    def expand(self, count: int) -> TextEmbedding:
        """One prompt for `count` samples; a batch of that size already is returned as it is."""
        if self.rows_BLD.shape[0] == count:
            return self
        assert self.rows_BLD.shape[0] == 1, "only a single prompt can be spread over a batch"
        return TextEmbedding(self.rows_BLD.expand(count, -1, -1))

    def __len__(self) -> int:
        return int(self.rows_BLD.shape[0])


@dataclass
class Batch:
    """One micro-batch of one process.

    positions: index of each sample in the step's global batch; with (seed, step) they seed every draw.
    latents_BCFHW: normalised VAE latents, or None for a prompts-only data set.
    latent_shape: (C, F, H, W) that a rollout takes.
    """

    positions: tuple[int, ...]
    text: TextEmbedding
    negative_text: TextEmbedding
    latent_shape: tuple[int, int, int, int]
    latents_BCFHW: Tensor | None = None
    captions: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            positions=self.positions,
            text=self.text.to(device),
            negative_text=self.negative_text.to(device),
            latent_shape=self.latent_shape,
            latents_BCFHW=None if self.latents_BCFHW is None else self.latents_BCFHW.to(device),
            captions=self.captions,
        )


class SampleDraws(Protocol):
    """Random numbers private to each sample, a pure function of (seed, step, sample, purpose): a RandomStream."""

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal, [B, *shape] on the CPU."""
        ...


@dataclass(frozen=True)
class Routing:
    """Asks for TREAD in one pass: blocks on a route see a random part of the tokens (training losses only).

    purpose: names the pass, so that two passes of one step draw apart and a repeated step draws the same.
    """

    draws: SampleDraws
    purpose: str


class Denoiser(Protocol):
    """A network seen as a velocity field. `routed`: TREAD for this pass, where the network has routes."""

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        """sigma: [B], or [B, F] for a causal or diffusion-forcing denoiser. Returns e - x0, shaped like x_t."""
        ...


@dataclass(frozen=True)
class Experts:
    """Two networks as one Denoiser: `high` at sigma >= boundary, `low` below. One call takes one noise level."""

    high: Denoiser
    low: Denoiser
    boundary: float

    def at(self, sigma: float) -> Denoiser:
        return self.high if sigma >= self.boundary else self.low

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        first = float(sigma.flatten()[0])
        assert bool((sigma == first).all()), "a sampler walks all samples together"
        return self.at(first).velocity(x_t_BCFHW, sigma, text)


@dataclass(frozen=True)
class NoiseRange:
    """The noise levels that a network knows: all of them, or one expert's side of the boundary between two.

    A level at the boundary is the high-noise expert's, so `high` belongs to the range only where it is 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        assert 0.0 <= self.low < self.high <= 1.0, f"no range of noise levels: {self.low} to {self.high}"

    def __contains__(self, sigma: float) -> bool:
        return self.low <= sigma and (sigma < self.high or self.high == 1.0)

    def rungs(self, ladder: Sequence[float]) -> range:
        """The places of the ladder's own rungs; a ladder decreases, so they stand together."""
        places = [place for place, sigma in enumerate(ladder) if sigma in self]
        return range(places[0], places[-1] + 1) if places else range(0)


ALL_NOISE = NoiseRange()


# --- conversions (algorithms 0.2) ----------------------------------------------------------------------------------


def spread(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma [B] or [B, F] in a shape that broadcasts against `like` [B, C, F, H, W] (or [B, ...] for [B])."""
    if sigma.ndim == 2:
        assert like.ndim == 5, "per-frame sigmas need [B, C, F, H, W]"
        return sigma[:, None, :, None, None]
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_s = (1 - s) x0 + s e, in the dtype of x0 (fp32 in this tool). sigma [B] or [B, F]."""
    s = spread(sigma, x0)
    return (1 - s) * x0 + s * noise


def x0_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_s - s v, in fp32 at least: the subtraction of near-equal numbers is where bf16 loses the signal."""
    wide = torch.promote_types(x_t.dtype, torch.float32)
    return x_t.to(wide) - spread(sigma, x_t).to(wide) * velocity.to(wide)


def noise_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """e = x_s + (1 - s) v."""
    wide = torch.promote_types(x_t.dtype, torch.float32)
    return x_t.to(wide) + (1 - spread(sigma, x_t).to(wide)) * velocity.to(wide)


def velocity_from_x0(x_t: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """v = (x_s - x0) / s, for s > 0."""
    return (x_t - x0) / spread(sigma, x_t)


def score_from_velocity(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of the log density of x_s: -(x_s + (1 - s) v) / s, for s > 0."""
    return -noise_from_velocity(x_t, velocity, sigma) / spread(sigma, x_t)


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in its standard meaning, v_u + g (v_c - v_u); 1 is off."""
    return unconditional + scale * (conditional - unconditional)


def guidance_is_off(scale: float) -> bool:
    """1 is off by the formula; 0 is accepted as off because users write it for "none"."""
    return scale in (0.0, 1.0)


def guided_velocity(
    denoiser: Denoiser, x_t: Tensor, sigma: Tensor, text: TextEmbedding, negative: TextEmbedding, scale: float
) -> Tensor:
    """The guided velocity in fp32: two forwards, or one where guidance is off."""
    conditional = denoiser.velocity(x_t, sigma, text).float()
    if guidance_is_off(scale):
        return conditional
    unconditional = denoiser.velocity(x_t, sigma, negative.expand(len(x_t))).float()
    return guided(unconditional, conditional, scale)


# --- noise levels ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The one source of noise levels for training, validation and export.

    shift k: sigma(u) = k u / (1 + (k - 1) u), u uniform. ladder: the student's sigmas, strictly decreasing,
    first in (0.99, 1]; the sampler ends at sigma 0 after the last.
    """

    shift: float = 1.0
    ladder: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, not {self.shift}")
        if self.ladder:
            check_ladder(self.ladder)

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(TIMESTEPS * sigma for sigma in self.ladder)

    def next_sigma(self, rung: int) -> float:
        """The sigma that follows rung `rung` (0-based); 0 after the last."""
        return self.ladder[rung + 1] if rung + 1 < len(self.ladder) else 0.0


def shifted(u: float | Tensor, shift: float) -> float | Tensor:
    """sigma(u) = k u / (1 + (k - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: float, shift: float) -> float:
    """The inverse: u(s) = s / (k - (k - 1) s)."""
    return sigma / (shift - (shift - 1) * sigma)


def check_ladder(ladder: Sequence[float]) -> None:
    """Raises ValueError unless the sigmas can be walked by a few-step sampler."""
    if any(later >= earlier for earlier, later in zip(ladder, ladder[1:], strict=False)):
        raise ValueError(f"the steps must decrease strictly, not {', '.join(f'{TIMESTEPS * s:g}' for s in ladder)}")
    if not 0.99 < ladder[0] <= 1.0:
        raise ValueError(f"the first step must be in (990, 1000] because sampling starts from pure noise, "
                         f"not {TIMESTEPS * ladder[0]:g}")  # fmt: skip
    if ladder[-1] <= 0:
        raise ValueError(f"the last step must be above 0, not {TIMESTEPS * ladder[-1]:g}")


def uniform_ladder(steps: int, shift: float) -> tuple[float, ...]:
    """(n - k) / n for k = 0..n-1, warped by the shift: the usual ladder of a few-step Wan student."""
    return tuple(float(shifted((steps - k) / steps, shift)) for k in range(steps))


@dataclass(frozen=True)
class SigmaWindow:
    """A shifted-uniform draw of sigma, truncated to [low, high].

    u is uniform between the inverse-shifted bounds, so no draw is clamped: clamping after a shift of 5 would put
    9% of all draws on the upper bound (algorithms 1.8).
    """

    low: float
    high: float
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"the noise window must satisfy 0 <= low < high <= 1, not [{self.low}, {self.high}]")

    def sigma(self, uniform_B: Tensor) -> Tensor:
        """uniform_B in [0, 1) to sigma in [low, high), fp32."""
        low, high = unshifted(self.low, self.shift), unshifted(self.high, self.shift)
        # The formula is evaluated in double: near 1 a single-precision rounding could leave the window.
        sigma = shifted(low + (high - low) * uniform_B.double(), self.shift)
        assert isinstance(sigma, Tensor)
        return sigma.clamp(self.low, self.high).float()


# --- samplers -------------------------------------------------------------------------------------------------------

NoiseSource = Callable[[int, Tensor], Tensor]
"""(index of the rung that is about to be entered, a tensor to imitate) -> fresh standard normal noise."""


def few_step_transition(x_t: Tensor, x0: Tensor, velocity: Tensor, sigma: float, to: float,
                        renoise: str, noise: Callable[[], Tensor]) -> Tensor:  # fmt: skip
    """One rung of the student's sampler: from x_t at `sigma` to the next rung `to`.

    "sde": (1 - s') x0 + s' e with fresh e (consistency sampling); "ode": x_t + (s' - s) v (Euler).
    At s' = 0 both are x0.
    """
    if to == 0.0:
        return x0
    if renoise == "sde":
        return (1 - to) * x0 + to * noise()
    return x_t.float() + (to - sigma) * velocity.float()


def sample_few_step(
    denoiser: Denoiser,
    noise_BCFHW: Tensor,
    text: TextEmbedding,
    schedule: Schedule,
    renoise: str,
    fresh_noise: NoiseSource,
    stop_at: int | None = None,
    start_at: int = 0,
) -> Tensor:
    """Walks the ladder from pure noise; returns x0, or with `stop_at` the x_t that enters that rung (0-based).

    start_at: a later rung, which the given x_t (in place of pure noise) has just entered. The same function makes the
    training rollout, the validation videos and the exported sampler's reference.
    """
    x = noise_BCFHW
    for rung, sigma in enumerate(schedule.ladder):
        if rung < start_at:
            continue
        if stop_at == rung:
            return x
        sigma_B = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        velocity = denoiser.velocity(x, sigma_B, text)
        x0 = x0_from_velocity(x, velocity, sigma_B)
        noise = partial(fresh_noise, rung + 1, x0)
        x = few_step_transition(x, x0, velocity, sigma, schedule.next_sigma(rung), renoise, noise)
    return x


def euler_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Sigmas of a plain Euler solver: uniform in u, warped, from 1; the end point 0 is implied."""
    return uniform_ladder(steps, shift)


def sample_euler(
    denoiser: Denoiser,
    noise_BCFHW: Tensor,
    text: TextEmbedding,
    negative: TextEmbedding,
    sigmas: Sequence[float],
    guidance: float,
    end: float = 0.0,
) -> Tensor:
    """Euler solution of dx/ds = v from the first of `sigmas` to `end` with standard guidance: the teacher's sampler."""
    x = noise_BCFHW.float()
    for sigma, to in zip(sigmas, (*sigmas[1:], end), strict=True):
        sigma_B = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        x = x + (to - sigma) * guided_velocity(denoiser, x, sigma_B, text, negative, guidance)
    return x
