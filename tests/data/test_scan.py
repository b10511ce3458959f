"""What a folder holds: nothing is dropped without being listed, with its reason."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.findings import CANNOT_READ
from simpletuner_dmd.data.scan import PromptSample, VideoSample, look, scan, scan_all
from simpletuner_dmd.data.sources.folder import list_files
from tests.data.clips import captioned, entry, make_config, prompts_entry, write_video


def messy(folder: Path) -> Path:
    """Two good clips and one of every kind of trouble."""
    captioned(folder / "good.mp4", frames=12)
    captioned(folder / "süß" / "文.mp4", caption="a field, 灰色", frames=30, fps=30, size=(96, 64))
    captioned(folder / "short.mp4", frames=5)
    captioned(folder / "tiny.mp4", size=(16, 16))
    write_video(folder / "silent.mp4")
    captioned(folder / "blank.mp4").with_suffix(".txt").write_text(" \n")
    captioned(folder / "empty.mp4").write_bytes(b"")
    captioned(folder / "note.mp4").write_text("not a video at all")
    cut = captioned(folder / "cut.mp4", frames=40)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "notes.md").write_text("# notes")
    (folder / ".DS_Store").write_bytes(b"\x00\x01")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.mp4").symlink_to(folder / "gone.mp4")
    return folder


def test_every_file_is_used_or_listed(tmp_path: Path, config: TrainConfig) -> None:
    result = scan(entry(messy(tmp_path / "data"), minimum_image_size=32), config)
    assert [sample.path.name for sample in result.usable] == ["good.mp4", "文.mp4"]
    assert result.buckets == {"64x64x9": 1, "80x48x9": 1}
    reasons = {item.path.name: item.reason for item in result.rejected}
    expected = {
        "short.mp4": "too short: 0.31 s (5 frames at 16 per second) give 5 frames at 16 per second, 9 are needed",
        "tiny.mp4": "too small: 16x16",
        "silent.mp4": "no caption: silent.txt is missing",
        "blank.mp4": "no caption: blank.txt is empty",
        "empty.mp4": "empty (0 bytes)",
        "note.mp4": "text",
        "cut.mp4": "cut off",
        "notes.md": "text",
        "dangling.mp4": "cannot be read",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], name
    assert "left out" in "\n".join(result.lines())


def test_check_changes_nothing_on_disk(tmp_path: Path, config: TrainConfig) -> None:
    folder = messy(tmp_path / "data")
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(folder / "loop"))
    scan(entry(folder), config)
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(folder / "loop")) == before


def test_quarantine_moves_what_cannot_be_decoded_and_only_that(tmp_path: Path, config: TrainConfig) -> None:
    folder = messy(tmp_path / "data")
    scan(entry(folder), config, quarantine=True)
    moved = {path.name for path in (folder / "rejected").iterdir()}
    assert {"empty.mp4", "note.mp4", "cut.mp4", "notes.md"} == {n for n in moved if not n.endswith(".reason.txt")}
    assert "cut off" in (folder / "rejected" / "cut.mp4.reason.txt").read_text()
    assert (folder / "short.mp4").exists() and (folder / "silent.mp4").exists()
    again = scan(entry(folder), config, quarantine=True)
    assert "cut.mp4" not in {item.path.name for item in again.rejected}, "the rejected folder is not scanned"


@pytest.mark.parametrize("kind", ["missing", "empty", "unusable"])
def test_folder_without_samples_is_a_users_mistake(tmp_path: Path, config: TrainConfig, kind: str) -> None:
    folder = tmp_path / "data"
    if kind != "missing":
        folder.mkdir()
    if kind == "unusable":
        write_video(folder / "silent.mp4")
    with pytest.raises(UserError) as caught:
        scan(entry(folder), config)
    (problem,) = caught.value.problems
    words = {"missing": "does not exist", "empty": "is empty", "unusable": "silent.mp4: no caption"}[kind]
    assert words in problem.message and problem.fix and problem.key == "clips.instance_data_dir"


def test_problems_of_all_datasets_come_at_once(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(UserError) as caught:
        scan_all([entry(tmp_path / "a", id="a"), entry(tmp_path / "b", id="b")], config)
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="no dataset is enabled"):
        scan_all([entry(tmp_path, disabled=True)], config)


def test_lengths(tmp_path: Path, config: TrainConfig) -> None:
    captioned(tmp_path / "d" / "a.mp4", frames=30, fps=30)  # 1 s: 16 frames at 16 per second
    path = tmp_path / "d"
    assert scan(entry(path, video={"num_frames": 16}), config).usable[0].frames == 13
    assert "rounded down to 13" in " ".join(scan(entry(path, video={"num_frames": 16}), config).notices)
    assert scan(entry(path, video={"num_frames": 81, "min_frames": 5}), config).usable[0].frames == 13
    assert scan(entry(path, video={"num_frames": 5, "frame_interval": 3}), config).usable[0].frames == 5
    for video, words in (
        ({"num_frames": 17}, "too short: 1.00 s (30 frames at 30 per second) give 16 frames"),
        ({"num_frames": 9, "frame_interval": 2}, "give 8 frames at 16 per second, one in 2 taken, 9 are needed"),
        ({"num_frames": 5, "max_frames": 10}, "too long"),
    ):
        with pytest.raises(UserError) as caught:
            scan(entry(path, video=video), config)
        assert words in str(caught.value)


def test_framerate_is_the_configs(tmp_path: Path) -> None:
    captioned(tmp_path / "d" / "a.mp4", frames=30, fps=30)
    config = make_config(tmp_path, framerate=24)
    assert scan(entry(tmp_path / "d", video={"num_frames": 81, "min_frames": 1}), config).usable[0].frames == 21


def test_captions(tmp_path: Path, config: TrainConfig) -> None:
    folder = tmp_path / "d"
    path = captioned(folder / "a_red_circle.mp4", caption="\ufefffirst line\r\n\nsecond line\n")

    def captions(**options: object) -> tuple[str, ...]:
        (sample,) = scan(entry(folder, **options), config).usable
        return sample.captions

    assert captions() == ("first line", "second line")
    assert captions(caption_strategy="filename") == ("a red circle",)
    assert captions(caption_strategy="instanceprompt", instance_prompt="xyz") == ("xyz",)
    assert captions(caption_strategy="filename", instance_prompt="xyz", prepend_instance_prompt=True) == (
        "xyz a red circle",
    )
    path.with_suffix(".txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        captions()


def test_caches_inside_the_folder_are_not_data(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    captioned(folder / "a.mp4")
    (folder / "cache" / "vae" / "x").mkdir(parents=True)
    (folder / "cache" / "vae" / "x" / "y.safetensors").write_bytes(b"x")
    result = scan(entry(folder), make_config(folder))
    assert result.rejected == []


def test_sizes_follow_the_entry_then_the_config(tmp_path: Path) -> None:
    captioned(tmp_path / "d" / "a.mp4", size=(128, 64))
    config = make_config(tmp_path, resolution=32, resolution_type="pixel")

    def size(**options: object) -> str:
        (sample,) = scan(entry(tmp_path / "d", **{"resolution": None, **options}), config).usable
        assert isinstance(sample, VideoSample)
        return sample.bucket

    assert size() == "64x32x9"
    assert size(resolution=64) == "128x64x9"
    assert size(resolution=64, resolution_type="pixel_area") == "96x48x9"  # 90.5 -> 5.66 -> 96, 45.3 -> 2.83 -> 48
    assert size(resolution=64, crop=True, crop_aspect="square") == "64x64x9"


def test_ids_name_folders_of_the_cache(tmp_path: Path, config: TrainConfig) -> None:
    bad = entry(tmp_path).model_copy(update={"id": "../x"})
    with pytest.raises(UserError, match="cannot be used"):
        scan(bad, config)


def test_the_wan_guides_sizes_and_lengths(tmp_path: Path) -> None:
    """The entry of SimpleTuner's Wan guide, at a seventh of its size and a fifth of its length."""
    captioned(tmp_path / "d" / "good.mp4", frames=40, fps=30, size=(128, 72))
    captioned(tmp_path / "d" / "short.mp4", frames=14)
    captioned(tmp_path / "d" / "tiny.mp4", frames=40, size=(48, 48))
    source = entry(
        tmp_path / "d", crop=False, resolution=64, minimum_image_size=64, maximum_image_size=64,
        target_downsample_size=64, resolution_type="pixel_area", caption_strategy="textfile",
        metadata_backend="discovery", repeats=0, video={"num_frames": 15, "min_frames": 15},
    )  # fmt: skip
    result = scan(source, make_config(tmp_path))
    assert result.buckets == {"80x48x13": 1}  # 15 -> 13 of 4n + 1; 64 * sqrt(1.78) = 85.3 -> 80, 47.97 -> 48
    assert result.counts == {"usable": 1, "too short": 1, "too small": 1}


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_read(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "good.mp4")
    captioned(tmp_path / "locked.mp4")
    genuine = av.open

    def guarded(name: str, *rest: Any, **options: Any) -> Any:
        if name.endswith("locked.mp4"):  # chmod does not stop root, as whom tests may run
            raise PermissionError(13, "Permission denied", name)
        return genuine(name, *rest, **options)

    monkeypatch.setattr(av, "open", guarded)
    result = look(entry(tmp_path), config)
    (bad,) = result.rejected
    assert (bad.path.name, bad.kind, bad.damaged) == ("locked.mp4", CANNOT_READ, False)
    assert "Permission denied" in bad.reason and bad.fix


