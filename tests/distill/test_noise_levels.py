"""Draws of sigma against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from simpletuner_dmd.distill.noise_levels import Beta, Draw, Listed, LogitNormal, NoiseLevels, Uniform, automatic_shift
from simpletuner_dmd.randomness import RandomStream

from .oracles import FastStream

SHAPE = (16, 21, 60, 104)  # 81 frames of 832x480
MANY = 20_000
TOO_FAR = 1.95 / MANY**0.5  # Kolmogorov: a right draw goes beyond with probability 0.001


def kolmogorov(sample: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """The largest distance between the sample's distribution function and the true one."""
    expected = distribution(sample.double().sort().values)
    steps = torch.arange(len(sample) + 1, dtype=torch.float64) / len(sample)
    return float(torch.maximum((steps[1:] - expected).abs(), (expected - steps[:-1]).abs()).max())


def logit_normal(mean: float, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.special.ndtr((torch.logit(u) - mean) / scale)


CASES: list[tuple[Draw, Callable[[Tensor], Tensor]]] = [
    (LogitNormal(), logit_normal(0, 1)),
    (LogitNormal(scale=1.8), logit_normal(0, 1.8)),
    (LogitNormal(0.7, 1.6), logit_normal(0.7, 1.6)),
    (Uniform(), lambda u: u),
    (Beta(2, 2), lambda u: 3 * u**2 - 2 * u**3),
    (Beta(2, 1), lambda u: u**2),
    (Beta(1, 3), lambda u: 1 - (1 - u) ** 3),
    (Beta(5, 1), lambda u: u**5),
    (Beta(0.5, 0.5), lambda u: 2 / math.pi * torch.asin(u.sqrt())),
    (Beta(0.1, 1), lambda u: u**0.1),
    (Beta(1, 40), lambda u: 1 - (1 - u) ** 40),
]


@pytest.mark.parametrize(("draw", "distribution"), CASES, ids=[str(draw) for draw, _ in CASES])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_a_draw_has_its_distribution_and_the_shift_warps_it(
    draw: Draw, distribution: Callable[[Tensor], Tensor], shift: float | None
) -> None:
    sigma = NoiseLevels(draw, shift).sigma(FastStream(0, 0, tuple(range(MANY))), SHAPE)
    assert sigma.dtype == torch.float32
    assert sigma.shape == (MANY,)
    k = 1.0 if shift is None else shift
    u = sigma.double() / (k - (k - 1) * sigma.double())
    assert kolmogorov(u, distribution) < TOO_FAR


def test_the_distance_sees_a_wrong_parameter() -> None:
    stream = FastStream(0, 0, tuple(range(MANY)))
    assert kolmogorov(Beta(2, 2).levels(stream, "x"), lambda u: u**2) > 10 * TOO_FAR
    assert kolmogorov(LogitNormal(scale=1.1).levels(stream, "x"), logit_normal(0, 1)) > TOO_FAR


class Middle(RandomStream):
    """Evenly spread numbers in place of random ones: a draw becomes its quantile function."""

    def uniform(self, purpose: str) -> Tensor:
        return (torch.arange(999, dtype=torch.float64) + 1) / 1000


def test_beta_is_inverted_exactly_enough() -> None:
    u = Middle(0, 0, ()).uniform("")
    for draw, quantiles in [
        (Beta(2, 1), u.sqrt()),
        (Beta(1, 3), 1 - (1 - u) ** (1 / 3)),
        (Beta(0.5, 0.5), torch.sin(math.pi / 2 * u) ** 2),
    ]:
        assert float((draw.levels(Middle(0, 0, ()), "") - quantiles).abs().max()) < 1e-4


def test_listed_levels_are_equally_likely_and_no_shift_moves_them() -> None:
    sigmas = (1.0, 0.757, 0.522, 0.1)
    drawn = NoiseLevels(Listed(sigmas), shift=5.0).sigma(FastStream(0, 0, tuple(range(MANY))), SHAPE)
    values, counts = drawn.unique(return_counts=True)
    assert torch.equal(values, torch.tensor(sorted(sigmas)))
    expected = MANY / 4
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-squared, 3 degrees, 0.001


@pytest.mark.parametrize("draw", [LogitNormal(), Uniform(), Beta(), Listed((0.2, 0.5, 0.9))], ids=str)
def test_a_sample_keeps_its_level_whatever_batch_it_is_in(draw: Draw) -> None:
    levels = NoiseLevels(draw, 2.0)
    whole = levels.sigma(RandomStream(3, 7, tuple(range(8))), SHAPE)
    halves = [levels.sigma(RandomStream(3, 7, positions), SHAPE) for positions in ((0, 1, 2, 3), (4, 5, 6, 7))]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole, levels.sigma(RandomStream(3, 7, tuple(range(8))), SHAPE))
    assert not torch.equal(whole, levels.sigma(RandomStream(3, 8, tuple(range(8))), SHAPE))


@pytest.mark.parametrize(("size", "shift"), [((60, 104), 2.06), ((90, 160), 2.90), ((32, 32), math.exp(0.5))])
def test_automatic_shift_is_the_rule_of_flux_on_the_tokens_of_a_frame(size: tuple[int, int], shift: float) -> None:
    tokens = size[0] * size[1] // 4
    assert automatic_shift((16, 21, *size)) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-12)
    assert automatic_shift((16, 21, *size)) == automatic_shift((16, 1, *size))
    assert automatic_shift((16, 21, *size)) == pytest.approx(shift, abs=0.006)


def test_automatic_shift_is_what_warps_the_draw() -> None:
    stream = FastStream(0, 0, tuple(range(100)))
    followed = NoiseLevels(Uniform(), automatic=True).sigma(stream, SHAPE)
    assert torch.equal(followed, NoiseLevels(Uniform(), automatic_shift(SHAPE)).sigma(stream, SHAPE))
    assert not torch.equal(followed, NoiseLevels(Uniform(), automatic=True).sigma(stream, (16, 21, 90, 160)))
    with pytest.raises(ValueError, match="exclude"):
        NoiseLevels(shift=3.0, automatic=True)
