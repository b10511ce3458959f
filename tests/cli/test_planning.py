"""The plan of whole configurations, made without any weight; and the plan held against a process that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_weights import configured
from simpletuner_dmd.cli.blueprint import known_config, local_config
from simpletuner_dmd.cli.capacity import CARDS, named_card
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.cli.planning import CUDA_CONTEXT, OPTIMIZER_BYTES, make_plan, sizes_of
from simpletuner_dmd.config import UserError
from simpletuner_dmd.config.coerce import allowed_words
from simpletuner_dmd.config.layers import option_field
from simpletuner_dmd.training.optimizers import build_optimizer

TINY = {"_class_name": "WanTransformer3DModel", "num_layers": 3, "patch_size": [1, 2, 2], "in_channels": 16}


@pytest.fixture
def hub_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of a Hub model that is not on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = configured(tmp_path / "run", "832x480", 81, lora_rank=64, model_flavour="t2v-480p-14b-2.1")
    assert loaded.path is not None
    return loaded.path


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_a_model_that_is_not_here_is_planned_and_listed(hub_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = check(capsys, "--config", str(hub_run), "--card", "h200")
    assert (code, document["problems"]) == (0, [])
    memory = document["memory"]
    assert memory["fits"] and memory["device"] == "cuda" and memory["tokens_per_sample"] == 32760
    missing = memory["missing_weights"]
    assert missing["transformer of Wan-AI/Wan2.1-T2V-14B-Diffusers"] == pytest.approx(28.6e9, rel=0.01)
    assert missing["text encoder"] == pytest.approx(11.4e9, rel=0.01)
    sides = {(part["role"], part["part"]): part["gpu"] for part in memory["components"]}
    # 306,708,480 numbers: rank 64 in ten linear layers of each of 40 blocks.
    assert sides["student", "weights"] == sides["critic", "weights"] == 4 * 306_708_480
    assert sides["student", "optimizer state"] == 8 * 306_708_480
    assert sum(sides.values()) == next(p["gpu"] for p in memory["phases"] if p["name"] == "training")
    assert document["time"]["hours"] > 0 and document["disk"]["export"] == 2 * 4 * 306_708_480


def test_a_card_that_was_named_is_a_requirement(hub_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = check(capsys, "--config", str(hub_run), "--card", "48", "base_model_precision=int8-quanto")
    assert (code, document["ok"], document["memory"]["fits"]) == (2, False, False)
    (problem,) = document["problems"]
    assert problem["key"] == "--card" and "Smallest change: " in problem["message"]
    (change,) = document["memory"]["smallest_change"]
    code, document = check(
        capsys, "--config", str(hub_run), "--card", "48", "base_model_precision=int8-quanto",
        f"{change['key']}={change['value']}",
    )  # fmt: skip
    assert (code, document["memory"]["fits"]) == (0, True), "the change that is named is enough when it is written"


def test_this_machine_is_only_warned_about(hub_run: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("simpletuner_dmd.cli.capacity._host_memory", lambda: 16 * 10**9)
    monkeypatch.setattr("simpletuner_dmd.cli.planning._changes", lambda *anything: [])
    code, document = check(capsys, "--config", str(hub_run))
    assert (code, document["memory"]["fits"], document["memory"]["device"]) == (0, False, "cpu")
    assert any("this will not fit" in notice for notice in document["notices"])


def test_loading_is_planned_block_by_block(hub_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantised blocks and a dense one, never the dense model; in a scheme whose library need not be here."""
    chosen = ("base_model_precision=nf4-bnb", "quantize_via=accelerator")
    _, document = check(capsys, "--config", str(hub_run), "--card", "h200", *chosen)
    memory = document["memory"]
    (base,) = [part["gpu"] for part in memory["components"] if part["role"] == "base"]
    (loading,) = [phase for phase in memory["phases"] if phase["name"] == "loading"]
    block = 2 * 14.05e9 / 40
    assert base == pytest.approx(14.05e9 * 0.53 + 2 * 0.24e9, rel=0.03)
    assert loading["gpu"] - CUDA_CONTEXT == pytest.approx(base + block, rel=0.01)
    (libraries,) = [part["host"] for part in memory["components"] if part["part"].startswith("Python")]
    assert loading["host"] - libraries == pytest.approx(base + block, rel=0.01)


def test_the_network_that_is_trained_is_the_one_that_is_planned(tmp_path: Path) -> None:
    """In a subfolder of a name of its own, and in the model's folder itself."""
    loaded = configured(tmp_path / "run", "64x64", 5, network=TINY)
    folder = Path(str(loaded.config.pretrained_transformer_model_name_or_path))
    assert known_config(loaded, "transformer")["num_layers"] == TINY["num_layers"]
    (folder / "ema").mkdir()
    (folder / "config.json").rename(folder / "ema" / "config.json")
    assert local_config(loaded, "transformer") is None
    named = configured(tmp_path / "other", "64x64", 5, pretrained_transformer_model_name_or_path=str(folder),
                       pretrained_transformer_subfolder="ema")  # fmt: skip
    assert local_config(named, "transformer") == TINY


def test_cards() -> None:
    assert named_card("RTX 4090").memory == named_card("24").memory == named_card("24GB").memory == 24 * 2**30
    with pytest.raises(UserError, match="no card is called 'moon'"):
        named_card("moon")
    assert all(memory > 0 and tflops > 0 for memory, tflops in CARDS.values())


def test_rollouts_are_as_long_as_the_method_lets_them(tmp_path: Path) -> None:
    long = configured(tmp_path, "832x480", 121)
    assert sizes_of(long).trained == (16, 21, 60, 104), "num_training_frames caps it"


def test_every_optimizer_has_its_state() -> None:
    assert set(OPTIMIZER_BYTES) == set(allowed_words(option_field("optimizer").annotation))


@pytest.mark.parametrize("name", ["adamw_bf16", "torch-adamw", "optimi-adamw", "optimi-lion", "optimi-stableadamw",
                                  "optimi-adan", "optimi-ranger"])  # fmt: skip
def test_optimizer_state_is_weighed(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(256, 64))
    optimizer = build_optimizer(name, [("blocks.0.weight", weight)], lr=1e-4)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    held = sum(value.numel() * value.element_size() for value in state if value.numel() > 1)
    assert held / weight.numel() == pytest.approx(OPTIMIZER_BYTES[name], rel=0.05)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="measures a forked process")
def test_the_plan_is_what_a_process_holds() -> None:
    """Beyond the libraries, with an error of at most 10%: a case of benchmarks/memory.py, in a process of its own."""
    code = "import json; from benchmarks.memory import CASES, compare; print(json.dumps(compare(*CASES['full'])))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    assert planned == pytest.approx(measured, rel=0.1)


def test_gradient_checkpointing_is_seen(tmp_path: Path) -> None:
    machine = named_card("h200")
    runs = [configured(tmp_path / str(on), "320x192", 33, gradient_checkpointing=on) for on in (True, False)]
    plans = [make_plan(run, machine) for run in runs]
    assert plans[1].training_peak > 2 * plans[0].training_peak and plans[1].flops < plans[0].flops
