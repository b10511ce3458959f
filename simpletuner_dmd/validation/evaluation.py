"""Losses that can be compared between two steps: fixed samples, fixed noise levels, fixed noise.

A training loss is mostly a record of which noise levels were drawn. Here every sample meets the same levels, evenly
spread quantiles under the run's shift, with the same noise each time, so that what changes is the network.

Shapes: B batch, C channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simpletuner_dmd.flow import Batch, Denoiser, TextEmbedding, add_noise, shifted
from simpletuner_dmd.randomness import generator

BINS = 4
CRITIC_LEVELS = 8
NOT_MOVED = 1e-3


def quantiles(count: int, shift: float) -> tuple[float, ...]:
    """Sigmas at the middles of `count` equal shares of the shifted-uniform draw, clean to noisy."""
    return tuple(float(shifted((index + 0.5) / count, shift)) for index in range(count))


def bin_of(level: int, levels: int) -> int:
    """0 for the cleanest quarter of the levels … 3 for the noisiest."""
    return level * BINS // levels


def fixed_noise(sample: int, level: int, like: Tensor) -> Tensor:
    """The noise of one sample at one level: the same at every evaluation, on every machine."""
    drawn = torch.randn(like.shape, generator=generator(0, "evaluation", sample, level), dtype=torch.float32)
    return drawn.to(like.device)


@torch.no_grad()
def denoising_losses(denoiser: Denoiser, batches: Iterable[Batch], levels: int, shift: float,
                     device: torch.device) -> Tensor:  # fmt: skip
    """Sums of ||v - (e - x0)||^2 (mean over elements) per bin, and how many there are: [2, BINS] fp64.

    Sums, so that processes can add theirs.
    """
    totals = torch.zeros(2, BINS, dtype=torch.float64)
    sigmas = quantiles(levels, shift)
    for batch in batches:
        assert batch.latents_BCFHW is not None and len(batch.positions) == 1, "one held-out sample at a time"
        x0, text = batch.latents_BCFHW.float().to(device), batch.text.to(device)
        for level, sigma in enumerate(sigmas):
            noise = fixed_noise(batch.positions[0], level, x0)
            sigma_B = torch.full((1,), sigma, device=device)
            velocity = denoiser.velocity(add_noise(x0, noise, sigma_B), sigma_B, text)
            totals[0, bin_of(level, levels)] += float((velocity - (noise - x0)).pow(2).mean())
            totals[1, bin_of(level, levels)] += 1
    return totals


def evaluation_row(totals: Tensor) -> dict[str, float]:
    """eval_loss over all levels, and eval_loss_q1 (cleanest quarter) … q4 (noisiest)."""
    bins = (totals[0] / totals[1]).tolist()
    return {
        "eval_loss": float(totals[0].sum() / totals[1].sum()),
        **{f"eval_loss_q{number + 1}": value for number, value in enumerate(bins)},
    }


# --- the critic -----------------------------------------------------------------------------------------------------


@dataclass
class CriticCheck:
    """How well the critic knows the student's samples, beside the teacher, which has never seen them.

    critic, teacher: sums of the denoising loss on the student's samples per bin; count: terms per bin.
    along, length: sums of <target - v_teacher, v_critic - v_teacher> and of |v_critic - v_teacher|^2, means over
    elements. All of them add up over samples and processes.
    """

    critic: list[float] = field(default_factory=lambda: [0.0] * BINS)
    teacher: list[float] = field(default_factory=lambda: [0.0] * BINS)
    count: int = 0
    along: float = 0.0
    length: float = 0.0

    def merge(self, other: CriticCheck) -> None:
        self.critic = [a + b for a, b in zip(self.critic, other.critic, strict=True)]
        self.teacher = [a + b for a, b in zip(self.teacher, other.teacher, strict=True)]
        self.count, self.along, self.length = (
            self.count + other.count,
            self.along + other.along,
            self.length + other.length,
        )

    @property
    def reach(self) -> float:
        """How far the critic has gone from the teacher to the student's own score, along its own direction.

        The best point teacher + p (critic - teacher) on the student's samples is at p* = along / length; the critic
        itself is at 1, so it has gone 1 / p* of the way. 0: it never left the teacher; 1: it is there; above 1: it
        went too far. Noise in p* can make it large, so it is cut at 2; a critic that has moved by less than a
        thousandth of the teacher's own error has not moved.
        """
        if self.length <= NOT_MOVED**2 * sum(self.teacher):
            return 0.0
        best = self.along / self.length
        return 2.0 if best <= 0.5 else 1 / best

    def row(self) -> dict[str, float]:
        """critic_loss_q1 … q4, critic_ratio_q1 … q4 (critic's loss over the teacher's), critic_reach."""
        per_bin = self.count / BINS
        found = {f"critic_loss_q{number + 1}": value / per_bin for number, value in enumerate(self.critic)}
        pairs = zip(self.critic, self.teacher, strict=True)
        found |= {f"critic_ratio_q{number + 1}": own / other for number, (own, other) in enumerate(pairs)}
        return {**found, "critic_reach": self.reach}


@torch.no_grad()
def check_critic(
    critic: Denoiser, teacher: Denoiser, samples: Sequence[tuple[int, Tensor, TextEmbedding]], shift: float,
    device: torch.device,
) -> CriticCheck:  # fmt: skip
    """samples: (number, the student's latents [C, F, H, W], its prompt). shift: of the critic's noise."""
    found = CriticCheck()
    for number, latents, prompt in samples:
        x0, text = latents[None].float().to(device), prompt.to(device)
        for level, sigma in enumerate(quantiles(CRITIC_LEVELS, shift)):
            noise = fixed_noise(number, level, x0)
            sigma_B = torch.full((1,), sigma, device=device)
            x_t, target = add_noise(x0, noise, sigma_B), noise - x0
            own, other = critic.velocity(x_t, sigma_B, text).double(), teacher.velocity(x_t, sigma_B, text).double()
            place, moved = bin_of(level, CRITIC_LEVELS), own - other
            found.critic[place] += float((own - target).pow(2).mean())
            found.teacher[place] += float((other - target).pow(2).mean())
            found.along += float(((target - other) * moved).mean())
            found.length += float(moved.pow(2).mean())
            found.count += 1
    return found
