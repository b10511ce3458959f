"""Order and loading: a pure function of the step, the same on any number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.batches import PreparedData, TensorCache
from simpletuner_dmd.data.buckets import LatentGeometry
from tests.data.clips import WIDTH, Encoders, captioned, entry, make_config, prepared, prompts_entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(7):
        size = (64, 64) if index < 5 else (96, 48)
        captioned(tmp_path / "d" / f"{index}.mp4", caption=f"clip {index}", size=size, frames=10 + index)
    return tmp_path / "d"


@pytest.fixture
def data(folder: Path, config: TrainConfig, encoders: Encoders) -> Iterator[PreparedData]:
    data = prepared([entry(folder)], config, encoders)
    yield data
    data.close()


def one_process(data: PreparedData, step: int, batch: int = 4, accumulation: int = 1) -> list[Any]:
    return [
        data.micro_batch(step, micro, 0, micro_batch_size=batch, accumulation=accumulation, world=1)
        for micro in range(accumulation)
    ]


def test_the_order_is_a_pure_function_of_the_step(data: PreparedData, folder: Path, tmp_path: Path) -> None:
    forwards = [one_process(data, step)[0].captions for step in range(12)]
    backwards = [one_process(data, step)[0].captions for step in reversed(range(12))]
    assert forwards == backwards[::-1]
    fresh = prepared([entry(folder)], make_config(tmp_path), Encoders(LatentGeometry()))
    assert [one_process(fresh, step)[0].captions for step in range(12)] == forwards
    other = prepared([entry(folder)], make_config(tmp_path, seed=8), Encoders(LatentGeometry()))
    assert [one_process(other, step)[0].captions for step in range(12)] != forwards


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(2, 1, 2), (1, 2, 2), (1, 4, 1), (2, 2, 1), (1, 1, 4)])
def test_any_split_sees_the_same_samples(data: PreparedData, batch: int, accumulation: int, world: int) -> None:
    for step in range(6):
        (whole,) = one_process(data, step)
        assert whole.positions == (0, 1, 2, 3)
        parts = [
            data.micro_batch(step, micro, rank, micro_batch_size=batch, accumulation=accumulation, world=world)
            for micro in range(accumulation)
            for rank in range(world)
        ]
        where = {p: (part, i) for part in parts for i, p in enumerate(part.positions)}
        assert sorted(where) == [0, 1, 2, 3]
        for position, (part, i) in where.items():
            assert part.captions[i] == whole.captions[position]
            assert torch.equal(part.latents_BCFHW[i], whole.latents_BCFHW[position])
            assert torch.equal(part.text.rows_BLD[i], whole.text.rows_BLD[position])


def test_every_sample_every_epoch_and_no_mixed_shapes(data: PreparedData) -> None:
    steps = data.steps_per_epoch(4)
    assert steps == 2 + 1  # 5 samples in one bucket, 2 in the other
    orders = []
    for epoch in range(3):
        seen: Counter[str] = Counter()
        order = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            (batch,) = one_process(data, step)
            wide = {caption in ("clip 5", "clip 6") for caption in batch.captions}
            assert len(wide) == 1
            assert batch.latents_BCFHW.shape[1:] == batch.latent_shape
            seen.update(batch.captions)
            order.append(tuple(batch.captions))
        assert set(seen) == {f"clip {i}" for i in range(7)}
        assert seen["clip 5"] + seen["clip 6"] == 4
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_latents_belong_to_their_captions(tmp_path: Path, config: TrainConfig, encoders: Encoders) -> None:
    for index in range(5):
        pictures = np.full((9, 64, 64, 3), 40 * index + 20, np.uint8)
        captioned(tmp_path / "d" / f"{index}.mp4", caption=str(index), pictures=pictures)
    data = prepared([entry(tmp_path / "d")], config, encoders)
    for step in range(4):
        (batch,) = one_process(data, step)
        for caption, latents in zip(batch.captions, batch.latents_BCFHW, strict=True):
            # The stand-in encoder passes the red channel through, so the level tells which clip it is.
            assert round((float(latents.mean()) + 1) * 127.5 - 20) // 10 in (4 * int(caption), 4 * int(caption) - 1)


def test_padding_is_exactly_zero(data: PreparedData, encoders: Encoders) -> None:
    (batch,) = one_process(data, 0)
    assert batch.text.rows_BLD.shape == (4, 16, WIDTH) and batch.text.rows_BLD.dtype == torch.float32
    for caption, rows in zip(batch.captions, batch.text.rows_BLD, strict=True):
        (real,) = encoders.text([caption])
        assert torch.equal(rows[: len(real)], real)
        assert torch.equal(rows[len(real) :], torch.zeros(16 - len(real), WIDTH))
    assert torch.equal(batch.negative_text.rows_BLD, data.text("ugly").rows_BLD)
    assert data.text("a validation prompt").rows_BLD.shape == (1, 16, WIDTH)
    with pytest.raises(KeyError, match="never seen"):
        data.text("never seen")


def test_repeats_are_extra_passes(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    data = prepared([entry(folder, repeats=2)], config, encoders)
    assert data.steps_per_epoch(1) == 21
    seen = Counter(one_process(data, step, batch=1)[0].captions[0] for step in range(21))
    assert set(seen.values()) == {3} and len(seen) == 7


def test_probability_weighs_datasets(tmp_path: Path, config: TrainConfig, encoders: Encoders) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(20)))
    options: dict[str, Any] = {"needs_latents": False, "encode_video": None}

    def counts(a: float, b: float, epochs: int) -> Counter[str]:
        entries = [
            prompts_entry(tmp_path / "a.txt", id="a", probability=a),
            prompts_entry(tmp_path / "b.txt", id="b", probability=b),
        ]
        data = prepared(entries, config, encoders, **options)
        steps = data.steps_per_epoch(2) * epochs
        return Counter(caption for step in range(steps) for caption in one_process(data, step, batch=2)[0].captions)

    even = counts(0.5, 0.5, 1)
    assert len(even) == 40 and set(even.values()) == {1}
    skewed = counts(1, 0.3, 1)
    assert sum(n for caption, n in skewed.items() if caption[0] == "b") == 6
    assert len([caption for caption in counts(1, 0.3, 12) if caption[0] == "b"]) == 20, "over epochs all are seen"
    assert not [caption for caption in counts(1, 0, 2) if caption[0] == "b"]


def test_small_buckets_are_kept_or_pruned_and_said(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    kept = prepared([entry(folder)], make_config(tmp_path, train_batch_size=4), encoders)
    assert kept.steps_per_epoch(4) == 3
    assert any(
        "2 samples for a batch of 4 (train_batch_size 4 x gradient_accumulation_steps 1 x num_processes 1), so some "
        "appear several times" in notice
        for notice in kept.notices
    )
    pruning = make_config(tmp_path, train_batch_size=4, disable_bucket_pruning=False)
    pruned = prepared([entry(folder)], pruning, encoders)
    assert pruned.steps_per_epoch(4) == 2
    assert any("num_processes 1) and is left out; repeats: 1 would fill it" in n for n in pruned.notices)
    assert "left out" in pruned.report() and "64x64x9: 5 samples, latents 16x3x8x8" in pruned.report()
    # Nothing left would be worse than a repeated sample.
    tiny = prepared([entry(folder)], make_config(tmp_path, train_batch_size=64, disable_bucket_pruning=False), encoders)
    assert tiny.steps_per_epoch(64) == 2
    assert any("several times in a batch; repeats: 12 would fill it" in notice for notice in tiny.notices)


def test_one_of_several_captions_is_drawn_per_epoch(tmp_path: Path, config: TrainConfig, encoders: Encoders) -> None:
    captioned(tmp_path / "d" / "a.mp4", caption="first\nsecond\nthird")
    data = prepared([entry(tmp_path / "d")], config, encoders)
    drawn = [one_process(data, step, batch=1)[0].captions[0] for step in range(20)]
    assert set(drawn) == {"first", "second", "third"}
    assert drawn == [one_process(data, step, batch=1)[0].captions[0] for step in range(20)]


def test_the_next_micro_batch_is_loaded_ahead(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[int, int]] = []
    genuine = PreparedData._load

    def counting(self: PreparedData, step: int, micro: int, *rest: int) -> Any:
        loads.append((step, micro))
        return genuine(self, step, micro, *rest)

    monkeypatch.setattr(PreparedData, "_load", counting)
    for step in range(3):
        one_process(data, step, batch=1, accumulation=2)
    data.close()
    assert loads == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)][: len(loads)] and len(loads) >= 6


def test_failures_while_loading_ahead_surface(data: PreparedData) -> None:
    one_process(data, 0, batch=1)
    for file in Path(data.latent_stores["clips"].folder).rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="is gone"):
        for step in range(1, 30):
            one_process(data, step, batch=1)


def test_tensor_cache_stays_within_its_bytes() -> None:
    cache = TensorCache(limit=40)
    for name in "abc":
        cache.put(name, torch.zeros(4))
        cache.get("a")
    assert cache.get("a") is not None and cache.get("b") is None and cache.get("c") is not None
    cache.put("huge", torch.zeros(100))
    assert cache.get("huge") is None
