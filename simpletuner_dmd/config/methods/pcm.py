"""Options of `distillation_config` for PCM: the trajectory in phases, each walked in one step."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import WHERE, RunOptions, ladder_mistake, steps_list, uniform_timesteps
from simpletuner_dmd.config.methods.consistency import AdversaryOptions, TargetOptions, phase_problem, unwarp


class PcmConfig(AdversaryOptions, TargetOptions):
    """Phased consistency model."""

    title: ClassVar[str] = "PCM"

    phases: int = Field(
        4, ge=1, le=50,
        description="Phases of the trajectory, evenly spaced and warped by `flow_schedule_shift`; the student takes "
        "one step in each.",
    )  # fmt: skip
    phase_edges: Annotated[tuple[float, ...] | None, BeforeValidator(steps_list)] = Field(
        None,
        description="The phases' noisy edges instead, as timesteps on the shifted scale, for example "
        '"1000,900,750,500". They are the student\'s steps.',
    )

    @property
    def ladder_key(self) -> str:
        return "phases" if self.phase_edges is None else "phase_edges"

    @property
    def transition(self) -> str:
        return "ode"

    def timesteps(self, shift: float) -> tuple[float, ...]:
        if self.phase_edges is None:
            return uniform_timesteps(self.phases, shift)
        mistake = ladder_mistake(self.phase_edges)
        if self.phase_edges and self.phase_edges[0] != 1000 and not mistake:
            mistake = "must start at 1000, because the first phase begins at pure noise"
        if mistake:
            raise ValueError(f"the ladder {', '.join(f'{step:g}' for step in self.phase_edges)} {mistake}")
        return self.phase_edges

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        if self.phase_edges is not None and "phases" in self.model_fields_set:
            found.append(
                Problem("", WHERE + "phases", "phases and phase_edges both describe the phases", "remove one of them")
            )
        try:
            edges = (*config.student_timesteps(), 0.0)
        except ValueError:
            return found  # reported already
        for upper, lower in zip(edges, edges[1:], strict=False):
            shift = config.flow_schedule_shift or 1.0
            points = (unwarp(upper, shift) - unwarp(lower, shift)) * self.num_ddim_timesteps
            if points < 2 - 1e-9:
                return [*found, phase_problem(self.ladder_key, points, lower)]
        return found
