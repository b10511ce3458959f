"""Options of `distillation_config` for DMD: distribution matching, and the student's rollout."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.flavours import flavour_of
from simpletuner_dmd.config.methods.base import TIMESTEPS, WHERE, RunOptions
from simpletuner_dmd.config.methods.matching import MatchingOptions

BLOCK_KEYS = ("num_frame_per_block", "independent_first_frame", "same_step_across_blocks", "context_noise")
"""They rule students that work block by block; a DMD student makes the whole clip at once."""


class DmdConfig(MatchingOptions):
    """Distribution matching distillation (DMD2)."""

    title: ClassVar[str] = "DMD"

    rollout: Literal["simulate", "data_latent", "handover"] = Field(
        "simulate",
        description="Where the student's input comes from: `simulate` its own steps from pure noise; `data_latent` "
        "your videos with noise; `handover` its own steps from latents noised to its first one, for the low-noise "
        "expert of two: latents that the high-noise expert made (`simpletuner synthesise --handover`), or videos. "
        "Default: `simulate`, for `t2v-14b-2.2-low` `handover`.",
    )
    last_step_only: bool = Field(False, description="Always trains the last student step instead of a random one.")
    regression_steps: int = Field(
        0, ge=0,
        description="Steps at the start in which the student learns the ends of the teacher's own trajectories from "
        "the same noise; the critic and its warm-up come after. Helps one- and two-step students.",
    )  # fmt: skip
    ode_steps: int = Field(48, ge=1, le=1000, description="Euler steps of a trajectory of `regression_steps`.")
    same_step_across_blocks: bool = Field(False, description="One exit step for all blocks. Block-wise students only.")
    num_frame_per_block: int = Field(3, ge=1, description="Latent frames per block. Block-wise students only.")
    independent_first_frame: bool = Field(False, description="The first block is one frame. Block-wise students only.")
    context_noise: float = Field(
        0.0, ge=0, lt=TIMESTEPS, description="Noise on the finished blocks, as a timestep. Block-wise students only."
    )

    @classmethod
    def complete(cls, given: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        given = super().complete(given, outside)
        if flavour_of(outside.get("model_flavour", "")).expert == "low":
            given.setdefault("rollout", "handover")
        return given

    @property
    def needs_latents(self) -> bool:
        return self.rollout != "simulate" or super().needs_latents

    @property
    def latents_are_for(self) -> tuple[str, str] | None:
        if self.rollout == "data_latent":
            return 'rollout "data_latent"', 'set "rollout": "simulate"'
        if self.rollout == "handover":
            return 'rollout "handover"', "make latents with simpletuner synthesise --handover"
        return super().latents_are_for

    @property
    def given_block_keys(self) -> list[str]:
        return [key for key in BLOCK_KEYS if key in self.model_fields_set]

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        begun = self.regression_steps + self.critic_warmup_steps
        if self.regression_steps and config.max_train_steps and begun >= config.max_train_steps:
            found.append(
                Problem("", WHERE + "regression_steps",
                        f"found {self.regression_steps} before {self.critic_warmup_steps} of critic_warmup_steps, but "
                        f"the run has {config.max_train_steps} steps: distribution matching would never begin",
                        "lower it, or raise max_train_steps")
            )  # fmt: skip
        return found

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        if "ode_steps" in self.model_fields_set and not self.regression_steps:
            found.append("ode_steps: no effect, regression_steps is 0.")
        if self.given_block_keys:
            found.append(
                f"{', '.join(self.given_block_keys)}: no effect here. They rule block-wise (causal) students; "
                "this student makes the whole clip at once, with one exit step."
            )
        return found
