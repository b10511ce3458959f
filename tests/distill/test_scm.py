"""The continuous-time consistency loss: its identity, its derivative, its gradient, and where it leads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.noise_levels import Listed, LogitNormal
from simpletuner_dmd.distill.scm import (
    ConsistencySettings,
    consistency_loss,
    derivative_by_difference,
    derivative_by_jvp,
    normalised_tangent,
    raw_tangent,
)
from simpletuner_dmd.flow import Denoiser, TextEmbedding, add_noise, guided_velocity
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan.roles import build_roles
from tests.wan import tiny

from .oracles import CPU, AffineCritic, FastStream, GaussianTeacher, Spy, make_batch, text_of

SHAPE = (2, 1, 2, 2)
# Exact in binary, so that the identity can be held to double precision although the oracle's means are fp32.
MEAN, NEGATIVE = torch.tensor([1.0, -0.5]), torch.tensor([0.625, -0.625])
VARIANCE = torch.tensor([0.5, 0.25])
TEACHER = GaussianTeacher(MEAN, torch.diag(VARIANCE), NEGATIVE)
LEVELS = torch.tensor([0.05, 0.3, 0.6, 0.95])


def guided_mean(guidance: float) -> Tensor:
    """With equal covariances the guided teacher is the Gaussian around m_u + g (m_c - m_u)."""
    return NEGATIVE + guidance * (MEAN - NEGATIVE)


def end_point(x_s: Tensor, sigma_B: Tensor, mean: Tensor) -> Tensor:
    """f*(x, s): where the probability-flow ODE of N(mean, diag(VARIANCE)) takes x."""
    s = sigma_B.reshape(-1, 1, 1, 1, 1)
    variance = VARIANCE.to(x_s.dtype)[:, None, None, None]
    centre = mean.to(x_s.dtype)[:, None, None, None]
    return centre + (variance / ((1 - s) ** 2 * variance + s**2)).sqrt() * (x_s - (1 - s) * centre)


@dataclass
class PerfectStudent:
    """G* = (x - f*) / s."""

    mean: Tensor

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        return (x_t_BCFHW - end_point(x_t_BCFHW, sigma, self.mean)) / sigma.reshape(-1, 1, 1, 1, 1)


class Network(nn.Module):
    """A small network that mixes input, noise level and text nonlinearly."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 8))

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        said = text.rows_BLD[:, 0, :1].to(x_t_BCFHW.dtype)
        return self.layers(torch.cat([x_t_BCFHW.flatten(1), 3 * sigma[:, None], said], dim=1)).view_as(x_t_BCFHW)


