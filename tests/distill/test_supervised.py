"""Supervised flow matching: what trains a teacher."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.distill.supervised import Supervised, SupervisedSettings
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import add_noise
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, AffineCritic, FastStream, GaussianTeacher, Spy, gaussian_velocity, make_batch, text_of

SHAPE = (2, 1, 2, 2)
MEAN, COVARIANCE = torch.tensor([1.0, -0.5]), torch.diag(torch.tensor([0.5, 0.25]))


def latents(count: int) -> Tensor:
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return MEAN[:, None, None, None] + COVARIANCE.diagonal().sqrt()[:, None, None, None] * noise


@pytest.mark.parametrize("shift", [None, 1.0, 5.0])
def test_sigmas_are_logit_normal_then_shifted(shift: float | None) -> None:
    settings = SupervisedSettings(shift)
    method = Supervised(GaussianTeacher(MEAN, COVARIANCE), settings, CPU)
    sigma = method.draw_sigma(FastStream(0, 0, tuple(range(10_000))))
    assert sigma.dtype == torch.float32
    assert sigma.shape == (10_000,)
    k = 1.0 if shift is None else shift
    u = sigma.double() / (k - (k - 1) * sigma.double())
    normal = torch.logit(u).sort().values
    expected = 0.5 * (1 + torch.erf(normal / math.sqrt(2)))
    empirical = torch.arange(1, 10_001, dtype=torch.float64) / 10_000
    assert float((expected - empirical).abs().max()) < 1.95 / 100


def test_the_loss_is_the_error_of_the_velocity_at_the_drawn_point() -> None:
    spy = Spy(GaussianTeacher(MEAN, COVARIANCE))
    method = Supervised(spy, SupervisedSettings(shift=3.0), CPU)
    batch = make_batch(4, SHAPE, latents(4))
    stream = RandomStream(0, 9, batch.positions)
    (loss,) = method.losses(batch, stream)
    (call,) = spy.calls
    noise = stream.normal(SHAPE, "noise")
    assert batch.latents_BCFHW is not None
    x_t = add_noise(batch.latents_BCFHW, noise, call.sigma)
    assert torch.equal(call.x_t, x_t)
    assert call.routed
    assert len(call.sigma.unique()) == 4
    expected = (gaussian_velocity(x_t, call.sigma, MEAN, COVARIANCE) - noise + batch.latents_BCFHW).pow(2).mean()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_the_velocity_of_its_data() -> None:
    network = AffineCritic(channels=2, knots=16)
    method = Supervised(network, SupervisedSettings(), CPU)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    batch = make_batch(512, SHAPE, latents(512))
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 600)
        for turn in method.turns(step):
            assert turn.role == "student"
            for loss in turn.losses(batch, FastStream(0, step, batch.positions)):
                optimizer.zero_grad()
                loss.value.backward()
                optimizer.step()
    clean, text = latents(512), text_of(1.0, 512)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    for sigma in (0.3, 0.5, 0.7):
        sigma_B = torch.full((512,), sigma)
        x_t = add_noise(clean, noise, sigma_B)
        exact = gaussian_velocity(x_t, sigma_B, MEAN, COVARIANCE)
        assert float((network.velocity(x_t, sigma_B, text).detach() - exact).pow(2).mean()) < 0.02


def test_updates_and_needs() -> None:
    method = Supervised(GaussianTeacher(MEAN, COVARIANCE), SupervisedSettings(), CPU)
    assert method.needs_latents
    assert method.updates("student", 17) == 17
    with pytest.raises(AssertionError, match="latents"):
        list(method.losses(make_batch(2, SHAPE), RandomStream(0, 0, (0, 1))))
    with pytest.raises(AssertionError):
        method.load_state_dict({"x": 1})


# --- caption dropout --------------------------------------------------------------------------------------------------


def test_captions_are_dropped_per_sample_and_not_the_same_ones_in_every_epoch() -> None:
    batch = make_batch(2000, SHAPE)
    dropped = [
        with_dropped_captions(batch, FastStream(0, step, batch.positions), 0.2).rows_BLD[:, 0, 0] == 0
        for step in range(2)
    ]
    for mask in dropped:
        assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float((dropped[0] & dropped[1]).float().mean()) == pytest.approx(0.04, abs=0.02)


def test_a_dropped_caption_is_the_negative_prompt_as_a_whole() -> None:
    batch = make_batch(8, SHAPE)
    stream = RandomStream(0, 0, batch.positions)
    assert with_dropped_captions(batch, stream, 0.0) is batch.text
    assert torch.equal(with_dropped_captions(batch, stream, 1.0).rows_BLD, torch.zeros(8, 2, 3))
    mixed = with_dropped_captions(batch, stream, 0.5).rows_BLD.flatten(1)
    assert bool((mixed == mixed[:, :1]).all())
