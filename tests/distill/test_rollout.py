"""The student's own sampling: where it starts, where it leaves, and whether a perfect student samples perfectly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.distill.rollout import RolloutSettings, exit_rung, roll_out
from simpletuner_dmd.flow import Routing, Schedule, TextEmbedding, add_noise, sample_few_step
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, FastStream, GaussianTeacher, Spy, make_batch, text_of

SHAPE = (2, 1, 2, 2)
LADDER = (1.0, 0.9375, 0.83333, 0.625)
SCHEDULE = Schedule(shift=5.0, ladder=LADDER)
SETTINGS = RolloutSettings(SCHEDULE)
MEAN, VARIANCE = torch.tensor([1.0, -0.5]), 0.25
TEACHER = GaussianTeacher(MEAN, VARIANCE * torch.eye(2))


def noise_of(seed: int, count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def renoise_of(stream: RandomStream, rung: int, like: Tensor) -> Tensor:
    return stream.normal(SHAPE, f"rollout/renoise {rung}")


# --- backward simulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_grad", [True, False])
def test_one_call_keeps_a_graph_and_nothing_runs_after_the_exit(with_grad: bool) -> None:
    seen = set()
    for step in range(24):
        student = Spy(TEACHER)
        batch = make_batch(2, SHAPE)
        stream = RandomStream(0, step, batch.positions)
        rollout = roll_out(student, batch, stream, SETTINGS, "rollout", CPU, with_grad)
        rungs = [LADDER.index(round(float(call.sigma[0]), 5)) for call in student.calls]
        assert rungs == list(range(rollout.exit_rung + 1))
        assert [call.with_grad for call in student.calls] == [False] * rollout.exit_rung + [with_grad]
        seen.add(rollout.exit_rung)
    assert seen == {0, 1, 2, 3}


def test_every_rank_and_micro_batch_of_a_step_leaves_at_the_same_rung() -> None:
    counts = torch.zeros(4)
    for step in range(2000):
        rungs = {exit_rung(SETTINGS, RandomStream(1, step, positions), "rollout") for positions in ((0, 1), (2,), (9,))}
        assert len(rungs) == 1
        counts[rungs.pop()] += 1
    assert float(((counts - 500) ** 2 / 500).sum()) < 16.27  # chi^2 of 3 degrees of freedom at 0.1%


def test_last_step_only() -> None:
    settings = replace(SETTINGS, last_step_only=True)
    assert {exit_rung(settings, RandomStream(0, step, (0,)), "rollout") for step in range(20)} == {3}


def test_the_first_rung_is_entered_with_private_standard_normal_noise() -> None:
    student, batch = Spy(TEACHER), make_batch(4000, SHAPE)
    roll_out(student, batch, FastStream(0, 0, batch.positions), SETTINGS, "rollout", CPU, False)
    entry = student.calls[0].x_t
    assert student.calls[0].sigma.tolist() == [1.0] * 4000
    assert float(entry.mean()) == pytest.approx(0, abs=0.02)
    assert float(entry.std()) == pytest.approx(1, abs=0.02)
    small = make_batch(3, SHAPE)
    roll_out(student, small, RandomStream(0, 0, small.positions), SETTINGS, "rollout", CPU, False)
    assert all(not torch.equal(student.calls[-1].x_t[a], student.calls[-1].x_t[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_each_rung_is_entered_with_noise_of_its_own() -> None:
    """The input of rung i is (1 - s_i) x0 + s_i e, with another e every time."""
    settings = replace(SETTINGS, last_step_only=True)
    student, batch = Spy(TEACHER), make_batch(2, SHAPE)
    roll_out(student, batch, RandomStream(0, 0, batch.positions), settings, "rollout", CPU, False)
    drawn = [student.calls[0].x_t]
    for before, after in zip(student.calls, student.calls[1:], strict=False):
        s, to = float(before.sigma[0]), float(after.sigma[0])
        x0 = before.x_t - s * TEACHER.velocity(before.x_t, before.sigma, batch.text)
        drawn.append((after.x_t - (1 - to) * x0) / to)
    for first in range(4):
        for second in range(first):
            assert float((drawn[first] - drawn[second]).abs().max()) > 0.1
    for rung, noise in enumerate(drawn[1:], start=1):
        expected = RandomStream(0, 0, batch.positions).normal(SHAPE, f"rollout/renoise {rung}")
        assert torch.allclose(noise, expected, atol=1e-5)


def test_a_rollout_goes_where_the_sampler_goes() -> None:
    """Training and validation share one sampler: the exit's x0 equals that of the ladder cut there."""
    for renoise in ("sde", "ode"):
        for step in range(8):
            batch = make_batch(2, SHAPE)
            stream = RandomStream(0, step, batch.positions)
            settings = replace(SETTINGS, renoise=renoise)
            rollout = roll_out(TEACHER, batch, stream, settings, "rollout", CPU, False)
            sampled = sample_few_step(
                TEACHER,
                stream.normal(SHAPE, "rollout/initial noise"),
                batch.text,
                Schedule(ladder=LADDER[: rollout.exit_rung + 1]),
                renoise,
                partial(renoise_of, stream),
            )
            assert torch.equal(rollout.x0, sampled)


