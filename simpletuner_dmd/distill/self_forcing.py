"""Self-Forcing: DMD on what a causal student makes by itself, block by block (arXiv 2506.08009).

Teacher and critic are bidirectional and judge the whole clip at one noise level; the student made it block by block
from its own earlier blocks, just as at inference. All losses, turns and noise windows are DMD's; only the rollout is
another one. Captions alone are enough: no loss reads data.
"""

from __future__ import annotations

from typing import cast

from simpletuner_dmd.distill.blocks import BlockRollout, BlockRolloutSettings, CausalDenoiser, roll_out_blocks
from simpletuner_dmd.distill.dmd import DMD, matching
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.rollout import RollOut, RolloutSettings
from simpletuner_dmd.flow import Batch
from simpletuner_dmd.randomness import RandomStream


def block_settings(parts: Ingredients) -> BlockRolloutSettings:
    """The rollout from the keys of the same names."""
    options = parts.options
    return BlockRolloutSettings(
        schedule=parts.schedule,
        renoise=options.renoise,
        num_frame_per_block=options.num_frame_per_block,
        independent_first_frame=options.independent_first_frame,
        context_noise=options.context_noise,
        same_step_across_blocks=options.same_step_across_blocks,
        last_step_only=options.last_step_only,
        start_gradient_frame=options.start_gradient_frame,
    )


def rollout_of(parts: Ingredients) -> RollOut:
    """The student's own clip, as DMD asks for it."""
    settings, student = block_settings(parts), cast(CausalDenoiser, parts.student)
    assert hasattr(student, "block_velocity"), "self-forcing needs a student that works block by block"

    def roll(batch: Batch, stream: RandomStream, with_grad: bool) -> BlockRollout:
        return roll_out_blocks(student, batch, stream, settings, "rollout", parts.device, with_grad)

    return roll


def build(parts: Ingredients) -> DMD:
    """DMD over block rollouts. Raises ValueError where a noise window is empty for one of the rungs."""
    options = parts.options
    source = RolloutSettings(parts.schedule, options.renoise, last_step_only=options.last_step_only)
    return matching(parts, source, rollout_of(parts))
