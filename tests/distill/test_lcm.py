"""LCM: where it converges, what would go wrong with the mistakes that others made, its sampler and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.config import TrainConfig
from simpletuner_dmd.config.methods.lcm import LcmConfig
from simpletuner_dmd.config.rules import combination_notices, cross_problems
from simpletuner_dmd.distill import builder
from simpletuner_dmd.distill.lcm import LCM
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.phases import ConsistencySettings, phase_grid
from simpletuner_dmd.flow import Denoiser, Schedule, TextEmbedding, sample_few_step, uniform_ladder
from simpletuner_dmd.randomness import RandomStream

from .consistency_toys import (
    MEAN,
    VARIANCE,
    TableStudent,
    data_batch,
    gaussian_teacher,
    jump_of,
    mean_at_guidance,
    trained_to_the_end,
)
from .oracles import CPU, FastStream, Spy, text_of

GRID = phase_grid(50, 5.0)


def one_step(student: TableStudent) -> tuple[float, float]:
    """Standard deviation and mean of one-step samples."""
    gain, offset = jump_of(student, GRID, 50)
    return abs(gain), offset


# --- where it converges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "solver", "substeps", "spread"),
    [(1.0, "euler", 1, 0.485), (3.0, "euler", 1, 0.472), (5.0, "euler", 1, 0.457), (17.0, "euler", 1, 0.376),
     (5.0, "euler", 4, 0.489), (17.0, "euler", 4, 0.467), (5.0, "heun", 1, 0.490), (17.0, "heun", 1, 0.414)],
)  # fmt: skip
def test_the_spread_of_one_step_samples_is_the_teachers_own(
    shift: float, solver: str, substeps: int, spread: float
) -> None:
    """Data of spread .5; what is missing is the discretisation error of the teacher's solver on the same grid."""
    grid = phase_grid(50, shift)
    student = trained_to_the_end(ConsistencySettings(grid, solver=solver, teacher_substeps=substeps))
    assert jump_of(student, grid, 50)[0] == pytest.approx(spread, abs=6e-4)


def test_a_target_by_the_frozen_teacher_would_be_seen() -> None:
    """A teacher's single jump ends in a conditional mean: hardly any spread is left."""
    good = trained_to_the_end(ConsistencySettings(GRID))
    bad = trained_to_the_end(ConsistencySettings(GRID), target="teacher")
    assert one_step(good)[0] == pytest.approx(0.457, abs=6e-4)
    assert one_step(bad)[0] < 0.01


def test_guidance_moves_the_mean_by_the_standard_form() -> None:
    for guidance in (1.0, 3.5, 6.0):
        spread, mean = one_step(trained_to_the_end(ConsistencySettings(GRID, guidance=guidance)))
        assert mean == pytest.approx(mean_at_guidance(guidance), abs=1e-4)
        assert spread == pytest.approx(0.457, abs=6e-4)
    assert mean_at_guidance(6.0) - mean_at_guidance(3.5) > 0.8, "the extra form, one higher, would be far off"


@pytest.mark.parametrize("aim", ["student", "teacher"])
def test_gradient_descent_finds_it(aim: str) -> None:
    """The production turns, Huber loss and Adam, from a student that knows nothing; and the mistake, the same way."""
    grid = phase_grid(16, 3.0)
    settings = ConsistencySettings(grid, huber_c=0.1)
    student, teacher = TableStudent(grid.sigmas), gaussian_teacher()
    method = LCM(teacher, student, student if aim == "student" else teacher, settings, CPU)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    batch = data_batch(512)
    steps = 2000
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        for turn in method.turns(step):
            assert turn.role == "student"
            for loss in turn.losses(batch, FastStream(0, step, batch.positions)):
                optimizer.zero_grad()
                loss.value.backward()
                optimizer.step()
        method.end_step()
    exact = jump_of(trained_to_the_end(settings), grid, 16)
    found = jump_of(student, grid, 16)
    if aim == "student":
        assert found == pytest.approx(exact, abs=0.02)
    else:
        assert abs(found[0]) < 0.1 < exact[0]


def test_one_update_costs_what_is_said() -> None:
    """Guided teacher twice, the target once, the student once and alone with a graph."""
    teacher, student = Spy(gaussian_teacher()), Spy(TableStudent(GRID.sigmas))
    method = LCM(teacher, student, student, ConsistencySettings(GRID, guidance=5.0), CPU)
    batch = data_batch(8)
    (turn,) = method.turns(0)
    (loss,) = turn.losses(batch, RandomStream(0, 0, batch.positions))
    assert loss.name == "consistency_loss"
    assert len(teacher.calls) == 2
    assert [call.with_grad for call in student.calls] == [False, True]
    assert loss.metrics["target_std"] > 0
    assert (method.needs_latents, method.updates("student", 7)) == (True, 7)
    with pytest.raises(AssertionError):
        method.load_state_dict({"x": 1})


# --- its sampler ------------------------------------------------------------------------------------------------------


@dataclass
class PerfectStudent:
    """f*(x, s) = m + sqrt(l / C_s) (x - (1 - s) m): the end of the flow itself."""

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        s = sigma[:, None, None, None, None]
        scale = (VARIANCE / ((1 - s) ** 2 * VARIANCE + s**2)).sqrt()
        return (x_t_BCFHW - MEAN - scale * (x_t_BCFHW - (1 - s) * MEAN)) / s


