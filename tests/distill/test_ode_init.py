"""ODE initialisation against an affine teacher, whose Euler map is a product of matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.config.methods.blockwise import OdeInitConfig
from simpletuner_dmd.distill.method import Ingredients, Turn
from simpletuner_dmd.distill.ode_init import (
    Initialised,
    OdeInit,
    OdeInitSettings,
    build,
    regression_loss,
    teacher_trajectory,
    trajectory_sigmas,
)
from simpletuner_dmd.flow import Routing, Schedule, TextEmbedding, sample_euler, uniform_ladder
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, FastStream, GaussianTeacher, Spy, gaussian_velocity, make_batch, text_of

MEAN, NEGATIVE = torch.tensor([1.0, -0.5]), torch.tensor([0.6, -0.6])
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]])
TEACHER = GaussianTeacher(MEAN, COVARIANCE, NEGATIVE)
LITERAL = Schedule(5.0, (1.0, 0.757, 0.522))
SHAPE = (2, 6, 1, 2)
NOISE = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


class PerRung(nn.Module):
    """x0 = A x + b with its own A, b at every rung; sigma [B] or [B, F], every sample and frame at its own rung."""

    def __init__(self, ladder: tuple[float, ...]) -> None:
        super().__init__()
        self.ladder = torch.tensor(ladder)
        self.matrix = nn.Parameter(0.5 * torch.eye(2).repeat(len(ladder), 1, 1))
        self.offset = nn.Parameter(torch.zeros(len(ladder), 2))

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        sigma_BF = sigma if sigma.ndim == 2 else sigma[:, None].expand(-1, x_t_BCFHW.shape[2])
        rung_BF = (sigma_BF[..., None] - self.ladder).abs().argmin(-1)
        x0 = torch.einsum("bfij,bjfhw->bifhw", self.matrix[rung_BF], x_t_BCFHW)
        x0 = x0 + self.offset[rung_BF].movedim(-1, 1)[..., None, None]
        return (x_t_BCFHW - x0) / sigma_BF[:, None, :, None, None]


def euler_map(schedule: Schedule, steps: int, rung: int, guidance: float) -> tuple[Tensor, Tensor]:
    """(A, b) with end = A x + b for x at the rung: the teacher's remaining Euler steps multiplied out, in float64."""
    mean = NEGATIVE + guidance * (MEAN - NEGATIVE)
    sigmas = [sigma for sigma in trajectory_sigmas(schedule, steps) if sigma <= schedule.ladder[rung]]
    points = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()[:, :, None, None, None]  # 0 and the axes
    for sigma, to in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        level = torch.full((3,), sigma, dtype=torch.float64)
        points = points + (to - sigma) * gaussian_velocity(points, level, mean, COVARIANCE)
    points = points.flatten(1)
    return (points[1:] - points[0]).T.float(), points[0].float()


# --- the grid and the trajectory --------------------------------------------------------------------------------------


def test_the_grid_contains_the_ladder_and_has_its_shift() -> None:
    sigmas = trajectory_sigmas(LITERAL, 48)
    assert set(LITERAL.ladder) < set(sigmas)
    assert all(later < earlier for earlier, later in zip(sigmas, sigmas[1:], strict=False))
    assert set(sigmas) - set(LITERAL.ladder) == set(uniform_ladder(48, 5.0)) - {1.0}
    # An even ladder of the same shift is part of the grid already: no step is added, none is doubled.
    even = trajectory_sigmas(Schedule(5.0, uniform_ladder(4, 5.0)), 48)
    assert even == pytest.approx(uniform_ladder(48, 5.0)) and len(even) == 48
    # A ladder that starts below 1 is walked from its own start: that is where the student's sampler begins.
    assert trajectory_sigmas(Schedule(1.0, (0.995, 0.5)), 4) == (0.995, 0.75, 0.5, 0.25)


def test_a_trajectory_is_the_teachers_sampler_with_its_states_kept() -> None:
    text, negative = text_of(1.0, 3), text_of(0.0)
    path = teacher_trajectory(TEACHER, NOISE, text, negative, LITERAL, 20, 3.0)
    sigmas = trajectory_sigmas(LITERAL, 20)
    assert torch.equal(path.end, sample_euler(TEACHER, NOISE, text, negative, sigmas, 3.0))
    assert torch.equal(path.states[0], NOISE) and len(path.states) == 3
    for rung, state in enumerate(path.states):
        matrix, offset = euler_map(LITERAL, 20, rung, 3.0)  # guidance is in it: the mean is the guided one
        end = torch.einsum("ij,bjfhw->bifhw", matrix, state) + offset[:, None, None, None]
        torch.testing.assert_close(end, path.end, atol=2e-5, rtol=0)
    assert not torch.allclose(path.end, teacher_trajectory(TEACHER, NOISE, text, negative, LITERAL, 20, 1.0).end)


# --- the regression ---------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> OdeInitSettings:
    return OdeInitSettings(**{"schedule": LITERAL, "ode_steps": 12, "guidance_scale": 3.0, **changes})


@pytest.mark.parametrize("plan", [None, (2, False)], ids=["plain", "causal"])
@pytest.mark.parametrize("huber_c", [None, 0.05], ids=["mse", "pseudo-huber"])
def test_an_affine_student_becomes_the_teachers_euler_map_at_every_rung(
    plan: tuple[int, bool] | None, huber_c: float | None
) -> None:
    student = PerRung(LITERAL.ladder)
    method = OdeInit(TEACHER, student, settings(plan=plan, huber_c=huber_c), CPU)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    batch = make_batch(32, SHAPE)
    for step in range(400):
        optimizer.zero_grad()
        for turn in method.turns(step):
            for loss in turn.losses(batch, FastStream(0, step, batch.positions)):
                loss.value.backward()
        optimizer.step()
        decay.step()
    for rung in range(3):
        matrix, offset = euler_map(LITERAL, 12, rung, 3.0)
        assert float((student.matrix[rung].detach() - matrix).abs().max()) < 1e-3
        assert float((student.offset[rung].detach() - offset).abs().max()) < 1e-3


