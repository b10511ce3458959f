"""Fixed-noise losses against closed forms, and the critic's way from the teacher to the student's score."""

from __future__ import annotations

import pytest
import torch

from simpletuner_dmd.flow import Batch, TextEmbedding
from simpletuner_dmd.validation.evaluation import (
    BINS,
    CriticCheck,
    bin_of,
    check_critic,
    denoising_losses,
    evaluation_row,
    fixed_noise,
    quantiles,
)

CPU = torch.device("cpu")
SHAPE = (2, 2, 8, 8)
TEXT = TextEmbedding(torch.zeros(1, 1, 1))


class Mean:
    """The exact denoiser of samples that are all `mean`, plus an error: v = (x_t - mean) / s + error."""

    def __init__(self, mean: float, error: float = 0.0) -> None:
        self.mean, self.error = mean, error

    def velocity(self, x_t, sigma, text, *, routed=None):
        return (x_t - self.mean) / sigma.view(-1, 1, 1, 1, 1) + self.error


def held_out(number: int) -> Batch:
    return Batch((number,), TEXT, TEXT, SHAPE, torch.full((1, *SHAPE), 0.5), [""])


def test_quantiles_are_the_shifted_middles():
    assert quantiles(4, 1.0) == pytest.approx((0.125, 0.375, 0.625, 0.875))
    assert quantiles(2, 3.0) == pytest.approx((0.5, 0.9))
    assert [bin_of(level, 8) for level in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {bin_of(level, 5) for level in range(5)} == set(range(BINS))


def test_the_loss_is_the_error_at_every_level():
    totals = denoising_losses(Mean(0.5, error=0.3), [held_out(0), held_out(1)], 8, 3.0, CPU)
    row = evaluation_row(totals)
    assert row == pytest.approx(dict.fromkeys(row, 0.09), rel=1e-4)
    assert set(row) == {"eval_loss", "eval_loss_q1", "eval_loss_q2", "eval_loss_q3", "eval_loss_q4"}
    assert totals[1].tolist() == [4, 4, 4, 4]


def test_the_same_network_has_the_same_loss_whoever_computes_it():
    batches = [held_out(number) for number in range(4)]
    network = Mean(0.2)
    whole = denoising_losses(network, batches, 8, 3.0, CPU)
    torch.manual_seed(123)
    parts = [denoising_losses(network, batches[rank::2], 8, 3.0, CPU) for rank in range(2)]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-12)
    like = torch.zeros(SHAPE)
    assert torch.equal(fixed_noise(1, 2, like), fixed_noise(1, 2, like))
    assert not torch.equal(fixed_noise(1, 2, like), fixed_noise(1, 3, like))
    assert not torch.equal(fixed_noise(1, 2, like), fixed_noise(2, 2, like))


@pytest.mark.parametrize(("critic", "reach"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (1.0, 1.0), (1.5, 1.5)])
def test_reach_is_the_share_of_the_way_that_the_critic_has_gone(critic, reach):
    """The teacher knows samples at 0, the student makes them at 1, the critic believes them to be at `critic`."""
    samples = [(number, torch.ones(SHAPE), TEXT) for number in range(2)]
    found = check_critic(Mean(critic), Mean(0.0), samples, 1.0, CPU)
    assert found.reach == pytest.approx(reach, abs=1e-4)
    if critic:
        ratios = [found.row()[f"critic_ratio_q{number}"] for number in range(1, BINS + 1)]
        assert ratios == pytest.approx([(1 - critic) ** 2] * BINS, abs=1e-4)


def test_a_critic_that_barely_moves_has_not_moved():
    samples = [(0, torch.ones(SHAPE), TEXT)]
    assert check_critic(Mean(5e-4), Mean(0.0), samples, 1.0, CPU).reach == 0
    assert check_critic(Mean(5e-3), Mean(0.0), samples, 1.0, CPU).reach == pytest.approx(0.005, rel=1e-2)


def test_checks_of_processes_add_up():
    samples = [(number, torch.ones(SHAPE), TEXT) for number in range(3)]
    whole = check_critic(Mean(0.4), Mean(0.1), samples, 3.0, CPU)
    merged = CriticCheck()
    for part in (samples[:1], samples[1:]):
        merged.merge(check_critic(Mean(0.4), Mean(0.1), part, 3.0, CPU))
    assert merged.row() == pytest.approx(whole.row(), rel=1e-9)
