"""What a person can get wrong: one clear sentence, exit code 2, no traceback, and nothing written or lost."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from simpletuner_dmd import durable
from simpletuner_dmd.cli.main import main
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import Project, assert_same_bits, videos_dataset
from tests.support.videos import write_moving_square, write_small_set

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
LADDER = {"student_steps": None}  # and dmd_denoising_steps instead


def refused(project: Project, capsys: Capture, *words: str, overrides: tuple[str, ...] = ()) -> str:
    """Both `train` and `check` refuse with all of `words`; returns what `train` said."""
    for verb in (project.check, project.train):
        capsys.readouterr()
        assert verb(*overrides) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        for word in words:
            assert word in said.err, f"{word!r} is not in:\n{said.err}"
    assert not project.output.exists(), "something was written for a run that cannot start"
    assert not (project.folder / "cache").exists()
    return said.err


# --- the configuration file -------------------------------------------------------------------------------------------


def test_no_configuration_at_all(capsys: Capture) -> None:
    assert main(["train", "learning_rate=1e-5"]) == 2
    said = capsys.readouterr().err
    for words in ("config/config.json", "config.json", "--example demo"):
        assert words in said
    assert not list(Path.cwd().iterdir())


def test_missing_configuration_file(capsys: Capture, tmp_path: Path) -> None:
    assert main(["train", "--config", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert main(["train", "--env", "nothing"]) == 2
    assert "config/nothing/config.json" in capsys.readouterr().err


def test_malformed_json_names_line_and_column(make_project: ProjectMaker, capsys: Capture) -> None:
    project = make_project()
    project.config.write_text('{\n  "seed": 1,\n  "learning_rate": 1e-5,,\n}\n')
    refused(project, capsys, "config.json", "line 3", "column 25")


def test_malformed_data_file_names_line_and_column(make_project: ProjectMaker, capsys: Capture) -> None:
    project = make_project()
    (project.folder / "multidatabackend.json").write_text('[\n  {"id": "a"\n   "dataset_type": "video"}\n]\n')
    refused(project, capsys, "multidatabackend.json", "line 3", "column 4")


def test_all_mistakes_at_once(make_project: ProjectMaker, capsys: Capture) -> None:
    project = make_project(learning_rat=1e-5, lora_rank="many", distillation={"fake_score_lrr": 1e-5})
    said = refused(project, capsys, "learning_rat", "lora_rank", "many", "fake_score_lrr")
    assert "did you mean learning_rate" in said.replace('"', "").replace("`", "").replace("'", "")
    assert "fake_score_lr" in said.replace("fake_score_lrr", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_train_steps": 0, "num_train_epochs": 0}, ("max_train_steps", "num_train_epochs", "both 0")),
        ({"distillation": {**LADDER, "dmd_denoising_steps": "1000,522,757"}}, ("dmd_denoising_steps", "decreas")),
        ({"distillation": {**LADDER, "dmd_denoising_steps": "700,300"}}, ("dmd_denoising_steps", "1000")),
        (
            {"validation_disable": False, "validation_resolution": "40x32"},
            ("validation_resolution", "40x32", "multiples of 16", "32x32"),
        ),
        ({"train_batch_size": "two"}, ("train_batch_size", "two")),
        ({"mixed_precision": "fp8"}, ("mixed_precision", "fp8", "bf16")),
        ({"optimizer": "adamw"}, ("optimizer", "adamw_bf16")),
        ({"lr_scheduler": "cosin"}, ("lr_scheduler", "cosin", "cosine")),
        ({"distillation_method": "ldm"}, ("distillation_method", "ldm", "dmd")),
        ({"lora_dropout": 0.1}, ("lora_dropout",)),
        ({"distillation": {"critic_warmup_steps": 6}}, ("critic_warmup_steps", "6")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_values_that_cannot_work(
    make_project: ProjectMaker, capsys: Capture, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(make_project(**options), capsys, *words)


# --- model, data, output ----------------------------------------------------------------------------------------------


def test_model_folder_without_a_transformer(
    make_project: ProjectMaker, small_wan: Path, tmp_path: Path, capsys: Capture
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_wan, broken)
    shutil.rmtree(broken / "transformer")
    project = make_project(pretrained_model_name_or_path=str(broken))
    refused(project, capsys, "pretrained_model_name_or_path", str(broken), "no transformer")


def test_model_folder_with_a_transformer_that_has_no_weights(
    make_project: ProjectMaker, small_wan: Path, tmp_path: Path, capsys: Capture
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_wan, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    project = make_project(pretrained_model_name_or_path=str(broken))
    assert project.train() == 2
    said = capsys.readouterr().err
    assert "transformer" in said and str(broken) in said and "Traceback" not in said


def test_model_that_does_not_exist(make_project: ProjectMaker, tmp_path: Path, capsys: Capture) -> None:
    project = make_project(pretrained_model_name_or_path=str(tmp_path / "no-such-model"))
    refused(project, capsys, "pretrained_model_name_or_path", "no-such-model")


def test_dataset_folder_missing_empty_or_useless(make_project: ProjectMaker, tmp_path: Path, capsys: Capture) -> None:
    missing = make_project("missing", videos_dataset(tmp_path / "nothing-here"))
    refused(missing, capsys, "instance_data_dir", "nothing-here")

    (tmp_path / "empty").mkdir()
    refused(make_project("empty-run", videos_dataset(tmp_path / "empty")), capsys, "instance_data_dir", "is empty")

    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "notes.mp4").write_text("this is no video")
    write_moving_square(tmp_path / "useless" / "short.mp4", frames=2)
    useless = make_project("useless-run", videos_dataset(tmp_path / "useless"))
    assert useless.check() == 2 and useless.train() == 2
    said = capsys.readouterr().err
    assert said.count("has no usable sample") == 2
    for name in ("notes.mp4", "short.mp4"):
        assert said.count(name) >= 2
    assert not useless.output.exists()


def test_empty_prompts_file(make_project: ProjectMaker, tmp_path: Path, capsys: Capture) -> None:
    project = make_project()
    (project.folder / "prompts.txt").write_text("\n\n")
    assert project.check() == 2 and project.train() == 2
    assert capsys.readouterr().err.count("prompts.txt") >= 2


@pytest.mark.parametrize("key", ["output_dir", "cache_dir_text"])
def test_folders_that_cannot_be_written(make_project: ProjectMaker, tmp_path: Path, capsys: Capture, key: str) -> None:
    (tmp_path / "a-file").write_text("in the way")
    project = make_project(**{key: str(tmp_path / "a-file" / "run")})
    refused(project, capsys, key, str(tmp_path / "a-file"), "it is a file")
    assert (tmp_path / "a-file").read_text() == "in the way"


def test_videos_are_needed_and_there_are_only_prompts(make_project: ProjectMaker, capsys: Capture) -> None:
    refused(make_project(distillation_method=None), capsys, "videos")
    refused(make_project("latents", distillation={"rollout": "data_latent"}), capsys, "data_latent", "videos")


# --- files that are left out, by name ---------------------------------------------------------------------------------


def test_bad_files_are_listed_and_the_rest_is_trained_on(
    make_project: ProjectMaker, tmp_path: Path, capsys: Capture
) -> None:
    videos = write_small_set(tmp_path / "videos", 3)
    whole = (videos / "clip-0.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "text.mp4").write_text("this is no video")
    (videos / "zero.mp4").write_bytes(b"")
    write_moving_square(videos / "short.mp4", frames=2)
    write_moving_square(videos / "silent.mp4", caption=None)
    bad = ["truncated", "text", "zero", "short", "silent"]
    for name in bad[:3]:
        (videos / f"{name}.txt").write_text("a caption")

    project = make_project(datasets=videos_dataset(videos), distillation_method=None)
    assert project.check() == 0
    said = capsys.readouterr().out
    assert "Ready to train" in said
    assert project.train() == 0
    trained = capsys.readouterr().out
    for name in bad:
        for text in (said, trained):
            (line,) = [line for line in text.splitlines() if f"{name}.mp4" in line]
            assert len(line.split(f"{name}.mp4", 1)[1].strip(": ")) > 8, f"no reason in {line!r}"
    assert "3 usable, 5 left out" in trained
    assert sorted(path.name for path in videos.glob("*.mp4")) == sorted(
        [*(f"{name}.mp4" for name in bad), "clip-0.mp4", "clip-1.mp4", "clip-2.mp4"]
    ), "a file was moved or deleted"

    assert project.check("--json") == 0
    document = json.loads(capsys.readouterr().out)  # nothing but JSON
    assert document["ok"] and document["problems"] == []
    (scan,) = document["data"]
    assert scan["usable"] == 3
    assert sorted(Path(bad["path"]).stem for bad in scan["rejected"]) == sorted(bad)


def test_check_json_of_a_broken_configuration_is_json_too(make_project: ProjectMaker, capsys: Capture) -> None:
    project = make_project(learning_rat=1e-5)
    assert project.check("--json") == 2
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"]
    assert document["problems"][0]["key"] == "learning_rat"
    assert {"file", "key", "message", "fix"} <= set(document["problems"][0])


# --- a full disk ------------------------------------------------------------------------------------------------------


def disk_full_when(monkeypatch: Patch, full: Callable[[Path], bool]) -> None:
    """Writing to a path for which `full` holds fails as it does on a full disk, half-way."""
    opened = Path.open
    durable_write = durable._write

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_path(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(path, mode, *args, **kwargs)
        return Half(file) if "b" in mode and "w" in mode and full(path) else file

    def write(descriptor: int, chunk: Any) -> int:
        if full(Path(f"/proc/self/fd/{descriptor}").readlink()):
            durable_write(descriptor, chunk[: len(chunk) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return durable_write(descriptor, chunk)

    monkeypatch.setattr(Path, "open", open_path)
    monkeypatch.setattr(durable, "_write", write)


@pytest.mark.parametrize("room", ["text", "vae"])
def test_disk_full_while_caching(
    make_project: ProjectMaker, tmp_path: Path, capsys: Capture, monkeypatch: Patch, room: str
) -> None:
    videos = write_small_set(tmp_path / "videos", 2)
    project = make_project(datasets=videos_dataset(videos), distillation={"rollout": "data_latent"})
    with monkeypatch.context() as patch:
        disk_full_when(patch, lambda path: (project.folder / "cache" / room) in path.parents)
        assert project.train() == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said and "the same command goes on from there" in said and "Traceback" not in said
    left = [
        path for path in (project.folder / "cache" / room).rglob("*") if path.is_file() and path.name != "claims.lock"
    ]
    assert not left, "half a file was left behind"
    assert project.train() == 0  # the same command


def test_disk_full_while_checkpointing(make_project: ProjectMaker, capsys: Capture, monkeypatch: Patch) -> None:
    straight = make_project("straight", checkpoint_step_interval=2)
    assert straight.train() == 0
    project = make_project("full", checkpoint_step_interval=2)
    with monkeypatch.context() as patch:
        disk_full_when(patch, lambda path: "checkpoint-000004" in str(path) and "critic" in path.name)
        assert project.train() == 2
    said = capsys.readouterr().err
    assert "too full for checkpoint 4" in said and "bytes are needed" in said and "Traceback" not in said
    assert project.checkpoints == ["checkpoint-000002"]
    assert project.train() == 0
    assert "checkpoint-000002" in capsys.readouterr().out
    assert_same_bits(project.exported(), straight.exported())


def test_disk_full_while_exporting(make_project: ProjectMaker, capsys: Capture, monkeypatch: Patch) -> None:
    from simpletuner_dmd.publish import export

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    project = make_project()
    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        assert project.train() == 2
    said = capsys.readouterr().err
    assert "full" in said and "export" in said and "Traceback" not in said
    assert not list((project.output / "export").rglob("*.safetensors*"))
    assert project.train() == 0  # trains nothing again, only exports
    assert len(project.rows("step")) == 6
    assert project.rows("export")[-1]["passed"]


def test_a_full_disk_while_rendering_costs_the_video_alone(make_project: ProjectMaker, monkeypatch: Patch) -> None:
    from simpletuner_dmd.validation import render

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    project = make_project(validation_disable=False, validation_step_interval=3, disable_benchmark=True)
    with monkeypatch.context() as patch:
        patch.setattr(render, "write_mp4", full)
        assert project.train() == 0
    assert "No space left" in project.rows("validation_failed")[0]["message"]
    assert project.rows("export")[-1]["passed"]


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_kind_of_run(make_project: ProjectMaker, capsys: Capture) -> None:
    project = make_project()
    assert project.train() == 0
    capsys.readouterr()
    resolved = (project.output / "config.resolved.json").read_text()
    for change in ("lora_rank=8", "peft_lora_target_modules=to_q", "model_type=full", "optimizer=optimi-lion"):
        assert project.train(change, "max_train_steps=8") == 2, change
        said = capsys.readouterr().err
        assert "checkpoint-000006" in said and "resume_from_checkpoint" in said and "Traceback" not in said
    assert project.checkpoints == ["checkpoint-000006"]
    assert (project.output / "config.resolved.json").read_text() == resolved
    assert len(project.rows("step")) == 6


def test_the_only_checkpoint_is_half_written(
    make_project: ProjectMaker, caplog: pytest.LogCaptureFixture, capsys: Capture
) -> None:
    project = make_project(checkpoint_step_interval=3)
    assert project.train() == 0
    before = project.exported()
    root = project.output / "checkpoints"
    (root / "checkpoint-000006" / "manifest.json").unlink()
    shutil.rmtree(root / "checkpoint-000003")
    assert project.train() == 0
    assert "checkpoint-000006" in caplog.text and "half-written" in caplog.text
    assert project.rows("start")[-1]["resumed_at"] == 0
    assert_same_bits(project.exported(), before)
