"""Draws depend on their name and on nothing else."""

from __future__ import annotations

import pytest
import torch

from simpletuner_dmd.randomness import RandomStream, derive_seed, generator, permutation

SHAPE = (2, 3)


def test_seeds_are_the_same_everywhere_and_forever() -> None:
    """A resumed run on another machine or version must draw the same: these numbers may not change."""
    assert derive_seed(42, 7, 3, "score/noise") == 3907920384491811743
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("a", "b") != derive_seed("ab")
    assert all(0 <= derive_seed(number) < 2**63 for number in range(1000))
    assert len({derive_seed(number) for number in range(1000)}) == 1000


def test_each_sample_draws_the_same_in_any_company() -> None:
    """One process of four samples, two of two, or four micro-batches of one: the same noise for each sample."""
    whole = RandomStream(1, 5, (0, 1, 2, 3))
    for split in (((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)), ((3, 1), (0, 2))):
        for positions in split:
            part = RandomStream(1, 5, positions)
            assert torch.equal(part.normal(SHAPE, "x"), whole.normal(SHAPE, "x")[list(positions)])
            assert torch.equal(part.uniform("x"), whole.uniform("x")[list(positions)])


def test_samples_steps_seeds_and_purposes_draw_apart() -> None:
    draws = [
        RandomStream(seed, step, (position,)).normal(SHAPE, purpose)
        for seed in (1, 2)
        for step in (0, 1)
        for position in (0, 1)
        for purpose in ("x", "y")
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 16


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    stream = RandomStream(1, 5, (0, 1))
    torch.manual_seed(0)
    first, after_first = stream.normal(SHAPE, "x"), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(stream.normal(SHAPE, "x"), first)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after_first)


def test_draws_have_the_promised_law() -> None:
    stream = RandomStream(3, 0, tuple(range(4000)))
    normal, uniform = stream.normal((4,), "x"), stream.uniform("x")
    assert normal.dtype == torch.float32
    assert normal.shape == (4000, 4)
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.std()) == pytest.approx(1, abs=0.025)
    assert uniform.dtype == torch.float64
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.005)


def test_a_shared_index_is_shared_and_uniform() -> None:
    counts = torch.zeros(4)
    for step in range(4000):
        index = RandomStream(1, step, (0, 1)).shared_index(4, "exit")
        assert index == RandomStream(1, step, (7,)).shared_index(4, "exit")
        counts[index] += 1
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 16.27  # 3 degrees of freedom, one honest run in a thousand is above


def test_permutations() -> None:
    orders = [permutation(50, 1, "order", epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] == permutation(50, 1, "order", 1)


def test_a_generator_is_fresh_each_time() -> None:
    assert torch.equal(torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x")))
