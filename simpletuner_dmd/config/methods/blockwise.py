"""Options of the methods whose student works block by block: self-forcing, and its two warm starts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import (
    TIMESTEPS,
    WHERE,
    DistillationOptions,
    LadderOptions,
    RunOptions,
    steps_list,
)
from simpletuner_dmd.config.methods.matching import MatchingOptions


class BlockOptions(DistillationOptions):
    """How a causal student cuts a clip, and how far back it looks."""

    num_frame_per_block: int = Field(3, ge=1, description="Latent frames that the student makes at once.")
    independent_first_frame: bool = Field(False, description="The first block is one frame.")
    sink_frames: int = Field(
        0, ge=0, description="First latent frames that stay visible for ever; they act with `local_attn_frames`."
    )
    local_attn_frames: int = Field(
        0, ge=0,
        description="Latent frames that a block sees, itself and the sink included; 0 is all. Bounds memory and time "
        "of long videos.",
    )  # fmt: skip

    @property
    def blockwise(self) -> bool:
        return True

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        room = self.local_attn_frames - self.sink_frames
        if self.local_attn_frames and room < self.num_frame_per_block:
            found.append(
                Problem("", WHERE + "local_attn_frames",
                        f"found {self.local_attn_frames}, which less sink_frames {self.sink_frames} leaves {room} "
                        f"frames, too few for a block of {self.num_frame_per_block}",
                        f"set it to {self.sink_frames + self.num_frame_per_block} or more, or to 0 for no limit")
            )  # fmt: skip
        elif self.sink_frames and not self.local_attn_frames:
            found.append(
                Problem("", WHERE + "sink_frames", f"found {self.sink_frames}, but without local_attn_frames every "
                        "frame stays visible", "set local_attn_frames, or remove sink_frames")
            )  # fmt: skip
        return found


FOUR_STEPS = (1000.0, 937.5, 2500 / 3, 625.0)
"""Four steps warped by a shift of 5, the ladder of the Self-Forcing and CausVid students."""


class SelfForcingConfig(BlockOptions, MatchingOptions):
    """Self-Forcing: DMD on clips that a causal student makes block by block from its own earlier blocks."""

    title: ClassVar[str] = "Self-Forcing"

    dmd_denoising_steps: Annotated[tuple[float, ...], BeforeValidator(steps_list)] = Field(
        FOUR_STEPS,
        description="The student's steps, as timesteps on the shifted scale, used literally.",
    )
    same_step_across_blocks: bool = Field(
        False, description="One exit step for all blocks of a rollout, instead of one for each."
    )
    last_step_only: bool = Field(False, description="Always trains the last student step instead of a random one.")
    context_noise: float = Field(
        0.0, ge=0, lt=TIMESTEPS,
        description="Noise on finished blocks before they become context, as a timestep; the same in training and "
        "inference.",
    )  # fmt: skip
    start_gradient_frame: int = Field(
        0, description="Blocks before this latent frame record no graph; negative counts from the end of the clip."
    )


class DiffusionForcingConfig(BlockOptions):
    """Diffusion forcing: supervised training of a causal student, every block at its own noise level."""

    title: ClassVar[str] = "Diffusion forcing"

    min_timestep_ratio: float = Field(0.0, ge=0, le=1, description="Lowest noise level that is drawn, as a sigma.")
    max_timestep_ratio: float = Field(1.0, ge=0, le=1, description="Highest noise level that is drawn, as a sigma.")

    def timesteps(self, shift: float) -> tuple[float, ...]:
        return ()

    @property
    def needs_latents(self) -> bool:
        return True

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        if not self.min_timestep_ratio < self.max_timestep_ratio:
            found.append(
                Problem("", WHERE + "min_timestep_ratio",
                        f"found {self.min_timestep_ratio:g}, not below max_timestep_ratio {self.max_timestep_ratio:g}",
                        "leave both out for all noise levels")
            )  # fmt: skip
        return found


class OdeInitConfig(BlockOptions, LadderOptions):
    """ODE initialisation: the student learns where the teacher's own trajectories end."""

    title: ClassVar[str] = "ODE initialisation"

    dmd_denoising_steps: Annotated[tuple[float, ...], BeforeValidator(steps_list)] = Field(
        FOUR_STEPS, description="The student's steps, as timesteps on the shifted scale, used literally."
    )
    causal: bool = Field(True, description="The student works block by block, for self-forcing; false: whole clips.")
    context_noise: float = Field(
        0.0, ge=0, lt=TIMESTEPS, description="Noise on finished blocks when the student is sampled, as a timestep."
    )
    ode_steps: int = Field(48, ge=1, le=1000, description="Euler steps of a teacher's trajectory.")
    rungs_per_trajectory: int = Field(
        1, ge=1, description="Steps of the student's ladder that learn from one trajectory; trajectories are costly."
    )
    ode_loss_type: Literal["l2", "pseudo_huber"] = Field(
        "l2", description="Distance to the trajectory's end; `pseudo_huber` is milder on outliers."
    )
    ode_huber_c: float = Field(0.001, gt=0, description="Scale of `pseudo_huber`: small is the absolute difference.")

    @property
    def blockwise(self) -> bool:
        return self.causal

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        # A ladder that cannot be walked is a problem already.
        if not found and self.rungs_per_trajectory > (steps := len(config.student_timesteps())):
            found.append(
                Problem("", WHERE + "rungs_per_trajectory",
                        f"found {self.rungs_per_trajectory}, but the student has {steps} steps",
                        f"set it to {steps} or less")
            )  # fmt: skip
        return found