def test_data_latents_are_noised_to_the_exit() -> None:
    latents = noise_of(3, 2)
    settings = replace(SETTINGS, source="data_latent")
    for step in range(8):
        student, batch = Spy(TEACHER), make_batch(2, SHAPE, latents)
        stream = RandomStream(0, step, batch.positions)
        rollout = roll_out(student, batch, stream, settings, "rollout", CPU, True)
        sigma_B = torch.full((2,), LADDER[rollout.exit_rung])
        assert len(student.calls) == 1
        expected = add_noise(latents, stream.normal(SHAPE, "rollout/data noise"), sigma_B)
        assert torch.equal(student.calls[0].x_t, expected)
        assert torch.equal(student.calls[0].sigma, sigma_B)
    with pytest.raises(AssertionError, match="latents"):
        roll_out(TEACHER, make_batch(2, SHAPE), RandomStream(0, 0, (0, 1)), settings, "rollout", CPU, True)


# --- the sampler on a Gaussian --------------------------------------------------------------------------------------


@dataclass
class FlowMap:
    """The exact probability-flow map of N(m, l I), as the velocity of one straight step.

    From each rung to 0 (what a consistency student learns), or, where `to_next_rung`, to the rung below.
    """

    to_next_rung: bool

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        s = float(sigma[0])
        to = SCHEDULE.next_sigma([round(rung, 5) for rung in LADDER].index(round(s, 5))) if self.to_next_rung else 0.0
        mean = MEAN[:, None, None, None]
        stretch = (((1 - to) ** 2 * VARIANCE + to**2) / ((1 - s) ** 2 * VARIANCE + s**2)) ** 0.5
        arrived = (1 - to) * mean + stretch * (x_t_BCFHW - (1 - s) * mean)
        return (x_t_BCFHW - arrived) / (s - to)


def sample(student: FlowMap | GaussianTeacher, renoise: str, ladder: tuple[float, ...] = LADDER) -> Tensor:
    count = 8000
    return sample_few_step(student, noise_of(0, count), text_of(1.0, count), Schedule(ladder=ladder), renoise,
                           lambda rung, like: noise_of(rung, count))  # fmt: skip


@pytest.mark.parametrize(("renoise", "student"), [("sde", FlowMap(False)), ("ode", FlowMap(True))])
def test_a_perfect_student_samples_the_data(renoise: str, student: FlowMap) -> None:
    samples = sample(student, renoise)
    assert torch.allclose(samples.mean(dim=(0, 2, 3, 4)), MEAN, atol=0.012)
    assert torch.allclose(samples.std(dim=(0, 2, 3, 4)), torch.full((2,), VARIANCE**0.5), atol=0.012)


def test_a_consistency_student_keeps_the_marginal_of_every_rung() -> None:
    spy = Spy(FlowMap(False))
    count = 8000
    sample_few_step(spy, noise_of(0, count), text_of(1.0, count), SCHEDULE, "sde", lambda at, like: noise_of(at, count))
    for call in spy.calls:
        s = float(call.sigma[0])
        assert float(call.x_t[:, 0].mean()) == pytest.approx((1 - s) * 1.0, abs=0.02)
        assert float(call.x_t[:, 0].std()) == pytest.approx(((1 - s) ** 2 * VARIANCE + s**2) ** 0.5, rel=0.02)


def test_the_undistilled_teacher_collapses_on_the_same_ladder() -> None:
    """Its x0 is a mean, so the spread after 1, 2, 3, 4 rungs is .000, .017, .050, .138 where the data has .5."""
    spreads = [float(sample(TEACHER, "sde", LADDER[:rungs])[:, 0].std()) for rungs in (1, 2, 3, 4)]
    assert spreads == pytest.approx([0.0, 0.017, 0.050, 0.138], abs=0.002)
