"""Options of `distillation_config` for DMD: the student's rollout, the adversarial term, weak-to-strong matching."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from simpletuner_dmd.config.methods.base import TIMESTEPS
from simpletuner_dmd.config.methods.critic import CriticOptions

if TYPE_CHECKING:
    from simpletuner_dmd.config.schema import TrainConfig

BLOCK_KEYS = ("num_frame_per_block", "independent_first_frame", "same_step_across_blocks", "context_noise")
"""They rule students that work block by block; a DMD student makes the whole clip at once."""


class DmdConfig(CriticOptions):
    """Distribution matching distillation (DMD2)."""

    title: ClassVar[str] = "DMD"

    rollout: Literal["simulate", "data_latent"] = Field(
        "simulate",
        description="Where the student's input comes from: its own steps from pure noise, or your videos with noise.",
    )
    last_step_only: bool = Field(False, description="Always trains the last student step instead of a random one.")
    same_step_across_blocks: bool = Field(False, description="One exit step for all blocks. Block-wise students only.")
    num_frame_per_block: int = Field(3, ge=1, description="Latent frames per block. Block-wise students only.")
    independent_first_frame: bool = Field(False, description="The first block is one frame. Block-wise students only.")
    context_noise: float = Field(
        0.0, ge=0, lt=TIMESTEPS, description="Noise on the finished blocks, as a timestep. Block-wise students only."
    )

    @property
    def needs_latents(self) -> bool:
        return self.rollout == "data_latent"

    @property
    def given_block_keys(self) -> list[str]:
        return [key for key in BLOCK_KEYS if key in self.model_fields_set]

    def notices(self, config: TrainConfig) -> list[str]:
        found = super().notices(config)
        if self.given_block_keys:
            found.append(
                f"{', '.join(self.given_block_keys)}: no effect here. They rule block-wise (causal) students; "
                "this student makes the whole clip at once, with one exit step."
            )
        return found
