"""Dual-expert consistency: one expert for layout and motion at high noise, one for detail below (arXiv 2506.03123).

The two never meet in a loss. Each learns on data latents, against the teacher's step and its own jump, within its own
part of the trajectory; what it converges to is the teacher's solver on that part, wherever it started. So the detail
expert starts at the teacher (an adapter at zero), not at the trained semantic expert as in the paper, whose weights say
nothing about noise levels they were never trained on; and in one run the two may take turns in any order. Its adapter
reaches layers that the semantic expert's does not, so there would be nothing to copy weights into either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simpletuner_dmd.distill.feature_adversary import FeatureAdversary, build_adversary
from simpletuner_dmd.distill.losses import per_sample_mean
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, Stateless, Turn
from simpletuner_dmd.distill.phases import (
    Consistency,
    ConsistencyPair,
    ConsistencySettings,
    consistency_settings,
    pair_metrics,
    phase_grid,
)
from simpletuner_dmd.flow import Batch, Denoiser
from simpletuner_dmd.randomness import RandomStream


def temporal_coherence(prediction_BCFHW: Tensor, target_BCFHW: Tensor, lag: int) -> Tensor:
    """[B]: mean ||(p_(f+lag) - p_f) - (t_(f+lag) - t_f)||^2 over latent frames f, in fp32.

    Blind to an error that stays the same over time; an independent error of variance q counts 2 q. A clip that has no
    two frames so far apart says nothing: 0.
    """
    residual = prediction_BCFHW.float() - target_BCFHW.float()
    if residual.shape[2] <= lag:
        return residual.new_zeros(len(residual))
    return per_sample_mean((residual[:, :, lag:] - residual[:, :, :-lag]).pow(2))


@dataclass(frozen=True)
class DCMSettings:
    """What the algorithm reads of `distillation_config` (documentation: the keys of the same names).

    split: index of the grid point at which the semantic expert's part ends and the detail expert's begins.
    """

    consistency: ConsistencySettings
    split: int
    mode: str = "both"
    semantic_fraction: float = 0.5
    temporal_coherence_weight: float = 1.0
    temporal_coherence_lag: int = 3


class DCM(Stateless):
    """The Method. Roles: "student" (the semantic expert), "detail", and "discriminator" where there is an adversary."""

    needs_latents = True

    def __init__(self, teacher: Denoiser, semantic: Denoiser, detail: Denoiser, settings: DCMSettings,
                 device: torch.device, adversary: FeatureAdversary | None = None) -> None:  # fmt: skip
        self.semantic, self.detail, self.adversary, self.settings = semantic, detail, adversary, settings
        # The shift cuts the semantic expert's part finely (steps of .002 at 17), where one solver step is near enough.
        self.consistency = Consistency(teacher, replace(settings.consistency, teacher_substeps=1), device)
        self.detail_consistency = Consistency(teacher, settings.consistency, device)
        self._shared: dict[tuple[int, ...], ConsistencyPair] = {}

    # --- the plan of a step ---------------------------------------------------------------------------------------

    def semantic_updates(self, steps: int) -> int:
        """How many of the first `steps` steps are the semantic expert's: spread evenly, so that a run may be lengthened
        and both experts have had their share whenever one looks."""
        share = {"semantic": 1.0, "detail": 0.0}.get(self.settings.mode, self.settings.semantic_fraction)
        return math.floor(steps * share)

    def is_semantic_step(self, step: int) -> bool:
        return self.semantic_updates(step + 1) > self.semantic_updates(step)

    def turns(self, step: int) -> Iterator[Turn]:
        if self.is_semantic_step(step):
            yield Turn("student", self.semantic_losses)
            return
        yield Turn("detail", self.detail_losses)
        if self.adversary is not None:
            yield Turn("discriminator", self.discriminator_losses)

    def updates(self, role: str, steps: int) -> int:
        semantic = self.semantic_updates(steps)
        return semantic if role == "student" else steps - semantic

    def end_step(self) -> None:
        self._shared.clear()

    # --- losses -----------------------------------------------------------------------------------------------------

    def semantic_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        settings, expert = self.settings, self.semantic
        pair = self.consistency.pair(expert, expert, batch, stream, first=settings.split + 1)
        coherence_B = temporal_coherence(pair.prediction, pair.target, settings.temporal_coherence_lag)
        loss = self.consistency.loss(pair, settings.temporal_coherence_weight * coherence_B)
        metrics = pair_metrics(pair) | {"temporal_coherence": float(coherence_B.detach().mean())}
        yield NamedLoss("semantic_loss", loss, metrics)

    def detail_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        expert = self.detail
        pair = self.detail_consistency.pair(expert, expert, batch, stream, last=self.settings.split)
        loss, metrics = self.detail_consistency.loss(pair), pair_metrics(pair)
        if self.adversary is None:
            yield NamedLoss("detail_loss", loss, metrics)
            return
        self._shared[batch.positions] = pair.detached()
        term = self.adversary.student_term(pair, stream)
        yield NamedLoss("detail_loss", loss + term.value, metrics | term.metrics, reported=float(loss.detach()))

    def discriminator_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        assert self.adversary is not None
        term = self.adversary.heads_term(self._shared[batch.positions], stream)
        yield NamedLoss("discriminator_loss", term.value, term.metrics)


def build(parts: Ingredients) -> DCM:
    """The method from `distillation_config`, on a grid with its own shift `dcm_shift`."""
    options = parts.options
    assert parts.detail is not None, "DCM has two experts"
    grid = phase_grid(options.euler_timesteps, options.dcm_shift, options.inner_edges)
    settings = DCMSettings(
        consistency=consistency_settings(parts, grid),
        split=grid.index_of(options.split),
        mode=options.mode,
        semantic_fraction=options.semantic_fraction,
        temporal_coherence_weight=options.temporal_coherence_weight,
        temporal_coherence_lag=options.temporal_coherence_lag,
    )
    return DCM(parts.teacher, parts.student, parts.detail, settings, parts.device, build_adversary(parts, grid))
