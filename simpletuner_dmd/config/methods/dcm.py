"""Options of `distillation_config` for DCM: a semantic expert at high noise, a detail expert below."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import TIMESTEPS, WHERE, RunOptions, ladder_mistake, steps_list, warp
from simpletuner_dmd.config.methods.consistency import AdversaryOptions, phase_problem, unwarp

PAPER_SPLIT = 0.7  # of the grid: point 35 of 50


class DcmConfig(AdversaryOptions):
    """Dual-expert consistency model."""

    title: ClassVar[str] = "DCM"
    has_detail_expert: ClassVar[bool] = True

    real_score_guidance_scale: float = Field(
        6.0, ge=0, le=30,
        description="Guidance of the teacher, built into the student; 1 and 0 are off. SimpleTuner's `distill_cfg` is "
        "one less: its 5 is 6 here.",
    )  # fmt: skip
    teacher_substeps: int = Field(
        4, ge=1, le=64,
        description="Solver steps of the teacher between two grid points of the detail expert; the semantic expert's "
        "lie so close that it always takes one. The paper takes 1.",
    )  # fmt: skip
    adv_weight: float = Field(
        0.1, ge=0, le=100,
        description="Weight of the detail expert's adversarial term, hinge and feature distance together, beside the "
        "consistency loss; 0 leaves it out.",
    )  # fmt: skip
    mode: Literal["both", "semantic", "detail"] = Field(
        "both", description="Which expert is trained: one of them, or both in turn in one run."
    )
    semantic_fraction: float = Field(
        0.5, gt=0, lt=1, description="In mode `both`: the share of the steps that train the semantic expert."
    )
    euler_timesteps: int = Field(
        50, ge=8, le=1000, description="Grid points that training starts from, and the teacher steps between."
    )
    dcm_shift: float = Field(
        17.0, gt=0, le=100,
        description="Shift of that grid and of the student's steps; `flow_schedule_shift` plays no part here.",
    )  # fmt: skip
    split_index: int | None = Field(
        None, ge=1,
        description="Grid point that separates the experts, counted from clean. Default: 0.7 of `euler_timesteps`, "
        "which is timestep 975 of 50 points at shift 17.",
    )  # fmt: skip
    sigma_split: float | None = Field(
        None, gt=0, lt=1, description="The separating noise level itself, between 0 and 1, instead of `split_index`."
    )
    multiphase: int | None = Field(
        None, ge=2, le=100,
        description="Phases over both experts, half of them in each, evenly spaced. Default: they end where the "
        "student's steps do, so that each step is exactly what was trained. 2 is the paper's: each expert learns the "
        "jump to the end of its part, and several steps within it widen the distribution (by 8% with the default six).",
    )  # fmt: skip
    student_steps: int = Field(
        6, ge=2, le=100,
        description="Number of student steps, split evenly between the experts (an odd one goes to the semantic) and "
        "evenly spaced within each one's part.",
    )  # fmt: skip
    denoising_steps: Annotated[tuple[float, ...] | None, BeforeValidator(steps_list)] = Field(
        None,
        description="The student's steps instead, as timesteps on the shifted scale, used literally. The "
        'split should be one of them: "1000,992,982,975.41,937,838".',
    )
    temporal_coherence_weight: float = Field(
        1.0, ge=0, le=100,
        description="Weight of the semantic expert's loss on the differences between frames; 0 is off.",
    )  # fmt: skip
    temporal_coherence_lag: int = Field(
        3,
        ge=1,
        le=100,
        description="How many latent frames apart those frames are; shorter videos go without that loss.",
    )

    # --- the trajectory's parts -------------------------------------------------------------------------------------

    @property
    def split(self) -> float:
        """The sigma at which the semantic expert's part ends and the detail expert's begins."""
        if self.sigma_split is not None:
            return self.sigma_split
        index = self.split_index or round(PAPER_SPLIT * self.euler_timesteps)
        return warp(index / self.euler_timesteps, self.dcm_shift) / TIMESTEPS

    @property
    def next_point(self) -> float:
        """The sigma of the grid point above `split`, the lowest that the semantic expert is trained at."""
        points = self.euler_timesteps
        index = round(unwarp(TIMESTEPS * self.split, self.dcm_shift) * points)  # the point that is moved onto the split
        return warp(min(points, index + 1) / points, self.dcm_shift) / TIMESTEPS

    @property
    def boundary(self) -> float:
        """Half-way between the two, so that rounding moves no step to the other expert."""
        return (self.split + self.next_point) / 2

    def _evenly(self, semantic: int, detail: int) -> tuple[float, ...]:
        """Timesteps that cut the experts' parts into so many pieces: their upper ends, from 1000 down."""
        middle = unwarp(TIMESTEPS * self.split, self.dcm_shift)
        upper = [1 - (1 - middle) * piece / semantic for piece in range(semantic)]
        lower = [middle * (detail - piece) / detail for piece in range(1, detail)]
        return (
            *(warp(u, self.dcm_shift) for u in upper),
            TIMESTEPS * self.split,
            *(warp(u, self.dcm_shift) for u in lower),
        )

    @property
    def inner_edges(self) -> tuple[float, ...]:
        """Sigmas of the phases' edges between 0 and 1, descending; `split` is one of them, to the bit."""
        half = (self.multiphase or 0) // 2
        upper = self._steps if self.multiphase is None else self._evenly(half, half)
        others = {edge / TIMESTEPS for edge in upper[1:] if abs(edge - TIMESTEPS * self.split) > 1e-6}
        return tuple(sorted({*others, self.split}, reverse=True))

    @property
    def _steps(self) -> tuple[float, ...]:
        if self.denoising_steps is not None:
            return self.denoising_steps
        return self._evenly(-(-self.student_steps // 2), self.student_steps // 2)

    def timesteps(self, shift: float) -> tuple[float, ...]:
        steps = self._steps
        mistake = ladder_mistake(steps)
        low, high = TIMESTEPS * self.split, TIMESTEPS * self.next_point
        between = [step for step in steps if low + 1e-6 < step < high - 1e-6]
        if between and not mistake:
            mistake = f"has {between[0]:g} between the experts: the detail expert is trained up to {low:.2f}, the " \
                      f"semantic from {high:.2f}"  # fmt: skip
        if not mistake and (steps[-1] > high - 1e-6 or steps[0] < high - 1e-6):
            mistake = f"leaves one expert out: the detail expert's steps are those up to {low:.2f}"
        if mistake:
            raise ValueError(f"the ladder {', '.join(f'{step:g}' for step in steps)} {mistake}")
        return steps

    def ladder_shift(self, shift: float) -> float:
        return self.dcm_shift

    @property
    def ladder_key(self) -> str:
        return "student_steps" if self.denoising_steps is None else "denoising_steps"

    @property
    def transition(self) -> str:
        return "ode"

    @property
    def has_discriminator(self) -> bool:
        return self.adv_weight > 0 and self.mode != "semantic"

    def last_interval(self, config: RunOptions) -> float:
        return warp(1 / self.euler_timesteps, self.dcm_shift)

    # --- checks -----------------------------------------------------------------------------------------------------

    def problems(self, config: RunOptions) -> list[Problem]:
        ladder, split = WHERE + self.ladder_key, self._split_problems()
        found = [problem for problem in super().problems(config) if not (split and problem.key == ladder)] + split
        if not split and all(problem.key != ladder for problem in found):
            found += self._phase_problems()
        if self.denoising_steps is not None and "student_steps" in self.model_fields_set:
            found.append(
                Problem("", WHERE + "student_steps", "student_steps and denoising_steps both describe the ladder",
                        "remove one of them")
            )  # fmt: skip
        return found

    def _split_problems(self) -> list[Problem]:
        if self.split_index is not None and self.sigma_split is not None:
            return [
                Problem("", WHERE + "split_index", "split_index and sigma_split both separate the experts",
                        "remove one of them")
            ]  # fmt: skip
        if self.split_index is not None and self.split_index >= self.euler_timesteps:
            return [
                Problem("", WHERE + "split_index", f"found {self.split_index}, must be below euler_timesteps "
                        f"{self.euler_timesteps}", "leave it out for 0.7 of it")
            ]  # fmt: skip
        if self.multiphase is not None and self.multiphase % 2:
            return [
                Problem("", WHERE + "multiphase", f"found {self.multiphase}, must be even: half of the phases are each "
                        "expert's", f"set it to {self.multiphase + 1}")
            ]  # fmt: skip
        return []

    def _phase_problems(self) -> list[Problem]:
        edges = [TIMESTEPS * sigma for sigma in (1.0, *self.inner_edges, 0.0)]
        for upper, lower in zip(edges, edges[1:], strict=False):
            points = (unwarp(upper, self.dcm_shift) - unwarp(lower, self.dcm_shift)) * self.euler_timesteps
            if points < 2 - 1e-9:
                return [phase_problem("euler_timesteps", points, lower)]
        return []

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        if "flow_schedule_shift" in config.model_fields_set:
            found.append(
                f"flow_schedule_shift has no effect on DCM's noise levels: dcm_shift {self.dcm_shift:g} sets them."
            )
        if self.mode == "semantic":
            found.append(
                "mode semantic: below the split the student stays the teacher; a second run in mode detail trains it."
            )
        if self.mode == "detail" and (config.init_lora is None or config.model_type == "full"):
            found.append(
                "mode detail: above the split the student stays the teacher"
                + (
                    ", and a full network cannot be taken over from the run that trained it."
                    if config.model_type == "full"
                    else '; "init_lora" with the output folder of the run in mode semantic takes over its expert.'
                )
            )
        if config.model_type == "full":
            found.append(
                f"model_type full: the semantic expert is the full network, the detail expert a LoRA of rank "
                f"{config.lora_rank} on the frozen base; learning_rate {config.learning_rate:g} is that of both."
            )
        if self.temporal_coherence_weight and self.num_training_frames <= self.temporal_coherence_lag:
            found.append(
                f"temporal_coherence_weight has no effect: videos have {self.num_training_frames} latent frames, and "
                f"temporal_coherence_lag is {self.temporal_coherence_lag}."
            )
        return found
