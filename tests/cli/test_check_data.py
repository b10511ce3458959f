"""The data part of `simpletuner check`: duplicates, the cost of the caches, and what it prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner_dmd.cli import check_data
from simpletuner_dmd.cli.main import main
from tests.support.videos import write_moving_square


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        write_moving_square(tmp_path / "videos" / f"{index}.mp4", (64, 64), level=150 + 30 * index, caption="a b c d")
    write_moving_square(tmp_path / "videos" / "short.mp4", (64, 64), frames=3)
    entry = {"id": "clips", "instance_data_dir": "videos", "resolution": 64, "video": {"num_frames": 9}}
    (tmp_path / "multidatabackend.json").write_text(json.dumps([entry]))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["check", "--json", *arguments])
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_the_same_bytes_under_two_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(home / "videos" / "1.mp4", home / "videos" / "copy.mp4")
    shutil.copy(home / "videos" / "1.txt", home / "videos" / "copy.txt")
    for name, letter in (("like", b"a"), ("unlike", b"b")):  # of one size, and not the same
        box = (9).to_bytes(4, "big") + b"free" + letter
        (home / "videos" / f"{name}.mp4").write_bytes((home / "videos" / "2.mp4").read_bytes() + box)
        shutil.copy(home / "videos" / "1.txt", home / "videos" / f"{name}.txt")
    (data,) = document(capsys)["data"]
    assert data["usable"] == 6
    assert [[Path(path).name for path in group] for group in data["duplicates"]] == [["1.mp4", "copy.mp4"]]
    main(["check"])
    assert "the same bytes: " in capsys.readouterr().out


def test_the_cost_of_the_caches(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = document(capsys)["cache"]
    # Latents of 9 frames of 64 x 64: 16 x 3 x 8 x 8 numbers of 4 bytes, of three clips. One caption of four words:
    # 4 * 1.4 + 1 = 7 rows of 4096 numbers in bf16.
    assert (cost["latent_bytes"], cost["clips"]) == (16 * 3 * 8 * 8 * 4 * 3, 3)
    assert (cost["text_bytes"], cost["captions"]) == (7 * 4096 * 2, 1)
    assert cost["seconds"] > 0
    dmd = document(capsys, "distillation_method=dmd")["cache"]
    assert (dmd["latent_bytes"], dmd["clips"], dmd["seconds"]) == (0, 0, 0)


def test_the_arithmetic_of_the_vae_is_counted_right() -> None:
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKLWan().encode(torch.empty(1, 3, 9, 64, 64))
    assert counter.get_total_flops() / (9 * 64 * 64) == pytest.approx(check_data.VAE_FLOPS_PER_PIXEL, rel=0.01)


def test_one_table_with_the_fix_of_each_kind(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "train_batch_size=4"]) == 0
    shown = capsys.readouterr().out
    header, row = [line.split() for line in shown.split("Data:\n")[1].splitlines()[:2]]
    assert (header, row) == (["dataset", "usable", "too", "short"], ["clips", "3", "1"])
    assert "Left out of clips: too short (1), in " in shown and "Fix: lower video.min_frames" in shown
    assert "clips  64x64x9: 3" in shown and "repeats: 1 would fill it" in shown
    assert "latents of 3 clips" in shown


def test_other_datasets_are_shown_when_one_gives_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads((home / "multidatabackend.json").read_text())
    (home / "words").mkdir()
    (home / "words" / "x.md").write_text("x")
    entries.append({"id": "words", "dataset_type": "prompts", "instance_data_dir": "words"})
    (home / "multidatabackend.json").write_text(json.dumps(entries))
    found = document(capsys)
    assert not found["ok"] and len(found["problems"]) == 1
    assert [(data["id"], data["usable"]) for data in found["data"]] == [("clips", 3), ("words", 0)]


def test_the_prompts_that_come_with_the_tool_need_no_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"id": "words", "dataset_type": "prompts", "instance_data_dir": "builtin", "resolution": "64x64"}
    (home / "multidatabackend.json").write_text(json.dumps([entry]))
    found = document(capsys, "distillation_method=dmd")
    assert found["ok"] and found["data"][0]["usable"] >= 300
