"""Block-wise sampling: the partition, what is called when, who carries a graph, and training = inference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.blocks import (
    BlockPlan,
    BlockRolloutSettings,
    Exit,
    draw_exits,
    roll_out_blocks,
    sample_blocks,
    stream_blocks,
)
from simpletuner_dmd.flow import Batch, Schedule, TextEmbedding
from simpletuner_dmd.randomness import RandomStream

from .causal_toys import FrameSum
from .oracles import CPU, make_batch, text_of

LADDER = Schedule(ladder=(1.0, 0.75, 0.5))
SHAPE = (1, 7, 2, 2)
NOISE = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def drawn(block: int, rung: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 * block + rung))


# --- the partition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "per_block", "first", "blocks"),
    [
        (6, 3, False, [(0, 3), (3, 6)]),
        (7, 3, False, [(0, 3), (3, 6), (6, 7)]),  # the remainder comes last
        (7, 3, True, [(0, 1), (1, 4), (4, 7)]),
        (6, 3, True, [(0, 1), (1, 4), (4, 6)]),
        (1, 3, True, [(0, 1)]),
        (2, 3, False, [(0, 2)]),
    ],
)
def test_the_partition(frames: int, per_block: int, first: bool, blocks: list[tuple[int, int]]) -> None:
    assert list(BlockPlan(frames, per_block, first).blocks) == blocks


def test_one_value_per_block_is_constant_within_it() -> None:
    spread = BlockPlan(6, 3, True).per_frame(
        [torch.tensor([1.0, 4.0]), torch.tensor([2.0, 5.0]), torch.tensor([3.0, 6.0])]
    )
    assert torch.equal(spread, torch.tensor([[1.0, 2, 2, 2, 3, 3], [4.0, 5, 5, 5, 6, 6]]))


def test_no_blocks_of_nothing() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        BlockPlan(0)


# --- what is called ---------------------------------------------------------------------------------------------------


def test_a_rollout_by_hand() -> None:
    """Two blocks, left at rungs 1 and 2, with context noise: every number written out."""
    student, noise, plan = FrameSum(), NOISE[:, :, :4], BlockPlan(4, 2)
    w = float(student.weight.detach())
    first, second = stream_blocks(student, noise, text_of(1.0, 2), LADDER, "sde", drawn, plan, 100.0,
                                  [Exit(1), Exit(2)])  # fmt: skip
    like = noise[:, :, :2]
    x = noise[:, :, :2]
    x = 0.25 * (x - 1.0 * w * (x + 1.0)) + 0.75 * drawn(0, 1, like)
    expected = x - 0.75 * w * (x + 0.75)
    torch.testing.assert_close(first, expected)
    context = (0.9 * expected + 0.1 * drawn(0, 3, like)).mean(2, keepdim=True)
    x = noise[:, :, 2:]
    x = 0.25 * (x - 1.0 * w * (x + 1.0 + context)) + 0.75 * drawn(1, 1, like)
    x = 0.5 * (x - 0.75 * w * (x + 0.75 + context)) + 0.5 * drawn(1, 2, like)
    torch.testing.assert_close(second, x - 0.5 * w * (x + 0.5 + context))


def test_rungs_after_the_exit_are_not_run_and_only_exits_inside_the_window_carry_a_graph() -> None:
    student = FrameSum()
    exits = [Exit(2, False), Exit(0, True), Exit(1, True)]
    parts = list(stream_blocks(student, NOISE, text_of(1.0, 2), LADDER, "sde", drawn, BlockPlan(7, 3), 0.0, exits))
    calls = [(call.kind, call.start, call.sigma, call.seen, call.with_grad) for call in student.calls]
    assert calls == [
        ("velocity", 0, 1.0, 0, False),
        ("velocity", 0, 0.75, 0, False),
        ("velocity", 0, 0.5, 0, False),
        ("commit", 0, 0.0, 0, False),
        ("velocity", 3, 1.0, 3, True),
        ("commit", 3, 0.0, 3, False),
        ("velocity", 6, 1.0, 6, False),
        ("velocity", 6, 0.75, 6, True),
    ]  # the last block is not committed: nobody reads it
    assert [part.requires_grad for part in parts] == [False, True, True]


def test_the_context_is_the_finished_block_itself_without_context_noise() -> None:
    student = FrameSum()
    parts = list(stream_blocks(student, NOISE, text_of(1.0, 2), LADDER, "sde", drawn, BlockPlan(7, 3)))
    commits = [call for call in student.calls if call.kind == "commit"]
    assert all(torch.equal(call.x, part) for call, part in zip(commits, parts, strict=False))


def test_ode_transitions_draw_nothing() -> None:
    def never(block: int, rung: int, like: Tensor) -> Tensor:
        raise AssertionError("a deterministic sampler draws no noise")

    sample_blocks(FrameSum(), NOISE, text_of(1.0, 2), LADDER, "ode", never, BlockPlan(7, 3))


def test_a_block_is_there_before_the_next_is_begun_and_grad_mode_does_not_leak() -> None:
    student = FrameSum()
    stream = stream_blocks(student, NOISE, text_of(1.0, 2), LADDER, "sde", drawn, BlockPlan(7, 3))
    first = next(stream)
    assert first.shape[2] == 3
    assert {call.start for call in student.calls} == {0}
    assert not any(call.kind == "commit" for call in student.calls)  # a viewer does not wait for the context pass
    assert torch.is_grad_enabled()
    rest = list(stream)
    whole = sample_blocks(student, NOISE, text_of(1.0, 2), LADDER, "sde", drawn, BlockPlan(7, 3))
    assert torch.equal(torch.cat([first, *rest], dim=2), whole)
    with pytest.raises(AssertionError, match="another number of frames"):
        next(stream_blocks(student, NOISE, text_of(1.0, 2), LADDER, "sde", drawn, BlockPlan(6, 3)))


# --- gradients --------------------------------------------------------------------------------------------------------


class WeightPerFrame(FrameSum):
    """The same stub with a weight of its own for every block, so that a gradient says where it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((7,), 0.3))

    def block_velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Any,
                       start_frame: int) -> Tensor:  # fmt: skip
        return self.weights[start_frame] * super().block_velocity(
            x_t_BCFHW, sigma, text, cache=cache, start_frame=start_frame
        )


