"""The three files of a published DMD guide, as they are: only paths, sizes, lengths and intervals are overridden."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from simpletuner_dmd.config import DatasetEntry, DmdConfig, TrainConfig
from simpletuner_dmd.config.layers import ALIASES
from tests.support.runs import Project, environment, frame_count, frame_size
from tests.support.videos import write_moving_square

GUIDE = Path(__file__).parent / "data" / "wan-dmd"
FILM_RATE = 24000 / 1001
STEPS = 6


def write_mixed_videos(folder: Path) -> Path:
    """Sizes, lengths and rates as people have them."""
    write_moving_square(folder / "wide.mp4", (96, 48), frames=14, rate=16, caption="a wide one")
    write_moving_square(folder / "tall.mp4", (48, 80), frames=30, rate=30, caption="a tall one")
    write_moving_square(folder / "square.mp4", (66, 66), frames=15, rate=FILM_RATE, caption="a square one")
    write_moving_square(folder / "slow.mp4", (64, 64), frames=10, rate=12, caption="a slow one")
    write_moving_square(folder / "nested" / "long.mp4", (100, 56), frames=60, rate=25, caption="a long one")
    return folder


def lay_out(folder: Path, small_wan: Path, extra: dict[str, Any]) -> list[str]:
    """The files where config.json expects them, and the overrides that are allowed."""
    videos = write_mixed_videos(folder / "videos")
    config = json.loads((GUIDE / "config.json").read_text(encoding="utf-8"))
    config["distillation_config"] = {**config["distillation_config"], **extra.get("distillation_config", {})}
    entry = json.loads((GUIDE / "dataset-entry.json").read_text(encoding="utf-8"))
    entry |= {"instance_data_dir": str(videos), "resolution": 64, "num_frames": 9}
    (folder / "config" / "wan").mkdir(parents=True)
    (folder / "config" / "wan" / "multidatabackend.json").write_text(json.dumps([entry]), encoding="utf-8")
    (folder / "config" / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return [
        f"pretrained_model_name_or_path={small_wan}",
        f"pretrained_t5_model_name_or_path={small_wan}",
        "resolution=64",
        "validation_resolution=64x32",
        "validation_num_video_frames=9",
        f"max_train_steps={STEPS}",
        "lr_warmup_steps=2",
        "checkpoint_step_interval=2",
        "validation_step_interval=3",
        "ema_update_interval=2",
    ]


@dataclass(frozen=True)
class Guide:
    """One finished run of the guide's files."""

    which: str
    project: Project
    output: Path
    text: str

    def rows(self, event: str) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for line in lines if (row := json.loads(line))["event"] == event]


