"""One of two experts: its rungs, where its rollouts begin and end, and the noise levels its losses look at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.noise_levels import Beta, Draw, Listed, LogitNormal, NoiseLevels, Uniform
from simpletuner_dmd.distill.rollout import RolloutSettings, exit_rung, roll_out
from simpletuner_dmd.flow import NoiseRange, Schedule, add_noise, sample_few_step, uniform_ladder
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, FastStream, make_batch
from .test_rollout import SHAPE, TEACHER

BOUNDARY = 0.875
HIGH, LOW = NoiseRange(BOUNDARY, 1.0), NoiseRange(0.0, BOUNDARY)
SCHEDULE = Schedule(5.0, uniform_ladder(4, 5.0))  # 1, .9375 | .8333, .625


def settings_of(known: NoiseRange, source: str = "simulate", **more: object) -> RolloutSettings:
    return RolloutSettings(SCHEDULE, source=source, known=known, **more)  # type: ignore[arg-type]


def test_rungs_tile_the_ladder() -> None:
    assert HIGH.rungs(SCHEDULE.ladder) == range(2) and LOW.rungs(SCHEDULE.ladder) == range(2, 4)
    assert HIGH.rungs((1.0, BOUNDARY)) == range(2)  # a step at the boundary is the high-noise expert's
    assert 1.0 in HIGH and 0.0 in LOW and BOUNDARY not in LOW
    with pytest.raises(ValueError, match="no step of the ladder 1000 is between 0 and 875"):
        RolloutSettings(Schedule(1.0, (1.0,)), source="handover", known=LOW)
    with pytest.raises(ValueError, match="cannot start from pure noise"):
        settings_of(LOW)


@pytest.mark.parametrize(("known", "source"), [(HIGH, "simulate"), (LOW, "handover"), (LOW, "data_latent")])
def test_exits_are_the_experts_own(known: NoiseRange, source: str) -> None:
    settings = settings_of(known, source)
    exits = {exit_rung(settings, RandomStream(1, step, (0,)), "rollout") for step in range(40)}
    assert exits == set(settings.rungs)
    last = replace(settings, last_step_only=True)
    assert exit_rung(last, RandomStream(1, 0, (0,)), "rollout") == settings.rungs[-1]


def test_a_handed_over_rollout_is_the_second_half_of_sampling() -> None:
    """From the high-noise expert's clean prediction and with the same draws it is the sampler's own way."""
    settings = settings_of(LOW, "handover", last_step_only=True)
    batch, stream = make_batch(2, SHAPE), RandomStream(0, 3, (0, 1))
    first = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))

    def drawn(rung: int, like: torch.Tensor) -> torch.Tensor:
        name = {1: "high", 2: "data noise"}.get(rung, f"renoise {rung}")
        return stream.normal(SHAPE, f"rollout/{name}")

    handed = sample_few_step(TEACHER, first, batch.text, Schedule(5.0, SCHEDULE.ladder[:2]), "sde", drawn)
    whole = sample_few_step(TEACHER, first, batch.text, SCHEDULE, "sde", drawn)
    rollout = roll_out(TEACHER, replace(batch, latents_BCFHW=handed), stream, settings, "rollout", CPU, False)
    torch.testing.assert_close(rollout.x0, whole)


def test_a_handed_over_rollout_leaves_at_its_first_step() -> None:
    settings = settings_of(LOW, "handover")
    batch = replace(make_batch(2, SHAPE), latents_BCFHW=torch.randn(2, *SHAPE))
    step = next(step for step in range(40) if exit_rung(settings, RandomStream(0, step, (0, 1)), "rollout") == 2)
    stream, seen = RandomStream(0, step, (0, 1)), []

    class Spy:
        def velocity(self, x_t, sigma, text, *, routed=None):
            seen.append((x_t, sigma))
            return TEACHER.velocity(x_t, sigma, text)

    assert batch.latents_BCFHW is not None
    roll_out(Spy(), batch, stream, settings, "rollout", CPU, False)
    ((x_t, sigma_B),) = seen
    assert torch.equal(sigma_B, torch.full((2,), SCHEDULE.ladder[2]))
    noise = stream.normal(SHAPE, "rollout/data noise")
    assert torch.equal(x_t, add_noise(batch.latents_BCFHW.float(), noise, sigma_B))


@pytest.mark.parametrize(
    ("known", "source", "windows", "critic"),
    [
        (HIGH, "simulate", {0: (0.9375, 0.98), 1: (0.875, 0.98)}, (0.875, 0.999)),
        (LOW, "handover", {2: (0.625, 0.875), 3: (0.02, 0.875)}, (0.001, 0.875)),
    ],
)
def test_scores_are_compared_where_the_teacher_knows(known, source, windows, critic) -> None:
    dmd = DMD(TEACHER, TEACHER, TEACHER, DMDSettings(settings_of(known, source), timestep_shift=5.0), CPU)
    for rung, (low, high) in windows.items():
        window = dmd.score_window(rung)
        assert (window.low, window.high) == pytest.approx((low, high))
        drawn = window.sigma(torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64))
        assert bool(((drawn >= known.low) & (drawn <= known.high)).all())
        assert (dmd.critic_window(rung).low, dmd.critic_window(rung).high) == critic
    assert dmd.needs_latents == (source != "simulate")


DRAWS: list[Draw] = [Uniform(), LogitNormal(), LogitNormal(0.3, 1.4), Beta(2.0, 3.0), Beta(0.5, 0.4)]


@pytest.mark.parametrize("known", [HIGH, LOW])
@pytest.mark.parametrize("shift", [None, 5.0])
@pytest.mark.parametrize("draw", DRAWS, ids=repr)
def test_within_a_range_levels_are_as_frequent_as_without_it(
    draw: Draw, shift: float | None, known: NoiseRange
) -> None:
    """Truncated, not clamped: the draws agree with those of the whole scale that happen to fall into the range."""
    count = 20000
    stream = FastStream(0, 0, tuple(range(count)))
    inside = NoiseLevels(draw, shift, known=known).sigma(stream, (1, 1, 1, 1))
    assert bool(((inside >= known.low) & (inside <= known.high)).all())
    whole = torch.cat([
        NoiseLevels(draw, shift).sigma(FastStream(1, step, tuple(range(count))), (1, 1, 1, 1)) for step in range(4)
    ])  # fmt: skip
    expected = whole[(whole >= known.low) & (whole < known.high)]
    points = torch.linspace(0.02, 0.98, 49)
    gap = (torch.quantile(inside, points) - torch.quantile(expected, points)).abs().max()
    assert len(expected) > 500
    assert float(gap) < 0.02 * (1 + 40 / len(expected) ** 0.5) * (known.high - known.low)


def test_listed_timesteps_outside_the_range_are_left_out() -> None:
    stream = RandomStream(0, 0, tuple(range(200)))
    levels = NoiseLevels(Listed((0.95, 0.9, 0.5)), known=HIGH).sigma(stream, (1, 1, 1, 1))
    assert sorted(set(levels.tolist())) == pytest.approx([0.9, 0.95])
    with pytest.raises(ValueError, match="none of the listed timesteps"):
        NoiseLevels(Listed((0.5,)), known=HIGH).sigma(stream, (1, 1, 1, 1))