def test_a_blocks_gradient_ends_at_its_own_frames() -> None:
    student = WeightPerFrame()
    parts = list(stream_blocks(student, NOISE, text_of(1.0, 2), LADDER, "sde", drawn, BlockPlan(7, 3), 0.0,
                               [Exit(1, True)] * 3))  # fmt: skip
    torch.cat(parts[1:], dim=2).square().sum().backward()
    assert student.weights.grad is not None
    reached = student.weights.grad != 0
    assert torch.equal(reached, torch.tensor([False, False, False, True, False, False, True]))


def exits_of(settings: BlockRolloutSettings, step: int = 0, seed: int = 0, positions: tuple[int, ...] = (0,),
             frames: int = 7, with_grad: bool = True) -> list[Exit]:  # fmt: skip
    return draw_exits(settings, settings.plan(frames), RandomStream(seed, step, positions), "rollout", with_grad)


def test_the_gradient_window() -> None:
    def carried(start: int, with_grad: bool = True) -> list[bool]:
        settings = BlockRolloutSettings(LADDER, start_gradient_frame=start)
        return [leave.with_grad for leave in exits_of(settings, with_grad=with_grad)]

    assert carried(0) == [True, True, True]
    assert carried(1) == [False, True, True]  # a block that starts before the window is outside
    assert carried(3) == [False, True, True]
    assert carried(6) == [False, False, True]
    assert carried(-1) == [False, False, True]
    assert carried(-4) == [False, True, True]
    assert carried(-7) == [True, True, True]
    assert carried(0, with_grad=False) == [False, False, False]
    with pytest.raises(ValueError, match="start_gradient_frame 7 leaves nothing to train"):
        carried(7)


