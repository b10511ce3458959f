"""Do the traffic lights name what is wrong? Plants failures in the demo and reads which lights turn.

    python benchmarks/health.py --out output/health

Each cell is a short run of the shipped demo (120 steps of 16 samples, a validation every 40) with one failure planted,
from seed 42, 43 or 44. It counts as named where the light that is about this failure leaves green at one validation at
least; a healthy run must leave none. A cell is kept in OUT/cells/NAME-SEED.json as soon as it is finished and a run
that was interrupted goes on from its last checkpoint, so the command may be stopped and given again; `--only guidance`
and `--seeds 42` take some of the cells, `--again` reads the finished runs anew (after a change of bands, say).

The table has a row per failure and a column per light: in how many of the seeds it was yellow or red.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.health import BANDS
from simpletuner_dmd.durable import write_json
from simpletuner_dmd.validation.health import GREEN, Knobs, Signs, judge
from simpletuner_dmd.validation.measures import against

SEEDS = (42, 43, 44)
SHORT = (
    "max_train_steps=120", "validation_step_interval=40", "checkpoint_step_interval=40", "checkpoints_total_limit=1",
    "benchmark_num_inference_steps=20", "train_batch_size=16", "health_on_red=continue",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """What is planted, and the lights of which any is the right one; none for a healthy run."""

    title: str
    overrides: tuple[str, ...]
    lights: tuple[str, ...]


FAILURES: dict[str, Failure] = {
    "healthy": Failure("healthy", (), ()),
    "guidance": Failure(
        "guidance 12 instead of 1", ("distillation_config.real_score_guidance_scale=12",),
        ("guidance", "saturation", "contrast", "clipping"),
    ),
    "critic": Failure("critic frozen", ("distillation_config.fake_score_lr=1e-12",), ("critic",)),
    "rate": Failure("learning rate x 100", ("learning_rate=0.01", "lr_end=0.001"), ("stability",)),
    "one-step": Failure("gradients of one step only", ("distillation_config.last_step_only=true",), ("steps",)),
}  # fmt: skip


def cell(name: str, seed: int, out: Path, again: bool) -> dict[str, Any]:
    """The lights of one run: trained, unless it was before."""
    kept = out / "cells" / f"{name}-{seed}.json"
    if kept.is_file() and not again:
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    folder = out / "runs" / f"{name}-{seed}"
    if not _finished(folder):
        command = [
            sys.executable, "-m", "simpletuner_dmd", "train", "--example", "demo", f"output_dir={folder}",
            f"cache_dir_text={out / 'cache/text'}", f"cache_dir_vae={out / 'cache/vae'}", f"seed={seed}", *SHORT,
            *FAILURES[name].overrides,
        ]  # fmt: skip
        print(f"\n{name}, seed {seed}: simpletuner {' '.join(command[3:])}", flush=True)
        code = subprocess.run(command, check=False).returncode
        # A gradient that is not finite stops a run by itself; what its lights said until then counts.
        if code == 130:
            raise SystemExit("interrupted; the same command goes on")
    lights = read_lights(folder)
    found = {"name": name, "seed": seed, "raised": raised(lights), "validations": lights}
    write_json(kept, found)
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []


def _finished(folder: Path) -> bool:
    return any(row["event"] in ("finish", "error") for row in _rows(folder))


def read_lights(folder: Path) -> list[dict[str, Any]]:
    """[{step, lights: [[name, colour, value], …]}] of every validation, by the bands as they are now."""
    found, student, references = [], {}, {}
    for row in _rows(folder):
        if row["event"] == "measures":
            (references if row["kind"] in ("teacher", "undistilled") else student)[row["kind"]] = row
        if row["event"] == "health" and row["lights"]:
            shipped = student.get("student-ema") or student["student"]
            teacher = references["teacher"]
            values = {light["name"]: light["value"] for light in row["lights"]}
            rungs = (round(3 * values["steps"]), 3) if "steps" in values else None
            signs = Signs(
                against(shipped, teacher), against(references["undistilled"], teacher), values.get("critic"),
                values.get("stability"), rungs, teacher["latent_std"],
            )  # fmt: skip
            lights = judge(signs, BANDS, Knobs())
            found.append({"step": row["step"], "lights": [[one.name, one.colour, one.value] for one in lights]})
    return found


def raised(validations: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the lights that were yellow or red at one validation at least."""
    names = {name for row in validations for name, colour, _ in row["lights"] if colour != GREEN}
    return [name for name in BANDS if name in names]


def right(name: str, lights: Sequence[str]) -> bool:
    wanted = FAILURES[name].lights
    return not lights if not wanted else any(light in lights for light in wanted)


def table(cells: Sequence[dict[str, Any]]) -> str:
    head = "| planted | " + " | ".join(BANDS) + " | named |"
    lines = [head, "|---|" + "---:|" * (len(BANDS) + 1)]
    for name, failure in FAILURES.items():
        own = [one for one in cells if one["name"] == name]
        if not own:
            continue
        counts = [sum(light in one["raised"] for one in own) for light in BANDS]
        marked = [
            f"**{count}**" if light in failure.lights and count else str(count) if count else ""
            for light, count in zip(BANDS, counts, strict=True)
        ]
        named = sum(right(name, one["raised"]) for one in own)
        lines.append(f"| {failure.title} | {' | '.join(marked)} | {named} of {len(own)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("output/health"), help="folder of runs and cells")
    parser.add_argument(
        "--only", nargs="+", choices=list(FAILURES), default=list(FAILURES), help="some of the failures"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="42 43 44")
    parser.add_argument("--again", action="store_true", help="reads finished runs anew")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every cell was named right."""
    options = parse(arguments)
    cells = [cell(name, seed, options.out.resolve(), options.again) for seed in options.seeds for name in options.only]
    print(f"\n{table(cells)}")
    for one in cells:
        if not right(one["name"], one["raised"]):
            print(f"{one['name']}, seed {one['seed']}: raised {', '.join(one['raised']) or 'nothing'}")
    return 0 if all(right(one["name"], one["raised"]) for one in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
