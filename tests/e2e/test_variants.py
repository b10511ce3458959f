"""The other ways to train: full networks, supervised, data_latent, and the options that change the loop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from simpletuner_dmd.config.training_options import LrScheduler
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import videos_dataset
from tests.support.videos import write_small_set

FULL = {"model_type": "full", "learning_rate": 1e-3}


def test_full_student_and_full_critic(make_project: ProjectMaker, small_wan: Path) -> None:
    project = make_project(**FULL)
    assert project.train() == 0
    (verdict,) = project.rows("export")
    assert verdict["passed"]
    folder = project.output / "export" / "diffusers" / "transformer"
    exported = WanTransformer3DModel.from_pretrained(folder).state_dict()
    started = WanTransformer3DModel.from_pretrained(small_wan / "transformer").state_dict()
    assert set(exported) == set(started)
    moved = [name for name in started if not torch.equal(exported[name], started[name])]
    assert len(moved) == len(started)
    assert set(project.trained("critic")) == set(started)


def test_full_student_in_bf16(make_project: ProjectMaker) -> None:
    project = make_project(**FULL, mixed_precision="bf16", gradient_checkpointing=True)
    assert project.train() == 0
    assert project.rows("export")[0]["passed"]
    assert {tensor.dtype for tensor in project.trained("student").values()} == {torch.float32}


def test_full_student_on_a_quantised_base_has_a_lora_critic(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(**FULL, base_model_precision="int8-quanto")
    assert project.train() == 0
    assert any(name.endswith("lora_A.weight") for name in project.trained("critic"))
    assert not any("lora" in name for name in project.trained("student"))
    assert "away from the teacher" in capsys.readouterr().out


def test_lora_student_with_a_full_critic(make_project: ProjectMaker) -> None:
    project = make_project(distillation={"fake_score_type": "full"})
    assert project.train() == 0
    assert any("lora" in name for name in project.trained("student"))
    assert not any("lora" in name for name in project.trained("critic"))
    assert project.rows("export")[0]["passed"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_supervised_learns_a_small_set(make_project: ProjectMaker, tmp_path: Path, precision: str) -> None:
    videos = write_small_set(tmp_path / "videos", 2)
    project = make_project(
        "supervised", videos_dataset(videos), distillation_method=None, model_type="full", learning_rate=5e-3,
        max_train_steps=150, validation_disable=False, validation_num_inference_steps=2, validation_step_interval=100,
        mixed_precision=precision,
    )  # fmt: skip
    assert project.train() == 0
    losses = [row["loss"] for row in project.rows("step")]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert project.rows("export")[0]["passed"]
    assert len(list((project.folder / "cache" / "vae").rglob("*.safetensors*"))) == 2
    kinds = {row["kind"] for row in project.rows("validation")}
    assert kinds == {"teacher", "student"}


def test_supervised_lora_with_a_shift_and_dropped_captions(make_project: ProjectMaker, tmp_path: Path) -> None:
    videos = write_small_set(tmp_path / "videos", 2)
    options: dict[str, Any] = {"distillation_method": None, "caption_dropout_probability": 0.5, "lora_dropout": 0.1}
    losses = []
    for shift in (None, 3):
        project = make_project(f"shift-{shift}", videos_dataset(videos), flow_schedule_shift=shift, **options)
        assert project.train() == 0
        losses.append(project.rows("step")[0]["loss"])
    assert losses[0] != losses[1]


def test_rollout_from_data_latents(make_project: ProjectMaker, tmp_path: Path) -> None:
    videos = write_small_set(tmp_path / "videos")
    data, noise = (
        make_project(rollout, videos_dataset(videos), distillation={"rollout": rollout})
        for rollout in ("data_latent", "simulate")
    )
    assert data.train() == 0 and noise.train() == 0
    assert list((data.folder / "cache" / "vae").rglob("*.safetensors*"))
    assert not list((noise.folder / "cache" / "vae").rglob("*.safetensors*"))  # nothing reads them
    assert data.rows("step")[-1]["fake_score_loss"] != noise.rows("step")[-1]["fake_score_loss"]


def test_ema_comparison_renders_both_and_exports_the_average(make_project: ProjectMaker) -> None:
    project = make_project(
        use_ema=True, ema_decay=0.5, ema_validation="comparison", validation_disable=False, lora_alpha=4.0
    )
    assert project.train() == 0
    folder = project.output / "validation" / "step-000006"
    names = sorted(path.name for path in folder.glob("*.mp4"))
    assert names == ["validation-seed42-32x32x5f-ema.mp4", "validation-seed42-32x32x5f.mp4"]
    checkpoint = project.output / "checkpoints" / "checkpoint-000006"
    shadow = load_file(checkpoint / "ema.safetensors")
    raw = project.trained("student")
    exported = project.exported()
    key = "blocks.0.attn1.to_q.lora_B.weight"
    average = next(tensor for name, tensor in shadow.items() if name.endswith(key))
    assert torch.equal(exported[f"transformer.{key}"], average)
    assert not torch.equal(average, raw[key])


def test_clipping_by_value_bounds_every_element(make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    from simpletuner_dmd.training.trainer import RoleOptimizer

    seen: list[float] = []
    update = RoleOptimizer.update

    def watched(role: RoleOptimizer, accelerator: Any) -> dict[str, float]:
        handle = role.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append(max(float(p.grad.abs().max()) for p in role.tensors))  # type: ignore[union-attr]
        )
        try:
            return update(role, accelerator)
        finally:
            handle.remove()

    monkeypatch.setattr(RoleOptimizer, "update", watched)
    project = make_project(
        grad_clip_method="value", max_grad_norm=1e-7, max_train_steps=3,
        distillation={"generator_update_interval": 1, "fake_score_grad_clip": 0},
    )  # fmt: skip
    assert project.train() == 0
    students, critics = seen[::2], seen[1::2]
    assert max(students) == pytest.approx(1e-7)
    assert min(critics) > 1e-4  # 0 is off


@pytest.mark.parametrize("scheduler", [*LrScheduler.__args__, "cosine_with_warmup"])
def test_every_schedule_trains_and_warms_up(make_project: ProjectMaker, scheduler: str) -> None:
    project = make_project(
        lr_scheduler=scheduler, lr_warmup_steps=2, max_train_steps=5, distillation={"generator_update_interval": 1}
    )
    assert project.train() == 0
    rates = [row["student_lr"] for row in project.rows("step")]
    assert all(0 <= rate <= 1e-3 and math.isfinite(rate) for rate in rates)
    assert rates[0] < rates[1] <= max(rates)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw_bf16",
        "optimi-adamw",
        "optimi-lion",
        "optimi-stableadamw",
        "optimi-adan",
        "optimi-ranger",
        "torch-muon",
        "bnb-adamw8bit",
        "bnb-lion-paged",
        "prodigy",
        "adafactor",
    ],
)
def test_every_optimizer_trains_and_resumes(make_project: ProjectMaker, optimizer: str) -> None:
    if optimizer.startswith("bnb-"):
        pytest.importorskip("bitsandbytes", reason="an extra")
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt", reason="an extra")
    project = make_project(optimizer=optimizer, max_train_steps=4, checkpoint_step_interval=2)
    assert project.train() == 0
    before = project.trained("student")
    assert project.train("resume_from_checkpoint=checkpoint-000002") == 0
    for name, tensor in project.trained("student").items():
        assert torch.equal(tensor, before[name])


def test_validation_on_startup_and_several_sizes(make_project: ProjectMaker) -> None:
    project = make_project(
        validation_disable=False, validation_on_startup=True, validation_step_interval=3, num_validation_images=2,
        validation_resolution="32x32,48x32", disable_benchmark=True,
    )  # fmt: skip
    assert project.train() == 0
    folders = {path.name: len(list(path.glob("*.mp4"))) for path in (project.output / "validation").iterdir()}
    assert folders == {"step-000000": 4, "step-000003": 4, "step-000006": 4}


def test_length_in_epochs(make_project: ProjectMaker) -> None:
    project = make_project(max_train_steps=None, num_train_epochs=3)
    assert project.train() == 0
    assert len(project.rows("step")) == 6  # 4 prompts, batches of 2, three passes


def test_strict_epoch_limit_stops_at_the_first_of_both(make_project: ProjectMaker) -> None:
    project = make_project(max_train_steps=100, num_train_epochs=1, strict_epoch_limit=True)
    assert project.train() == 0
    assert len(project.rows("step")) == 2


def test_one_format_and_chosen_layers(make_project: ProjectMaker) -> None:
    project = make_project(
        lora_format="comfyui", peft_lora_target_modules="to_q,to_k", lora_alpha=8, lora_init_type="gaussian"
    )
    assert project.train() == 0
    assert not (project.output / "export" / "diffusers" / "pytorch_lora_weights.safetensors").exists()
    (file,) = (project.output / "export" / "comfyui").glob("*.safetensors")
    modules = {name.rsplit(".", 2)[0].rsplit(".", 1)[1] for name in load_file(file)}
    assert modules == {"q", "k"}
