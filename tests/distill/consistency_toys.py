"""Toys on which the fixed point of consistency training is an affine map known in closed form.

Data N(m, l) per element. The teacher's velocity is affine in x, so its Euler or Heun steps are, so the jump to the end
of a phase is their product, and a student with one affine velocity per grid point can be exactly that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.phases import Consistency, ConsistencySettings, PhaseGrid
from simpletuner_dmd.flow import Batch, TextEmbedding

from .oracles import CPU, FastStream, GaussianTeacher, Spy, number_said, text_of

SHAPE = (1, 1, 2, 2)
MEAN, VARIANCE = 0.6, 0.25
SAID_BY_NEGATIVE = 0.25
"""Not 0: an unconditional prompt of zeros, instead of the negative prompt's embedding, would go unnoticed."""


def gaussian_teacher() -> GaussianTeacher:
    """The prompt says 1, which is N(MEAN, VARIANCE); what says 0 has mean 0.1."""
    return GaussianTeacher(torch.tensor([MEAN]), torch.tensor([[VARIANCE]]), torch.tensor([0.1]))


def mean_at_guidance(guidance: float) -> float:
    """The mean of the guided teacher: v_u + g (v_c - v_u) of Gaussians of equal variance is a Gaussian's."""
    unconditional = 0.1 + SAID_BY_NEGATIVE * (MEAN - 0.1)
    return unconditional + guidance * (MEAN - unconditional)


def data_batch(count: int, shape: tuple[int, int, int, int] = SHAPE, seed: int = 0) -> Batch:
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    latents = MEAN + VARIANCE**0.5 * noise
    return Batch(tuple(range(count)), text_of(1.0, count), text_of(SAID_BY_NEGATIVE), shape, latents)


class TableStudent(nn.Module):
    """velocity = a_n x + b_n at grid point n, found by the sigma of each sample."""

    def __init__(self, sigmas: Sequence[float], channels: int = 1) -> None:
        super().__init__()
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self.gain = nn.Parameter(torch.zeros(len(sigmas)))
        self.offset = nn.Parameter(torch.zeros(len(sigmas)))

    def rungs(self, sigma_B: Tensor) -> Tensor:
        distance = (self.sigmas - sigma_B.double()[:, None]).abs()
        assert float(distance.min(dim=1).values.max()) < 1e-6, "asked at a level that is not on the grid"
        return distance.argmin(dim=1)

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        rungs = self.rungs(sigma)
        gain, offset = (table[rungs].reshape(-1, 1, 1, 1, 1) for table in (self.gain, self.offset))
        return gain * x_t_BCFHW + offset


Affine = tuple[float, float]
"""x -> first x + second."""


def velocity_at(sigma: float, mean: float) -> Affine:
    """(gain, offset) of the exact velocity of N(mean, VARIANCE)."""
    marginal = (1 - sigma) ** 2 * VARIANCE + sigma**2
    gain = (sigma - (1 - sigma) * VARIANCE) / marginal
    return gain, -gain * (1 - sigma) * mean - mean


def teacher_step(start: float, end: float, mean: float, solver: str, substeps: int) -> Affine:
    """The solver between two grid points, written down by hand."""
    a, b = 1.0, 0.0
    for step in range(substeps):
        here, there = (start + (end - start) * at / substeps for at in (step, step + 1))
        h, (gain, offset) = there - here, velocity_at(here, mean)
        step_a, step_b = 1 + h * gain, h * offset
        if solver == "heun" and there > 1e-12:
            second_gain, second_offset = velocity_at(there, mean)
            step_a = 1 + h / 2 * (gain + second_gain * step_a)
            step_b = h / 2 * (offset + second_gain * step_b + second_offset)
        a, b = step_a * a, step_a * b + step_b
    return a, b


