"""Options of `distillation_config` for LCM: one jump from any noise level to the clean video."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import WHERE, RunOptions, uniform_timesteps
from simpletuner_dmd.config.methods.consistency import TargetOptions


class LcmConfig(TargetOptions):
    """Latent consistency model."""

    title: ClassVar[str] = "LCM"

    student_steps: int = Field(
        4, ge=1, le=100, description="Number of student steps, evenly spaced and warped by `flow_schedule_shift`."
    )
    renoise: Literal["sde", "ode"] = Field(
        "sde",
        description="Between two student steps: fresh noise (`sde`), which keeps the distribution, or "
        "the straight line on (`ode`), which widens it.",
    )
    guidance_min: float | None = Field(
        None, ge=0, le=30,
        description="With `guidance_max`: the teacher's guidance is drawn uniformly between the two for each sample. "
        "The student is not told the draw, so it learns an average; a fixed `real_score_guidance_scale` is sharper.",
    )  # fmt: skip
    guidance_max: float | None = Field(None, ge=0, le=30, description="Upper end of the drawn guidance.")

    def timesteps(self, shift: float) -> tuple[float, ...]:
        return uniform_timesteps(self.student_steps, shift)

    @property
    def transition(self) -> str:
        return self.renoise

    @property
    def guided(self) -> bool:
        return self.guidance_min is not None or super().guided

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        low, high = self.guidance_min, self.guidance_max
        if (low is None) != (high is None):
            key, other = ("guidance_max", "guidance_min") if low is None else ("guidance_min", "guidance_max")
            found.append(
                Problem("", WHERE + key, f"is set, and {other} is not", "set both, or use real_score_guidance_scale")
            )
        elif low is not None and high is not None and low >= high:
            found.append(
                Problem("", WHERE + "guidance_min", f"found {low:g}, not below guidance_max {high:g}",
                        "for one fixed value use real_score_guidance_scale")
            )  # fmt: skip
        return found

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        if self.renoise == "ode" and self.student_steps > 1:
            found.append(
                "renoise ode: the line to where an LCM jumps leaves the trajectory, and samples come out too wide (by "
                'a quarter at 4 steps of a Gaussian); use "sde", or pcm, whose steps need no noise.'
            )
        if self.guidance_min is not None:
            found.append(
                "guidance_min and guidance_max: the student is not told which guidance was drawn and learns an "
                "average; real_score_guidance_scale acts on the teacher's reference videos only."
            )
        return found
