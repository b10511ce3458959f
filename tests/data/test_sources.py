"""Datasets that are tables of paths and URLs, and parquet files on this machine or on the Hub."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.findings import BAD_ROW, CANNOT_FETCH, CANNOT_READ
from simpletuner_dmd.data.scan import DatasetScan, look, scan
from simpletuner_dmd.data.sources import download
from tests.data.clips import Encoders, captioned, entry, prepared, prompts_entry, write_video
from tests.data.stores import FileServer, hub_route, serving


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def csv_entry(path: Path, **options: Any) -> DatasetEntry:
    table = {"path": str(path), **options.pop("table", {})}
    downloads = str(path.parent / "downloads")
    return entry(path.parent, type="csv", table=table, instance_data_dir="", download_dir=downloads, **options)


def captions(result: DatasetScan) -> list[tuple[str, ...]]:
    return [sample.captions for sample in result.usable]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FileServer]:
    files = {}
    for name, frames in (("a", 9), ("b", 10)):
        files[f"/{name}.mp4"] = write_video(tmp_path / "web" / f"{name}.mp4", frames=frames).read_bytes()
    with serving(files) as server:
        yield server


# --- tables of URLs and paths -----------------------------------------------------------------------------------------


def test_a_csv_of_urls_and_paths(tmp_path: Path, config: TrainConfig, web: FileServer) -> None:
    write_video(tmp_path / "d" / "clips" / "local.mp4")
    table = write_csv(
        tmp_path / "d" / "list.csv",
        [
            {"url": f"{web.url}/a.mp4", "caption": "first, with a comma\nand a line"},
            {"url": "clips/local.mp4", "caption": "second"},
            {"url": f"{web.url}/gone.mp4", "caption": "third"},
            {"url": "clips/nowhere.mp4", "caption": "fourth"},
            {"url": "", "caption": "fifth"},
            {"url": f"{web.url}/b.mp4", "caption": ""},
        ],
    )
    result = scan(csv_entry(table), config)
    assert captions(result) == [("first, with a comma\nand a line",), ("second",)]
    reasons = {(bad.kind, bad.reason.split(":")[0]) for bad in result.rejected}
    assert reasons == {
        (CANNOT_FETCH, "cannot fetch http"),
        (CANNOT_READ, "row 4 of list.csv names it, and it is not there"),
        (BAD_ROW, 'line 5 has no "url"'),
        ("no caption", "no caption"),
    }
    assert "404" in next(bad.reason for bad in result.rejected if bad.kind == CANNOT_FETCH)
    assert web.asked["/gone.mp4"] == 1, "what is not there is not asked for again"
    before = dict(web.asked)
    again = scan(csv_entry(table), config)
    assert captions(again) == captions(result)
    assert web.asked["/a.mp4"] == before["/a.mp4"], "a file is fetched once"


def test_a_download_that_is_cut_off_leaves_nothing(
    tmp_path: Path, config: TrainConfig, web: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    table = write_csv(tmp_path / "d" / "list.csv", [{"url": f"{web.url}/{n}.mp4", "caption": n} for n in "ab"])
    web.truncate = {"/a.mp4"}
    web.broken = {"/b.mp4": 503}
    result = look(csv_entry(table), config)
    assert result.counts == {"usable": 0, CANNOT_FETCH: 2}
    assert (web.asked["/a.mp4"], web.asked["/b.mp4"]) == (3, 3), "such faults may pass"
    assert not list((tmp_path / "d" / "downloads").glob("*"))
    web.truncate, web.broken = set(), {}
    assert len(scan(csv_entry(table), config).usable) == 2, "the next start goes on"


def fill(source: DatasetEntry, config: TrainConfig, **options: Any) -> tuple[int, list[Any], list[str]]:
    """Prepares one dataset: (clips that were encoded, the samples that training sees, what a person is told)."""
    encoders = Encoders(LatentGeometry())
    data = prepared([source], config, encoders, **options)
    return encoders.clips, [sample for group in data.groups for sample in group.samples], data.notices


def test_a_complete_cache_needs_no_copies_of_what_was_fetched(
    tmp_path: Path, config: TrainConfig, web: FileServer
) -> None:
    rows = [{"url": f"{web.url}/{name}.mp4", "caption": name} for name in ("a", "b", "gone")]
    table = write_csv(tmp_path / "d" / "list.csv", rows)
    made, samples, _ = fill(csv_entry(table), config)
    assert made == 2
    shutil.rmtree(tmp_path / "d" / "downloads")
    before = sum(web.asked.values())
    made, again, notices = fill(csv_entry(table), config)
    assert (made, again) == (0, samples) and sum(web.asked.values()) == before, "not one request"
    assert any("the cache stands in and nothing is fetched" in notice for notice in notices)
    assert any("gone.mp4: the server answers 404" in notice for notice in notices), "still said"
    assert fill(csv_entry(table, repeats=3), config)[0] == 0 and sum(web.asked.values()) == before
    # Whatever may change the samples is looked at with the files: these are fetched, and encoded where they differ.
    for change, encoded in (("row", 0), ("option", 0), ("frames", 2), ("vae", 2), ("latents", 2)):
        source, options = csv_entry(table), {}
        if change == "row":
            write_csv(table, [*rows[:2], {"url": f"{web.url}/a.mp4", "caption": "another"}])
        elif change == "option":
            source = csv_entry(table, prepend_instance_prompt=True, instance_prompt="film")
        elif change == "frames":
            source = csv_entry(table, video={"num_frames": 5})
        elif change == "vae":
            options["vae_fingerprint"] = "vae-b"
        else:
            fill(source, config)
            for file in (tmp_path / "cache" / "vae").rglob("??/*.safetensors"):
                file.unlink()
        shutil.rmtree(tmp_path / "d" / "downloads", ignore_errors=True)
        before = web.asked["/b.mp4"]
        assert fill(source, config, **options)[0] == encoded, change
        assert web.asked["/b.mp4"] == before + 1, change
    shutil.rmtree(tmp_path / "d" / "downloads")
    restored = fill(csv_entry(table), config)[1]
    assert ("another",) in [sample.captions for sample in restored], "the manifest is that of the last table"


def test_an_unquoted_comma_is_said_and_no_half_caption_is_used(tmp_path: Path, config: TrainConfig) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "t.csv").write_text("file,caption\na.mp4,a cat, and a dog\na.mp4,fine\n")
    result = scan(csv_entry(tmp_path / "t.csv"), config)
    assert captions(result) == [("fine",)]
    assert "line 1 has more values than the header" in result.rejected[0].reason


def test_columns_have_usual_names_or_are_named(tmp_path: Path, config: TrainConfig) -> None:
    write_video(tmp_path / "a.mp4")
    write_csv(tmp_path / "t.csv", [{"clip": "a.mp4", "words": "w", "more": "m"}])
    with pytest.raises(UserError, match="it has clip, words, more") as caught:
        scan(csv_entry(tmp_path / "t.csv"), config)
    assert caught.value.problems[0].key == "clips.table.filename_column"
    named = {"filename_column": "clip", "caption_column": "words"}
    assert captions(scan(csv_entry(tmp_path / "t.csv", table=named), config)) == [("w",)]
    with pytest.raises(UserError, match='no column "wrods"'):
        scan(csv_entry(tmp_path / "t.csv", table={**named, "caption_column": "wrods"}), config)
    write_csv(tmp_path / "t.csv", [{"clip": "a.mp4", "words": "", "more": "m"}])
    spare = {**named, "fallback_caption_column": "more"}
    assert captions(scan(csv_entry(tmp_path / "t.csv", table=spare), config)) == [("m",)]


def test_a_number_of_samples_is_a_fixed_choice(tmp_path: Path, config: TrainConfig) -> None:
    rows = [{"file": write_video(tmp_path / f"{i}.mp4", frames=9).name, "caption": str(i)} for i in range(8)]
    table = write_csv(tmp_path / "t.csv", rows)
    chosen = captions(scan(csv_entry(table, max_num_samples=3), config))
    assert len(chosen) == 3 and chosen == captions(scan(csv_entry(table, max_num_samples=3), config))
    other = captions(scan(csv_entry(table, max_num_samples=3, id="other"), config))
    assert chosen != other, "the choice belongs to the dataset"
    assert chosen != [("0",), ("1",), ("2",)], "and is no prefix, which may be all of one kind"


# --- tables beside a folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_captions_from_a_table_beside_the_files(tmp_path: Path, config: TrainConfig, kind: str) -> None:
    folder = tmp_path / "d"
    for name in ("a.mp4", "sub/b.mp4", "c.mp4"):
        write_video(folder / name)
    rows = [
        {"file_name": "a.mp4", "caption": "one"},
        {"file_name": "sub/b.mp4", "caption": "two\nlines"},
        {"file_name": "absent.mp4", "caption": "x"},
    ]
    if kind == "csv":
        write_csv(folder / "metadata.csv", rows)
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    result = scan(entry(folder, caption_strategy=kind), config)
    assert captions(result) == [("one",), ("two\nlines",)]
    assert [(bad.path.name, bad.kind) for bad in result.rejected] == [("c.mp4", "no caption")]
    assert any("1 rows of" in notice and "absent.mp4" in notice for notice in result.notices)
    short = look(entry(folder, caption_strategy=kind, video={"num_frames": 81}, max_num_samples=1), config)
    assert short.notices == result.notices, "a file that is left out is still there"
    named = scan(entry(folder, caption_strategy=kind, metadata_backend="json" if kind == "jsonl" else kind), config)
    assert captions(named) == captions(result)
    assert [(bad.path.name, bad.kind) for bad in named.rejected] == [("absent.mp4", CANNOT_READ)]


def test_a_table_may_name_the_files_and_leave_captions_to_text_files(tmp_path: Path, config: TrainConfig) -> None:
    for name in "abc":
        captioned(tmp_path / f"{name}.mp4", caption=f"beside {name}")
    write_csv(tmp_path / "metadata.csv", [{"file": "a", "caption": "x"}, {"file": "c", "caption": "y"}])
    table = {"identifier_includes_extension": False}
    result = scan(entry(tmp_path, metadata_backend="csv", table=table), config)
    assert captions(result) == [("beside a",), ("beside c",)]
    assert not result.rejected and not result.notices


def test_a_list_in_a_cell_is_several_captions(tmp_path: Path, config: TrainConfig) -> None:
    write_video(tmp_path / "a.b.mp4")
    pq.write_table(pa.table({"id": ["a.b"], "caption": [["one", "two"]]}), tmp_path / "metadata.parquet")
    table = {"filename_column": "id", "identifier_includes_extension": False}
    result = scan(entry(tmp_path, caption_strategy="parquet", table=table), config)
    assert captions(result) == [("one", "two")]


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install \"simpletuner-dmd\[parquet\]\""):
        scan(entry(tmp_path, caption_strategy="parquet"), config)


def test_a_damaged_parquet_file_is_said(tmp_path: Path, config: TrainConfig) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and nothing that belongs to it")
    with pytest.raises(UserError, match="not a whole parquet file"):
        scan(entry(tmp_path, caption_strategy="parquet"), config)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def write_shards(folder: Path, *, rows: int = 4, filler: int = 0) -> list[bytes]:
    """Two parquet files of the split train, one of test; each row a video, a caption and `filler` bytes."""
    clips = [write_video(folder / "raw" / f"{i}.mp4", frames=9 + i).read_bytes() for i in range(rows)]
    for path in (folder / "raw").iterdir():
        path.unlink()
    (folder / "raw").rmdir()
    (folder / "data").mkdir()
    for split, part, indices in (
        ("train", 0, range(rows // 2)),
        ("train", 1, range(rows // 2, rows)),
        ("test", 0, range(1)),
    ):
        table = pa.table(
            {
                "video": [{"bytes": clips[i], "path": None} for i in indices],
                "caption": [f"{split} {i}" for i in indices],
                "filler": [os.urandom(filler) for _ in indices],
            }
        )
        pq.write_table(table, folder / "data" / f"{split}-{part:05d}-of-00002.parquet", row_group_size=1)
    return clips


def hub_entry(name: str, tmp_path: Path, **options: Any) -> DatasetEntry:
    return entry(
        tmp_path, type="huggingface", dataset_name=name, download_dir=str(tmp_path / "downloads"),
        **{"instance_data_dir": "", **options},
    )  # fmt: skip


def test_parquet_files_on_disk(tmp_path: Path, config: TrainConfig) -> None:
    clips = write_shards(tmp_path / "set")
    source = hub_entry(str(tmp_path / "set"), tmp_path)
    result = scan(source, config)
    assert captions(result) == [(f"train {i}",) for i in range(4)]
    assert [sample.path.read_bytes() for sample in result.usable] == clips
    assert {sample.path.suffix for sample in result.usable} == {".mp4"}
    assert captions(scan(hub_entry(str(tmp_path / "set"), tmp_path, split="test"), config)) == [("test 0",)]
    with pytest.raises(UserError, match="no parquet file belongs to the split val"):
        scan(hub_entry(str(tmp_path / "set"), tmp_path, split="val"), config)


def test_parquet_rows_are_read_once(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "set")
    source = hub_entry(str(tmp_path / "set"), tmp_path)
    first = captions(scan(source, config))
    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetFile, "iter_batches", None)
        assert captions(scan(source, config)) == first
    next((tmp_path / "downloads").glob("*.mp4")).unlink()
    assert captions(scan(source, config)) == first, "what is gone is written again"


def test_columns_of_a_hub_dataset(tmp_path: Path, config: TrainConfig) -> None:
    write_shards(tmp_path / "set")
    with pytest.raises(UserError, match='no column "film"; it has video, caption, filler'):
        scan(hub_entry(str(tmp_path / "set"), tmp_path, video_column="film"), config)
    with pytest.raises(UserError, match='no column "words"'):
        scan(hub_entry(str(tmp_path / "set"), tmp_path, caption_column="words"), config)
    table = pa.table({"video": ["no/such/file.mp4", None], "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "one.parquet")
    result = look(hub_entry(str(tmp_path / "one.parquet"), tmp_path), config)
    assert [bad.reason for bad in result.rejected] == [
        f"row {n} holds neither bytes nor a file that is there" for n in (1, 2)
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving({}, hub_route("owner/films", tmp_path / "set")) as server:
        from huggingface_hub import constants, hf_api, hf_file_system

        for module in (constants, hf_api, hf_file_system):
            monkeypatch.setattr(module, "ENDPOINT", server.url, raising=False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        yield server


def test_videos_of_a_hub_dataset(tmp_path: Path, config: TrainConfig, hub: FileServer) -> None:
    clips = write_shards(tmp_path / "set")
    result = scan(hub_entry("owner/films", tmp_path), config)
    assert captions(result) == [(f"train {i}",) for i in range(4)]
    assert [sample.path.read_bytes() for sample in result.usable] == clips


def test_prompts_of_a_hub_dataset_travel_without_its_videos(
    tmp_path: Path, config: TrainConfig, hub: FileServer
) -> None:
    write_shards(tmp_path / "set", filler=3_000_000)
    size = sum(path.stat().st_size for path in (tmp_path / "set").rglob("*.parquet"))
    source = prompts_entry(tmp_path, type="huggingface", dataset_name="owner/films", instance_data_dir="")
    assert captions(scan(source, config)) == [(f"train {i}",) for i in range(4)]
    assert hub.sent < size / 2


def test_a_part_of_a_hub_dataset_travels_alone(tmp_path: Path, config: TrainConfig, hub: FileServer) -> None:
    write_shards(tmp_path / "set", rows=8, filler=12_000_000)
    result = scan(hub_entry("owner/films", tmp_path, max_num_samples=1), config)
    again = scan(hub_entry("owner/films", tmp_path, max_num_samples=1), config)
    assert len(result.usable) == 1 and captions(again) == captions(result)
    assert len(list((tmp_path / "downloads").glob("*.mp4"))) == 1
    assert hub.sent < 12_000_000 * 2, "of eight row groups, one and what is read ahead of it"
    grown = captions(scan(hub_entry("owner/films", tmp_path, max_num_samples=5), config))
    assert len(set(grown)) == 5 and set(captions(result)) <= set(grown), "a larger part holds the smaller one"


def files_asked(hub: FileServer) -> int:
    return sum(count for path, count in hub.asked.items() if "/resolve/" in path)


@pytest.mark.parametrize("parquet", [True, False])
def test_a_complete_cache_of_a_hub_dataset_asks_for_the_list_of_files_alone(
    tmp_path: Path, config: TrainConfig, hub: FileServer, parquet: bool
) -> None:
    if parquet:
        write_shards(tmp_path / "set")
    else:
        for name, frames in (("a", 9), ("b", 10)):
            captioned(tmp_path / "set" / f"{name}.mp4", caption=name, frames=frames)
    source = hub_entry("owner/films", tmp_path)
    made, samples, _ = fill(source, config)
    assert made == len(samples) > 1
    shutil.rmtree(tmp_path / "downloads")
    before = files_asked(hub)
    assert fill(source, config)[:2] == (0, samples)
    assert files_asked(hub) == before and not (tmp_path / "downloads").exists()
    first = next(path for path in (tmp_path / "set").rglob("*.*") if path.suffix in (".txt", ".parquet"))
    first.write_bytes(first.read_bytes() + b" ") if not parquet else first.unlink()
    fill(source, config)
    assert files_asked(hub) > before, "the dataset has changed"


def test_what_is_asked_of_a_file_on_the_hub_is_asked_once(tmp_path: Path, config: TrainConfig, hub: FileServer) -> None:
    write_shards(tmp_path / "set")
    words = prompts_entry(
        tmp_path, type="huggingface", dataset_name="owner/films", instance_data_dir="",
        download_dir=str(tmp_path / "words"),
    )  # fmt: skip
    part = hub_entry("owner/films", tmp_path, max_num_samples=2)
    first = captions(scan(words, config)), captions(scan(part, config))
    before = files_asked(hub)
    assert (captions(scan(words, config)), captions(scan(part, config))) == first
    assert files_asked(hub) == before


def test_a_hub_dataset_of_files_is_copied(tmp_path: Path, config: TrainConfig, hub: FileServer) -> None:
    write_video(tmp_path / "set" / "clips" / "a.mp4")
    write_csv(tmp_path / "set" / "metadata.csv", [{"file_name": "clips/a.mp4", "caption": "from the table"}])
    result = scan(hub_entry("owner/films", tmp_path), config)
    assert captions(result) == [("from the table",)]


def test_a_hub_dataset_that_is_not_there(tmp_path: Path, config: TrainConfig, hub: FileServer) -> None:
    with pytest.raises(UserError, match="owner/none cannot be read from the Hub") as caught:
        scan(hub_entry("owner/none", tmp_path), config)
    assert caught.value.problems[0].key == "clips.dataset_name"
