"""DMD on data whose every score is known: does it arrive where the mathematics says, and only there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.flow import Denoiser, Routing, Schedule, TextEmbedding

from .oracles import (
    CPU,
    AffineCritic,
    AffineStudent,
    FastStream,
    GaussianTeacher,
    Mixture,
    OracleCritic,
    Particles,
    gaussian_velocity,
    make_batch,
    text_of,
)

MEAN = torch.tensor([1.0, -0.5])
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]])


def settings(ladder: tuple[float, ...] = (1.0,), guidance: float = 1.0, interval: int = 1, warmup: int = 0,
             repeats: int = 1, shift: float = 1.0, **more: Any) -> DMDSettings:  # fmt: skip
    return DMDSettings(
        RolloutSettings(Schedule(ladder=ladder)),
        generator_update_interval=interval,
        critic_warmup_steps=warmup,
        real_score_guidance_scale=guidance,
        timestep_shift=shift,
        critic_noise_repeats=repeats,
        **{"ts_schedule": False, **more},
    )


def train(
    method: DMD,
    optimizers: Mapping[str, torch.optim.Optimizer],
    steps: int,
    batch_size: int,
    shape: tuple[int, int, int, int],
    *,
    decay: bool = True,
    stream: type[FastStream] = FastStream,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The production turns and losses in the smallest loop; roles without an optimizer are oracles and do not move."""
    batch = make_batch(batch_size, shape)
    rates = {role: optimizer.param_groups[0]["lr"] for role, optimizer in optimizers.items()}
    for step in range(steps):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)))
        for turn in method.turns(step):
            if turn.role not in optimizers:
                continue
            optimizer = optimizers[turn.role]
            optimizer.param_groups[0]["lr"] = rates[turn.role] * (float(cosine) if decay else 1.0)
            for other in optimizers.values():
                other.zero_grad()
            for loss in turn.losses(batch, stream(0, step, batch.positions)):
                loss.value.backward()
            optimizer.step()
        method.end_step()
        after_step()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_affine_student_reaches_the_teachers_mean_and_covariance(guidance: float) -> None:
    """With equal covariances the guided teacher *is* the Gaussian around m_u + g (m_c - m_u)."""
    negative = MEAN - torch.tensor([0.4, 0.1])
    teacher = GaussianTeacher(MEAN, COVARIANCE, negative)
    student = AffineStudent((1.0,), channels=2)
    method = DMD(teacher, student, OracleCritic(student), settings(guidance=guidance), CPU)
    train(method, {"student": torch.optim.Adam(student.parameters(), lr=0.02)}, 1500, 32, (2, 1, 1, 2))
    offset, matrix = student.offset[0].detach(), student.matrix[0].detach()
    assert float((offset - (negative + guidance * (MEAN - negative))).abs().max()) < 1.5e-6
    assert float((matrix @ matrix.T - COVARIANCE).abs().max()) < 2e-3


def test_a_learned_critic_suffices() -> None:
    """Five updates of an affine critic for each of the student."""
    variance = torch.tensor([0.5, 0.25])
    student, critic = AffineStudent((1.0,), channels=2), AffineCritic(channels=2)
    teacher = GaussianTeacher(MEAN, torch.diag(variance))
    method = DMD(teacher, student, critic, settings(interval=5, warmup=100), CPU)
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.0, 0.999)),
        "critic": torch.optim.Adam(critic.parameters(), lr=0.02, betas=(0.0, 0.999)),
    }
    train(method, optimizers, 2600, 64, (2, 1, 2, 2))
    matrix = student.matrix[0].detach()
    assert float((student.offset[0].detach() - MEAN).abs().max()) < 0.05
    assert float(((matrix @ matrix.T).diagonal().sqrt() - variance.sqrt()).abs().max()) < 0.05


@pytest.mark.parametrize(("follows", "expected"), [(True, 0.5), (False, 0.98)])
def test_the_last_step_is_not_judged_by_the_blur_of_the_first(follows: bool, expected: float) -> None:
    """A first exit that cannot spread (its variance stays 0.02), a second that can, data of variance 0.5. A critic that
    learns both at all noise levels matches their mean: the last step then spreads to 2 x 0.5 - 0.02."""
    student, critic = AffineStudent((1.0, 0.6), channels=2), AffineCritic(channels=2, knots=16)
    teacher = GaussianTeacher(MEAN, torch.diag(torch.tensor([0.5, 0.5])))
    with torch.no_grad():
        student.matrix[0].copy_(0.02**0.5 * torch.eye(2))
        student.offset[0].copy_(MEAN)
    blurred = [parameter.detach()[0].clone() for parameter in (student.matrix, student.offset)]

    def keep_blurred() -> None:
        with torch.no_grad():
            for parameter, value in zip((student.matrix, student.offset), blurred, strict=True):
                parameter[0] = value

    wanted = settings((1.0, 0.6), interval=5, warmup=100, ts_schedule=True, fake_score_ts_schedule=follows)
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.0, 0.999)),
        "critic": torch.optim.Adam(critic.parameters(), lr=0.02, betas=(0.0, 0.999)),
    }
    method = DMD(teacher, student, critic, wanted, CPU)
    train(method, optimizers, 2600, 64, (2, 1, 2, 2), after_step=keep_blurred)
    matrix, noise = student.matrix[1].detach(), torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    entering = 0.4 * (MEAN[:, None] + blurred[0] @ noise) + 0.6 * torch.randn(noise.shape)
    variance = (matrix @ entering).var(dim=1)
    assert float((variance - expected).abs().max()) < 0.06


