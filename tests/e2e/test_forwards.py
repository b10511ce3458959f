"""What a step costs: every forward of the transformers is counted on a real run."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from simpletuner_dmd.distill.discriminator import AdversarySettings, VideoHead
from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.distill.weak_to_strong import WeakToStrong
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.roles import build_roles
from tests.e2e.conftest import ProjectMaker
from tests.wan.tiny import LORA, batch_of, tiny_wan

RUNGS = 3


def count_forwards(project: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Per training step, one entry for each forward: whether it carried a graph."""
    from simpletuner_dmd.training.trainer import Trainer

    steps: list[list[bool]] = []
    forward, step = WanTransformer3DModel.forward, Trainer._train_step

    def counted(model: WanTransformer3DModel, *args: Any, **kwargs: Any) -> Any:
        if steps:
            steps[-1].append(torch.is_grad_enabled())
        return forward(model, *args, **kwargs)

    def opened(trainer: Trainer) -> dict[str, float]:
        steps.append([])
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(WanTransformer3DModel, "forward", counted)
        patch.setattr(Trainer, "_train_step", opened)
        assert project.train() == 0
    steps[-1] = steps[-1][: len(steps[0]) + 10]  # what follows the last step is the export's check
    return steps


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_full_cycle(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, guidance: float, checkpointing: bool
) -> None:
    cycle, steps = 5, 11
    project = make_project(
        max_train_steps=steps, gradient_checkpointing=checkpointing,
        distillation={"generator_update_interval": cycle, "real_score_guidance_scale": guidance},
    )  # fmt: skip
    counted = count_forwards(project, monkeypatch)
    rows = project.rows("step")
    teacher = 1 if guidance == 1.0 else 2
    for number, forwards in enumerate(counted[:-1]):  # the last is followed by the export
        if number % cycle == 0:
            rung = int(rows[number]["exit_rung"])
            # Rungs up to the exit (only the last with a graph), the two scores, and the critic's own forward: the
            # rollout is reused for it.
            assert forwards == [False] * rung + [True] + [False] * (teacher + 1) + [True]
        else:
            assert 2 <= len(forwards) <= RUNGS + 1
            assert forwards == [False] * (len(forwards) - 1) + [True]
    # Rungs after the exit are not run: over the steps every length occurs.
    assert {len(forwards) for number, forwards in enumerate(counted[:-1]) if number % cycle} == {2, 3, 4}


# --- the budget of a student update -----------------------------------------------------------------------------------


@dataclass
class Work:
    """What a network did, in passes of the whole network: every block counts as its share."""

    forwards: float = 0.0
    recomputed: float = 0.0
    backwards: float = 0.0


@contextmanager
def watched(network: nn.Module) -> Iterator[Work]:
    """Hooks on the blocks: each forward, each that backward runs again, each gradient that comes through."""
    work, blocks = Work(), list(network.blocks)  # type: ignore[arg-type]
    share = 1 / len(blocks)

    def through(gradient: torch.Tensor) -> None:
        work.backwards += share

    def before(block: nn.Module, arguments: Any) -> None:
        # A recompute stops as soon as it has what backward needs, before the block's end: count where it starts.
        if torch._C._current_graph_task_id() == -1:
            work.forwards += share
        else:
            work.recomputed += share

    def after(block: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        if output.requires_grad and torch._C._current_graph_task_id() == -1:
            output.register_hook(through)

    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def cost_of_a_student_update(
    *, checkpointing: bool = False, gan: bool = False, detach: bool = False, weak: WeakToStrong | None = None
) -> Work:
    """Of the network, per student update, at four rungs and five critic updates; the mean over all exits is exact."""
    interval, rungs = 5, 4
    network = tiny_wan()
    roles = build_roles(network, adapters={"student": LORA, "critic": LORA}, gradient_checkpointing=checkpointing)
    critic = roles.critic
    assert critic is not None
    head = VideoHead(critic.width, (0, critic.depth - 1)) if gan else None
    if head is not None:
        nn.init.ones_(head.logit.weight)
        roles.add_head("critic", head)
    settings = DMDSettings(
        RolloutSettings(Schedule(ladder=(1.0, 0.9375, 0.8333, 0.625))), generator_update_interval=interval,
        adversary=AdversarySettings(weight=0.1, detach_backbone=detach) if gan else None,
        weak_to_strong=weak or WeakToStrong(),
    )  # fmt: skip
    method = DMD(
        roles.teacher, roles.student, critic, settings, torch.device("cpu"),
        weak=WanDenoiser(network, critic.switch, "critic"), head=head, blocks=(0, critic.depth - 1) if gan else (),
    )  # fmt: skip
    batch, costs = batch_of(1), defaultdict(list)
    step = 0
    while len(costs) < 2 * rungs:  # every exit, in steps with a student's turn and without
        stream = RandomStream(0, step, batch.positions)
        with watched(network) as work:
            for turn in method.turns(step):
                moving = [parameter for _, parameter in roles.parameters[turn.role]]
                for loss in turn.losses(batch, stream):
                    loss.value.backward(inputs=moving)
        method.end_step()
        costs[method.is_student_step(step), stream.shared_index(rungs, "rollout/exit")].append(work)
        step += 1
    total = Work()
    for (with_student, _), works in costs.items():
        assert all(work == works[0] for work in works), "the cost of a step follows from its exit"
        steps = (1 if with_student else interval - 1) / rungs
        total.forwards += steps * works[0].forwards
        total.recomputed += steps * works[0].recomputed
        total.backwards += steps * works[0].backwards
    return total


def test_the_budget() -> None:
    """5 rollouts of 2.5 calls, 3 scores, 5 critic forwards; and 1 + 5 backwards, which checkpointing runs forward."""
    plain, checkpointed = (cost_of_a_student_update(checkpointing=checkpointing) for checkpointing in (False, True))
    assert plain == Work(pytest.approx(20.5), 0.0, pytest.approx(6.0))
    assert checkpointed.forwards == pytest.approx(20.5)
    assert checkpointed.forwards + checkpointed.recomputed == pytest.approx(26.5, rel=0.02)
    assert checkpointed.backwards == pytest.approx(6.0)


@pytest.mark.parametrize("mode", ["linear", "exact-both"])
def test_weak_to_strong_costs_nothing(mode: str) -> None:
    work = cost_of_a_student_update(weak=WeakToStrong(0.25, mode))
    assert (work.forwards, work.backwards) == (pytest.approx(20.5), pytest.approx(6.0))


def test_the_price_of_the_adversarial_term() -> None:
    """One pass there and back in the student's turn, two in each critic's (forward only if detached)."""
    work, detached = cost_of_a_student_update(gan=True), cost_of_a_student_update(gan=True, detach=True)
    assert (work.forwards, work.backwards) == (pytest.approx(31.5), pytest.approx(17.0))
    assert (detached.forwards, detached.backwards) == (pytest.approx(31.5), pytest.approx(7.0))


def test_peak_memory_is_reported_and_modest(make_project: ProjectMaker) -> None:
    project = make_project()
    assert project.train() == 0
    peaks = [row["peak_bytes"] for row in project.rows("step")]
    assert peaks == sorted(peaks)
    assert 50e6 < peaks[-1] < 4e9
