"""A run's folder as training leaves it, from the demo's clips. `python tests/validation/fake_run.py FOLDER` makes one
to look at."""

from __future__ import annotations

import json
import math
import random
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from simpletuner_dmd.demo.shapes import ALL_COMBINATIONS, draw_clip
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.publish.export import distill_document
from simpletuner_dmd.publish.info import ExportInfo
from simpletuner_dmd.publish.schedulers import scheduler_for


def write_mp4(path: Path, clip: np.ndarray, framerate: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(framerate))
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))


def write_run(folder: Path, prompts: int = 4, steps: int = 600, interval: int = 200, export: bool = True) -> Path:
    """A whole run: step rows, validations with mp4 files, settings and an export."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, chance = np.random.default_rng(0), random.Random(0)
    rows: list[dict] = [{"event": "start", "ladder": [1000, 757, 522], "seed": 42,
                         "environment": {"torch": "2.13.0", "device": "cpu", "python": "3.11.7"}}]  # fmt: skip
    chosen = ALL_COMBINATIONS[: prompts * 5 : 5]

    def clip_row(combination, clip, kind, step, sampling_steps, place):
        name = combination.caption.replace(" ", "-")
        path = Path("validation") / place / f"{name}-seed42-64x64x9f{'-ema' if kind == 'student-ema' else ''}.mp4"
        write_mp4(folder / path, clip)
        return {"event": "validation", "step": step, "kind": kind, "name": name, "prompt": combination.caption,
                "seed": 42, "steps": sampling_steps, "width": 64, "height": 64, "frames": 9, "file": str(path),
                "poster": ""}  # fmt: skip

    truth = {c: draw_clip(c, rng) for c in chosen}

    def blurred(clip, noise):
        return np.clip(clip + rng.normal(0, noise, clip.shape), 0, 255).astype(np.uint8)

    for combination, clip in truth.items():
        rows.append(clip_row(combination, clip, "teacher", 0, 40, "teacher"))
        rows.append(clip_row(combination, blurred(clip, 60), "undistilled", 0, 3, "undistilled"))
    for step in range(steps + 1):
        if step % interval == 0:
            for combination, clip in truth.items():
                noise = 50 * (1 - step / steps)
                rows.append(clip_row(combination, blurred(clip, noise), "student", step, 3, f"step-{step:06d}"))
            rows.append({"event": "checkpoint", "step": step, "path": f"checkpoints/checkpoint-{step:06d}"})
        if step:
            rows.append({
                "event": "step", "step": step, "dmd_loss": 0.5 * math.exp(-step / 200) + chance.gauss(0.1, 0.03),
                "fake_score_loss": 0.3 + chance.gauss(0, 0.05), "lr": 3e-4 * min(1, step / 50), "fake_score_lr": 2e-3,
                "grad_norm": abs(chance.gauss(1, 0.2)), "step_seconds": chance.uniform(0.5, 0.6),
                "peak_bytes": 1.5e9 + 1e6 * min(step, 20),
            })  # fmt: skip
    if export:
        info = ExportInfo("demo", "dmd", Schedule(1.0, (1.0, 0.757, 0.522)), "sde", "demo/tiny-wan", train_steps=steps,
                          trained_sizes=((64, 64, 9),), framerate=16)  # fmt: skip
        document = distill_document(info, scheduler_for(info.schedule, "sde"), "float32", {})
        (folder / "export").mkdir()
        (folder / "export" / "distill.json").write_text(json.dumps(document))
        rows.append({"event": "export", "step": steps, "path": "export"})
        rows.append({"event": "finish", "step": steps})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "distillation_method": {"value": "dmd", "origin": "config/demo/config.json"},
        "dmd_denoising_steps": {"value": "1000,757,522", "origin": "config/demo/config.json"},
        "learning_rate": {"value": 3e-4, "origin": "command line"},
        "lora_rank": {"value": 32, "origin": "config/demo/config.json"},
        "seed": {"value": 42, "origin": "default"},
        "webhook_config": {"value": {"webhook_url": "https://host/SECRET"}, "origin": "command line"},
    }
    (folder / "config.resolved.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    from simpletuner_dmd.validation.report import build_report

    print(build_report(write_run(Path(sys.argv[1]))))