@pytest.fixture(scope="module", params=["config", "advanced"])
def guide(request: pytest.FixtureRequest, small_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Guide:
    """config.json alone, and with distillation-advanced.json merged over it."""
    folder = tmp_path_factory.mktemp(f"guide-{request.param}")
    extra = json.loads((GUIDE / "distillation-advanced.json").read_text()) if request.param == "advanced" else {}
    overrides = lay_out(folder, small_wan, extra)
    variables = environment(HOME=str(folder), XDG_CACHE_HOME=str(folder / "xdg"))
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN", "HF_HOME", "NETRC"):
        variables.pop(variable, None)
    finished = subprocess.run(
        [sys.executable, "-m", "simpletuner_dmd", "train", *overrides],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    text = finished.stdout + finished.stderr
    assert finished.returncode == 0, text
    assert "Traceback" not in text
    return Guide(request.param, Project(folder), folder / "output" / "wan-dmd", text)


def test_every_key_is_known_and_in_force(guide: Guide) -> None:
    resolved = json.loads((guide.output / "config.resolved.json").read_text(encoding="utf-8"))
    written = json.loads((GUIDE / "config.json").read_text(encoding="utf-8"))
    overridden = {
        "pretrained_model_name_or_path", "pretrained_t5_model_name_or_path", "resolution", "validation_resolution",
        "validation_num_video_frames", "max_train_steps", "lr_warmup_steps", "checkpoint_step_interval",
        "validation_step_interval", "ema_update_interval", "distillation_config", "ignore_final_epochs",
    }  # fmt: skip
    for key, value in written.items():
        name = ALIASES.get(key, key)
        assert name in TrainConfig.model_fields, key
        if key not in overridden:
            # What is absent is not in force: here the webhook's file.
            expected = {"report_to": ["wandb"], "webhook_config": None}.get(key, value)
            assert resolved[name]["value"] == expected, key
            assert resolved[name]["origin"] == "config/config.json", key
    nested = written["distillation_config"]
    if guide.which == "advanced":
        nested |= json.loads((GUIDE / "distillation-advanced.json").read_text())["distillation_config"]
    for key, value in nested.items():
        assert key in DmdConfig.model_fields
        expected = [float(step) for step in value.split(",")] if key == "dmd_denoising_steps" else value
        assert resolved[f"distillation_config.{key}"]["value"] == expected, key
    (entry, _) = resolved["datasets"]["value"]
    for key, value in json.loads((GUIDE / "dataset-entry.json").read_text()).items():
        if key in DatasetEntry.model_fields and key not in ("cache_dir", "resolution"):
            assert entry[key] == value, key
    assert entry["video"]["num_frames"] == 9 and entry["video"]["frame_interval"] == 1
    assert entry["cache_dir_vae"].endswith("cache/wan-dmd")


def test_what_is_absent_is_named_and_the_run_goes_on(guide: Guide) -> None:
    named = (
        "webhook_config: there is no config/wan/webhook.json",
        "validation_prompt_library: there is no config/wan/validation_prompts_dmd.json",
        "wandb has no key, so the run is kept offline",
        "push_to_hub is on but",
    )
    for warning in named:
        assert guide.text.count(warning) == 1, warning
    assert "simpletuner push output/wan-dmd\n" in guide.text
    assert list((guide.output / "wandb").glob("offline-run-*"))


def test_videos_of_every_shape_are_used(guide: Guide) -> None:
    assert "5 usable, 0 left out" in guide.text
    for shape in ("80x48x9: 1", "48x80x9: 1", "64x64x9: 2", "96x48x9: 1"):
        assert shape in guide.text


def test_training_and_result(guide: Guide) -> None:
    rows = guide.rows("step")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    interval = 4 if guide.which == "advanced" else 1
    assert [row["step"] for row in rows if "dmd_loss" in row] == list(range(1, STEPS + 1, interval))
    assert all(math.isfinite(row["fake_score_loss"]) for row in rows)
    ladder = [1000, 666, 333] if guide.which == "advanced" else [1000, 757, 522]
    assert guide.rows("start")[0]["ladder"] == pytest.approx(ladder)
    assert guide.rows("export")[0]["passed"]
    lora = load_file(guide.output / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    assert {tensor.shape[0] for name, tensor in lora.items() if "lora_A" in name} == {128}
    assert any(bool(tensor.any()) for name, tensor in lora.items() if "lora_B" in name)


def test_three_checkpoints_are_kept_and_each_is_exported(guide: Guide) -> None:
    names = sorted(path.name for path in (guide.output / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000006"]
    for name in names:
        assert (guide.output / "export-checkpoints" / name / "distill.json").is_file()


def test_videos_are_rendered_with_the_average(guide: Guide) -> None:
    videos = sorted((guide.output / "validation").rglob("*.mp4"))
    assert sorted({video.parent.name for video in videos}) == ["step-000003", "step-000006", "teacher", "undistilled"]
    for video in videos:
        assert frame_count(video) == 9 and frame_size(video) == (64, 32)
        assert video.stem.endswith("-ema") == video.parent.name.startswith("step-")


def test_the_guides_data_file_may_hold_the_bare_entry(small_wan: Path, tmp_path: Path) -> None:
    """Only the folder of the videos is added; everything else as the guide has it (480 pixels, 121 frames)."""
    from simpletuner_dmd.config import load

    overrides = lay_out(tmp_path, small_wan, {})
    entry = json.loads((GUIDE / "dataset-entry.json").read_text()) | {"instance_data_dir": str(tmp_path / "videos")}
    (tmp_path / "config" / "wan" / "multidatabackend.json").write_text(json.dumps(entry))
    loaded = load(overrides, cwd=tmp_path, environ={})
    assert loaded.datasets[0].resolution == 480 and loaded.datasets[0].video.num_frames == 121
