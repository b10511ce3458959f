"""Every method as a person runs it, for every kind of student: trains, exports, and the export is loaded back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.wan.adapters import CONDITIONING_TARGETS
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import videos_dataset
from tests.support.videos import write_small_set

CRITIC = {"generator_update_interval": 2, "fake_score_lr": 2e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "dmd": CRITIC | {"student_steps": 3, "weak_lora_scale": 0.25},
    "lcm": {"student_steps": 4, "num_ddim_timesteps": 16},
    "pcm": {"phases": 4, "num_ddim_timesteps": 16, "adv_weight": 0.1, "discriminator_head_stride": 1},
    "dcm": {"student_steps": 4, "euler_timesteps": 20, "dcm_shift": 4, "temporal_coherence_lag": 1,
            "discriminator_head_stride": 1},
    "self_forcing": CRITIC | {"student_steps": 3, "num_frame_per_block": 1, "context_noise": 50},
    "diffusion_forcing": {"num_frame_per_block": 1},
    "ode_init": {"student_steps": 3, "num_frame_per_block": 1, "ode_steps": 4, "rungs_per_trajectory": 2},
}  # fmt: skip
ROLES = {
    "dmd": {"student", "critic"}, "lcm": {"student"}, "pcm": {"student", "discriminator"},
    "dcm": {"student", "detail", "discriminator"}, "self_forcing": {"student", "critic"},
    "diffusion_forcing": {"student"}, "ode_init": {"student"},
}  # fmt: skip
STUDENTS: dict[str, dict[str, Any]] = {
    "lora": {"use_ema": True, "gradient_checkpointing": True},
    "int8": {"base_model_precision": "int8-quanto"},
    "lokr": {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4}},
    "full": {"model_type": "full", "learning_rate": 1e-4, "use_ema": True},
}
VIDEOS = ("lcm", "pcm", "dcm", "diffusion_forcing")
TWO_EXPERTS: dict[str, dict[str, Any]] = {
    "lokr int8": STUDENTS["lokr"] | STUDENTS["int8"],
    "full int8": STUDENTS["full"] | STUDENTS["int8"],
}
"""A second expert sits on the base also where the first does not."""
CASES = [
    *((method, student) for method in SETTINGS for student in STUDENTS),
    *(("dcm", student) for student in TWO_EXPERTS),
]


def project_of(make_project: ProjectMaker, tmp_path: Path, method: str, **options: Any) -> Any:
    datasets = videos_dataset(write_small_set(tmp_path / "videos", 2)) if method in VIDEOS else None
    return make_project(
        method, datasets, distillation_method=method, distillation=SETTINGS[method],
        validation_num_inference_steps=2, max_train_steps=4, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "student"), CASES)
def test_a_method_trains_and_its_export_loads_back(
    make_project: ProjectMaker, tmp_path: Path, method: str, student: str
) -> None:
    project = project_of(make_project, tmp_path, method, **(STUDENTS | TWO_EXPERTS)[student])
    assert project.train() == 0
    verdict = project.rows("export")[0]
    assert verdict["passed"] and verdict["relative_error"] < 1e-4
    rows = project.rows("step")
    norms = [(name, value) for row in rows for name, value in row.items() if name.endswith("_grad_norm")]
    # The first matching gradient is exactly 0: student, critic and teacher are still the same.
    assert {name.removesuffix("_grad_norm") for name, value in norms if value > 0} == ROLES[method]


@pytest.mark.parametrize(
    ("method", "student"), [("dcm", None), ("dcm", "lokr"), ("dcm", "full"), ("self_forcing", None), ("pcm", None)]
)
def test_a_stopped_run_ends_with_the_same_bits(
    make_project: ProjectMaker, tmp_path: Path, method: str, student: str | None
) -> None:
    options = STUDENTS[student] if student else {}
    whole = project_of(make_project, tmp_path, method, **options)
    assert whole.train() == 0
    project = project_of(make_project, tmp_path, method, **options)
    stopped = type(project)(tmp_path / "stopped")
    stopped.write(json.loads(project.config.read_text()) | {"output_dir": str(stopped.output)},
                  json.loads((project.folder / "multidatabackend.json").read_text()))  # fmt: skip
    (stopped.folder / "prompts.txt").write_bytes((project.folder / "prompts.txt").read_bytes()) \
        if (project.folder / "prompts.txt").exists() else None  # fmt: skip
    assert stopped.train("max_train_steps=2", "lr_scheduler=constant_with_warmup") == 0
    assert stopped.train("resume_from_checkpoint=latest", "lr_scheduler=constant_with_warmup") == 0
    files = sorted((whole.output / "export").rglob("*.safetensors"))
    assert len(files) >= 2 if method == "dcm" else files
    for file in files:
        first, second = load_file(file), load_file(stopped.output / file.relative_to(whole.output))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file.name


def test_a_causal_export_says_so_and_has_no_comfyui_file(make_project: ProjectMaker, tmp_path: Path) -> None:
    project = project_of(make_project, tmp_path, "self_forcing")
    assert project.train() == 0
    export = project.output / "export"
    document = json.loads((export / "distill.json").read_text())
    assert document["blocks"]["num_frame_per_block"] == 1 and document["blocks"]["context_noise"] == 50
    assert not (export / "comfyui").exists()
    sampler = (export / "sampler.py").read_text()
    assert "CONTEXT = 1, False, 0.05" in sampler and "simpletuner" not in sampler


def test_two_experts_are_shipped_with_their_boundary(make_project: ProjectMaker, tmp_path: Path) -> None:
    project = project_of(make_project, tmp_path, "dcm")
    assert project.train() == 0
    export = project.output / "export"
    document = json.loads((export / "distill.json").read_text())
    ladder, experts = document["ladder"]["sigmas"], document["experts"]
    assert document["shift"] == SETTINGS["dcm"]["dcm_shift"]
    assert experts["high_noise_steps"] == sum(sigma >= experts["boundary"] for sigma in ladder) == 2
    graph = json.loads((export / "comfyui" / "workflow.json").read_text())
    assert graph["21"]["inputs"]["step"] == 2 and graph["24"]["inputs"]["latent_image"] == ["11", 0]
    assert (export / "comfyui" / graph["20"]["inputs"]["lora_name"]).exists()
    low = load_file(export / "diffusers" / "pytorch_lora_weights_low_noise.safetensors")
    assert any("proj_out" in name for name in low) and any("time_embedder" in name for name in low)


@pytest.mark.parametrize("student", ["lora", "lokr"])
def test_two_experts_are_trained_one_after_the_other(make_project: ProjectMaker, tmp_path: Path, student: str) -> None:
    """The second run's export holds the first run's semantic expert as it was, beside its own detail expert."""
    datasets = videos_dataset(write_small_set(tmp_path / "videos", 2))
    exports = []
    for mode in ("semantic", "detail"):
        start = {"init_lora": str(exports[0].parent)} if exports else {}
        project = make_project(
            mode, datasets, distillation_method="dcm", distillation=SETTINGS["dcm"] | {"mode": mode},
            max_train_steps=3, **STUDENTS[student], **start,
        )  # fmt: skip
        assert project.train() == 0
        assert project.rows("export")[0]["passed"]
        exports.append(project.output / "export")
    folder = "diffusers" if student == "lora" else "lycoris"
    first, second = (
        {("low" if "low" in file.name else "high"): load_file(file) for file in (export / folder).glob("*.safetensors")}
        for export in exports
    )
    assert all(torch.allclose(first["high"][name], second["high"][name], rtol=1e-6) for name in first["high"])
    assert any(not torch.equal(first["low"][name], second["low"][name]) for name in first["low"])


@pytest.mark.parametrize("student", ["lokr", "full"])
def test_two_experts_of_other_kinds_are_sampled_and_exported_again(
    make_project: ProjectMaker, tmp_path: Path, student: str
) -> None:
    """The averages of both, as `train` wrote them; and as `export --raw` does, the weights themselves."""
    options = STUDENTS[student] | {"use_ema": True, "ema_decay": 0.5}
    project = project_of(make_project, tmp_path, "dcm", **options)
    assert project.train() == 0
    run = str(project.output)
    assert main(["sample", run, "--prompt", "a red circle", "--seed", "7"]) == 0
    assert len(list((project.output / "samples").rglob("*.mp4"))) == 1
    for name, arguments in {"again": [], "raw": ["--raw"]}.items():
        assert main(["export", run, *arguments, "--out", str(tmp_path / name)]) == 0
    low = {"lokr": "lycoris/*-low-noise.safetensors", "full": "diffusers/*_low_noise.safetensors"}[student]
    high = {"lokr": "lycoris/*.safetensors", "full": "diffusers/transformer/*.safetensors"}[student]
    for pattern in (low, high):
        (first,), (second,), (raw,) = (
            [load_file(file) for file in sorted(folder.glob(pattern))[:1]]
            for folder in (project.output / "export", tmp_path / "again", tmp_path / "raw")
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], raw[name]) for name in first)
    detail = load_file(next((project.output / "export").glob(low)))
    assert any("proj_out" in name for name in detail) and any("time_embedder" in name for name in detail)
    if student == "lokr":
        layers = {file.name: len({key.partition(".")[0] for key in load_file(file)})
                  for file in (project.output / "export" / "lycoris").iterdir()}  # fmt: skip
        assert max(layers.values()) == min(layers.values()) + len(CONDITIONING_TARGETS)


def test_two_lycoris_experts_load_back_in_half_precision(make_project: ProjectMaker, tmp_path: Path) -> None:
    """Wan keeps its time embedder in fp32 in a bf16 base; the detail expert's modules on it are bf16 in a pipeline."""
    project = project_of(make_project, tmp_path, "dcm", **STUDENTS["lokr"], mixed_precision="bf16")
    assert project.train() == 0
    assert project.rows("export")[0]["passed"]
