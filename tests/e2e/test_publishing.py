"""What leaves a run, and the verbs that make it again: the load-back in a fresh process, merged and extracted files."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import constants
from safetensors.torch import load_file

from simpletuner_dmd.cli import run as run_module
from simpletuner_dmd.cli.main import main
from tests.e2e.conftest import ProjectMaker
from tests.support.fake_hub import WRITE, fake_hub
from tests.support.runs import Project


@pytest.mark.fresh_process
def test_the_export_is_loaded_back_by_a_process_of_its_own_after_the_training_is_freed(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports nothing of this package; by then the networks of the training are gone."""
    networks: list[weakref.ref[Any]] = []
    alive: list[int] = []
    put_together, load_back = run_module.TrainingRun._put_together, run_module.load_back

    def remembering(self: Any) -> Any:
        parts = put_together(self)
        networks.extend(weakref.ref(p) for _, p in parts.roles.student.transformer.named_parameters())
        return parts

    def watched(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in networks))
        return load_back(*arguments)

    monkeypatch.setattr(run_module.TrainingRun, "_put_together", remembering)
    monkeypatch.setattr(run_module, "load_back", watched)
    # With validation: what judges the run holds its networks too.
    project = make_project(max_train_steps=2, validation_disable=False, disable_benchmark=True, use_ema=True)
    assert project.train() == 0
    gc.collect()
    assert networks and alive == [0]
    (row,) = project.rows("export")
    assert row["checked"] and row["passed"] and row["relative_error"] < 1e-4


@pytest.fixture
def averaged(make_project: ProjectMaker) -> Project:
    """A finished run with EMA, of which everything below is made again."""
    project = make_project(max_train_steps=4, use_ema=True, ema_decay=0.5, validation_disable=False,
                           disable_benchmark=True, ema_validation="ema_only", validation_step_interval=4)  # fmt: skip
    assert project.train() == 0
    return project


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distill.json").read_text(encoding="utf-8"))


def test_the_average_is_exported_and_the_weights_as_trained_beside_it(
    averaged: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    export = averaged.output / "export"
    average, raw = (load_file(folder / "diffusers" / "pytorch_lora_weights.safetensors")
                    for folder in (export, export / "raw"))  # fmt: skip
    assert document(export)["weights"] == "ema" and document(export / "raw")["weights"] == "raw"
    assert any(not torch.equal(average[name], raw[name]) for name in average)
    trained = averaged.trained("student")
    name = next(name for name in raw if ".lora_A." in name)
    assert torch.equal(raw[name], trained[name.removeprefix("transformer.")])
    assert (export / "raw" / "comfyui" / "output-raw.safetensors").is_file()
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "moving average (EMA); `raw/` holds them as trained" in card
    videos = sorted(path.name for path in (export / "videos").iterdir())
    assert videos and all(name.endswith("-ema.mp4") for name in videos)
    assert f'"url": "videos/{videos[0]}"' in card and "<Gallery />" in card
    assert "real_score_guidance_scale" in card and str(averaged.folder) not in card
    assert document(export)["teacher"].startswith("small-wan, guidance 1")

    # and again by the verb: under one dialect, and merged into the base
    out = averaged.folder / "again"
    words = ["export", str(averaged.output), "--out", str(out)]
    assert main([*words, "--to", "comfyui", "--to", "merged"]) == 0
    assert not (out / "diffusers" / "pytorch_lora_weights.safetensors").exists()
    assert (out / "comfyui" / "output.safetensors").is_file()
    merged = WanTransformer3DModel.from_pretrained(out / "merged" / "diffusers" / "transformer", dtype=torch.float32)
    layer = "blocks.0.attn1.to_q"
    key = f"transformer.{layer}.lora_A.weight"
    base_folder = json.loads(averaged.config.read_text())["pretrained_model_name_or_path"]
    base = WanTransformer3DModel.from_pretrained(base_folder, subfolder="transformer", dtype=torch.float32)
    change = average[key.replace("lora_A", "lora_B")] @ average[key]
    expected = base.get_submodule(layer).weight.detach() + change
    torch.testing.assert_close(merged.get_submodule(layer).weight.detach(), expected, rtol=1e-6, atol=1e-7)
    assert document(out / "merged")["model_type"] == "full"

    assert main(["extract-lora", str(averaged.output)]) == 2
    assert "is a LoRA already" in capsys.readouterr().err


def test_a_lora_extracted_from_a_full_student_says_how_lossy_it_is(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(max_train_steps=2, model_type="full", learning_rate=1e-3)
    assert project.train() == 0
    assert main(["extract-lora", str(project.output), "--rank", "2"]) == 0
    folder = project.output / "export" / "lora-rank2"
    found = document(folder)
    assert found["model_type"] == "lora" and found["adapter"]["rank"] == 2 == found["extracted"]["rank"]
    assert found["extracted"]["relative_error"] > 0.05  # of layers that are 32 wide
    assert "lossy" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "comfyui" / "output-lora-rank2.safetensors").is_file()
    assert main(["export", str(project.output), "--to", "comfyui"]) == 2
    output, mistake = capsys.readouterr()
    assert "extract-lora" in mistake
    assert "lossy" in output and "reported, not judged" in output


def test_a_quantised_base_is_the_one_that_is_judged(make_project: ProjectMaker) -> None:
    """The export agrees on the base of the training; the difference on the base as users have it is reported."""
    project = make_project(max_train_steps=2, base_model_precision="int8-quanto")
    assert project.train() == 0
    (row,) = project.rows("export")
    assert row["passed"] and row["relative_error"] < 1e-4 < row["unquantised"]
    assert "without quantisation" in row["message"]


def test_a_run_reaches_the_hub_before_training_and_leaves_nothing_behind(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Hub that is ill half-way does not end the run; what it did not take is pushed afterwards."""
    for name, value in {"HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITE}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds / 100, 0.05)))
    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        server.fail("/commit/", 500, times=99)
        project = make_project(max_train_steps=2, checkpoint_step_interval=1, push_to_hub=True, hub_model_id="student",
                               push_checkpoints_to_hub=True)  # fmt: skip
        assert project.train() == 0
        assert server.repositories["someone/student"].private and not server.repositories["someone/student"].files
        assert f"simpletuner push {project.output}" in capsys.readouterr().out
        assert 'source = "someone/student"' in (project.output / "export" / "README.md").read_text(encoding="utf-8")
        server.failures.clear()
        assert main(["push", str(project.output)]) == 0
        files = set(server.repositories["someone/student"].files)
        for place in ("", "checkpoint-000001/", "checkpoint-000002/"):
            assert f"{place}diffusers/pytorch_lora_weights.safetensors" in files
        assert not (project.output / "hub-queue.json").exists()
        assert not list((project.output / "export-checkpoints").iterdir())