class KernelCritic:
    """The exact fake score of particles: their empirical distribution, diffused."""

    def __init__(self, student: Particles) -> None:
        self.student = student

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        particles = self.student.samples.detach().flatten()
        s = sigma[:, None, None, None, None, None]
        centred = x_t_BCFHW[..., None] - (1 - s) * particles
        clean = (torch.softmax(-(centred**2) / (2 * s**2), dim=-1) * particles).sum(-1)
        return (x_t_BCFHW - clean) / s[..., 0]


def test_both_modes_of_a_mixture_keep_their_weight() -> None:
    """Gaussians cannot show mode collapse; 0.7 at -2 and 0.3 at +2 can. Particles start between the two."""
    weights, means = torch.tensor([0.7, 0.3]), torch.tensor([-2.0, 2.0])
    teacher = Mixture(weights, means, torch.full((2,), 0.04))
    seeded = torch.Generator().manual_seed(0)
    student = Particles(torch.randn(8, 1, 1, 4, 8, generator=seeded))
    method = DMD(teacher, student, KernelCritic(student), settings(shift=3.0), CPU)
    train(method, {"student": torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.0, 0.99))}, 900, 8, (1, 1, 4, 8))
    particles = student.samples.detach().flatten().sort().values
    target = torch.cat([-2 + 0.2 * torch.randn(7000, generator=seeded), 2 + 0.2 * torch.randn(3000, generator=seeded)])
    middles = (torch.arange(len(particles)) + 0.5) / len(particles)
    wasserstein = float((particles - torch.quantile(target, middles)).abs().mean())
    assert wasserstein < 0.3
    assert 0.24 < float((particles > 0).float().mean()) < 0.36


def test_a_critic_alone_learns_the_velocity_of_the_students_samples() -> None:
    """Warm-up: only the critic moves, and its loss has no other minimum than the closed form."""
    student, critic = AffineStudent((1.0, 0.5), channels=2, scale=0.7), AffineCritic(channels=2, knots=16)
    with torch.no_grad():
        student.matrix[1].copy_(student.matrix[0] / (0.5**2 * 0.7**2 + 0.5**2) ** 0.5)
        student.offset.copy_(torch.tensor([0.3, -0.2]))
        student.offset[1] -= (student.matrix[1] @ torch.tensor([0.3, -0.2])) * 0.5
    before = [parameter.clone() for parameter in student.parameters()]
    method = DMD(GaussianTeacher(MEAN, COVARIANCE), student, critic, settings((1.0, 0.5), warmup=10**6), CPU)
    assert [turn.role for turn in method.turns(0)] == ["critic"]
    train(method, {"critic": torch.optim.Adam(critic.parameters(), lr=0.03)}, 1200, 128, (2, 1, 2, 2))
    assert all(torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True))
    # Both rungs were set to give N((0.3, -0.2), 0.49 I), so that is what the critic must have found.
    noise = torch.randn(512, 2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for sigma in (0.1, 0.3, 0.5, 0.7, 0.9):
        sigma_B = torch.full((512,), sigma)
        mean = torch.tensor([0.3, -0.2])
        spread = ((1 - sigma) ** 2 * 0.49 + sigma**2) ** 0.5
        x_t = (1 - sigma) * mean[:, None, None, None] + spread * noise
        exact = gaussian_velocity(x_t, sigma_B, mean, 0.49 * torch.eye(2))
        excess = (critic.velocity(x_t, sigma_B, text_of(1.0, 512)).detach() - exact).pow(2).mean()
        assert float(excess) < 0.02, f"at sigma {sigma}"


# --- two time scales --------------------------------------------------------------------------------------------------


class FixedLevel(FastStream):
    """Every draw of sigma is the middle of its window, so that the race of two means is a linear recursion."""

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.positions),), 0.5, dtype=torch.float64)


class PointMass(nn.Module):
    """Velocity of all mass at one point: (mean, far); `far` does not move and makes DMD's normaliser a constant."""

    def __init__(self, mean: float, far: float) -> None:
        super().__init__()
        self.mean, self.far = nn.Parameter(torch.tensor([mean])), torch.tensor([far])

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        point = torch.cat([self.mean, self.far])[None, :, None, None, None]
        return (x_t_BCFHW - point) / sigma[:, None, None, None, None]


def overshoot(interval: int, rate: float = 0.02) -> float:
    """How far the student's mean, which starts at 1, goes below the teacher's 0, with equal rates per update."""
    far = 1000.0
    teacher: Denoiser = PointMass(0.0, 0.0)
    student, critic = PointMass(1.0, far), PointMass(1.0, far)
    method = DMD(teacher, student, critic, settings(interval=interval), CPU)
    # Over its 2 elements the student's loss has slope (m_F - m_T) / (far / 2) / 2, the critic's (m_F - m_G) / s^2.
    critic_sigma = 0.5
    optimizers = {
        "student": torch.optim.SGD(student.parameters(), lr=rate * far),
        "critic": torch.optim.SGD(critic.parameters(), lr=rate * critic_sigma**2),
    }
    path: list[float] = []
    train(method, optimizers, 350 * interval, 1, (2, 1, 1, 1), decay=False, stream=FixedLevel,
          after_step=lambda: path.append(float(student.mean.detach())))  # fmt: skip
    assert min(path) < 0.05, "the student never arrived"
    return max(0.0, -min(path))


def test_at_equal_rates_the_critic_needs_four_updates_per_student_update() -> None:
    """lambda^2 + K b lambda + K a b = 0 has real roots, hence no overshoot, iff K b >= 4 a."""
    assert overshoot(3) == pytest.approx(0.0059, abs=0.001)
    assert overshoot(4) < 1e-4
    assert overshoot(5) < 1e-5
    assert overshoot(1) > 0.1