def sampled(student: Denoiser, renoise: str, steps: int = 4, shift: float = 5.0) -> tuple[Tensor, Spy]:
    spy, count = Spy(student), 20_000
    seeded = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, 1, 1, 1, generator=seeded)
    schedule = Schedule(shift, uniform_ladder(steps, shift))
    return sample_few_step(spy, noise, text_of(1.0, count), schedule, renoise,
                           lambda rung, like: torch.randn(like.shape, generator=seeded)), spy  # fmt: skip


def test_the_sampler_keeps_the_distribution_of_every_level() -> None:
    samples, spy = sampled(PerfectStudent(), "sde")
    for call in spy.calls:
        s = float(call.sigma[0])
        assert float(call.x_t.std()) == pytest.approx(((1 - s) ** 2 * VARIANCE + s**2) ** 0.5, rel=0.015)
        assert float(call.x_t.mean()) == pytest.approx((1 - s) * MEAN, abs=0.03)
    assert float(samples.std()) == pytest.approx(0.5, rel=0.015)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.015)
    assert [round(float(call.sigma[0]), 3) for call in spy.calls] == [1.0, 0.938, 0.833, 0.625]


def test_without_fresh_noise_the_distribution_widens() -> None:
    """The chord to the end of a curved trajectory: .633 instead of .5, of which the notice on `renoise` speaks."""
    assert float(sampled(PerfectStudent(), "ode")[0].std()) == pytest.approx(0.633, rel=0.015)


def test_the_undistilled_teacher_collapses_at_few_steps() -> None:
    """What makes a distilled student recognisable: one step of the teacher is the mean, without any spread."""
    spreads = [float(sampled(gaussian_teacher(), "sde", steps, 1.0)[0].std()) for steps in (1, 2, 4)]
    assert spreads[0] < 1e-4
    assert spreads[0] < spreads[1] < spreads[2] < 0.3


# --- its settings -----------------------------------------------------------------------------------------------------


def lcm(distillation: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    given = {"distillation_method": "lcm", "distillation_config": distillation or {}, **options}
    return TrainConfig.model_validate(given)


def mistakes(config: TrainConfig) -> set[str]:
    return {problem.key.removeprefix("distillation_config.") for problem in cross_problems(config)}


def notices(config: TrainConfig) -> str:
    return "\n".join(combination_notices(config))


def test_defaults() -> None:
    settings = lcm().distillation
    assert isinstance(settings, LcmConfig)
    assert settings.timesteps(5.0) == pytest.approx((1000, 937.5, 833.33, 625), abs=0.01)
    assert settings.needs_latents
    assert (settings.transition, settings.target, settings.num_ddim_timesteps) == ("sde", "student", 50)
    assert not mistakes(lcm())
    assert notices(lcm()) == ""


def test_the_target_follows_the_kind_of_student() -> None:
    assert lcm(model_type="full", use_ema=True).distillation.target == "ema"  # type: ignore[attr-defined]
    assert lcm(model_type="full").distillation.target == "student"  # type: ignore[attr-defined]
    assert lcm(use_ema=True).distillation.target == "student"  # type: ignore[attr-defined]
    assert mistakes(lcm({"target": "ema"})) == {"target"}
    assert not mistakes(lcm({"target": "ema"}, use_ema=True))


@pytest.mark.parametrize(
    ("given", "key"),
    [({"guidance_min": 3}, "guidance_min"), ({"guidance_max": 3}, "guidance_max"),
     ({"guidance_min": 5, "guidance_max": 5}, "guidance_min")],
)  # fmt: skip
def test_ranges_of_guidance_that_cannot_work(given: dict[str, Any], key: str) -> None:
    assert mistakes(lcm(given)) == {key}


def test_notices() -> None:
    assert "learns an average" in notices(lcm({"guidance_min": 3, "guidance_max": 6}))
    assert "258 to 0" in notices(lcm(flow_schedule_shift=17))
    assert "solver step" not in notices(lcm({"teacher_substeps": 2}, flow_schedule_shift=17))
    assert "caption_dropout_probability" in notices(lcm(caption_dropout_probability=0.1))
    assert "too wide" in notices(lcm({"renoise": "ode"}))
    unguided = lcm({"real_score_guidance_scale": 1}, caption_dropout_probability=0.1, validation_guidance=4)
    assert notices(unguided) == "", "a student without built-in guidance may be guided"


def test_it_is_built_from_its_settings() -> None:
    teacher, student, average = gaussian_teacher(), TableStudent(GRID.sigmas), TableStudent(GRID.sigmas)
    config = lcm(
        {"target": "ema", "num_ddim_timesteps": 20, "solver": "heun", "teacher_substeps": 3, "loss_type": "l2",
         "huber_c": 0.2, "loss_weighting": "inverse_sigma", "guidance_min": 2, "guidance_max": 4},
        use_ema=True,
    )  # fmt: skip
    parts = Ingredients(teacher, student, Schedule(5.0, uniform_ladder(4, 5.0)), config.distillation, CPU, 0.3,
                        target=average)  # fmt: skip
    method = builder("lcm")(parts)
    assert isinstance(method, LCM)
    assert (method.student, method.target) == (student, average)
    expected = ConsistencySettings(phase_grid(20, 5.0), 5.0, (2.0, 4.0), "heun", 3, "l2", 0.2, "inverse_sigma", 0.3)
    assert method.consistency.settings == expected
    plain = builder("lcm")(Ingredients(teacher, student, Schedule(5.0, (1.0,)), lcm().distillation, CPU))
    assert isinstance(plain, LCM)
    assert plain.target is student
    assert plain.consistency.settings.guidance_range is None
