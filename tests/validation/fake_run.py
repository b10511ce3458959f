"""A run's folder as training leaves it, from the demo's clips. `python tests/validation/fake_run.py FOLDER` makes one
to look at."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np

from simpletuner_dmd.data.video import write_mp4, write_poster
from simpletuner_dmd.demo.shapes import ALL_COMBINATIONS, draw_clip
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.publish.export import distill_document
from simpletuner_dmd.publish.info import ExportInfo
from simpletuner_dmd.publish.schedulers import scheduler_for


def judged(step: int, share: float) -> list[dict]:
    """What a validation logs besides its videos: measures, critic, evaluation and lights. share: 0 to 1, to the end."""
    quotients = {"saturation": 1 + 0.5 * share, "contrast": 0.9, "detail": 0.7 + 0.2 * share, "motion": 1 - 0.6 * share,
                 "latent_std": 1 + 0.1 * share, "prompt_diversity": 0.95}  # fmt: skip
    lights = [
        {"name": "saturation", "colour": "yellow" if share > 0.6 else "green", "value": quotients["saturation"],
         "band": [0.55, 0.75, 1.35, 1.7], "sentence": "saturation is 150% of the teacher's: lower learning_rate"},
        {"name": "motion", "colour": "red" if share > 0.9 else "green", "value": quotients["motion"],
         "band": [0.4, 0.6, 1.7, 2.5], "sentence": "motion is 40% of the teacher's: stop earlier or lower guidance"},
        {"name": "critic", "colour": "green", "value": 0.9, "band": [0.1, 0.3, None, None],
         "sentence": "the critic has gone 90% of the way to the student's score"},
    ]  # fmt: skip
    quarters = {f"{name}_q{k}": 0.1 * k + 0.2 * share for k in (1, 2, 3, 4) for name in ("critic_loss", "critic_ratio")}
    colour = "red" if share > 0.9 else "yellow" if share > 0.6 else "green"
    return [
        {"event": "measures", "step": step, "kind": "student", "videos": 4, "saturation": 0.3, "of_teacher": quotients},
        {"event": "critic", "step": step, **quarters, "critic_reach": 0.9},
        {"event": "evaluation", "step": step, "eval_loss": 0.4, **{f"eval_loss_q{k}": 0.1 * k for k in (1, 2, 3, 4)}},
        {"event": "health", "step": step, "colour": colour, "score": 0.3 - 0.1 * share, "best": share < 0.5,
         "lights": lights},
    ]  # fmt: skip


def step_row(step: int, chance: random.Random) -> dict:
    row = {"event": "step", "step": step, "fake_score_loss": 0.3 + chance.gauss(0, 0.05), "critic_lr": 2e-3,
           "score_gap_rms": chance.uniform(0.1, 0.2), "step_seconds": chance.uniform(0.5, 0.6),
           "peak_bytes": 1.5e9 + 1e6 * min(step, 20)}  # fmt: skip
    moved = ["critic"]
    if step % 3 == 0:
        moved.append("student")
        row["dmd_loss"] = 0.5 * math.exp(-step / 200) + chance.gauss(0.1, 0.03)
        row["student_lr"] = 3e-4 * min(1, step / 50)
    for role in moved:
        row[f"{role}_grad_norm"] = abs(chance.gauss(1, 0.2))
        row[f"{role}_grad_norm_attention"] = abs(chance.gauss(0.8, 0.2))
        row[f"{role}_grad_norm_feed_forward"] = abs(chance.gauss(0.6, 0.1))
    return row


def write_run(folder: Path, prompts: int = 4, steps: int = 600, interval: int = 200, export: bool = True) -> Path:
    """A whole run: step rows, validations with mp4 files and what they judged, settings and an export."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, chance = np.random.default_rng(0), random.Random(0)
    rows: list[dict] = [{"event": "start", "ladder": [1000, 757, 522], "seed": 42,
                         "environment": {"torch": "2.13.0", "device": "cpu", "python": "3.11.7"}}]  # fmt: skip
    chosen = ALL_COMBINATIONS[: prompts * 5 : 5]

    def clip_row(combination, clip, kind, step, sampling_steps, place):
        name = combination.caption.replace(" ", "-")
        path = Path("validation") / place / f"{name}-seed42-64x64x9f{'-ema' if kind == 'student-ema' else ''}.mp4"
        write_mp4(folder / path, clip, 16)
        write_poster((folder / path).with_suffix(".png"), clip)
        return {"event": "validation", "step": step, "kind": kind, "name": name, "prompt": combination.caption,
                "seed": 42, "steps": sampling_steps, "width": 64, "height": 64, "frames": 9, "file": str(path),
                "poster": str(path.with_suffix(".png"))}  # fmt: skip

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
            rows += judged(step, step / steps) if step else []
        if step:
            rows.append(step_row(step, chance))
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


def write_gallery(folder: Path, prompts: int) -> Path:
    """Only videos of 832x480 with posters, three per prompt, all with the same picture."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(30, 220, 832)[None, None, :, None] + np.arange(9)[:, None, None, None]
    clip = np.clip(ramp + rng.normal(0, 4, (9, 480, 832, 3)), 0, 255).astype(np.uint8)
    first, rows = folder / "validation" / "teacher" / "p0.mp4", []
    for number in range(prompts):
        for kind in ("teacher", "undistilled", "student"):
            file = folder / "validation" / kind / f"p{number}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            if file == first:
                write_mp4(file, clip, 16)
                write_poster(file.with_suffix(".png"), clip)
            else:
                shutil.copy(first, file)
                shutil.copy(first.with_suffix(".png"), file.with_suffix(".png"))
            place = {"file": str(file.relative_to(folder)), "poster": str(file.with_suffix(".png").relative_to(folder))}
            rows.append({"event": "validation", "step": 9, "kind": kind, "name": f"p{number}", "prompt": f"p{number}",
                         "seed": 1, "steps": 4, "width": 832, "height": 480, "frames": 9, **place})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


if __name__ == "__main__":
    from simpletuner_dmd.validation.report import build_report

    print(build_report(write_run(Path(sys.argv[1]))))
