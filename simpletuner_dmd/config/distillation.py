"""Options of `distillation_config` for DMD: the student's ladder, the critic, the window of the score noise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import Options, numbers

TIMESTEPS = 1000.0
BLOCK_KEYS = ("num_frame_per_block", "independent_first_frame", "same_step_across_blocks", "context_noise")
"""They act when the student works block by block (causal), which no method of this version does."""


def _ladder(value: Any) -> list[float]:
    steps: list[float] = numbers(value)
    if len(steps) > 1 and steps[-1] == 0:
        steps = steps[:-1]  # SimpleTuner's files may end with the 0 that sampling always ends with
    return steps


def ladder_mistake(timesteps: tuple[float, ...]) -> str | None:
    """Why a few-step sampler cannot walk these timesteps (scale 0 to 1000), or None if it can."""
    if not timesteps:
        return "has no steps"
    if any(later >= earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False)):
        return "must decrease strictly"
    if not 990 < timesteps[0] <= TIMESTEPS:
        return "must start in (990, 1000], because sampling starts from pure noise"
    if timesteps[-1] <= 0:
        return "must stay above 0"
    return None


class DmdConfig(Options):
    """Distribution matching distillation (DMD2 without its adversarial term)."""

    dmd_denoising_steps: Annotated[tuple[float, ...], BeforeValidator(_ladder)] = Field(
        (1000.0, 757.0, 522.0),
        description="The student's steps, as timesteps on the shifted scale, used literally.",
    )
    student_steps: int | None = Field(
        None, ge=1, le=100,
        description="Number of student steps, evenly spaced and warped by `flow_schedule_shift`, "
        "instead of a list in `dmd_denoising_steps`.",
    )  # fmt: skip
    warp_denoising_steps: bool = Field(
        False, description="`dmd_denoising_steps` is on the unshifted scale: warp it by `flow_schedule_shift`."
    )
    generator_update_interval: int = Field(
        1, ge=1, description="The student is updated at every so many steps, the critic at every step. 5 is steadier."
    )
    critic_warmup_steps: int = Field(
        0, ge=0, description="Steps at the start in which only the critic learns. 50 to 200 help."
    )
    critic_noise_repeats: int = Field(
        1, ge=1, le=64, description="Noise levels at which the critic learns from each rollout; rollouts are costly."
    )
    real_score_guidance_scale: float = Field(
        3.0, ge=0, le=30, description="Guidance of the teacher, built into the student; 1 and 0 are off."
    )
    fake_score_guidance_scale: float = Field(
        0.0, ge=0, le=30, description="Guidance of the critic; 1 and 0 are off, as in the DMD papers."
    )
    negative_prompt: str = Field(
        "", description="The teacher's unconditional prompt. Default: `validation_negative_prompt`."
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
    rollout: Literal["simulate", "data_latent"] = Field(
        "simulate",
        description="Where the student's input comes from: its own steps from pure noise, or your videos with noise.",
    )
    renoise: Literal["sde", "ode"] = Field(
        "sde", description="Between two student steps: fresh noise (`sde`) or the straight line on (`ode`)."
    )
    last_step_only: bool = Field(False, description="Always trains the last student step instead of a random one.")
    same_step_across_blocks: bool = Field(False, description="One exit step for all blocks. Block-wise students only.")
    num_frame_per_block: int = Field(3, ge=1, description="Latent frames per block. Block-wise students only.")
    independent_first_frame: bool = Field(False, description="The first block is one frame. Block-wise students only.")
    context_noise: float = Field(
        0.0, ge=0, lt=TIMESTEPS, description="Noise on the finished blocks, as a timestep. Block-wise students only."
    )
    num_training_frames: int = Field(
        21, ge=1, description="The most latent frames that a rollout has; 21 is 81 frames."
    )

    def timesteps(self, shift: float) -> tuple[float, ...]:
        """The student's ladder on the shifted scale, 1000 = pure noise. Raises ValueError if it cannot be walked."""
        if self.student_steps is not None:
            n = self.student_steps
            steps = tuple(_warp((n - k) / n, shift) for k in range(n))
        elif self.warp_denoising_steps:
            steps = tuple(_warp(step / TIMESTEPS, shift) for step in self.dmd_denoising_steps)
        else:
            steps = tuple(self.dmd_denoising_steps)
        mistake = ladder_mistake(steps)
        if mistake:
            raise ValueError(f"the ladder {', '.join(f'{step:g}' for step in steps)} {mistake}")
        return steps

    @property
    def given_block_keys(self) -> list[str]:
        return [key for key in BLOCK_KEYS if key in self.model_fields_set]


def _warp(u: float, shift: float) -> float:
    """1000 k u / (1 + (k - 1) u), as `flow.shifted`, which this room cannot import: it stays free of torch."""
    return TIMESTEPS * shift * u / (1 + (shift - 1) * u)
