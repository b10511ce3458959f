import math

import pytest
import torch
from torch.nn import Parameter

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.packing import pack, unpack
from simpletuner_dmd.training.schedules import SCHEDULES, build_schedule

LR = 2e-4


def optimizer(lr=LR):
    return torch.optim.SGD([Parameter(torch.zeros(1))], lr=lr)


def rates(name, updates, count=None, lr=LR, **options):
    moving = optimizer(lr)
    schedule = build_schedule(name, moving, updates=updates, **options)
    seen = []
    for _ in range(updates + 1 if count is None else count):
        seen.append(moving.param_groups[0]["lr"])
        moving.step()
        schedule.step()
    return seen


HALF = {0: 1.0, 50: 0.5, 100: 0.0}
CLOSED_FORM = {
    "linear": ({}, HALF | {25: 0.75}),
    "cosine": ({}, HALF | {25: 0.5 * (1 + math.cos(math.pi / 4))}),
    "cosine_with_min_lr": ({}, {0: 1.0, 50: 0.55, 100: 0.1}),
    "cosine_with_restarts": ({"num_cycles": 2}, {0: 1.0, 25: 0.5, 49: 0.5 * (1 + math.cos(0.98 * math.pi)), 50: 1.0,
                                                 75: 0.5, 100: 0.0}),
    "polynomial": ({"power": 2.0, "lr_end": 0.0}, {0: 1.0, 50: 0.25, 100: 0.0}),
    "constant": ({}, {0: 1.0, 50: 1.0, 100: 1.0}),
    "constant_with_warmup": ({}, {0: 1.0, 100: 1.0}),
    "sine": ({"num_cycles": 2}, {0: 1.0, 25: 0.0, 50: 1.0, 75: 0.0, 100: 1.0,
                                 12: 0.5 * (1 + math.cos(0.48 * math.pi))}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_form(name):
    options, expected = CLOSED_FORM[name]
    seen = rates(name, 100, **options)
    for update, share in expected.items():
        assert seen[update] == pytest.approx(share * LR, abs=1e-12), update


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_never_spends_an_update_at_zero_and_peaks_where_it_ends(name):
    seen = rates(name, 30, warmup=4)
    if name == "constant":
        assert seen[0] == LR
        return
    assert seen[:5] == pytest.approx([LR * share / 5 for share in (1, 2, 3, 4, 5)])
    assert max(seen) == seen[4]


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_falls_as_the_curves_of_diffusers_do(name):
    diffusers = pytest.importorskip("diffusers.optimization")
    moving = optimizer()
    theirs = diffusers.get_scheduler(name, moving, num_warmup_steps=5, num_training_steps=60, num_cycles=3, power=1.5)
    expected = []
    for _ in range(60):
        expected.append(moving.param_groups[0]["lr"])
        moving.step()
        theirs.step()
    assert rates(name, 60, 60, warmup=5, num_cycles=3, power=1.5)[5:] == pytest.approx(expected[5:], rel=1e-9)


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts", "polynomial", "sine"]
)
def test_lr_end_is_the_floor_of_every_curve_that_falls(name):
    seen = rates(name, 40, lr_end=LR / 5, num_cycles=1)
    assert min(seen) == pytest.approx(LR / 5) and max(seen) == pytest.approx(LR)


def test_each_group_keeps_its_own_rate():
    groups = [{"params": [Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-3, 1e-5)]
    moving = torch.optim.SGD(groups, lr=1.0)
    schedule = build_schedule("polynomial", moving, updates=10)
    for _ in range(10):
        moving.step()
        schedule.step()
    assert [group["lr"] for group in moving.param_groups] == pytest.approx([1e-7, 1e-7])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_gives_the_same_bits(name):
    straight = rates(name, 20, warmup=3)
    moving = optimizer()
    schedule = build_schedule(name, moving, updates=20, warmup=3)
    for _ in range(9):
        moving.step()
        schedule.step()
    saved, saved_optimizer = unpack(*pack(schedule.state_dict())), moving.state_dict()

    other = optimizer()
    again = build_schedule(name, other, updates=20, warmup=3)
    other.load_state_dict(saved_optimizer)
    again.load_state_dict(saved)
    seen = []
    for _ in range(9, 21):
        seen.append(other.param_groups[0]["lr"])
        other.step()
        again.step()
    assert seen == straight[9:]


def test_a_warm_up_longer_than_the_run_does_not_break_it():
    assert rates("cosine", 3, warmup=10) == pytest.approx([LR * share / 11 for share in (1, 2, 3, 4)])


def test_refusals():
    with pytest.raises(UserError, match="cosine_with_min_lr"):
        build_schedule("cosin", optimizer(), updates=1)
    with pytest.raises(UserError, match="between 0 and"):
        build_schedule("cosine", optimizer(1e-6), updates=1, lr_end=1e-5)
