"""Writes small configurations, runs the command line on them, and reads what a run left."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from safetensors.torch import load_file

from simpletuner_dmd.cli.main import main

REPOSITORY = Path(__file__).parents[2]

SMALL_DMD: dict[str, Any] = {
    "model_family": "wan",
    "model_type": "lora",
    "lora_rank": 4,
    "distillation_method": "dmd",
    "distillation_config": {
        "student_steps": 3,
        "generator_update_interval": 2,
        "real_score_guidance_scale": 1.0,
        "fake_score_lr": 2e-3,
    },
    "flow_schedule_shift": 3,
    "max_train_steps": 6,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "tokenizer_max_length": 16,
    "checkpoint_step_interval": 1000,
    "validation_disable": True,
    "validation_prompt": "a red circle moves left",
    "validation_num_video_frames": 5,
    "validation_resolution": "32x32",
    "benchmark_num_inference_steps": 2,
    "seed": 5,
}
PROMPTS = ["a red circle moves left", "a green square moves up", "a blue circle moves down", "a red square moves up"]


def prompts_dataset(folder: Path) -> list[dict[str, Any]]:
    """A data file's content: four prompts at 32x32, 5 frames."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return [
        {
            "id": "prompts",
            "dataset_type": "prompts",
            "instance_data_dir": "prompts.txt",
            "resolution": "32x32",
            "video": {"num_frames": 5},
        }
    ]


def videos_dataset(videos: Path, **options: Any) -> list[dict[str, Any]]:
    """A data file's content: a folder of videos at 32x32, 5 frames."""
    entry = {
        "id": "videos",
        "dataset_type": "video",
        "instance_data_dir": str(videos),
        "resolution": 32,
        "video": {"num_frames": 5},
    }
    return [{**entry, **options}]


@dataclass(frozen=True)
class Project:
    """A folder with config.json and multidatabackend.json, and the run it describes."""

    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    def write(self, options: Mapping[str, Any], datasets: list[dict[str, Any]] | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "output_dir": str(self.output),
            "cache_dir_text": str(self.folder / "cache" / "text"),
            "cache_dir_vae": str(self.folder / "cache" / "vae"),
            **options,
        }
        self.config.write_text(json.dumps(content), encoding="utf-8")
        entries = prompts_dataset(self.folder) if datasets is None else datasets
        (self.folder / "multidatabackend.json").write_text(json.dumps(entries), encoding="utf-8")

    def train(self, *overrides: str) -> int:
        return main(["train", "--config", str(self.config), *overrides])

    def check(self, *overrides: str) -> int:
        return main(["check", "--config", str(self.config), *overrides])

    def command(self, *overrides: str) -> list[str]:
        """The same as `train`, for a process of its own."""
        return [sys.executable, "-m", "simpletuner_dmd", "train", "--config", str(self.config), *overrides]

    # --- what a run left ----------------------------------------------------------------------------------------------

    def rows(self, event: str) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for line in lines if (row := json.loads(line))["event"] == event]

    @property
    def checkpoints(self) -> list[str]:
        root = self.output / "checkpoints"
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []

    def exported(self) -> dict[str, torch.Tensor]:
        """The exported student: a LoRA, or the transformer of a full one."""
        export = self.output / "export"
        lora = export / "diffusers" / "pytorch_lora_weights.safetensors"
        if lora.exists():
            return load_file(lora)
        (weights,) = export.glob("**/diffusion_pytorch_model.safetensors")
        return load_file(weights)

    def trained(self, role: str) -> dict[str, torch.Tensor]:
        """What the newest checkpoint holds of a role."""
        latest = (self.output / "checkpoints" / "latest").read_text().strip()
        return load_file(self.output / "checkpoints" / latest / f"{role}.safetensors")


def environment(**more: str) -> dict[str, str]:
    """The environment of a training process started by a test: one thread, this working tree, nothing online."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **settings, **more}


def assert_same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, f"{len(differing)} of {len(left)} tensors differ, for example {differing[0]}"


def largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    assert set(left) == set(right)
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def frame_count(video: Path) -> int:
    """Frames that really decode."""
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def frame_size(video: Path) -> tuple[int, int]:
    with av.open(str(video)) as container:
        return container.streams.video[0].width, container.streams.video[0].height
