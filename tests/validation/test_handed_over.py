"""A student that is one of two experts, rendered with an undistilled network for the rest of the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.flow import NoiseRange, Schedule, TextEmbedding, euler_sigmas, uniform_ladder
from simpletuner_dmd.validation.sampling import HandedOver, Sampler, reference_noise

LADDER = Schedule(5.0, uniform_ladder(4, 5.0))
SHAPE = (1, 2, 1, 2, 2)
TEXT = TextEmbedding(torch.zeros(1, 1, 1))


class Named:
    """A linear field that writes down where it was asked."""

    def __init__(self, slope: float) -> None:
        self.slope, self.sigmas = slope, []

    def velocity(self, x_t: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        self.sigmas.append(round(float(sigma[0]), 4))
        return self.slope * x_t


@pytest.mark.parametrize(("known", "own"), [(NoiseRange(0.875, 1.0), (0, 2)), (NoiseRange(0.0, 0.875), (2, 4))])
@pytest.mark.parametrize("renoise", ["sde", "ode"])
def test_each_makes_its_part_of_the_way(known: NoiseRange, own: tuple[int, int], renoise: str) -> None:
    student, other = Named(0.3), Named(0.7)
    teacher = Sampler(Schedule(5.0), "ode", 10, 1.0)
    sampler = HandedOver(Sampler(LADDER, renoise), other, teacher, known)
    made = sampler(student, TEXT, TEXT, SHAPE, 7, torch.device("cpu"))
    ladder, many = [round(sigma, 4) for sigma in LADDER.ladder], [round(s, 4) for s in euler_sigmas(10, 5.0)]
    assert student.sigmas == ladder[own[0] : own[1]]
    change = ladder[2]
    expected = [change, *(s for s in many if s < change)] if own[0] == 0 else [s for s in many if s > change]
    assert other.sigmas == expected
    assert sampler.forwards == len(student.sigmas) + len(other.sigmas)
    # By hand: both are linear, so each Euler step is a factor.
    x, fresh = reference_noise(7, SHAPE)
    for rung, sigma in enumerate(LADDER.ladder[:2] if own[0] == 0 else ()):
        x0, to = x - sigma * 0.3 * x, LADDER.ladder[rung + 1]
        x = (1 - to) * x0 + to * fresh(rung + 1, x0) if renoise == "sde" else x + (to - sigma) * 0.3 * x
    grid = [LADDER.ladder[2], *(s for s in euler_sigmas(10, 5.0) if s < LADDER.ladder[2]), 0.0] if own[0] == 0 else \
        [*(s for s in euler_sigmas(10, 5.0) if s > LADDER.ladder[2]), LADDER.ladder[2]]  # fmt: skip
    for sigma, to in zip(grid, grid[1:], strict=False):
        x = x + (to - sigma) * 0.7 * x
    for rung in range(2, 4) if own[0] else ():
        sigma, to = LADDER.ladder[rung], LADDER.next_sigma(rung)
        x0 = x - sigma * 0.3 * x
        if to == 0:
            x = x0
        else:
            x = (1 - to) * x0 + to * fresh(rung + 1, x0) if renoise == "sde" else x + (to - sigma) * 0.3 * x
    torch.testing.assert_close(made, x)


def test_a_high_noise_student_may_make_every_step() -> None:
    student, other = Named(0.3), Named(0.7)
    one = Sampler(Schedule(5.0, (1.0,)), "sde")
    HandedOver(one, other, Sampler(Schedule(5.0), "ode", 10, 1.0), NoiseRange(0.875, 1.0))(
        student, TEXT, TEXT, SHAPE, 7, torch.device("cpu")
    )
    assert student.sigmas == [1.0] and not other.sigmas
