"""Supervised flow matching: what trains a teacher."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.distill.noise_levels import Beta, Listed, LogitNormal, NoiseLevels, Uniform
from simpletuner_dmd.distill.supervised import Supervised, SupervisedSettings, noise_levels
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import add_noise
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, AffineCritic, FastStream, GaussianTeacher, Spy, gaussian_velocity, make_batch, text_of

SHAPE = (2, 1, 2, 2)
MEAN, COVARIANCE = torch.tensor([1.0, -0.5]), torch.diag(torch.tensor([0.5, 0.25]))


def latents(count: int) -> Tensor:
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return MEAN[:, None, None, None] + COVARIANCE.diagonal().sqrt()[:, None, None, None] * noise


def test_the_levels_are_those_of_the_settings() -> None:
    spy = Spy(GaussianTeacher(MEAN, COVARIANCE))
    levels = NoiseLevels(Listed((0.25, 0.5)))
    method = Supervised(spy, SupervisedSettings(levels), CPU)
    batch = make_batch(4, SHAPE, latents(4))
    stream = RandomStream(0, 9, batch.positions)
    list(method.losses(batch, stream))
    assert torch.equal(spy.calls[0].sigma, levels.sigma(stream, SHAPE))


OPTIONS = {
    "flow_schedule_shift": None,
    "flow_schedule_auto_shift": False,
    "flow_sigmoid_scale": 1.0,
    "flow_use_uniform_schedule": False,
    "flow_use_beta_schedule": False,
    "flow_beta_schedule_alpha": 2.0,
    "flow_beta_schedule_beta": 2.0,
    "flow_custom_timesteps": None,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, NoiseLevels(LogitNormal(0.0, 1.0))),
        ({"flow_sigmoid_scale": 1.5, "flow_schedule_shift": 3.0}, NoiseLevels(LogitNormal(0.0, 1.5), 3.0)),
        ({"flow_use_uniform_schedule": True, "flow_schedule_auto_shift": True}, NoiseLevels(Uniform(), None, True)),
        (
            {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3.0, "flow_beta_schedule_beta": 1.5},
            NoiseLevels(Beta(3.0, 1.5)),
        ),
        ({"flow_custom_timesteps": (1000.0, 250.0, 0.5, 1.0)}, NoiseLevels(Listed((1.0, 0.25, 0.5, 1.0)))),
    ],
)
def test_options_name_the_draw_and_the_shift(changes: dict[str, object], expected: NoiseLevels) -> None:
    options = SimpleNamespace(**{**OPTIONS, **changes})
    assert noise_levels(options) == expected


def test_one_update_is_one_forward() -> None:
    spy = Spy(GaussianTeacher(MEAN, COVARIANCE))
    method = Supervised(spy, SupervisedSettings(), CPU)
    batch = make_batch(4, SHAPE, latents(4))
    for turn in method.turns(0):
        list(turn.losses(batch, RandomStream(0, 0, batch.positions)))
    method.end_step()
    assert [call.with_grad for call in spy.calls] == [True]


def test_the_loss_is_the_error_of_the_velocity_at_the_drawn_point() -> None:
    spy = Spy(GaussianTeacher(MEAN, COVARIANCE))
    method = Supervised(spy, SupervisedSettings(NoiseLevels(shift=3.0)), CPU)
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