def test_a_folder_that_vanishes_is_listed(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "good.mp4")
    captioned(tmp_path / "sub" / "gone.mp4")
    genuine = os.scandir

    def vanishing(place: Any) -> Any:
        if isinstance(place, Path) and place.name == "sub":
            shutil.rmtree(place)
        return genuine(place)

    monkeypatch.setattr(os, "scandir", vanishing)
    result = look(entry(tmp_path), config)
    assert len(result.usable) == 1
    (bad,) = result.rejected
    assert (bad.path.name, bad.kind) == ("sub", CANNOT_READ) and "No such file" in bad.reason


def test_a_file_that_vanishes_is_listed(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "good.mp4")
    captioned(tmp_path / "gone.mp4")
    genuine = list_files

    def listing(*arguments: Any) -> Any:
        found = genuine(*arguments)
        (tmp_path / "gone.mp4").unlink()
        return found

    monkeypatch.setattr("simpletuner_dmd.data.sources.listing.list_files", listing)
    result = look(entry(tmp_path), config)
    assert [(bad.path.name, bad.kind) for bad in result.rejected] == [("gone.mp4", CANNOT_READ)]


def test_names_of_any_script_and_of_the_longest_length(tmp_path: Path, config: TrainConfig) -> None:
    names = ["a" * 251, "日本語のファイル", "emoji 🎬 and spaces", "quote'\"percent%20#?&", "combining e\u0301"]
    for name in names:
        captioned(tmp_path / f"{name}.mp4", caption=name)
    result = scan(entry(tmp_path), config)
    assert {sample.captions[0] for sample in result.usable} == set(names) and not result.rejected


