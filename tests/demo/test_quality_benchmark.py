"""benchmarks/quality.py from a run folder to its table, on a random model of the demo's shape."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from simpletuner_dmd.demo import shapes
from simpletuner_dmd.demo.skeleton import SHIFT, TEXT_ROWS, build_transformer, save_text_parts
from simpletuner_dmd.demo.train_vae import build_vae
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.publish.export import export_full, export_lora
from simpletuner_dmd.publish.info import ExportInfo
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.roles import build_roles

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality_benchmark", ROOT / "benchmarks" / "quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_text_parts(folder, seed=0)
    torch.manual_seed(0)
    build_vae().save_pretrained(folder / "vae")
    build_transformer(0).save_pretrained(folder / "transformer")
    return folder


def make_run(folder, model, strength=None, transformer=None):
    """A run's output folder: a LoRA student whose second factors are random at `strength`, or a full one."""
    schedule = Schedule(shift=SHIFT, ladder=(1.0, 0.757, 0.522))
    full = transformer is not None
    info = ExportInfo("test", "dmd", schedule, "sde", str(model), model_type="full" if full else "lora")
    options = {
        "pretrained_model_name_or_path": str(model),
        "tokenizer_max_length": TEXT_ROWS,
        "distillation_config": {"real_score_guidance_scale": 1.0, "negative_prompt": ""},
    }
    folder.mkdir()
    resolved = {key: {"value": value, "origin": "test"} for key, value in options.items()}
    (folder / "config.resolved.json").write_text(json.dumps(resolved))
    if full:
        export_full(folder / "export", transformer, info)
        return folder
    roles = build_roles(build_transformer(0), adapters={"student": AdapterSpec(RANK, ALPHA)})
    lora = roles.tensors("student")
    draws = torch.Generator().manual_seed(1)
    for name, tensor in lora.items():
        if "lora_B" in name:
            lora[name] = strength * torch.randn(tensor.shape, generator=draws)
    export_lora(folder / "export", lora, rank=RANK, alpha=ALPHA, info=info)
    return folder


def measure(quality, run, *more):
    out = run / "figures.json"
    small = ["--samples", "8", "--seeds", "2", "--teacher-steps", "10"]
    assert quality.main(["--run", str(run), *small, "--json", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_a_student_that_has_not_moved_is_the_undistilled_model(quality, model, tmp_path, capsys):
    figures = measure(quality, make_run(tmp_path / "run", model, strength=0.0))
    distances = figures["distances"]
    assert distances["student"] == pytest.approx(distances["undistilled"], abs=1e-6)
    assert figures["gap_closed"]["student"] == pytest.approx([0, 0], abs=1e-3)
    assert figures["gap_closed"]["floor"] == [1, 1]
    assert set(figures["pixels"]) == {"teacher", "student"}
    printed = capsys.readouterr().out
    assert "| student (1000, 757, 522; sde) | 3 |" in printed
    assert "obedience (colour and direction)" in printed
    assert "took" in printed


def test_a_student_that_has_moved_is_seen_and_kept_teacher_samples_are_the_same(quality, model, tmp_path):
    run = make_run(tmp_path / "run", model, strength=0.3)
    first = measure(quality, run)
    kept = sorted((run / "quality-cache").iterdir())
    assert len(kept) == 2 * (1 + 1 + len(quality.FEW_EULER_STEPS))
    second = measure(quality, run)
    assert second["distances"] == first["distances"]
    assert sorted((run / "quality-cache").iterdir()) == kept
    student, undistilled = first["distances"]["student"][0], first["distances"]["undistilled"][0]
    assert abs(student - undistilled) > 1e-3


def test_guidance_moves_the_teacher_and_not_the_student(quality, model, tmp_path, capsys):
    run = make_run(tmp_path / "run", model, strength=0.0)
    without, with_guidance = measure(quality, run), measure(quality, run, "--guidance", "3")
    assert "trained for guidance 1" in capsys.readouterr().out
    assert without["distances"]["floor"] != with_guidance["distances"]["floor"]
    assert without["pixels"]["student"] == with_guidance["pixels"]["student"]


def test_a_full_student_is_the_exported_one(quality, model, tmp_path):
    same = measure(quality, make_run(tmp_path / "same", model, transformer=build_transformer(0)))["distances"]
    other = measure(quality, make_run(tmp_path / "other", model, transformer=build_transformer(7)))["distances"]
    assert same["student"] == same["undistilled"]
    assert other["student"] != other["undistilled"]
    assert other["floor"] == same["floor"]


def test_samples_do_not_depend_on_batches(quality, model, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", model, strength=0.3)
    bench = quality.open_run(run, None, 1.0, tmp_path / "cache")
    whole = quality.few_step_samples(bench, bench.student, 0, 5, 6)
    monkeypatch.setattr(quality, "BATCH", 4)
    assert torch.allclose(quality.few_step_samples(bench, bench.student, 0, 5, 6), whole, atol=1e-4)
    assert [c.caption for c in bench.combinations(31, 2)] == [
        shapes.ALL_COMBINATIONS[31].caption,
        shapes.ALL_COMBINATIONS[0].caption,
    ]


def test_a_folder_that_is_no_run_is_a_clear_sentence(quality, tmp_path, capsys):
    assert quality.main(["--run", str(tmp_path / "nothing")]) == 2
    assert "config.resolved.json is not there" in capsys.readouterr().err
