"""Latent consistency models for a flow: one jump from any noise level to the clean sample (arXiv 2310.04378).

f(x, s) = x - s G(x, s): a consistency function on the velocity output itself, identity at s = 0 by construction. The
diffusion form's c_skip and c_out are of no use here. The student is sampled by jumping to clean and adding fresh noise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from simpletuner_dmd.distill.method import Ingredients, NamedLoss, OneRole
from simpletuner_dmd.distill.phases import (
    Consistency,
    ConsistencySettings,
    consistency_settings,
    pair_metrics,
    phase_grid,
    target_network,
)
from simpletuner_dmd.flow import Batch, Denoiser
from simpletuner_dmd.randomness import RandomStream


class LCM(OneRole):
    """The Method: one role, "student", moved every step."""

    needs_latents = True

    def __init__(self, teacher: Denoiser, student: Denoiser, target: Denoiser, settings: ConsistencySettings,
                 device: torch.device) -> None:  # fmt: skip
        self.student, self.target = student, target
        self.consistency = Consistency(teacher, settings, device)

    def losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        pair = self.consistency.pair(self.student, self.target, batch, stream)
        yield NamedLoss("consistency_loss", self.consistency.loss(pair), pair_metrics(pair))


def build(parts: Ingredients) -> LCM:
    """The method from `distillation_config`, on a grid with the student's own shift."""
    options = parts.options
    sampled = options.guidance_min is not None
    settings = consistency_settings(
        parts,
        phase_grid(options.num_ddim_timesteps, parts.schedule.shift),
        guidance_range=(options.guidance_min, options.guidance_max) if sampled else None,
    )
    return LCM(parts.teacher, parts.student, target_network(parts), settings, parts.device)