def test_links_that_lead_round_in_circles(tmp_path: Path, config: TrainConfig) -> None:
    captioned(tmp_path / "good.mp4")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    result = look(entry(tmp_path), config)
    assert len(result.usable) == 1
    assert sorted((bad.path.name, bad.kind) for bad in result.rejected) == [
        (name, CANNOT_READ) for name in ("one", "self", "two")
    ]


def test_counts_name_every_kind(tmp_path: Path, config: TrainConfig) -> None:
    folder = messy(tmp_path / "data")
    captioned(folder / "long.mp4", frames=40)
    write_video(folder / "silent2.mp4")
    source = entry(folder, minimum_image_size=32, video={"num_frames": 9, "max_frames": 30})
    result = look(source, config)
    assert result.counts == {
        "usable": 2,
        "too short": 1,
        "wrong frame count": 1,
        "too small": 1,
        "no caption": 3,
        "cannot decode": 2,
        "wrong kind of file": 2,
        "cannot read": 1,
    }
    assert len(result.usable) + len(result.rejected) == sum(result.counts.values())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_dataset_of_pictures(tmp_path: Path, config: TrainConfig) -> None:
    for name, size in (("a.png", (64, 64)), ("b.jpg", (128, 64)), ("small.png", (8, 8))):
        Image.new("RGB", size, (90, 90, 90)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    captioned(tmp_path / "clip.mp4")
    source = entry(tmp_path, dataset_type="image", minimum_image_size=32)
    result = scan(source, config)
    assert result.buckets == {"64x64x1": 1, "96x48x1": 1}
    assert {bad.path.name: bad.kind for bad in result.rejected} == {
        "small.png": "too small",
        "clip.mp4": "wrong kind of file",
    }
    assert not result.notices or all("rounded" not in notice for notice in result.notices)


def test_videos_and_pictures_may_share_a_folder(tmp_path: Path, config: TrainConfig) -> None:
    captioned(tmp_path / "clip.mp4")
    captioned(tmp_path / "cut.mp4", frames=40).write_bytes(b"\0\0\0\x18ftypmp42")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    (tmp_path / "picture.txt").write_text("black")
    for kind in ("video", "image"):
        (sample,) = scan(entry(tmp_path, dataset_type=kind), config, quarantine=True).usable
        assert sample.path.name == {"video": "clip.mp4", "image": "picture.png"}[kind]
    assert {path.name for path in (tmp_path / "rejected").iterdir()} == {"cut.mp4", "cut.mp4.reason.txt"}


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path, config: TrainConfig) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n\n  two  \n")
    (folder / "b.jsonl").write_text('{"caption": "three"}\n{"prompt": "four\u2028five"}\n{"text": 1}\n{oops\n')
    (folder / "c.csv").write_text("x")
    (folder / "d.md").write_text("x")
    result = scan(prompts_entry(folder), config)
    assert [sample.captions[0] for sample in result.usable] == ["one", "two", "three", "four\u2028five"]
    assert [item.reason.split(" at ")[0] for item in result.rejected] == [
        "line 4 is not JSON: Expecting property name enclosed in double quotes",
        'line 3 has no "caption" or "prompt" or "text" text',
        "it holds no prompt",
        "not a prompt file: .txt, .jsonl, .json, .csv, .tsv, .parquet are read",
    ]
    assert result.buckets == {"64x32x9": 4}


