"""Phased consistency models: jumps to the end of the own phase, walked without noise in between (arXiv 2405.18407)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from simpletuner_dmd.distill.feature_adversary import FeatureAdversary, build_adversary
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, Stateless, Turn
from simpletuner_dmd.distill.phases import (
    Consistency,
    ConsistencyPair,
    ConsistencySettings,
    consistency_settings,
    pair_metrics,
    phase_grid,
    target_network,
)
from simpletuner_dmd.flow import Batch, Denoiser
from simpletuner_dmd.randomness import RandomStream


class PCM(Stateless):
    """The Method. Roles: "student", and "discriminator" where there is an adversarial term."""

    needs_latents = True

    def __init__(self, teacher: Denoiser, student: Denoiser, target: Denoiser, settings: ConsistencySettings,
                 device: torch.device, adversary: FeatureAdversary | None = None) -> None:  # fmt: skip
        self.student, self.target, self.adversary = student, target, adversary
        self.consistency = Consistency(teacher, settings, device)
        self._shared: dict[tuple[int, ...], ConsistencyPair] = {}

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("student", self.student_losses)
        if self.adversary is not None:
            yield Turn("discriminator", self.discriminator_losses)

    def updates(self, role: str, steps: int) -> int:
        return steps

    def end_step(self) -> None:
        self._shared.clear()

    def student_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        pair = self.consistency.pair(self.student, self.target, batch, stream)
        loss, metrics = self.consistency.loss(pair), pair_metrics(pair)
        if self.adversary is None:
            yield NamedLoss("consistency_loss", loss, metrics)
            return
        self._shared[batch.positions] = pair.detached()
        term = self.adversary.student_term(pair, stream)
        yield NamedLoss("consistency_loss", loss + term.value, metrics | term.metrics, reported=float(loss.detach()))

    def discriminator_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        assert self.adversary is not None
        term = self.adversary.heads_term(self._shared[batch.positions], stream)
        yield NamedLoss("discriminator_loss", term.value, term.metrics)


def build(parts: Ingredients) -> PCM:
    """The method from `distillation_config`: the upper edges of its phases are the student's ladder."""
    grid = phase_grid(parts.options.num_ddim_timesteps, parts.schedule.shift, parts.schedule.ladder[1:])
    settings = consistency_settings(parts, grid)
    adversary = build_adversary(parts, grid)
    return PCM(parts.teacher, parts.student, target_network(parts), settings, parts.device, adversary)
