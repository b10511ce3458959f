"""rCM: a continuous-time consistency loss regularised by distribution matching (arXiv 2510.08431).

Consistency (`scm.py`) follows the teacher's trajectories from data and so keeps its variety, but blurs where errors of
the derivative add up; distribution matching (`dmd.py`) sharpens, but collects on few modes. The student's turn yields
both, each with its own graph; the critic is DMD's. In the first `tangent_warmup_steps` the student alone moves, by
consistency, so that the critic does not chase a student that is still the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, Turn
from simpletuner_dmd.distill.noise_levels import LogitNormal
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.distill.scm import ConsistencySettings, consistency_loss
from simpletuner_dmd.flow import Batch, Denoiser
from simpletuner_dmd.randomness import RandomStream


@dataclass(frozen=True)
class RCMSettings:
    """The weights of the two terms, both means over elements."""

    consistency: ConsistencySettings
    scm_weight: float = 0.07
    dmd_weight: float = 1.0


class RCM:
    """The Method: DMD's turns, with the consistency term before the student's own losses."""

    needs_latents = True

    def __init__(
        self, teacher: Denoiser, student: Denoiser, dmd: DMD, settings: RCMSettings, device: torch.device
    ) -> None:
        self.teacher, self.student, self.dmd = teacher, student, dmd
        self.settings, self.device = settings, device

    @property
    def _alone(self) -> int:
        """Steps in which the student moves alone."""
        return self.settings.consistency.tangent_warmup_steps

    def turns(self, step: int) -> Iterator[Turn]:
        if step < self._alone:
            yield Turn("student", self.consistency)
            return
        for turn in self.dmd.turns(step - self._alone):
            yield replace(turn, losses=partial(self.both, turn)) if turn.role == "student" else turn

    def updates(self, role: str, steps: int) -> int:
        alone = min(steps, self._alone) if role == "student" else 0
        return alone + self.dmd.updates(role, max(0, steps - self._alone))

    def end_step(self) -> None:
        self.dmd.end_step()

    # --- losses -----------------------------------------------------------------------------------------------------

    def consistency(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        yield weighted(
            consistency_loss(self.teacher, self.student, batch, stream, self.settings.consistency, self.device),
            self.settings.scm_weight,
        )

    def both(self, matching: Turn, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        yield from self.consistency(batch, stream)
        for loss in matching.losses(batch, stream):
            yield weighted(loss, self.settings.dmd_weight)

    # --- resume -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.dmd.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dmd.load_state_dict(state)


def weighted(loss: NamedLoss, weight: float) -> NamedLoss:
    """The term at `weight`; what is logged stays the term itself."""
    reported = float(loss.value.detach()) if loss.reported is None else loss.reported
    return replace(loss, value=weight * loss.value, reported=reported)


def build(parts: Ingredients) -> RCM:
    """The method from `distillation_config`. Raises ValueError where a noise window is empty for one of the rungs."""
    options = parts.options
    assert parts.critic is not None, "rCM has a critic"
    consistency = ConsistencySettings(
        guidance=options.real_score_guidance_scale,
        tangent_method=options.tangent_method,
        tangent_step=options.tangent_step,
        tangent_warmup_steps=options.tangent_warmup_steps,
        draw=LogitNormal(options.scm_logit_mean, options.scm_logit_std),
    )
    # Every setting of DMD that rCM's options have too goes by the same name; what they lack stays off.
    shared = {field.name: getattr(options, field.name) for field in fields(DMDSettings) if hasattr(options, field.name)}
    shared |= {
        "rollout": RolloutSettings(parts.schedule, options.renoise, last_step_only=options.last_step_only),
        "caption_dropout_probability": parts.caption_dropout_probability,
    }
    dmd = DMD(parts.teacher, parts.student, parts.critic, DMDSettings(**shared), parts.device)
    return RCM(
        parts.teacher,
        parts.student,
        dmd,
        RCMSettings(consistency, options.scm_weight, options.dmd_weight),
        parts.device,
    )
