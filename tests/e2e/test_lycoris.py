"""Whole runs with LyCORIS networks, from other people's adapters, and on a fine-tuned teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file

from simpletuner_dmd.cli.main import main
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import Project, assert_same_bits, largest_difference

LOKR: dict[str, Any] = {"algo": "lokr", "linear_dim": 4, "linear_alpha": 2, "multiplier": 0.9, "factor": 4}
SHORT = {"max_train_steps": 4, "learning_rate": 1e-2}


def lycoris_options(**config: Any) -> dict[str, Any]:
    return {"lora_type": "lycoris", "lycoris_config": {**LOKR, **config}, **SHORT}


def passed(project: Project) -> float:
    (verdict,) = project.rows("export")
    assert verdict["passed"], verdict
    return float(verdict["relative_error"])


def lycoris_file(project: Project) -> Path:
    (file,) = (project.output / "export" / "lycoris").glob("*.safetensors")
    return file


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({}, {"gradient_checkpointing": True, "use_ema": True, "mixed_precision": "bf16"}),
        ({}, {"base_model_precision": "int8-quanto"}),
        ({"algo": "locon"}, {}),
        ({"algo": "locon"}, {"base_model_precision": "int8-quanto", "mixed_precision": "bf16"}),
        ({"algo": "full"}, {"gradient_checkpointing": True, "mixed_precision": "bf16"}),
        ({"algo": "diag-oft", "multiplier": 1}, {}),
        ({"algo": "diag-oft", "multiplier": 1}, {"mixed_precision": "bf16"}),
    ],
    ids=["lokr", "lokr bf16 ema", "lokr int8", "locon", "locon int8", "full bf16", "oft", "oft bf16"],
)
def test_trained_exported_and_loaded_back(
    make_project: ProjectMaker, small_wan: Path, config: dict[str, Any], options: dict[str, Any]
) -> None:
    project = make_project(**lycoris_options(**config), **options)
    assert project.train() == 0
    assert passed(project) < (5e-2 if options.get("mixed_precision") == "bf16" else 1e-4)
    student, critic = project.trained("student"), project.trained("critic")
    assert set(student) == set(critic)
    assert all(name.startswith("lycoris_blocks_") for name in student)
    assert largest_difference(student, critic) > 0
    file = lycoris_file(project)
    document = json.loads((project.output / "export" / "distill.json").read_text())
    comfyui = [] if config.get("algo") == "diag-oft" else [f"comfyui/{file.name}"]
    assert document["adapter"]["files"] == [f"lycoris/{file.name}", *comfyui]
    assert document["adapter"]["lycoris_config"]["algo"] == config.get("algo", "lokr")
    stock = WanTransformer3DModel.from_pretrained(small_wan / "transformer")
    network, tensors = create_lycoris_from_weights(1.0, str(file), stock)
    assert len(network.loras) == len({name.partition(".")[0] for name in tensors}) == 20


def test_the_snippet_of_the_card_runs(make_project: ProjectMaker, small_wan: Path, tmp_path: Path) -> None:
    project = make_project(**lycoris_options())
    assert project.train() == 0
    card = (project.output / "export" / "README.md").read_text()
    snippet = card.split("```python\n", 1)[1].split("```", 1)[0]
    assert "create_lycoris_from_weights" in snippet
    compile(snippet, "card", "exec")
    sampler = (project.output / "export" / "sampler.py").read_text()
    assert len(sampler.splitlines()) <= 30
    compile(sampler, "sampler.py", "exec")
    assert snippet.index('pipe.to("cuda")') < snippet.index("network.to(")
    assert sampler.index("pipe.to(") < sampler.index("network.to(")
    lines = snippet[: snippet.index("torch.manual_seed")].replace('pipe.to("cuda")', 'pipe.to("cpu")')
    lines = lines.replace("path/to/export", str(project.output / "export"))
    scope: dict[str, Any] = {}
    exec(lines.replace(f'"{small_wan.name}"', f'"{small_wan}"'), scope)
    assert isinstance(scope["pipe"], WanPipeline)
    assert {module.lokr_w1.dtype for module in scope["network"].loras} == {torch.bfloat16}
    with torch.no_grad():
        latents = torch.zeros(1, 16, 1, 4, 4, dtype=torch.bfloat16)
        rows = torch.zeros(1, 16, scope["pipe"].transformer.config.text_dim, dtype=torch.bfloat16)
        (velocity,) = scope["pipe"].transformer(latents, torch.tensor([500.0]), rows, return_dict=False)
    assert bool(velocity.isfinite().all())


def test_an_interrupted_run_ends_with_the_same_bits(make_project: ProjectMaker) -> None:
    whole = make_project("whole", **lycoris_options(), use_ema=True)
    assert whole.train() == 0
    parts = make_project("parts", **lycoris_options(), use_ema=True)
    assert parts.train("max_train_steps=2") == 0
    assert parts.train() == 0
    for role in ("student", "critic"):
        assert_same_bits(parts.trained(role), whole.trained(role))
    assert_same_bits(load_file(lycoris_file(parts)), load_file(lycoris_file(whole)))
    assert main(["export", str(whole.output), "--out", str(whole.folder / "again")]) == 0
    (again,) = (whole.folder / "again" / "lycoris").glob("*.safetensors")
    assert_same_bits(load_file(again), load_file(lycoris_file(whole)))


@pytest.mark.parametrize("kind", ["lora", "lycoris", "dora"])
def test_a_student_that_starts_from_the_last_run_is_that_student(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    options = {"lora": SHORT, "lycoris": lycoris_options(), "dora": {**SHORT, "use_dora": True}}[kind]
    first = make_project("first", **options)
    assert first.train() == 0
    capsys.readouterr()
    # At this rate nothing moves; what is exported is what it started from.
    second = make_project("second", **{**options, "init_lora": str(first.output), "learning_rate": 1e-30, "seed": 9})
    assert second.train() == 0
    said = capsys.readouterr().out
    assert f"the student starts from {first.output}" in said
    assert "self-test: the student starts" in said
    assert "self-test: the critic equals the teacher bit for bit" in said
    passed(second)
    if kind == "lycoris":
        left, right = load_file(lycoris_file(first)), load_file(lycoris_file(second))
    else:
        left, right = first.exported(), second.exported()
    assert largest_difference(left, right) < 1e-6
    assert any(bool(tensor.any()) for tensor in left.values())


def test_a_merged_teacher_is_the_base_of_every_role(
    make_project: ProjectMaker, small_wan: Path, tmp_path: Path
) -> None:
    tuned = make_project("tuned", **SHORT)
    assert tuned.train() == 0
    merged = tmp_path / "merged"
    pipeline = WanPipeline.from_pretrained(small_wan)
    pipeline.load_lora_weights(tuned.output / "export" / "diffusers")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(merged)

    expected = make_project("on-merged", **SHORT, seed=3, pretrained_model_name_or_path=str(merged))
    assert expected.train() == 0
    project = make_project("on-both", **SHORT, seed=3, teacher_lora=f"{tuned.output}:0.7")
    assert project.train() == 0
    passed(project)
    for role in ("student", "critic"):
        assert largest_difference(project.trained(role), expected.trained(role)) < 1e-4
    without = make_project("without", **SHORT, seed=3)
    assert without.train() == 0
    assert largest_difference(project.trained("student"), without.trained("student")) > 1e-3

    export = project.output / "export"
    record = json.loads((export / "distill.json").read_text())["teacher_lora"]
    assert record["file"] == "pytorch_lora_weights.safetensors" and record["strength"] == 0.7
    assert len(record["sha256"]) == 64
    assert "merged into the base" in (export / "README.md").read_text()
    graph = json.loads((export / "comfyui" / "workflow.json").read_text())
    assert graph["17"]["inputs"]["strength_model"] == 0.7 and graph["2"]["inputs"]["model"] == ["17", 0]


def test_a_dora_is_loaded_back_by_diffusers(make_project: ProjectMaker) -> None:
    project = make_project(**SHORT, use_dora=True, gradient_checkpointing=True)
    assert project.train() == 0
    assert passed(project) < 1e-4
    exported = project.exported()
    assert any(name.endswith("lora_magnitude_vector") for name in exported)
    assert not (project.output / "export" / "comfyui").exists()


# --- what a person can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lycoris_config": {"algo": "ia3"}}, ("lycoris_config.algo", "ia3", "cannot run", "lokr")),
        ({"lycoris_config": {"algo": "lokrr"}}, ("lycoris_config.algo", "lokrr", 'did you mean "lokr"')),
        ({"lycoris_config": {"linear_dimm": 4}}, ("lycoris_config.linear_dimm", "mean lycoris_config.linear_dim")),
        ({"lycoris_config": {"apply_preset": {"target_modul": ["a"]}}}, ("apply_preset.target_modul", "target_module")),
        ({"lycoris_config": {"apply_preset": {"module_algo_map": {"FeedForward": {"facto": 4}}}}}, ("facto", "factor")),
        ({"lycoris_config": {"dropout": 0.1}}, ("lycoris_config.dropout", "dropout")),
        ({"lycoris_config": "nowhere.json"}, ("lycoris_config", "found no file nowhere.json")),
        ({"lycoris_config": {"algo": "full"}, "base_model_precision": "int8-quanto"}, ("base_model_precision", "full")),
        ({"lycoris_config": {"algo": "boft", "multiplier": 0.5}}, ("lycoris_config.multiplier", "0.5")),
        ({"use_dora": True}, ("use_dora", "lycoris")),
        ({"teacher_lora": "nowhere.safetensors:0.5"}, ("teacher_lora", "there is no nowhere.safetensors")),
        ({"init_lora": "nowhere"}, ("init_lora", "there is no nowhere")),
        ({"lora_type": "standard", "init_lokr_norm": 0.01}, ("init_lokr_norm", "lora_type")),
        ({"lora_type": "standard", "use_dora": True, "base_model_precision": "int8-quanto"}, ("use_dora", "int8")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else None,
)  # fmt: skip
def test_mistakes(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    project = make_project(**{"lora_type": "lycoris", **options})
    assert project.check() == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said, said


def test_a_configuration_of_lycoris_beside_a_standard_lora_is_a_notice(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(lycoris_config="config/wan/lycoris_config.json")
    assert project.check() == 0
    said = capsys.readouterr()
    assert "lycoris_config (" in said.out + said.err
    assert "has no effect: lora_type is standard" in said.out + said.err


def test_the_file_of_other_peoples_settings_is_read(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(lora_type="lycoris", lycoris_config="lycoris.json")
    settings = {
        "bypass_mode": True, "algo": "lokr", "multiplier": 1.0, "full_matrix": True, "linear_dim": 10000,
        "linear_alpha": 0.5, "factor": 12,
        "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 4}}},
    }  # fmt: skip
    (project.folder / "lycoris.json").write_text(json.dumps(settings))
    changed = ("lycoris_config.constraint=0.25", "lycoris_config.apply_preset.exclude_name=.*attn2.*")
    assert project.train("max_train_steps=2", *changed) == 0
    assert "bypass_mode" in "".join(capsys.readouterr())
    resolved = json.loads((project.output / "config.resolved.json").read_text())["lycoris_config"]["value"]
    assert resolved["constraint"] == 0.25
    assert not any("attn2" in name for name in project.trained("student"))
    assert resolved["linear_alpha"] == 0.5 and resolved["apply_preset"]["target_module"] == ["WanAttention"]
    assert {tuple(t.shape) for name, t in project.trained("student").items() if name.endswith("lokr_w1")} == {(4, 4)}
    assert torch.isfinite(torch.tensor(passed(project)))
