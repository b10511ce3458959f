"""Which passes ask for TREAD, and that each asks with a name of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.distill.supervised import Supervised, SupervisedSettings
from simpletuner_dmd.flow import Routing, Schedule, TextEmbedding
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, make_batch

SHAPE = (2, 1, 2, 2)


@dataclass
class Asked:
    """Predicts nothing and keeps note of who asked for routing."""

    routings: list[Routing | None] = field(default_factory=list)

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        self.routings.append(routed)
        return torch.zeros_like(x_t_BCFHW)


def test_the_critics_own_passes_draw_apart_and_no_other_pass_is_routed() -> None:
    teacher, student, critic = Asked(), Asked(), Asked()
    settings = DMDSettings(RolloutSettings(Schedule(ladder=(1.0, 0.5))), critic_noise_repeats=3)
    method = DMD(teacher, student, critic, settings, CPU)
    batch = make_batch(2, SHAPE)
    stream = RandomStream(0, 0, batch.positions)
    list(method.student_losses(batch, stream))
    assert critic.routings == [None], "the score that the student follows"
    list(method.critic_losses(batch, stream))
    own = [routing for routing in critic.routings[1:] if routing is not None]
    assert len(own) == len(critic.routings) - 1 == 3
    assert len({routing.purpose for routing in own}) == 3, "two noise levels of one step would keep the same tokens"
    assert all(routing.draws is stream for routing in own)
    assert not any(teacher.routings + student.routings)


def test_supervised_passes_are_routed_by_the_streams_draws() -> None:
    student, batch = Asked(), make_batch(2, SHAPE, torch.zeros(2, *SHAPE))
    stream = RandomStream(0, 0, batch.positions)
    list(Supervised(student, SupervisedSettings(), CPU).losses(batch, stream))
    (routing,) = student.routings
    assert routing is not None and routing.draws is stream
