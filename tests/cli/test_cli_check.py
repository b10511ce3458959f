"""`simpletuner check`: what stands in the way is exit code 2, what is merely left out is a warning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.wan.flavours import FLAVOURS, published_config
from tests.support.videos import write_moving_square


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config and a dataset of one clip and one file that is none."""
    monkeypatch.chdir(tmp_path)
    write_moving_square(tmp_path / "videos" / "clip.mp4", (64, 64))
    (tmp_path / "videos" / "notes.md").write_text("x")
    entry = {"id": "clips", "dataset_type": "video", "instance_data_dir": "videos", "resolution": 64,
             "video": {"num_frames": 9}}  # fmt: skip
    (tmp_path / "multidatabackend.json").write_text(json.dumps([entry]))
    configure(tmp_path)
    return tmp_path


def configure(home: Path, **options: Any) -> None:
    (home / "config.json").write_text(json.dumps(options))


def check_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_rejected_files_are_warnings(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    shown = capsys.readouterr().out
    assert "notes.md: not a video: it is text" in shown and "wrong kind of file (1)" in shown
    assert "Fix: keep such files elsewhere" in shown
    assert "64x64x9: 1" in shown
    assert "Ready to train." in shown
    code, document = check_json(capsys)
    assert (code, document["ok"], document["problems"]) == (0, True, [])
    data = document["data"][0]
    assert (data["id"], data["usable"], data["buckets"]) == ("clips", 1, {"64x64x9": 1})
    assert data["counts"] == {"usable": 1, "wrong kind of file": 1}
    (bad,) = data["rejected"]
    assert (bad["kind"], bad["reason"]) == ("wrong kind of file", "not a video: it is text") and bad["fix"]


def test_mistakes_in_the_config_are_in_the_document_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = check_json(capsys, "sed=1", "lora_rank=x")
    assert (code, document["ok"]) == (2, False)
    assert {problem["key"] for problem in document["problems"]} == {"sed", "lora_rank"}
    assert set(document["problems"][0]) == {"file", "key", "message", "fix"}


@pytest.mark.parametrize("state", ["missing", "empty", "a file", "nothing usable"])
def test_a_dataset_that_gives_nothing_is_a_problem(home: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    if state == "nothing usable":
        (home / "videos" / "clip.mp4").unlink()
    else:
        shutil.rmtree(home / "videos")
    if state == "empty":
        (home / "videos").mkdir()
    if state == "a file":
        (home / "videos").write_text("x")
    code, document = check_json(capsys)
    assert code == 2
    assert [problem["key"] for problem in document["problems"]] == ["instance_data_dir"]
    assert main(["check"]) == 2


def test_a_model_folder_must_have_every_part(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = home / "model"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (model / part).mkdir(parents=True)
        (model / part / "config.json").write_text("{}")
    configure(home, pretrained_model_name_or_path="model")
    code, document = check_json(capsys)
    assert code == 2
    assert "no transformer" in document["problems"][0]["message"]
    (home / "mine").mkdir()
    (home / "mine" / "config.json").write_text("{}")
    configure(home, pretrained_model_name_or_path="model", pretrained_transformer_model_name_or_path="mine")
    assert check_json(capsys)[0] == 0


@pytest.mark.parametrize("key", ["output_dir", "cache_dir_text", "cache_dir_vae"])
def test_folders_that_cannot_be_written(home: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    configure(home, **{key: "videos/clip.mp4/below"})
    code, document = check_json(capsys)
    assert code == 2
    assert [problem["key"] for problem in document["problems"]] == [key]
    assert "cannot write" in document["problems"][0]["message"]


def test_a_check_leaves_nothing_behind(home: Path) -> None:
    before = sorted(home.rglob("*"))
    assert main(["check"]) == 0
    assert sorted(home.rglob("*")) == before


def test_a_model_of_another_flavour_is_refused_and_a_custom_one_is_said(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flavour = FLAVOURS["t2v-480p-14b-2.1"]
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (home / "model" / part).mkdir(parents=True)
        config = published_config(flavour, part) if part in flavour.parts else {}
        (home / "model" / part / "config.json").write_text(json.dumps(config))
    configure(home, pretrained_model_name_or_path="model")
    code, document = check_json(capsys)
    (problem,) = document["problems"]
    assert code == 2 and problem["key"] == "model_flavour"
    assert "transformer/config.json: found num_layers 40, expected 30" in problem["message"]
    assert '"model_flavour": "t2v-480p-14b-2.1"' in problem["fix"]
    configure(home, pretrained_model_name_or_path="model", model_flavour="t2v-480p-14b-2.1")
    assert check_json(capsys)[0] == 0
    file = home / "model" / "transformer" / "config.json"
    file.write_text(json.dumps(published_config(flavour, "transformer") | {"num_layers": 3}))
    code, document = check_json(capsys)
    assert code == 0 and any("a custom Wan (num_layers 3)" in notice for notice in document["notices"])