def draw(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def latents(count: int) -> Tensor:
    return MEAN[:, None, None, None] + VARIANCE.sqrt()[:, None, None, None] * draw(0, count)


# --- the identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_map_to_the_end_of_the_ode_has_no_tangent(guidance: float) -> None:
    """G* = v_T - s dG*/ds in double precision, by both derivatives."""
    x_s, sigma_B = 2 * draw(1).double(), LEVELS.double()
    student, text = PerfectStudent(guided_mean(guidance)), text_of(1.0, 4)
    target = text_of(1.0, 4), text_of(0.0)
    conditional, unconditional = (TEACHER.velocity(x_s, sigma_B, said.expand(4)) for said in target)
    velocity = unconditional + guidance * (conditional - unconditional)
    own = student.velocity(x_s, sigma_B, text)
    for derivative, tolerance in (
        (derivative_by_jvp(student, x_s, sigma_B, velocity, text), 2e-14),
        (derivative_by_difference(student, x_s, sigma_B, velocity, text, 1e-4), 5e-7),  # measured: 1.4e-7
        (derivative_by_difference(student, x_s, sigma_B, velocity, text, 1e-5), 5e-9),  # and 1.5e-9, as h^2
    ):
        assert float(raw_tangent(own, velocity, derivative, sigma_B).abs().max()) < tolerance
        assert float(raw_tangent(own, velocity, -derivative, sigma_B).abs().max()) > 0.05


@pytest.mark.parametrize("level", [0.0, 1e-5, 1 - 1e-5, 1.0])
def test_the_difference_is_one_sided_where_the_scale_ends(level: float) -> None:
    student, text = Network().double(), text_of(1.0, 4)
    x_s, direction, sigma_B = draw(1).double(), draw(2).double(), torch.full((4,), level, dtype=torch.float64)
    spy = Spy(student)
    found = derivative_by_difference(spy, x_s, sigma_B, direction, text, 1e-4)
    assert all(0 <= float(call.sigma.min()) <= float(call.sigma.max()) <= 1 for call in spy.calls)
    exact = derivative_by_jvp(student, x_s, sigma_B, direction, text)
    assert float((found - exact).abs().max()) < 1e-3 * float(exact.abs().max())


def test_at_no_noise_the_target_is_the_teachers_velocity() -> None:
    velocity, target, derivative = draw(0), draw(1), draw(2)
    assert torch.equal(raw_tangent(velocity, target, derivative, torch.zeros(4)), velocity - target)


# --- the derivative ---------------------------------------------------------------------------------------------------


def test_both_derivatives_agree_and_include_input_and_noise_level() -> None:
    student, text = Network(), text_of(1.0, 4)
    x_s, direction = draw(1), draw(2)
    exact = derivative_by_jvp(student, x_s, LEVELS, direction, text)
    found = derivative_by_difference(student, x_s, LEVELS, direction, text, 1e-3)
    assert float((found - exact).norm() / exact.norm()) < 1e-3
    x_leaf, sigma_leaf = x_s.clone().requires_grad_(), LEVELS.clone().requires_grad_()
    probe = draw(3)
    output = (student.velocity(x_leaf, sigma_leaf, text) * probe).sum()
    by_input, by_level = torch.autograd.grad(output, (x_leaf, sigma_leaf))
    expected = float((by_input * direction).sum() + by_level.sum())
    assert float((exact * probe).sum()) == pytest.approx(expected, rel=1e-4)
    assert abs(float(by_level.sum())) > 0.05 * abs(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_stock_wan_both_derivatives_agree(checkpointing: bool) -> None:
    """A LoRA student on a shared base, through diffusers' own attention. 1e-4 leaves (1000 h)^2 / 6 = 0.17%."""
    roles = build_roles(
        tiny.tiny_wan(), adapters={"student": tiny.LORA, "critic": tiny.LORA}, gradient_checkpointing=checkpointing
    )
    tiny.wake(roles)
    x_s, text, sigma_B = tiny.latents(), tiny.prompts(), torch.tensor([0.7, 0.4])
    direction = roles.teacher.velocity(x_s, sigma_B, text).detach()
    exact = derivative_by_jvp(roles.student, x_s, sigma_B, direction, text)
    found = derivative_by_difference(roles.student, x_s, sigma_B, direction, text, 1e-4)
    assert not exact.requires_grad
    assert not found.requires_grad
    assert float((found - exact).norm() / exact.norm()) < 5e-3
    teachers = derivative_by_jvp(roles.teacher, x_s, sigma_B, direction, text)
    assert float((teachers - exact).norm() / exact.norm()) > 0.05, "the adapter is part of the derivative"


def test_a_difference_in_bf16_is_noise_which_is_why_the_options_refuse_it() -> None:
    x_s, text, sigma_B = tiny.latents(), tiny.prompts(), torch.tensor([0.7, 0.4])
    whole, half = (
        build_roles(tiny.tiny_wan(dtype=dtype), adapters={"student": tiny.LORA}).student
        for dtype in (torch.float32, torch.bfloat16)
    )
    direction = whole.velocity(x_s, sigma_B, text).detach()
    exact = derivative_by_jvp(whole, x_s, sigma_B, direction, text)

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert error(derivative_by_jvp(half, x_s, sigma_B, direction, text)) < 0.1
    assert error(derivative_by_difference(half, x_s, sigma_B, direction, text, 1e-4)) > 0.5


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_normalised_tangent_has_one_size_per_sample() -> None:
    tangent = draw(0).double() * torch.tensor([1e-3, 1.0, 10.0, 1e4], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    for sample, result in zip(tangent, normalised_tangent(tangent), strict=True):
        expected = sample / (sample.pow(2).sum().sqrt() + 0.1) * sample.numel() ** 0.5
        assert torch.allclose(result, expected, rtol=1e-12)
    assert float(normalised_tangent(tangent)[3].pow(2).mean().sqrt()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(normalised_tangent(torch.zeros(1, *SHAPE)), torch.zeros(1, *SHAPE))


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize(("warmup", "step", "share"), [(0, 3, 1.0), (12, 3, 0.25), (3, 30, 1.0)])
def test_the_gradient_is_the_normalised_tangent_of_the_guided_teacher(
    method: str, warmup: int, step: int, share: float
) -> None:
    network, batch = Network(), make_batch(4, SHAPE, latents(4))
    stream = RandomStream(0, step, batch.positions)
    settings = ConsistencySettings(3.0, method, 1e-3, warmup, LogitNormal(0.7, 1.6))
    loss = consistency_loss(TEACHER, network, batch, stream, settings, CPU)
    loss.value.backward()
    assert batch.latents_BCFHW is not None
    sigma_B = torch.sigmoid(0.7 + 1.6 * stream.normal((), "scm/sigma").double()).float()
    x_s = add_noise(batch.latents_BCFHW, stream.normal(SHAPE, "scm/noise"), sigma_B)
    target = guided_velocity(TEACHER, x_s, sigma_B, batch.text, batch.negative_text, 3.0)
    reference = Network()
    velocity = reference.velocity(x_s, sigma_B, batch.text)
    derivative = derivative_by_jvp(reference, x_s, sigma_B, target, batch.text)
    residual = velocity.detach() - target + share * sigma_B.reshape(-1, 1, 1, 1, 1) * derivative
    (velocity * normalised_tangent(residual) / velocity.numel()).sum().backward()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=2e-3, atol=2e-5)
    assert loss.reported == pytest.approx(float(residual.pow(2).mean()), rel=1e-2)
    assert loss.metrics["tangent_share"] == share


@pytest.mark.parametrize(("guidance", "teachers"), [(1.0, 1), (5.0, 2)])
@pytest.mark.parametrize(("method", "students"), [("jvp", 2), ("finite_difference", 3)])
def test_forwards_of_one_loss(guidance: float, teachers: int, method: str, students: int) -> None:
    teacher, student = Spy(TEACHER), Spy(Network())
    batch = make_batch(4, SHAPE, latents(4))
    settings = ConsistencySettings(guidance, method)
    consistency_loss(teacher, student, batch, RandomStream(0, 0, batch.positions), settings, CPU)
    assert (len(teacher.calls), len(student.calls)) == (teachers, students)
    assert [call.with_grad for call in student.calls] == [False] * (students - 1) + [True]
    assert not any(call.with_grad or call.routed for call in teacher.calls)
    assert all(call.said.tolist() == [1.0] * 4 for call in student.calls)


def test_without_latents_there_is_nothing_to_follow() -> None:
    with pytest.raises(AssertionError, match="latents"):
        consistency_loss(TEACHER, Network(), make_batch(2, SHAPE), RandomStream(0, 0, (0, 1)),
                         ConsistencySettings(), CPU)  # fmt: skip


def train(student: nn.Module, teacher: Denoiser, settings: ConsistencySettings, steps: int, count: int = 256) -> None:
    batch = make_batch(count, SHAPE, latents(count))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.0, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))
        optimizer.zero_grad()
        stream = FastStream(0, step, batch.positions)
        consistency_loss(teacher, student, batch, stream, settings, CPU).value.backward()  # type: ignore[arg-type]
        optimizer.step()


@pytest.mark.parametrize(("guidance", "method"), [(1.0, "finite_difference"), (3.0, "finite_difference"), (1.0, "jvp")])
def test_it_leads_to_the_end_of_the_teachers_ode(guidance: float, method: str) -> None:
    """From nothing, with the tangent warmed up: one step from anywhere is the whole trajectory."""
    student = AffineCritic(channels=2, knots=16)
    train(student, TEACHER, ConsistencySettings(guidance, method, 1e-3, 300, LogitNormal(0.0, 1.6)), 1500)
    text = text_of(1.0, 256)
    for level in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        sigma_B = torch.full((256,), level)
        x_s = add_noise(latents(256), draw(5, 256), sigma_B)
        with torch.no_grad():
            found = x_s - level * student.velocity(x_s, sigma_B, text)
        error = float((found - end_point(x_s, sigma_B, guided_mean(guidance))).pow(2).mean().sqrt())
        assert error < 0.03, f"at sigma {level}"
    with torch.no_grad():
        undistilled = x_s - TEACHER.velocity(x_s, sigma_B, text)
    assert float((undistilled - end_point(x_s, sigma_B, MEAN)).pow(2).mean().sqrt()) > 0.5, "the test would see it"


def test_without_the_derivative_it_stays_the_teacher() -> None:
    """At share 0 (the whole run is warm-up) the same loss is plain imitation of the velocity."""
    student = AffineCritic(channels=2, knots=16)
    train(student, TEACHER, ConsistencySettings(1.0, "finite_difference", 1e-3, 10**9, Listed((0.5,))), 300)
    sigma_B, text = torch.full((256,), 0.5), text_of(1.0, 256)
    x_s = add_noise(latents(256), draw(5, 256), sigma_B)
    with torch.no_grad():
        difference = student.velocity(x_s, sigma_B, text) - TEACHER.velocity(x_s, sigma_B, text)
    assert float(difference.pow(2).mean().sqrt()) < 0.02