def teacher_jumps(grid: PhaseGrid, mean: float, solver: str = "euler", substeps: int = 1) -> list[Affine]:
    """At every grid point, the teacher's way to the end of its phase: the product of the solver's steps."""
    jumps: list[Affine] = [(1.0, 0.0)]
    for index in range(1, len(grid.sigmas)):
        rest_a, rest_b = (1.0, 0.0) if index - 1 in grid.edges else jumps[index - 1]
        a, b = teacher_step(grid.sigmas[index], grid.sigmas[index - 1], mean, solver, substeps)
        jumps.append((rest_a * a, rest_a * b + rest_b))
    return jumps


def phase_end(grid: PhaseGrid, index: int) -> float:
    return grid.sigmas[max(edge for edge in grid.edges if edge < index)]


@torch.no_grad()
def set_jump(student: TableStudent, grid: PhaseGrid, index: int, jump: Affine) -> None:
    """x + (e - s)(a x + b) = jump."""
    width = phase_end(grid, index) - grid.sigmas[index]
    student.gain[index], student.offset[index] = (jump[0] - 1) / width, jump[1] / width


def jump_of(student: TableStudent, grid: PhaseGrid, index: int) -> Affine:
    width = phase_end(grid, index) - grid.sigmas[index]
    return 1 + width * float(student.gain[index].detach()), width * float(student.offset[index].detach())


def perfect_student(grid: PhaseGrid, mean: float, solver: str = "euler", substeps: int = 1) -> TableStudent:
    student = TableStudent(grid.sigmas)
    for index, jump in enumerate(teacher_jumps(grid, mean, solver, substeps)):
        if index:
            set_jump(student, grid, index, jump)
    return student


def trained_to_the_end(settings: ConsistencySettings, *, target: str = "student", first: int = 1,
                       last: int | None = None, student: TableStudent | None = None) -> TableStudent:  # fmt: skip
    """Where the production loss has its only minimum: from clean upwards, each grid point is fitted to its targets.

    target: "student", or "teacher" for the mistake of jumping with the frozen teacher.
    """
    grid = settings.grid
    student = TableStudent(grid.sigmas) if student is None else student
    consistency = Consistency(gaussian_teacher(), settings, CPU)
    batch = data_batch(16)
    for index in range(first, (grid.points if last is None else last) + 1):
        spy = Spy(student)
        with torch.no_grad():
            aim = student if target == "student" else consistency.teacher
            pair = consistency.pair(spy, aim, batch, FastStream(0, index, batch.positions), index, index)
        x, goal = spy.calls[-1].x_t.flatten().double(), pair.target.flatten().double()
        gain = float(((x - x.mean()) * goal).sum() / (x - x.mean()).pow(2).sum())
        set_jump(student, grid, index, (gain, float(goal.mean() - gain * x.mean())))
        with torch.no_grad():
            pair = consistency.pair(student, aim, batch, FastStream(0, index, batch.positions), index, index)
        assert float((pair.prediction - pair.target).abs().max()) < 2e-5, "the student can be what it is asked to be"
    return student


@dataclass
class FeatureCall:
    x_t: Tensor
    sigma: Tensor
    blocks: tuple[int, ...]
    with_grad: bool
    said: Tensor


@dataclass
class FeatureTeacher:
    """A Gaussian teacher with features to look at: tanh of fixed projections of the channels, one token per place."""

    inner: GaussianTeacher
    width: int = 8
    channels: int = 1
    calls: list[FeatureCall] = field(default_factory=list)
    velocity_calls: int = 0

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        self.velocity_calls += 1
        return self.inner.velocity(x_t_BCFHW, sigma, text)

    def features(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]) -> list[Tensor]:
        asked = FeatureCall(x_t_BCFHW.detach(), sigma, tuple(blocks), torch.is_grad_enabled(), number_said(text))
        self.calls.append(asked)
        tokens = x_t_BCFHW.flatten(2).transpose(1, 2)
        found = []
        for block in blocks:
            seeded = torch.Generator().manual_seed(block)
            weight = torch.randn(self.channels, self.width, generator=seeded)
            bias = torch.randn(self.width, generator=seeded)
            found.append(torch.tanh(tokens @ weight + bias + sigma[:, None, None]))
        return found
