"""`TrainConfig`: every option of config.json, typed. The one source of defaults, limits and explanations."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from simpletuner_dmd.config.flavours import Flavour, flavour_of
from simpletuner_dmd.config.memory_options import MemoryOptions
from simpletuner_dmd.config.methods import METHODS, CriticOptions, DistillationOptions
from simpletuner_dmd.config.optimizer_options import OptimizerOptions
from simpletuner_dmd.config.run_options import DataOptions, ModelOptions, OutputOptions
from simpletuner_dmd.config.training_options import (
    EmaOptions,
    FlowOptions,
    LengthOptions,
    LoraOptions,
    PrecisionOptions,
)
from simpletuner_dmd.config.tread import TreadConfig
from simpletuner_dmd.config.validation_options import EvaluationOptions, HealthOptions, ValidationOptions

TEACHER_STEPS = 40


def frames_4n1(frames: int) -> int:
    """The next count of the form 4n+1 below: Wan's VAE folds 4 frames into one, after the first."""
    return frames - (frames - 1) % 4


# pydantic takes the fields of the last base first; a default may look at the options that stand before it.
class TrainConfig(
    OutputOptions,
    HealthOptions,
    EvaluationOptions,
    ValidationOptions,
    DataOptions,
    FlowOptions,
    EmaOptions,
    LoraOptions,
    MemoryOptions,
    PrecisionOptions,
    OptimizerOptions,
    LengthOptions,
    ModelOptions,
):
    """Every option of a run. `TrainConfig()` is valid: a LoRA fine-tune of Wan 2.1 1.3B."""

    distillation_config: SerializeAsAny[DistillationOptions] | None = Field(
        None,
        validate_default=True,
        description="The settings of `distillation_method`; also a path to a JSON file of them.",
    )
    tread_config: TreadConfig | None = Field(
        None,
        description="TREAD: in training, part of the video tokens bypasses spans of blocks, which saves time. Acts on "
        "plain denoising losses: the student's in fine-tuning, the critic's in DMD. Also a path to a JSON file.",
    )
    benchmark_guidance: float = Field(
        default_factory=lambda data: _teacher_guidance(data),
        ge=0, le=30,
        description="Guidance of the teacher's reference videos. Default: `real_score_guidance_scale`, "
        "or `validation_guidance` without distillation.",
    )  # fmt: skip
    validation_num_inference_steps: int = Field(
        default_factory=lambda data: _validation_steps(data),
        ge=1, le=1000,
        description="Steps of the validation videos. A distilled student always walks its own ladder. "
        "Default: the ladder's length, or 40 without distillation.",
    )  # fmt: skip

    @field_validator("distillation_config", mode="before")
    @classmethod
    def _follow_the_student(cls, value: Any, info: ValidationInfo) -> Any:
        """The settings of the chosen method, with what follows from the student and from the validation options."""
        method = info.data.get("distillation_method")
        if method is None:
            if value:
                raise ValueError("is given, but distillation_method is not")
            return None
        if isinstance(value, DistillationOptions):
            value = value.model_dump(exclude_unset=True)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            return value
        given = {key: item for key, item in value.items() if item is not None}
        options = METHODS[method]
        return options.model_validate(options.complete(given, info.data))

    @model_validator(mode="after")
    def _whole_latent_frames(self) -> TrainConfig:
        rounded = [frames_4n1(frames) for frames in self.validation_num_video_frames]
        self.validation_num_video_frames = list(dict.fromkeys(rounded))
        return self

    @property
    def flavour(self) -> Flavour:
        """The facts of `model_flavour`."""
        return flavour_of(self.model_flavour)

    @property
    def distillation(self) -> DistillationOptions:
        """The settings of the distillation method, where there is one."""
        assert self.distillation_config is not None, "asked for distillation settings in a run without distillation"
        return self.distillation_config

    @property
    def critic(self) -> CriticOptions | None:
        """The settings of the critic, in a method that has one."""
        return self.distillation_config if isinstance(self.distillation_config, CriticOptions) else None

    def student_timesteps(self) -> tuple[float, ...]:
        """The student's ladder on the shifted scale, 1000 = pure noise; empty where it samples as the teacher does."""
        if self.distillation_config is None:
            return ()
        return self.distillation_config.timesteps(self.flow_schedule_shift or 1.0)

    @property
    def frames_cap(self) -> int | None:
        """The most video frames that a rollout has; None without distillation."""
        return None if self.distillation_config is None else 4 * (self.distillation.num_training_frames - 1) + 1

    @property
    def global_batch_size(self) -> int:
        """Samples per step, over processes and micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes


def _teacher_guidance(data: dict[str, Any]) -> float:
    settings = data.get("distillation_config")
    if isinstance(settings, DistillationOptions):
        return settings.real_score_guidance_scale
    return float(data.get("validation_guidance", 5.0))


def _validation_steps(data: dict[str, Any]) -> int:
    settings = data.get("distillation_config")
    if isinstance(settings, DistillationOptions):
        try:
            return len(settings.timesteps(data.get("flow_schedule_shift") or 1.0)) or TEACHER_STEPS
        except ValueError:
            pass  # a ladder that cannot be walked is reported as such
    return TEACHER_STEPS