# --- exits ------------------------------------------------------------------------------------------------------------


def test_exits_are_uniform_and_independent_between_blocks() -> None:
    settings = BlockRolloutSettings(LADDER)
    rungs = [tuple(leave.rung for leave in exits_of(settings, step)) for step in range(1800)]
    for block in range(3):
        counts = Counter(drawn[block] for drawn in rungs)
        assert sum((counts[rung] - 600) ** 2 / 600 for rung in range(3)) < 13.8  # chi-square, 2 degrees, p = 0.001
    pairs = Counter((drawn[0], drawn[1]) for drawn in rungs)
    assert sum((pairs[a, b] - 200) ** 2 / 200 for a in range(3) for b in range(3)) < 26.1  # 8 degrees


def test_exits_are_those_of_the_step_on_every_rank() -> None:
    for settings in (BlockRolloutSettings(LADDER), BlockRolloutSettings(LADDER, same_step_across_blocks=True)):
        for step in range(5):
            assert exits_of(settings, step, positions=(0, 1)) == exits_of(settings, step, positions=(6, 7))
    assert len({exits_of(BlockRolloutSettings(LADDER), step)[0].rung for step in range(20)}) == 3


def test_one_exit_for_all_blocks() -> None:
    shared = BlockRolloutSettings(LADDER, same_step_across_blocks=True)
    seen = [{leave.rung for leave in exits_of(shared, step)} for step in range(200)]
    assert all(len(rungs) == 1 for rungs in seen)
    assert set.union(*seen) == {0, 1, 2}
    last = BlockRolloutSettings(LADDER, last_step_only=True)
    assert {leave.rung for step in range(20) for leave in exits_of(last, step)} == {2}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_noise", [0.0, 80.0])
def test_a_rollout_to_the_last_rung_is_the_sampler_bit_for_bit(context_noise: float) -> None:
    student, batch, stream = FrameSum(), make_batch(2, SHAPE), RandomStream(5, 6, (0, 1))
    settings = BlockRolloutSettings(
        LADDER, context_noise=context_noise, independent_first_frame=True, last_step_only=True
    )
    rollout = roll_out_blocks(student, batch, stream, settings, "rollout", CPU, True)
    sampled = sample_blocks(
        student, stream.normal(SHAPE, "rollout/initial noise"), batch.text, LADDER, "sde",
        lambda block, rung, like: stream.normal(like.shape[1:], f"rollout/renoise {block} {rung}"),
        BlockPlan(7, 3, True), context_noise,
    )  # fmt: skip
    assert torch.equal(rollout.x0.detach(), sampled)
    assert rollout.x0.requires_grad and not sampled.requires_grad
    assert (rollout.exit_rungs, rollout.exit_rung, rollout.first_exit) == ((2, 2, 2), 2, 2)


def test_a_rollout_says_where_it_left_the_ladder() -> None:
    settings = BlockRolloutSettings(LADDER)
    for step in range(10):
        rollout = roll_out_blocks(
            FrameSum(), make_batch(1, SHAPE), RandomStream(0, step, (0,)), settings, "rollout", CPU, False
        )
        assert rollout.exit_rungs == tuple(leave.rung for leave in exits_of(settings, step))
        assert (rollout.first_exit, rollout.exit_rung) == (min(rollout.exit_rungs), max(rollout.exit_rungs))
        assert not rollout.x0.requires_grad


def test_samples_have_noise_of_their_own_wherever_they_are_computed() -> None:
    settings = BlockRolloutSettings(LADDER, context_noise=50.0)

    def rolled(positions: tuple[int, ...]) -> Tensor:
        batch = Batch(positions, text_of(1.0, len(positions)), text_of(0.0), SHAPE)
        stream = RandomStream(0, 3, positions)
        return roll_out_blocks(FrameSum(), batch, stream, settings, "rollout", CPU, False).x0

    together = rolled((0, 1))
    assert torch.equal(together, torch.cat([rolled((0,)), rolled((1,))]))
    assert not torch.equal(together[0], together[1])
