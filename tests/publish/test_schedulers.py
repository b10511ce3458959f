"""The shipped scheduler walks the ladder, rung by rung, after a round through its config file."""

import pytest
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from simpletuner_dmd.flow import Schedule, uniform_ladder
from simpletuner_dmd.publish.schedulers import scheduler_for

LITERAL3 = (1.0, 0.757, 0.522)


def reloaded_timesteps(choice, folder, steps):
    choice.scheduler.save_pretrained(folder)
    scheduler = type(choice.scheduler).from_pretrained(folder)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas[-1] == 0
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize(
    ("shift", "ladder"),
    [
        (1.0, LITERAL3), (5.0, LITERAL3), (5.0, uniform_ladder(4, 5.0)), (8.0, uniform_ladder(4, 8.0)),
        (3.0, uniform_ladder(3, 3.0)), (5.0, (1.0, 0.9, 0.75, 0.5)), (5.0, uniform_ladder(8, 5.0)),
        (5.0, (1.0, 0.6)), (5.0, uniform_ladder(2, 5.0)), (5.0, (1.0,)), (1.0, (1.0,)),
    ],
)  # fmt: skip
def test_stock_scheduler_is_exact(tmp_path, renoise, shift, ladder):
    choice = scheduler_for(Schedule(shift, ladder), renoise)
    assert choice.exact
    assert not choice.needs_sampler_file
    assert choice.max_error < 1e-6
    assert choice.name == {"sde": "lcm", "ode": "euler"}[renoise]
    timesteps = reloaded_timesteps(choice, tmp_path, len(ladder))
    assert timesteps == pytest.approx([1000 * sigma for sigma in ladder], abs=1e-3)


def test_classes_follow_the_sampler():
    uniform = Schedule(5.0, uniform_ladder(4, 5.0))
    assert isinstance(scheduler_for(uniform, "ode").scheduler, FlowMapEulerDiscreteScheduler)
    renoising = scheduler_for(uniform, "sde").scheduler
    assert isinstance(renoising, FlowMatchEulerDiscreteScheduler)
    assert renoising.config.stochastic_sampling is True
    literal = scheduler_for(Schedule(5.0, LITERAL3), "ode").scheduler
    assert isinstance(literal, FlowMatchEulerDiscreteScheduler)
    assert literal.config.stochastic_sampling is False
    assert literal.config.shift_terminal == 0.522
    assert literal.config.shift == pytest.approx(0.967047, abs=1e-6)


def test_a_uniform_ladder_is_found_whatever_the_shift_of_the_run():
    choice = scheduler_for(Schedule(5.0, (1.0, 0.9, 0.75, 0.5)), "ode")
    assert choice.scheduler.config.shift == pytest.approx(3.0, abs=1e-9)


@pytest.mark.parametrize("ladder", [(1.0, 0.757, 0.522, 0.25), (0.995, 0.7, 0.4)])
@pytest.mark.parametrize("renoise", ["sde", "ode"])
def test_a_ladder_that_no_config_gives_is_called_so(ladder, renoise):
    choice = scheduler_for(Schedule(1.0, ladder), renoise)
    assert choice.needs_sampler_file
    assert not choice.exact
    assert 1e-3 < choice.max_error < 0.02  # the nearest stock config, with its measured difference


def test_without_a_ladder_wan_keeps_its_own_solver():
    choice = scheduler_for(Schedule(3.0), "sde")
    assert (choice.name, choice.scheduler.config.flow_shift) == ("unipc", 3.0)


def test_renoise_is_checked():
    with pytest.raises(ValueError, match="sde"):
        scheduler_for(Schedule(1.0, LITERAL3), "euler")
