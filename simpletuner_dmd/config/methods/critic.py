"""Options of the critic (the fake score), and of the noise levels at which its score is compared with the teacher's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import numbers
from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import TIMESTEPS, WHERE, LadderOptions, RunOptions

SMALL_BATCH = 16


class CriticOptions(LadderOptions):
    """Every option of distribution matching: whoever has a critic has these."""

    has_critic: ClassVar[bool] = True

    generator_update_interval: int = Field(
        1, ge=1, description="The student is updated at every so many steps, the critic at every step. 5 is steadier."
    )
    critic_warmup_steps: int = Field(
        0, ge=0, description="Steps at the start in which only the critic learns. 50 to 200 help."
    )
    critic_noise_repeats: int = Field(
        1, ge=1, le=64, description="Noise levels at which the critic learns from each rollout; rollouts are costly."
    )
    fake_score_guidance_scale: float = Field(
        0.0, ge=0, le=30, description="Guidance of the critic; 1 and 0 are off, as in the DMD papers."
    )
    fake_score_type: Literal["lora", "full"] = Field(
        "lora",
        description="The critic: a second LoRA on the shared base, or a full copy. Default: `lora`, but `full` where "
        "`model_type` is full and the base is not quantised.",
    )
    fake_score_lora_rank: int = Field(
        16, ge=1, le=4096, description="Rank of the critic's LoRA. Default: the student's; never choose less."
    )
    fake_score_lora_alpha: float = Field(16.0, gt=0, description="Alpha of the critic's LoRA. Default: its rank.")
    fake_score_lr: float = Field(1e-5, gt=0, le=1, description="Peak learning rate of the critic.")
    fake_score_lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts", "polynomial",
        "constant", "constant_with_warmup", "sine",
    ] = Field("constant_with_warmup", description="Course of the critic's learning rate.")  # fmt: skip
    fake_score_lr_warmup_steps: int = Field(0, ge=0, description="Steps over which the critic's rate rises from 0.")
    fake_score_weight_decay: float = Field(0.01, ge=0, le=1, description="Decoupled weight decay of the critic.")
    fake_score_betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(numbers)
    ] = Field((0.9, 0.999), description="Moment decays of the critic's AdamW. [0, 0.999] follows the student faster.")
    fake_score_eps: float = Field(1e-8, gt=0, description="Added to the denominator of the critic's update.")
    fake_score_grad_clip: float = Field(1.0, ge=0, description="Norm the critic's gradient is clipped to; 0 is off.")
    min_timestep_ratio: float = Field(
        0.02, ge=0, le=1, description="Lower end of the noise levels at which teacher and critic are compared."
    )
    max_timestep_ratio: float = Field(0.98, ge=0, le=1, description="Upper end of those noise levels.")
    timestep_shift: float = Field(
        1.0, gt=0, le=100, description="Moves those noise levels, and the critic's own, towards the noisy end."
    )
    min_score_timestep: float = Field(
        0.0, ge=0, lt=TIMESTEPS,
        description="Another lower end, as a timestep of 0 to 1000; it acts where `ts_schedule` is off.",
    )  # fmt: skip
    ts_schedule: bool = Field(
        True,
        description="Compares only at more noise than the student's next step has: the lower end follows the exit.",
    )
    ts_schedule_max: bool = Field(
        False, description="Compares only at less noise than the student's exit step has: the upper end follows it."
    )
    fake_score_ts_schedule: bool = Field(
        False,
        description="Critic and discriminator learn from a sample only at the noise levels at which `ts_schedule` lets "
        "samples of its exit be compared, so that they never judge the last step by the blur of the first.",
    )

    @classmethod
    def complete(cls, given: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        given = super().complete(given, outside)
        if outside.get("model_type") == "full" and outside.get("base_model_precision") == "no_change":
            given.setdefault("fake_score_type", "full")
        lycoris = outside.get("lycoris_config")
        if lycoris is not None and "fake_score_lora_rank" not in given:
            rank = given["fake_score_lora_rank"] = min(lycoris.linear_dim, 4096)
            given.setdefault("fake_score_lora_alpha", lycoris.linear_alpha * rank / lycoris.linear_dim)
        if "lora_rank" in outside:
            given.setdefault("fake_score_lora_rank", outside["lora_rank"])
        given.setdefault("fake_score_lora_alpha", given.get("fake_score_lora_rank", 16))
        return given

    @property
    def student_interval(self) -> int:
        return self.generator_update_interval

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        if self.fake_score_type == "full" and config.base_model_precision != "no_change":
            found.append(
                Problem("", WHERE + "fake_score_type",
                        f"a full critic cannot stand beside a base in {config.base_model_precision}: "
                        "its score would differ from the teacher's by the quantisation error",
                        'set "fake_score_type": "lora", or "base_model_precision": "no_change"')
            )  # fmt: skip
        if not self.min_timestep_ratio < self.max_timestep_ratio:
            found.append(
                Problem("", WHERE + "min_timestep_ratio",
                        f"found {self.min_timestep_ratio:g}, not below max_timestep_ratio {self.max_timestep_ratio:g}",
                        "the defaults are 0.02 and 0.98")
            )  # fmt: skip
        elif not self.ts_schedule and self.min_score_timestep / TIMESTEPS >= self.max_timestep_ratio:
            found.append(
                Problem("", WHERE + "min_score_timestep",
                        f"found {self.min_score_timestep:g}, not below max_timestep_ratio {self.max_timestep_ratio:g} "
                        "x 1000: no noise level is left",
                        "lower it, for example to 0")
            )  # fmt: skip
        if config.max_train_steps and self.critic_warmup_steps >= config.max_train_steps:
            found.append(
                Problem("", WHERE + "critic_warmup_steps",
                        f"found {self.critic_warmup_steps}, but the run has {config.max_train_steps} steps: "
                        "the student would never be updated", "set it below max_train_steps")
            )  # fmt: skip
        return found

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        if config.caption_dropout_probability:
            found.append(
                f"caption_dropout_probability {config.caption_dropout_probability:g} acts on the critic's turn only: "
                "the student's turn never drops a caption."
            )
        if config.global_batch_size < SMALL_BATCH:
            found.append(
                f"{config.global_batch_size} samples per step is little for {self.title}, which is steadier with 16 to "
                "64: raise train_batch_size or gradient_accumulation_steps."
            )
        if self.ts_schedule and self.min_score_timestep:
            found.append("min_score_timestep has no effect: ts_schedule sets the lower end of the noise levels.")
        rank = config.lycoris_config.linear_dim if config.lycoris_config is not None else config.lora_rank
        if self.fake_score_type == "lora" and config.model_type == "lora" \
                and self.fake_score_lora_rank < min(rank, 4096):  # fmt: skip
            found.append(
                f"the critic's rank {self.fake_score_lora_rank} is below the student's {rank}: "
                "the critic may not be able to follow the student."
            )
        return found
