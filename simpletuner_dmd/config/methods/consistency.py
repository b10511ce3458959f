"""Options that every consistency method has: the teacher's solver, the distance, the adversary on features."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import TIMESTEPS, WHERE, DistillationOptions, RunOptions, warp

WIDE_INTERVAL = 150.0
"""A last interval (timesteps) from which on a single solver step visibly narrows the distribution: at shift 17 and 50
points it is 258, and the teacher's samples of a Gaussian have .75 of its width instead of .97 at shift 1."""


class ConsistencyOptions(DistillationOptions):
    """A student that jumps along the teacher's trajectory."""

    real_score_guidance_scale: float = Field(
        5.0, ge=0, le=30,
        description="Guidance of the teacher, built into the student; 1 and 0 are off, and then captions are dropped "
        "with `caption_dropout_probability`, so that the student can be guided later.",
    )  # fmt: skip
    solver: Literal["euler", "heun"] = Field(
        "euler", description="The teacher's step between two grid points: `heun` is exact to second order at twice the "
        "cost, except in the step to 0, which is always Euler's.",
    )  # fmt: skip
    teacher_substeps: int = Field(
        1,
        ge=1,
        le=64,
        description="Solver steps of the teacher between two grid points; 2 to 4 where they lie far apart.",
    )
    loss_type: Literal["huber", "l2"] = Field(
        "huber", description="Distance of the two jumps, per element: `huber` sqrt(r² + c²) − c, or the square."
    )
    huber_c: float = Field(
        0.001, gt=0, le=100, description="The c of `loss_type` huber: below it errors count squared, above it linearly."
    )
    loss_weighting: Literal["none", "inverse_sigma", "inverse_interval"] = Field(
        "none",
        description="Weight of a sample: 1, 1 / (distance to the end of its phase), or 1 / (width of its grid "
        "interval). The last two lean towards clean levels.",
    )

    @property
    def needs_latents(self) -> bool:
        return True

    @property
    def guided(self) -> bool:
        """The teacher's guidance is built into the student."""
        return self.real_score_guidance_scale not in (0.0, 1.0)

    def last_interval(self, config: RunOptions) -> float:
        """Width, in timesteps, of the grid's interval next to clean, which is its widest."""
        raise NotImplementedError

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        if config.caption_dropout_probability and self.guided:
            found.append(
                f"caption_dropout_probability {config.caption_dropout_probability:g} has no effect: captions are "
                "dropped only where real_score_guidance_scale is off."
            )
        width = self.last_interval(config)
        if width > WIDE_INTERVAL and self.teacher_substeps == 1:
            found.append(
                f"the last grid interval goes from timestep {width:.0f} to 0 in one solver step, which loses detail: "
                'set "teacher_substeps" to 2 or more.'
            )
        return found


class TargetOptions(ConsistencyOptions):
    """One network is the student, on a grid with the student's own shift."""

    num_ddim_timesteps: int = Field(
        50, ge=8, le=1000, description="Grid points that training starts from, and the teacher steps between."
    )
    target: Literal["student", "ema"] = Field(
        "student",
        description="Whose jump is the goal: the student's own as it is, or that of its running average (`use_ema`). "
        "Default: `student`, but `ema` where `model_type` is full and `use_ema` is on.",
    )

    @classmethod
    def complete(cls, given: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        given = super().complete(given, outside)
        if outside.get("model_type") == "full" and outside.get("use_ema"):
            given.setdefault("target", "ema")
        return given

    def last_interval(self, config: RunOptions) -> float:
        return warp(1 / self.num_ddim_timesteps, config.flow_schedule_shift or 1.0)

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        if self.target == "ema" and not config.use_ema:
            found.append(
                Problem("", WHERE + "target", "found ema, but no average is kept: use_ema is false",
                        'set "use_ema": true, or "target": "student"')
            )  # fmt: skip
        return found


class AdversaryOptions(ConsistencyOptions):
    """Heads on the teacher's features, trained against the consistency target."""

    adv_weight: float = Field(
        0.0, ge=0, le=100,
        description="Weight of the adversarial term, hinge and feature distance together, beside the consistency loss; "
        "0 leaves it out.",
    )  # fmt: skip
    adv_hinge_scale: float = Field(5.0, ge=0, le=1000, description="Weight of the hinge loss within that term.")
    adv_feature_scale: float = Field(
        10.0, ge=0, le=1000, description="Weight of the distance of the teacher's features within that term."
    )
    discriminator_head_stride: int = Field(
        2, ge=1, le=100, description="A head at every so many blocks of the teacher, counted from its last."
    )
    discriminator_lr: float = Field(1e-5, gt=0, le=1, description="Learning rate of the heads.")

    @property
    def has_discriminator(self) -> bool:
        return self.adv_weight > 0

    def feature_blocks(self, depth: int) -> tuple[int, ...]:
        """Blocks (0-based) of a teacher of `depth` whose features get a head: 1, 3, …, 29 of 30 at a stride of 2."""
        return tuple(range((depth - 1) % self.discriminator_head_stride, depth, self.discriminator_head_stride))


def phase_problem(key: str, points: float, timestep: float) -> Problem:
    """A phase of fewer than two grid points, where there is nothing to be consistent with."""
    return Problem("", WHERE + key, f"the phase that ends at timestep {timestep:g} has {points:.1f} grid points, "
                   "and needs 2", "take fewer phases, or more grid points")  # fmt: skip


def unwarp(timestep: float, shift: float) -> float:
    """The u of a timestep: the inverse of `warp`."""
    sigma = timestep / TIMESTEPS
    return sigma / (shift - (shift - 1) * sigma)