def test_every_block_is_the_state_of_its_own_rung_and_rungs_are_uniform() -> None:
    ladder = torch.tensor(LITERAL.ladder)
    spy = Spy(PerRung(LITERAL.ladder))
    method = OdeInit(TEACHER, spy, settings(plan=(2, True)), CPU)
    blocks, counts, pairs = ((0, 1), (1, 3), (3, 5), (5, 6)), Counter[int](), Counter[tuple[int, int]]()
    for step in range(60):
        batch, stream = make_batch(4, SHAPE), RandomStream(0, step, (0, 1, 2, 3))
        list(method.losses(batch, stream))
        call = spy.calls.pop()
        path = teacher_trajectory(
            TEACHER, stream.normal(SHAPE, "ode/noise"), batch.text, batch.negative_text, LITERAL, 12, 3.0
        )
        for sample in range(4):
            rungs = []
            for start, stop in blocks:
                (sigma,) = set(call.sigma[sample, start:stop].tolist())
                rung = int((ladder - sigma).abs().argmin())
                assert sigma == pytest.approx(LITERAL.ladder[rung])
                assert torch.equal(call.x_t[sample, :, start:stop], path.states[rung][sample, :, start:stop])
                rungs.append(rung)
            counts.update(rungs)
            pairs[rungs[0], rungs[1]] += 1
    assert sum((counts[rung] - 320) ** 2 / 320 for rung in range(3)) < 13.8  # chi-square, p = 0.001
    assert len(pairs) == 9  # independent between blocks


def test_one_trajectory_serves_several_rungs() -> None:
    teacher, student = Spy(TEACHER), Spy(PerRung(LITERAL.ladder))
    batch, stream = make_batch(8, SHAPE), RandomStream(0, 0, tuple(range(8)))
    losses = list(OdeInit(teacher, student, settings(rungs_per_trajectory=3), CPU).losses(batch, stream))
    assert len(losses) == 3
    assert len(teacher.calls) == 2 * len(trajectory_sigmas(LITERAL, 12))  # one guided trajectory, without a graph
    assert not any(call.with_grad for call in teacher.calls)
    met = torch.stack([call.sigma for call in student.calls])
    assert torch.allclose(met.sort(0, descending=True).values, torch.tensor(LITERAL.ladder)[:, None].expand(-1, 8))
    alone = [next(OdeInit(TEACHER, PerRung(LITERAL.ladder), settings(), CPU).losses(batch, stream))]
    torch.testing.assert_close(losses[0].value * 3, alone[0].value)
    with pytest.raises(ValueError, match="3 rungs to learn from, not 4"):
        settings(rungs_per_trajectory=4)


def test_the_two_losses() -> None:
    predicted, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    torch.testing.assert_close(regression_loss(predicted, target, None), torch.tensor([4.5, 8.0]))
    huber = torch.tensor([((9 + 16) ** 0.5 - 4) / 2, ((16 + 16) ** 0.5 - 4) / 2])
    torch.testing.assert_close(regression_loss(predicted, target, 4.0), huber)


@pytest.mark.parametrize("causal", [False, True])
def test_every_key_reaches_the_method(causal: bool) -> None:
    options = OdeInitConfig(
        ode_steps=7, real_score_guidance_scale=2.0, rungs_per_trajectory=2, ode_loss_type="pseudo_huber",
        ode_huber_c=0.01, num_frame_per_block=2, independent_first_frame=True, causal=causal,
    )  # fmt: skip
    student = PerRung(LITERAL.ladder)
    method = build(Ingredients(TEACHER, student, LITERAL, options, CPU))
    assert method.settings == OdeInitSettings(LITERAL, 7, 2.0, 2, 0.01, (2, True) if causal else None)
    squared = options.model_copy(update={"ode_loss_type": "l2"})
    assert build(Ingredients(TEACHER, student, LITERAL, squared, CPU)).settings.huber_c is None


# --- before another method --------------------------------------------------------------------------------------------


class EveryOther:
    """A method with a critic, whose student moves at even steps of its own count."""

    needs_latents = True

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("critic" if step % 2 else "student", lambda batch, stream: [])

    def updates(self, role: str, steps: int) -> int:
        return {"student": (steps + 1) // 2, "critic": steps // 2}[role]

    def end_step(self) -> None:
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        return {"of": "the second"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def test_initialisation_comes_first_and_the_other_method_starts_at_its_own_zero() -> None:
    then = EveryOther()
    method = Initialised(OdeInit(TEACHER, PerRung(LITERAL.ladder), settings(), CPU), 3, then)
    roles = [[turn.role for turn in method.turns(step)] for step in range(7)]
    assert roles == [["student"]] * 3 + [["student"], ["critic"], ["student"], ["critic"]]
    for steps in range(9):
        for role in ("student", "critic"):
            counted = sum(turn.role == role for step in range(steps) for turn in method.turns(step))
            assert method.updates(role, steps) == counted
    method.end_step()
    method.load_state_dict(method.state_dict())
    assert then.ended and then.loaded == {"of": "the second"} and method.needs_latents
