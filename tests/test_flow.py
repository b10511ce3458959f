"""The arithmetic everything rests on, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.flow import (
    Batch,
    Routing,
    Schedule,
    SigmaWindow,
    TextEmbedding,
    add_noise,
    check_ladder,
    few_step_transition,
    guidance_is_off,
    guided,
    guided_velocity,
    noise_from_velocity,
    sample_euler,
    sample_few_step,
    score_from_velocity,
    shifted,
    spread,
    uniform_ladder,
    unshifted,
    velocity_from_x0,
    x0_from_velocity,
)

SHAPE = (4, 3, 2, 5, 2)
SHIFTS = (1.0, 3.0, 5.0, 8.0, 17.0)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Recorder:
    """velocity = the number the text says; remembers the sigmas it was asked for."""

    def __init__(self) -> None:
        self.sigmas: list[Tensor] = []
        self.batches: list[int] = []

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        self.sigmas.append(sigma)
        self.batches.append(len(text))
        return torch.ones_like(x_t_BCFHW) * text.rows_BLD[:, 0, 0].reshape(-1, 1, 1, 1, 1)


def text_of(value: float, count: int = 1) -> TextEmbedding:
    return TextEmbedding(torch.full((count, 2, 3), value))


# --- conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_conversions_agree_with_their_definitions(dtype: torch.dtype, tolerance: float) -> None:
    x0, noise = draw(0, dtype), draw(1, dtype)
    sigma_B = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=dtype)
    s = sigma_B.reshape(-1, 1, 1, 1, 1)
    x_t, velocity = add_noise(x0, noise, sigma_B), noise - x0

    def same(left: Tensor, right: Tensor) -> None:
        assert left.dtype == dtype
        assert float((left - right).abs().max()) < tolerance * max(1.0, float(right.abs().max()))

    same(x_t, (1 - s) * x0 + s * noise)
    same(x0_from_velocity(x_t, velocity, sigma_B), x0)
    same(noise_from_velocity(x_t, velocity, sigma_B), noise)
    same(velocity_from_x0(x_t, x0, sigma_B), velocity)
    same(score_from_velocity(x_t, velocity, sigma_B), -(x_t - (1 - s) * x0) / s**2)


def test_clean_sample_is_not_divided_by_one_minus_sigma() -> None:
    """(x_t - s v) / (1 - s), found elsewhere, is ten times too large at s = 0.9; a zero clean sample would hide it."""
    x0, sigma_B = torch.ones(SHAPE), torch.full((4,), 0.9)
    x_t = add_noise(x0, draw(1, torch.float32), sigma_B)
    assert torch.allclose(x0_from_velocity(x_t, draw(1, torch.float32) - x0, sigma_B), x0, atol=1e-5)


def test_sigma_one_is_pure_noise_and_sigma_zero_is_clean() -> None:
    x0, noise = draw(0), draw(1)
    assert torch.equal(add_noise(x0, noise, torch.ones(4)), noise)
    assert torch.equal(add_noise(x0, noise, torch.zeros(4)), x0)


def test_half_precision_inputs_are_subtracted_in_fp32() -> None:
    x0, noise, sigma_B = draw(0, torch.float32), draw(1, torch.float32), torch.full((4,), 0.981)
    x_t, velocity = add_noise(x0, noise, sigma_B).bfloat16(), (noise - x0).bfloat16()
    expected = x_t.double() - sigma_B.double().reshape(-1, 1, 1, 1, 1) * velocity.double()
    assert x0_from_velocity(x_t, velocity, sigma_B).dtype == torch.float32
    assert float((x0_from_velocity(x_t, velocity, sigma_B) - expected).abs().max()) < 1e-6
    assert noise_from_velocity(x_t, velocity, sigma_B).dtype == torch.float32


def test_a_sigma_per_frame_lands_on_its_frame_and_not_on_a_channel() -> None:
    """Frames and channels have the sizes 2 and 3; flattening in the wrong order mixes their planes."""
    sigma_BF = torch.tensor([[0.0, 1.0]]).expand(4, 2)
    x0, noise = draw(0), draw(1)
    x_t = add_noise(x0, noise, sigma_BF)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])
    assert torch.equal(x_t[:, :, 1], noise[:, :, 1])
    assert spread(torch.zeros(4), x0).shape == (4, 1, 1, 1, 1)


# --- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_is_the_standard_form() -> None:
    unconditional, conditional = draw(0), draw(1)
    assert torch.allclose(guided(unconditional, conditional, 1.0), conditional, atol=1e-12)
    assert torch.allclose(guided(unconditional, conditional, 0.0), unconditional, atol=1e-12)
    assert torch.allclose(guided(unconditional, conditional, 3.0), 3 * conditional - 2 * unconditional, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "forwards", "value"), [(0.0, [4], 2.0), (1.0, [4], 2.0), (3.0, [4, 4], 4.0), (0.5, [4, 4], 1.5)]
)
def test_guidance_costs_a_second_forward_only_where_it_is_on(scale: float, forwards: list[int], value: float) -> None:
    network = Recorder()
    velocity = guided_velocity(
        network, draw(0, torch.float32), torch.full((4,), 0.5), text_of(2.0, 4), text_of(1.0), scale
    )
    assert network.batches == forwards
    assert torch.equal(velocity, torch.full(SHAPE, value))
    assert guidance_is_off(scale) == (len(forwards) == 1)


# --- ladders and shifts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_and_its_inverse(shift: float) -> None:
    for u in (0.0, 0.02, 0.5, 0.98, 1.0):
        assert unshifted(float(shifted(u, shift)), shift) == pytest.approx(u, abs=1e-14)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (1.0, (1, 0.75, 0.5, 0.25)),
        (3.0, (1, 0.9, 0.75, 0.5)),
        (5.0, (1, 0.9375, 0.83333, 0.625)),
        (8.0, (1, 0.96, 0.88889, 0.72727)),
    ],
)
def test_ladders_known_from_other_work(shift: float, expected: tuple[float, ...]) -> None:
    assert uniform_ladder(4, shift) == pytest.approx(expected, abs=1e-5)


def test_timestep_1000_is_pure_noise() -> None:
    """A table of descending sigmas, indexed by the timestep, gives its cleanest entry for 1000."""
    schedule = Schedule(ladder=(1.0, 0.757, 0.522))
    assert schedule.timesteps == pytest.approx((1000, 757, 522), abs=1e-12)
    assert schedule.timesteps[0] == 1000.0
    assert [schedule.next_sigma(rung) for rung in range(3)] == [0.757, 0.522, 0.0]


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ((1.0, 0.5, 0.5), "decrease strictly"),
        ((1.0, 0.5, 0.7), "decrease strictly"),
        ((0.99, 0.5), "first step"),
        ((1.001, 0.5), "first step"),
        ((1.0, 0.0), "last step"),
    ],
)
def test_ladders_that_cannot_be_walked(ladder: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ladder(ladder)
    with pytest.raises(ValueError, match=message):
        Schedule(ladder=ladder)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_shift_must_be_positive(shift: float) -> None:
    with pytest.raises(ValueError, match="shift"):
        Schedule(shift=shift)


# --- the draw of noise levels ---------------------------------------------------------------------------------------

DRAWS = 20_000


def uniform(count: int = DRAWS) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("low", "high"), [(0.02, 0.98), (0.001, 0.999), (0.522, 0.757)])
def test_sigmas_follow_the_truncated_shifted_law(shift: float, low: float, high: float) -> None:
    """Kolmogorov-Smirnov against the closed-form distribution, u(s) uniform between u(low) and u(high)."""
    sigma = SigmaWindow(low, high, shift).sigma(uniform())
    bottom, top = unshifted(low, shift), unshifted(high, shift)
    ordered = sigma.double().sort().values
    expected = (ordered / (shift - (shift - 1) * ordered) - bottom) / (top - bottom)
    empirical = torch.arange(1, DRAWS + 1, dtype=torch.float64) / DRAWS
    assert float((empirical - expected).abs().max()) < 1.95 / math.sqrt(DRAWS)  # 0.1% of honest samples fail


@pytest.mark.parametrize(("shift", "mass"), [(3.0, 0.058), (5.0, 0.0926), (8.0, 0.140), (12.0, 0.197)])
def test_no_draw_is_piled_on_a_bound(shift: float, mass: float) -> None:
    """Clamping after the shift, as others do, would put `mass` of all draws on sigma 0.98."""
    sigma = SigmaWindow(0.02, 0.98, shift).sigma(uniform())
    at_the_bounds = ((sigma <= 0.02 + 1e-7) | (sigma >= 0.98 - 1e-7)).double().mean()
    assert float(at_the_bounds) < 1e-3
    clamped = torch.as_tensor(shifted(uniform(), shift)).clamp(0.02, 0.98)
    assert float((clamped == 0.98).double().mean()) == pytest.approx(mass, abs=0.006)
    assert 1 - unshifted(0.98, shift) == pytest.approx(mass, abs=5e-4)


def test_the_extremes_of_the_draw_stay_in_the_window() -> None:
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for shift in SHIFTS:
        sigma = SigmaWindow(0.25, 0.75, shift).sigma(edge)
        assert sigma.dtype == torch.float32
        assert 0.25 <= float(sigma[0]) < 0.2501
        assert 0.7499 < float(sigma[1]) <= 0.75


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_windows_that_hold_nothing(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="noise window"):
        SigmaWindow(low, high)


def test_a_dense_ladder_needs_more_than_half_precision() -> None:
    """In bf16 only 39 of the 50 sigmas of a shift-17 ladder are distinct; the ones that networks get are all 50."""
    network = Recorder()
    schedule = Schedule(shift=17.0, ladder=uniform_ladder(50, 17.0))
    noise = draw(0, torch.bfloat16)
    sample_few_step(network, noise, text_of(0.0, 4), schedule, "sde", lambda rung, like: torch.zeros_like(like))
    given = torch.stack([sigma[0] for sigma in network.sigmas])
    assert given.dtype == torch.float32
    assert len(given.unique()) == 50
    assert len(given.bfloat16().unique()) == 39
    assert torch.equal(given, torch.tensor(schedule.ladder, dtype=torch.float64).float())
    network.sigmas.clear()
    sample_euler(network, noise, text_of(0.0, 4), text_of(0.0), schedule.ladder, 1.0)
    assert torch.equal(torch.stack([sigma[0] for sigma in network.sigmas]), given)


# --- samplers -------------------------------------------------------------------------------------------------------


def test_transitions() -> None:
    x_t, velocity, noise = draw(0), draw(1), draw(2)
    x0 = x0_from_velocity(x_t, velocity, torch.full((4,), 0.75))
    renoised = few_step_transition(x_t, x0, velocity, 0.75, 0.5, "sde", lambda: noise)
    assert torch.allclose(renoised, 0.5 * x0 + 0.5 * noise, atol=1e-12)

    def forbidden() -> Tensor:
        raise AssertionError("no noise is drawn here")

    euler = few_step_transition(x_t, x0, velocity, 0.75, 0.5, "ode", forbidden)
    assert torch.allclose(euler.double(), x_t - 0.25 * velocity, atol=1e-5)
    for renoise in ("sde", "ode"):
        assert torch.equal(few_step_transition(x_t, x0, velocity, 0.75, 0.0, renoise, forbidden), x0)


def test_the_few_step_sampler_walks_down_and_stops_where_told() -> None:
    schedule = Schedule(ladder=(1.0, 0.75, 0.25))
    for stop_at, runs in ((None, 3), (2, 2), (1, 1), (0, 0)):
        network = Recorder()
        entered: list[int] = []

        def fresh(rung: int, like: Tensor, entered: list[int] = entered) -> Tensor:
            entered.append(rung)
            return torch.zeros_like(like)

        noise = draw(0, torch.float32)
        out = sample_few_step(network, noise, text_of(1.0, 4), schedule, "sde", fresh, stop_at)
        assert [round(float(sigma[0]), 6) for sigma in network.sigmas] == [1.0, 0.75, 0.25][:runs]
        assert entered == [1, 2][:runs]
        if stop_at == 0:
            assert torch.equal(out, noise)


def test_euler_integrates_a_constant_velocity_exactly() -> None:
    noise = draw(0, torch.float32)
    out = sample_euler(Recorder(), noise, text_of(2.0, 4), text_of(1.0), uniform_ladder(7, 5.0), 3.0)
    assert torch.allclose(out, noise - 4.0, atol=1e-5)


# --- what they pass around ------------------------------------------------------------------------------------------


def test_one_prompt_is_spread_over_a_batch_but_several_are_not() -> None:
    assert text_of(1.0).expand(3).rows_BLD.shape == (3, 2, 3)
    several = text_of(1.0, 3)
    assert several.expand(3) is several
    with pytest.raises(AssertionError, match="single prompt"):
        several.expand(2)


def test_a_batch_moves_with_everything_in_it() -> None:
    batch = Batch((4, 5), text_of(1.0, 2), text_of(0.0), (3, 2, 4, 4), torch.zeros(2, 3, 2, 4, 4), ["a", "b"])
    moved = batch.to("meta")
    tensors = (moved.text.rows_BLD, moved.negative_text.rows_BLD, moved.latents_BCFHW)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
    assert (moved.positions, moved.latent_shape, moved.captions) == ((4, 5), (3, 2, 4, 4), ["a", "b"])
