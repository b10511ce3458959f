"""Diffusion forcing: supervised flow matching with a noise level of its own for every block (arXiv 2407.01392).

A causal student sees each block beside earlier blocks that are as noisy as their own level says; so it learns to go on
from a past of any quality, from data, before it ever makes its own (a warm start for self-forcing).

Shapes: B batch, C channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner_dmd.distill.blocks import BlockPlan
from simpletuner_dmd.distill.losses import velocity_loss
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, OneRole
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import Batch, Denoiser, SigmaWindow, add_noise
from simpletuner_dmd.randomness import RandomStream


@dataclass(frozen=True)
class DiffusionForcingSettings:
    """What the method reads of `distillation_config`; window: where each block draws its sigma."""

    num_frame_per_block: int = 3
    independent_first_frame: bool = False
    window: SigmaWindow = SigmaWindow(0.0, 1.0)
    caption_dropout_probability: float = 0.0


class DiffusionForcing(OneRole):
    """The Method: one role, "student", moved every step by ||v - (e - x0)||^2 with sigma constant within a block."""

    needs_latents = True

    def __init__(self, student: Denoiser, settings: DiffusionForcingSettings, device: torch.device) -> None:
        self.student, self.settings, self.device = student, settings, device

    def draw_sigma(self, frames: int, stream: RandomStream) -> Tensor:
        """[B, F] fp32: independent per sample and block."""
        settings = self.settings
        plan = BlockPlan(frames, settings.num_frame_per_block, settings.independent_first_frame)
        blocks = range(len(plan.blocks))
        return plan.per_frame([settings.window.sigma(stream.uniform(f"sigma of block {block}")) for block in blocks])

    def losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        assert batch.latents_BCFHW is not None, "diffusion forcing needs latents"
        x0 = batch.latents_BCFHW.float()
        sigma_BF = self.draw_sigma(x0.shape[2], stream).to(self.device)
        noise = stream.normal(batch.latent_shape, "noise").to(self.device)
        text = with_dropped_captions(batch, stream, self.settings.caption_dropout_probability)
        velocity = self.student.velocity(add_noise(x0, noise, sigma_BF), sigma_BF, text)
        yield NamedLoss("loss", velocity_loss(velocity, x0, noise).mean())


def build(parts: Ingredients) -> DiffusionForcing:
    """The method from `distillation_config`; sigma follows the shift of the run's schedule."""
    options = parts.options
    settings = DiffusionForcingSettings(
        num_frame_per_block=options.num_frame_per_block,
        independent_first_frame=options.independent_first_frame,
        window=SigmaWindow(options.min_timestep_ratio, options.max_timestep_ratio, parts.schedule.shift),
        caption_dropout_probability=parts.caption_dropout_probability,
    )
    return DiffusionForcing(parts.student, settings, parts.device)
