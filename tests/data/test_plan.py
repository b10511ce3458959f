"""The plan of an epoch: what is too small says so with the repeats that would do, and the plan is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.plan import PLAN_FILE, DataPlan
from simpletuner_dmd.data.scan import scan_all
from tests.data.clips import Encoders, captioned, entry, make_config, prepared, prompts_entry, write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(5):
        captioned(tmp_path / "d" / f"{index}.mp4", size=(64, 64) if index < 3 else (96, 40))
    return tmp_path / "d"


def plan_of(datasets: list[Any], config: TrainConfig) -> DataPlan:
    return DataPlan.of(scan_all(datasets, config), config)


def test_too_small_for_a_batch_names_the_repeats(folder: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, train_batch_size=2, gradient_accumulation_steps=2, num_processes=2,
                         disable_bucket_pruning=False)  # fmt: skip
    plan = plan_of([entry(folder)], config)
    assert plan.global_batch == 8
    needed = {bucket.bucket: bucket.repeats_needed for bucket in plan.buckets}
    assert needed == {"64x64x9": 2, "96x48x9": 3}
    text = "\n".join(plan.notices())
    assert "8 (train_batch_size 2 x gradient_accumulation_steps 2 x num_processes 2)" in text
    assert "none of its 2 buckets fills a batch" in text and "repeats: 3 would fill them all" in text
    # What it advises is enough, and one less is not.
    assert plan_of([entry(folder, repeats=3)], config).notices() == []
    assert len(plan_of([entry(folder, repeats=2)], config).notices()) == 1


def test_small_buckets_stay_where_they_are_asked_to(folder: Path, tmp_path: Path) -> None:
    pruning = make_config(tmp_path, train_batch_size=3, disable_bucket_pruning=False)
    taking = {b.bucket: b.takes_part for b in plan_of([entry(folder)], pruning).buckets}
    assert taking == {"64x64x9": True, "96x48x9": False}
    kept = plan_of([entry(folder)], make_config(tmp_path, train_batch_size=3))
    assert all(bucket.takes_part for bucket in kept.buckets)
    assert "so some appear several times in a batch; repeats: 1 would fill it" in kept.notices()[0]
    alone = plan_of([entry(folder)], make_config(tmp_path, train_batch_size=9, disable_bucket_pruning=False))
    assert all(bucket.takes_part for bucket in alone.buckets), "an empty epoch would be worse"


def test_vae_batch_size_is_compared_with_the_files(folder: Path, tmp_path: Path) -> None:
    plan = plan_of([entry(folder, repeats=9)], make_config(tmp_path, vae_batch_size=3))
    assert plan.notices() == [
        "clips: bucket 96x48x9 has 2 of the 3 files that vae_batch_size asks for, and is encoded in one smaller batch"
    ]
    (tmp_path / "p.txt").write_text("one")
    assert plan_of([prompts_entry(tmp_path / "p.txt")], make_config(tmp_path, vae_batch_size=3)).notices() == []


def test_the_plan_is_saved(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    write_video(folder / "silent.mp4")
    crop: dict[str, Any] = {"crop": True, "crop_aspect": "square"}
    config = make_config(tmp_path, train_batch_size=2)
    data = prepared([entry(folder, **crop)], config, encoders)
    path = data.save_plan(tmp_path / "out")
    data.close()
    assert path.name == PLAN_FILE and [p.name for p in path.parent.iterdir()] == [PLAN_FILE]
    (dataset,) = json.loads(path.read_text())["datasets"]
    assert dataset["counts"] == {"usable": 5, "no caption": 1}
    (left_out,) = dataset["left_out"]
    assert Path(left_out["path"]).name == "silent.mp4" and left_out["fix"]
    (bucket,) = dataset["buckets"]
    assert (bucket["bucket"], bucket["samples"], bucket["takes_part"]) == ("64x64x9", 5, True)
    # 96x40 becomes 154x64 and loses 90 of its 154 columns; the three squares lose nothing.
    assert bucket["cropped_most"] == pytest.approx(90 / 154, abs=1e-4)
    assert bucket["cropped_mean"] == pytest.approx(2 / 5 * 90 / 154, abs=1e-4)


def test_datasets_of_different_resolution_are_mixed(tmp_path: Path, encoders: Encoders) -> None:
    for name, size in (("a", (64, 64)), ("b", (96, 96))):
        for index in range(4):
            captioned(tmp_path / name / f"{index}.mp4", caption=f"{name} {index}", size=size)
    datasets = [
        entry(tmp_path / "a", id="a", resolution=32, probability=0.5),
        entry(tmp_path / "b", id="b", resolution=96, repeats=1),
    ]
    data = prepared(datasets, make_config(tmp_path, train_batch_size=2), encoders)
    steps = data.steps_per_epoch(2)
    assert steps == 1 + 4  # half of a's two batches, and both passes of b's two
    shapes = []
    for step in range(steps):
        batch = data.micro_batch(step, 0, 0, micro_batch_size=2, accumulation=1, world=1)
        assert len({caption[0] for caption in batch.captions}) == 1, "a batch is of one dataset"
        shapes.append(tuple(batch.latents_BCFHW.shape[2:]))
    assert sorted(shapes) == [(3, 4, 4)] + [(3, 12, 12)] * 4
    data.close()