def test_a_prompt_file_may_be_named_itself(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    (sample,) = scan(prompts_entry(tmp_path / "p.txt", resolution="70x40"), config).usable
    assert isinstance(sample, PromptSample) and (sample.width, sample.height) == (64, 48)
    (native,) = scan(prompts_entry(tmp_path / "p.txt", resolution=None), config).usable
    assert native.bucket == "832x480x9"
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        scan(prompts_entry(tmp_path / "p.txt"), config)


def test_prompts_of_tables(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "p.csv").write_text('prompt,extra\n"one, two",x\n,y\nthree,z\n')
    result = scan(prompts_entry(tmp_path / "p.csv"), config)
    assert [sample.captions for sample in result.usable] == [("one, two",), ("three",)]
    assert result.counts == {"usable": 2, "bad row": 1}
    named = prompts_entry(tmp_path / "p.csv", table={"caption_column": "extra"})
    assert [sample.captions[0] for sample in scan(named, config).usable] == ["x", "y", "z"]
    (tmp_path / "q.csv").write_text("words\nx\n")
    with pytest.raises(UserError, match="no column of a usual name"):
        scan(prompts_entry(tmp_path / "q.csv"), config)


def test_the_prompts_that_come_with_the_tool(config: TrainConfig) -> None:
    result = scan(prompts_entry(Path("builtin")), config)
    prompts = [sample.captions[0] for sample in result.usable]
    assert len(prompts) >= 300 and len(set(prompts)) == len(prompts) and not result.rejected
    words = sorted(len(prompt.split()) for prompt in prompts)
    assert words[0] <= 3 and words[-1] >= 60, "short ones and long ones"
    starts = Counter(" ".join(prompt.split()[:2]) for prompt in prompts)
    assert starts.most_common(1)[0][1] <= 10, "they do not all begin alike"
    few = scan(prompts_entry(Path("builtin"), max_num_samples=16), config)
    assert len(few.usable) == 16
