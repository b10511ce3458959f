"""Sampling with diffusers' own solvers, and what guidance may add to a plain guided velocity.

A student without a ladder is judged as its users will sample it: by the scheduler of a stock pipeline, called as the
pipeline calls it, on the same timesteps.

Shapes: B batch, C channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from simpletuner_dmd.distill.noise_levels import Beta
from simpletuner_dmd.flow import TIMESTEPS, Denoiser, TextEmbedding, euler_sigmas, guidance_is_off, guided

BETA = Beta(0.6, 0.6)  # of "Beta Sampling is All You Need" (arXiv 2407.12173), diffusers' and ComfyUI's defaults


class SkipsBlocks(Protocol):
    """A denoiser that can leave out some of its blocks in one pass."""

    def velocity_without(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]
    ) -> Tensor: ...


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: v + scale (v_c - v_s), v_s the conditional velocity without `blocks`.

    As in Stable Diffusion 3.5's pipeline: it acts at the steps k with start < k / n < stop, n steps in all.
    """

    blocks: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def acts(self, step: int, steps: int) -> bool:
        # The first step of a window that starts at 0 belongs to it: "0.0 to 1.0" means all of them.
        return (step > self.start * steps or self.start == 0 == step) and step < self.stop * steps


@dataclass(frozen=True)
class Guidance:
    """What a solver asks of the network at each step.

    scale: classifier-free guidance, 1 is off. rescale: takes the guided velocity towards the spread of the conditional
    one (arXiv 2305.08891, eq. 15 and 16).
    """

    scale: float = 1.0
    rescale: float = 0.0
    skip: SkipLayers | None = None

    def velocity(
        self, denoiser: Denoiser, x: Tensor, sigma_B: Tensor, text: TextEmbedding, negative: TextEmbedding,
        step: int, steps: int,
    ) -> Tensor:  # fmt: skip
        conditional = denoiser.velocity(x, sigma_B, text).float()
        result = conditional
        if not guidance_is_off(self.scale):
            result = guided(denoiser.velocity(x, sigma_B, negative.expand(len(x))).float(), conditional, self.scale)
        if self.skip is not None and self.skip.acts(step, steps):
            weaker = cast(SkipsBlocks, denoiser).velocity_without(x, sigma_B, text, self.skip.blocks)
            result = result + self.skip.scale * (conditional - weaker.float())
        if self.rescale and result is not conditional:
            result = rescale_noise_cfg(result, conditional, self.rescale)
        return result


def scheduler_of(solver: str, steps: int, shift: float) -> Any:
    """A stock scheduler with its timesteps set. solver: "unipc", "euler" or "euler-beta"."""
    if solver == "unipc":
        scheduler: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        scheduler.set_timesteps(steps)
        return scheduler
    # Shifted already: the scheduler's own default grid is not that of any Wan recipe, and would shift twice.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sigmas = euler_sigmas(steps, shift)
    scheduler.set_timesteps(sigmas=list(beta_sigmas(sigmas) if solver == "euler-beta" else sigmas))
    return scheduler


def beta_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """As many sigmas between the same ends, at the quantiles of Beta(.6, .6): denser at both. As diffusers'
    `use_beta_sigmas`, which needs scipy for the quantiles."""
    shares = torch.linspace(1, 0, len(sigmas), dtype=torch.float64)
    places = BETA.quantile(shares)
    places[0], places[-1] = 1.0, 0.0 if len(sigmas) > 1 else 1.0
    return tuple((sigmas[-1] + places * (sigmas[0] - sigmas[-1])).tolist())


def solve(scheduler: Any, first: Tensor, velocity: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """From noise to x0. velocity: (x, sigma [B], number of the step) -> v. fp32."""
    x = first.float()
    for number, timestep in enumerate(scheduler.timesteps):
        sigma_B = (timestep.float() / TIMESTEPS).to(x.device).expand(len(x))
        (x,) = scheduler.step(velocity(x, sigma_B, number), timestep, x, return_dict=False)
    return x
