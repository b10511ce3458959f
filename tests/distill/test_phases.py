"""The grid, the solver and the phased consistency loss, on data whose fixed point is known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from simpletuner_dmd.distill.phases import (
    Consistency,
    ConsistencyPair,
    ConsistencySettings,
    PhaseGrid,
    consistency_distance,
    end_of_phase,
    jump,
    loss_weight,
    phase_grid,
    solve,
)
from simpletuner_dmd.flow import Batch, shifted
from simpletuner_dmd.randomness import RandomStream

from .consistency_toys import (
    MEAN,
    SAID_BY_NEGATIVE,
    SHAPE,
    VARIANCE,
    TableStudent,
    data_batch,
    gaussian_teacher,
    jump_of,
    mean_at_guidance,
    perfect_student,
    teacher_jumps,
    teacher_step,
    trained_to_the_end,
)
from .oracles import CPU, FastStream, Spy, text_of

# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_of_the_dual_expert_paper() -> None:
    """Its s_i is our point i + 1, its prev_i our point i; its prev_0 = s(.001) = .0167 is 0 here."""
    sigmas = phase_grid(50, 17.0).sigmas
    assert (sigmas[0], sigmas[50], len(sigmas)) == (0.0, 1.0, 51)
    for index, value in ((36, 0.97764), (35, 0.97541), (1, 0.2576), (39, 0.98368), (38, 0.98176)):
        assert sigmas[index] == pytest.approx(value, abs=6e-6 if index > 1 else 6e-5)
    assert float(shifted(0.001, 17.0)) == pytest.approx(0.0167, abs=5e-5)


def test_half_precision_could_not_tell_the_levels_apart() -> None:
    """What a network is asked is fp32; in bf16 only 39 of the 50 levels would be left."""
    sigmas = torch.tensor(phase_grid(50, 17.0).sigmas[1:], dtype=torch.float64)
    assert len(sigmas.to(torch.bfloat16).unique()) == 39
    spy = Spy(gaussian_teacher())
    settings = ConsistencySettings(phase_grid(50, 17.0))
    batch = data_batch(4000, (1, 1, 1, 1))
    Consistency(spy, settings, CPU).pair(
        gaussian_teacher(), gaussian_teacher(), batch, FastStream(0, 0, batch.positions)
    )
    asked = spy.calls[0].sigma
    assert asked.dtype == torch.float32
    assert len(asked.unique()) == 50


def test_the_nearest_points_are_moved_onto_the_edges() -> None:
    plain, grid = phase_grid(50, 5.0), phase_grid(50, 5.0, [0.9, 0.8333])
    moved = [index for index in range(51) if grid.sigmas[index] != plain.sigmas[index]]
    assert [grid.sigmas[index] for index in moved] == [0.8333, 0.9]
    assert grid.edges == (0, *moved, 50)
    for index in moved:
        others = [abs(sigma - grid.sigmas[index]) for sigma in plain.sigmas]
        # nearest in u, where the points are evenly spaced
        assert others[index] <= 1.2 * min(others)
    assert all(lower < upper for lower, upper in zip(grid.sigmas, grid.sigmas[1:], strict=False))


@pytest.mark.parametrize("edges", [[0.5, 0.51], [0.001], [0.9999]])
def test_edges_without_a_point_of_their_own_are_refused(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="too few"):
        phase_grid(8, 1.0, edges)


def test_jumps_start_everywhere_and_go_towards_clean_within_their_phase() -> None:
    grid = PhaseGrid((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0, 2, 5))
    jumps = grid.jumps((torch.arange(5) + 0.5) / 5)
    assert jumps.start_B.tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert jumps.partner_B.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert jumps.end_B.tolist() == [0.0, 0.0, 0.4, 0.4, 0.4]
    assert jumps.start_B.dtype == torch.float64
    assert grid.jumps(torch.tensor([0.0, 0.999]), 3, 4).start_B.tolist() == [0.6, 0.8]
    drawn = [grid.level_within(jumps, torch.full((5,), u)).tolist() for u in (0.0, 0.34, 0.999)]
    assert drawn == [[0.2, 0.2, 0.6, 0.6, 0.6], [0.2, 0.2, 0.8, 0.8, 0.8], [0.4, 0.4, 1.0, 1.0, 1.0]]


# --- the solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "substeps"), [("euler", 1), ("euler", 4), ("heun", 1), ("heun", 2)])
def test_the_solver_against_one_written_by_hand(solver: str, substeps: int) -> None:
    """Two samples at different places; the second ends at 0, where Heun's last step is Euler's."""
    teacher = gaussian_teacher()
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    start, end = torch.tensor([0.8, 0.3]).double(), torch.tensor([0.5, 0.0]).double()
    spy = Spy(teacher)
    found = solve(lambda x, s: spy.velocity(x, s, text_of(1.0, 2)), x, start, end, solver, substeps)
    for sample in range(2):
        a, b = teacher_step(float(start[sample]), float(end[sample]), MEAN, solver, substeps)
        assert torch.allclose(found[sample], a * x[sample] + b, atol=2e-6)
    assert len(spy.calls) == substeps * (1 if solver == "euler" else 2)


def test_a_heun_step_to_clean_costs_one_call() -> None:
    spy = Spy(gaussian_teacher())
    x, level = torch.randn(2, *SHAPE), torch.full((2,), 0.1, dtype=torch.float64)
    solve(lambda x, s: spy.velocity(x, s, text_of(1.0, 2)), x, level, torch.zeros_like(level), "heun", 1)
    assert len(spy.calls) == 1


@pytest.mark.parametrize(("points", "error"), [(10, 0.069), (20, 0.036), (40, 0.018), (80, 0.0092), (160, 0.0046)])
def test_the_teachers_rollout_nears_the_flow_as_one_over_n(points: int, error: float) -> None:
    gain = teacher_jumps(phase_grid(points, 1.0), MEAN)[-1][0]
    assert math.sqrt(VARIANCE) - gain == pytest.approx(error, rel=0.04)


# --- distance and weights ---------------------------------------------------------------------------------------------


def test_distances() -> None:
    seeded = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, *SHAPE, generator=seeded) for _ in range(2))
    r = (a - b).double()
    huber = ((r**2 + 0.5**2).sqrt() - 0.5).flatten(1).mean(1)
    assert torch.allclose(consistency_distance(a, b, "huber", 0.5).double(), huber, rtol=1e-5)
    assert torch.allclose(consistency_distance(a, b, "l2", 0.5).double(), (r**2).flatten(1).mean(1), rtol=1e-5)
    assert float(consistency_distance(a, a, "huber", 0.001).max()) == 0
    tiny = consistency_distance(a, a + 1e-4, "huber", 1.0)
    assert torch.allclose(tiny, torch.full((3,), 0.5e-8), rtol=1e-2), "no cancellation below c"


def test_weights() -> None:
    jumps = PhaseGrid((0.0, 0.25, 0.5, 1.0), (0, 1, 3)).jumps(torch.tensor([0.0, 0.4, 0.9]))
    assert loss_weight(jumps, "none").tolist() == [1, 1, 1]
    assert loss_weight(jumps, "inverse_sigma").tolist() == pytest.approx([4, 4, 1 / 0.75])
    assert loss_weight(jumps, "inverse_interval").tolist() == pytest.approx([4, 4, 2])


@pytest.mark.parametrize("weighting", ["none", "inverse_sigma", "inverse_interval"])
def test_the_loss_is_a_weighted_mean_over_samples(weighting: str) -> None:
    """Of the distance and of what is added to it, both weighted alike."""
    grid = phase_grid(10, 5.0, [0.8])
    settings = ConsistencySettings(grid, loss_type="l2", loss_weighting=weighting)
    _, _, _, pair, _ = spied(settings)
    extra_B = torch.arange(16.0)
    jumps, expected = pair.jumps, 0.0
    for sample in range(16):
        weight = {
            "none": 1.0,
            "inverse_sigma": 1 / float(jumps.start_B[sample] - jumps.end_B[sample]),
            "inverse_interval": 1 / float(jumps.start_B[sample] - jumps.partner_B[sample]),
        }[weighting]
        distance = (pair.prediction[sample] - pair.target[sample]).pow(2).mean().item()
        expected += weight * (distance + sample) / 16
    found = Consistency(gaussian_teacher(), settings, CPU).loss(pair, extra_B)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --- the loss ---------------------------------------------------------------------------------------------------------

GRIDS = {"lcm": phase_grid(50, 5.0), "pcm": phase_grid(50, 5.0, [0.625, 0.8333, 0.9375]),
         "dcm": phase_grid(50, 17.0, [0.97541])}  # fmt: skip


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize(("solver", "substeps", "guidance"), [("euler", 1, 3.0), ("euler", 3, 1.0), ("heun", 1, 1.0)])
def test_the_fixed_point_is_the_teachers_own_solver(name: str, solver: str, substeps: int, guidance: float) -> None:
    """Fitted point by point to the production targets, the student's jumps are the products of the solver's steps."""
    grid = GRIDS[name]
    settings = ConsistencySettings(grid, guidance=guidance, solver=solver, teacher_substeps=substeps)
    student = trained_to_the_end(settings)
    expected = teacher_jumps(grid, mean_at_guidance(guidance), solver, substeps)
    for index in range(1, grid.points + 1):
        assert jump_of(student, grid, index) == pytest.approx(expected[index], abs=2e-5), index
    # and the phases one after another are the teacher's whole rollout
    a, b = 1.0, 0.0
    for edge in reversed(grid.edges[1:]):
        step_a, step_b = jump_of(student, grid, edge)
        a, b = step_a * a, step_a * b + step_b
    whole = teacher_jumps(PhaseGrid(grid.sigmas, (0, grid.points)), mean_at_guidance(guidance), solver, substeps)[-1]
    assert (a, b) == pytest.approx(whole, abs=3e-5)


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("weighting", ["none", "inverse_sigma", "inverse_interval"])
def test_at_the_fixed_point_loss_and_gradient_vanish_and_nowhere_near(name: str, weighting: str) -> None:
    grid = GRIDS[name]
    settings = ConsistencySettings(grid, guidance=3.0, loss_type="l2", loss_weighting=weighting)
    consistency = Consistency(gaussian_teacher(), settings, CPU)
    student = perfect_student(grid, mean_at_guidance(3.0))
    batch = data_batch(256)
    losses = []
    for change in (0.0, 0.01):
        student.gain.data += change
        loss = consistency.loss(consistency.pair(student, student, batch, FastStream(0, 0, batch.positions)))
        gradient = torch.autograd.grad(loss, [student.gain, student.offset])
        losses.append((loss.item(), max(float(g.abs().max()) for g in gradient)))
    (at, slope_at), (near, slope_near) = losses
    assert at < 1e-9
    assert near > 1000 * at
    assert slope_at < 1e-5
    assert slope_near > 100 * slope_at


def spied(
    settings: ConsistencySettings, step: int = 0, count: int = 16
) -> tuple[Spy, Spy, Spy, ConsistencyPair, Batch]:
    """Teacher, student and target (which both stand still: their velocity is 0), a pair of them, and its batch."""
    teacher, student, target = Spy(gaussian_teacher()), Spy(TableStudent(settings.grid.sigmas)), Spy(
        TableStudent(settings.grid.sigmas))  # fmt: skip
    batch = data_batch(count)
    consistency = Consistency(teacher, settings, CPU)
    pair = consistency.pair(student, target, batch, RandomStream(0, step, batch.positions))
    return teacher, student, target, pair, batch


def test_who_is_asked_what() -> None:
    """Teacher at the start, with prompt and negative; target at the partner, less noisy; student at the start."""
    grid = phase_grid(10, 5.0, [0.8])
    teacher, student, target, pair, batch = spied(ConsistencySettings(grid, guidance=3.0))
    assert [call.said.tolist() for call in teacher.calls] == [[1.0] * 16, [SAID_BY_NEGATIVE] * 16]
    (asked,), (aimed,) = student.calls, target.calls
    assert asked.with_grad
    assert not any(call.with_grad for call in (*teacher.calls, aimed))
    assert not any(call.routed for call in (*teacher.calls, aimed, asked))
    start, partner, end = (level.float() for level in (pair.jumps.start_B, pair.jumps.partner_B, pair.jumps.end_B))
    for call in (*teacher.calls, asked):
        assert torch.equal(call.sigma, start)
        assert torch.equal(call.x_t, teacher.calls[0].x_t)
    on_the_way = partner > end
    assert 0 < int(on_the_way.sum()) < 16, "the draw has both kinds"
    assert torch.equal(aimed.sigma, partner[on_the_way])
    assert bool((partner < start).all())
    assert aimed.said.tolist() == asked.said[on_the_way].tolist() == [1.0] * len(aimed.said)
    noise = RandomStream(0, 0, batch.positions).normal(SHAPE, "consistency/noise")
    s = start[:, None, None, None, None]
    assert torch.allclose(asked.x_t, (1 - s) * batch.latents_BCFHW + s * noise)


def test_prediction_and_target_are_jumped_to_states_not_velocities() -> None:
    grid = phase_grid(10, 5.0, [0.8])
    teacher, student, target, pair, _ = spied(ConsistencySettings(grid))
    x, jumps = student.calls[0].x_t, pair.jumps
    s, p, e = (level.float()[:, None, None, None, None] for level in (jumps.start_B, jumps.partner_B, jumps.end_B))
    assert torch.allclose(pair.prediction, x, atol=1e-6), "this student's velocity is 0"
    velocity = gaussian_teacher().velocity(x, jumps.start_B.float(), text_of(1.0, 16))
    assert torch.allclose(pair.target, x + (p - s) * velocity, atol=1e-6)
    student.inner.offset.data += 1.0
    target.inner.offset.data += 0.5
    again = Consistency(teacher, ConsistencySettings(grid), CPU).pair(
        student, target, data_batch(16), RandomStream(0, 0, tuple(range(16)))
    )
    assert torch.allclose(again.prediction, x + (e - s), atol=1e-6)
    assert torch.allclose(again.target, x + (p - s) * velocity + 0.5 * (e - p), atol=1e-6)


def test_a_partner_at_the_end_of_its_phase_is_the_target_to_the_bit() -> None:
    grid = phase_grid(10, 5.0)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    spy = Spy(TableStudent(grid.sigmas))
    spy.inner.offset.data += 1.0
    first = grid.jumps(torch.zeros(3))
    assert end_of_phase(spy, x, first, text_of(1.0, 3)) is x
    assert spy.calls == []
    mixed = grid.jumps(torch.tensor([0.0, 0.5, 0.0]))
    found = end_of_phase(spy, x, mixed, text_of(1.0, 3))
    assert torch.equal(found[[0, 2]], x[[0, 2]])
    assert torch.allclose(found[1], x[1] - mixed.partner_B[1].float())
    assert spy.calls[0].sigma.tolist() == pytest.approx([float(mixed.partner_B[1])])
    stays = torch.full((3,), 0.4, dtype=torch.float64)
    assert torch.equal(jump(gaussian_teacher(), x, stays, stays, text_of(1.0, 3)), x), "f(x, end) = x"
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(jump(gaussian_teacher(), x, zero, zero, text_of(1.0, 3)), x)


def test_only_the_prediction_carries_a_graph() -> None:
    grid = phase_grid(10, 5.0)
    student = TableStudent(grid.sigmas)
    batch = data_batch(16)
    pair = Consistency(gaussian_teacher(), ConsistencySettings(grid), CPU).pair(
        student, student, batch, RandomStream(0, 0, batch.positions)
    )
    assert pair.prediction.requires_grad
    assert not pair.target.requires_grad
    assert not pair.detached().prediction.requires_grad


@pytest.mark.parametrize(("solver", "substeps", "guidance", "teacher_calls"),
                         [("euler", 1, 5.0, 2), ("euler", 4, 5.0, 8), ("heun", 2, 5.0, 8), ("euler", 2, 1.0, 2),
                          ("euler", 1, 0.0, 1)])  # fmt: skip
def test_forwards_of_a_micro_batch(solver: str, substeps: int, guidance: float, teacher_calls: int) -> None:
    settings = ConsistencySettings(phase_grid(10, 5.0), guidance=guidance, solver=solver, teacher_substeps=substeps)
    teacher, student, target, _, _ = spied(settings)
    assert (len(teacher.calls), len(student.calls), len(target.calls)) == (teacher_calls, 1, 1)


def test_drawn_guidance_is_each_samples_own_and_in_the_standard_form() -> None:
    settings = ConsistencySettings(phase_grid(10, 1.0), guidance=1.0, guidance_range=(2.0, 8.0))
    teacher, student, _, pair, batch = spied(settings)
    assert len(teacher.calls) == 2
    drawn = 2 + 6 * RandomStream(0, 0, batch.positions).uniform("consistency/guidance")
    assert len(drawn.unique()) == 16
    x, jumps = student.calls[0].x_t, pair.jumps
    for sample in range(16):
        # this student stands still, so the target is the teacher's step
        a, b = teacher_step(float(jumps.start_B[sample]), float(jumps.partner_B[sample]),
                            mean_at_guidance(float(drawn[sample])), "euler", 1)  # fmt: skip
        assert torch.allclose(pair.target[sample], a * x[sample] + b, atol=1e-5)


def test_captions_are_dropped_only_where_no_guidance_is_built_in() -> None:
    grid = phase_grid(10, 5.0)
    dropping = ConsistencySettings(grid, guidance=1.0, caption_dropout_probability=1.0)
    teacher, student, target, _, _ = spied(dropping)
    for spy in (teacher, student, target):
        assert set(spy.calls[0].said.tolist()) == {SAID_BY_NEGATIVE}
    teacher, student, _, _, _ = spied(replace(dropping, guidance=3.0))
    assert set(student.calls[0].said.tolist()) == {1.0}
    _, student, _, _, _ = spied(replace(dropping, guidance_range=(2.0, 3.0)))
    assert set(student.calls[0].said.tolist()) == {1.0}
