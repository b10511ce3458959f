"""The demo's configuration, unchanged but for its length and sizes, and everything a run must leave behind."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from simpletuner_dmd.cli.main import main
from tests.support.runs import Project, frame_count, frame_size

STEPS = 8


@pytest.fixture(scope="module")
def finished(small_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code = main(
            [
                "train",
                "--example",
                "demo",
                f"pretrained_model_name_or_path={small_wan}",
                f"max_train_steps={STEPS}",
                "train_batch_size=2",
                "checkpoint_step_interval=4",
                "validation_step_interval=4",
                # What the recipe may tune, and this file counts on.
                "distillation_config.critic_warmup_steps=2",
                "distillation_config.generator_update_interval=5",
                "distillation_config.fake_score_lr=2e-3",
                "distillation_config.student_steps=3",
                "flow_schedule_shift=3",
                "use_ema=true",
                "ema_validation=ema_only",
                "lora_rank=32",
                "benchmark_num_inference_steps=3",
                f"output_dir={folder / 'output'}",
            ]
        )
    assert code == 0
    return Project(folder)


def test_resolved_configuration_says_where_each_value_came_from(finished: Project) -> None:
    resolved = json.loads((finished.output / "config.resolved.json").read_text())
    assert resolved["max_train_steps"] == {"value": STEPS, "origin": "command line"}
    assert resolved["distillation_method"]["value"] == "dmd"
    assert "demo" in resolved["distillation_method"]["origin"]
    assert resolved["framerate"]["origin"] == "default"
    assert resolved["distillation_config.student_steps"]["value"] == 3
    assert resolved["datasets"]["value"][0]["dataset_type"] == "prompts"


def test_one_row_of_metrics_per_step(finished: Project) -> None:
    rows = finished.rows("step")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    student_rows = [row["step"] for row in rows if "dmd_loss" in row]
    assert student_rows == [3, 8]  # after 2 critic-only steps, every 5th
    for row in rows:
        assert row["fake_score_loss"] > 0
        assert 0 < row["critic_lr"] <= 2e-3
        assert row["critic_grad_norm"] > 0
        assert row["step_seconds"] > 0
        assert row["peak_bytes"] > 0
    for row in rows:
        if row["step"] in student_rows:
            assert row["student_lr"] >= 0
            assert row["student_grad_norm"] > 0


def test_events_tell_the_run(finished: Project) -> None:
    (start,) = finished.rows("start")
    assert start["ladder"] == pytest.approx([1000, 6000 / 7, 600])
    assert start["steps"] == STEPS and start["resumed_at"] == 0
    assert [row["step"] for row in finished.rows("checkpoint")] == [4, 8]
    assert len(finished.rows("finish")) == 1
    assert not finished.rows("error")


def test_checkpoints(finished: Project) -> None:
    assert finished.checkpoints == ["checkpoint-000004", "checkpoint-000008"]
    root = finished.output / "checkpoints"
    assert (root / "latest").read_text().strip() == "checkpoint-000008"
    for name in finished.checkpoints:
        manifest = json.loads((root / name / "manifest.json").read_text())
        assert {"student.safetensors", "critic.safetensors", "cursor.json"} <= set(manifest["files"])
        assert {path.suffix for path in (root / name).iterdir()} == {".json", ".safetensors"}
    config = json.loads((root / "checkpoint-000008" / "cursor.json").read_text())["meta"]["config"]
    assert config["max_train_steps"] == STEPS


def test_videos_of_student_teacher_and_undistilled_decode(finished: Project) -> None:
    validation = finished.output / "validation"
    prompts = 6
    expected = {"teacher": "", "undistilled": "", "step-000004": "-ema", "step-000008": "-ema"}
    assert {path.name for path in validation.iterdir()} == {*expected, "references.json"}
    for folder, suffix in expected.items():
        videos = sorted((validation / folder).glob("*.mp4"))
        assert len(videos) == prompts
        for video in videos:
            assert video.stem.endswith(f"-seed42-64x64x9f{suffix}")
            assert frame_count(video) == 9
            assert frame_size(video) == (64, 64)
            assert video.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = finished.rows("validation")
    assert len(rows) == prompts * len(expected)
    steps = {row["kind"]: row["steps"] for row in rows}
    assert steps == {"teacher": 3, "undistilled": 3, "student-ema": 3}


def test_report_opens_offline(finished: Project) -> None:
    page = (finished.output / "report" / "index.html").read_text(encoding="utf-8")
    for word in ("DMD loss", "Teacher", "a red circle moves left", "validation/undistilled/"):
        assert word in page
    assert not [word for word in ('src="http', 'href="http', "@import") if word in page]


def test_export_and_its_load_back(finished: Project) -> None:
    export = finished.output / "export"
    (verdict,) = finished.rows("export")
    assert verdict["passed"] and verdict["relative_error"] < 1e-3
    assert len(finished.exported()) == 2 * 2 * 10  # A and B, 2 blocks, 2 x 4 attention and 2 feed-forward layers
    assert all(name.startswith("transformer.blocks.") for name in finished.exported())
    assert any(bool(tensor.any()) for name, tensor in finished.exported().items() if "lora_B" in name)
    (comfyui,) = (export / "comfyui").glob("*.safetensors")
    with safe_open(comfyui, "pt") as file:
        assert all(name.startswith("diffusion_model.blocks.") for name in file.keys())  # noqa: SIM118  no dict
    document = json.loads((export / "distill.json").read_text())
    assert document["ladder"]["timesteps"] == pytest.approx([1000, 6000 / 7, 600])
    assert document["trained_sizes"] == [{"width": 64, "height": 64, "frames": 9}]
    assert (export / "diffusers" / "scheduler" / "scheduler_config.json").is_file()
    compile((export / "sampler.py").read_text(encoding="utf-8"), "sampler.py", "exec")
    json.loads((export / "comfyui" / "workflow.json").read_text(encoding="utf-8"))
    readme = (export / "README.md").read_text(encoding="utf-8")
    assert "load_lora_weights" in readme
