"""Every distillation method on the demo: trains each by its shipped recipe, measures the student, prints one table.

    python benchmarks/methods.py --out output/methods

A row is kept in OUT/rows/NAME.json as soon as it is finished, and a run that was interrupted goes on from its last
checkpoint, so the command may be stopped and given again; `--only dmd lcm` takes some of the rows, `--again` measures
(not trains) anew. Each student is sampled from its last checkpoint (the average, where there is one) by the sampler it
was trained for, and compared with samples of the teacher at 40 Euler steps:

- energy distance to the teacher (demo/measures.py), and the share of the gap between the undistilled model at the same
  steps and the teacher's own noise floor that the student closed;
- energy distance to the data, which the teacher has too;
- what the pixels show: obedience to the caption (colour and direction; with the shape as well), saturation and travel
  relative to the teacher's.

Forwards per update are counted by hooks on the transformers, over the turns that lead to one update of the student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.saved import SavedStudent, open_checkpoint, open_run
from simpletuner_dmd.demo import measures, shapes
from simpletuner_dmd.distill.method import Method
from simpletuner_dmd.durable import write_json, write_text, write_through
from simpletuner_dmd.flow import Denoiser, TextEmbedding, euler_sigmas, sample_euler
from simpletuner_dmd.randomness import RandomStream, derive_seed, generator
from simpletuner_dmd.validation.measures import energy_distance
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.roles import Roles

CPU = torch.device("cpu")
BATCH = 64
TEACHER_STEPS = 40
TEACHER_SHIFT = 3.0
CYCLES = 24  # student updates over which forwards are counted; exits are drawn at random


@dataclass(frozen=True)
class Recipe:
    """A row: a shipped example, and what is changed in it. after: the row whose student it starts from."""

    title: str
    example: str
    overrides: tuple[str, ...] = ()
    after: str | None = None


RECIPES: dict[str, Recipe] = {
    "dmd": Recipe("`dmd`", "demo"),
    "w2svd": Recipe("`dmd`, W2SVD", "demo", ("distillation_config.weak_lora_scale=0.25",)),
    "gan": Recipe("`dmd`, adversarial", "demo-gan"),
    "gan-43": Recipe("`dmd`, adversarial, seed 43", "demo-gan", ("seed=43",)),
    "gan-44": Recipe("`dmd`, adversarial, seed 44", "demo-gan", ("seed=44",)),
    "lcm": Recipe("`lcm`", "demo-lcm"),
    "pcm": Recipe("`pcm`", "demo-pcm"),
    "dcm": Recipe("`dcm`", "demo-dcm"),
    "rcm": Recipe("`rcm`", "demo-rcm"),
    "diffusion-forcing": Recipe("`diffusion_forcing`", "demo-diffusion-forcing"),
    "ode-init": Recipe("`ode_init`", "demo-ode-init"),
    "self-forcing": Recipe("`self_forcing`, after `diffusion_forcing`", "demo-self-forcing", after="diffusion-forcing"),
}


# --- training -------------------------------------------------------------------------------------------------------


def train(name: str, recipe: Recipe, out: Path) -> None:
    """Runs `simpletuner train`; a finished run is found finished, an interrupted one goes on."""
    folder = out / name
    if finished(folder) is not None:
        return
    command = [
        sys.executable, "-m", "simpletuner_dmd", "train", "--example", recipe.example, f"output_dir={folder}",
        f"tracker_run_name={name}", *([f"init_lora={out / recipe.after}"] if recipe.after else []), *recipe.overrides,
    ]  # fmt: skip
    print(f"\n{name}: simpletuner {' '.join(command[3:])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f"{name}: training ended with exit code {code}")


def finished(folder: Path) -> dict[str, float] | None:
    """Time and memory of a finished run, None of another."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        return None
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not any(row.get("event") == "finish" for row in rows):
        return None
    steps = [row for row in rows if "step_seconds" in row]
    return {
        "minutes": sum(row["step_seconds"] for row in steps) / 60,
        "peak_gb": max(row["peak_bytes"] for row in steps) / 1e9,
    }


# --- forwards per update --------------------------------------------------------------------------------------------


def count_forwards(assembly: Assembly, roles: Roles, method: Method) -> dict[str, float]:
    """Forwards, and those with a graph (a backward each), per update of the student: on one sample, by hooks."""
    counts = {"forwards": 0, "backwards": 0}

    def counted(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        counts["forwards"] += 1
        counts["backwards"] += torch.is_grad_enabled()

    data = assembly.data([], progress=False)
    handles = [network.register_forward_hook(counted) for network in roles.transformers()]
    first = settled(assembly)
    last = first + CYCLES * assembly.config.distillation.student_interval
    try:
        for step in range(first, last):
            batch = data.micro_batch(step, 0, 0, micro_batch_size=1, accumulation=1, world=1)
            stream = RandomStream(assembly.config.seed, step, batch.positions)
            for turn in method.turns(step):
                for _ in turn.losses(batch, stream):
                    pass
            method.end_step()
    finally:
        for handle in handles:
            handle.remove()
        data.close()
    return {name: count / CYCLES for name, count in counts.items()}


def settled(assembly: Assembly) -> int:
    """A step at which the student moves and every term of its loss has begun."""
    options: Any = assembly.config.distillation
    warmup = getattr(options, "critic_warmup_steps", 0)
    begun = max(warmup, getattr(options, "gan_start_step", 0) if getattr(options, "gan_weight", 0) else 0)
    interval = assembly.config.distillation.student_interval
    return warmup + -(-(begun - warmup) // interval) * interval


# --- sampling -------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Prompts, teacher's samples and data, shared by all rows. combinations: what each prompt says, in turn."""

    text_NLD: Tensor
    negative: TextEmbedding
    latent_shape: tuple[int, int, int, int]
    samples: int
    cache: Path

    @property
    def combinations(self) -> list[shapes.Combination]:
        return [shapes.ALL_COMBINATIONS[index % len(shapes.ALL_COMBINATIONS)] for index in range(self.samples)]

    def noise(self, seed: int, first: int, count: int, purpose: str) -> Tensor:
        draws = [generator(seed, "methods", index, purpose) for index in range(first, first + count)]
        return torch.stack([torch.randn(self.latent_shape, generator=draw) for draw in draws])

    def text(self, first: int, count: int) -> TextEmbedding:
        return TextEmbedding(self.text_NLD[[(first + index) % len(self.text_NLD) for index in range(count)]])

    @torch.no_grad()
    def batches(self, make: Callable[[int, int], Tensor]) -> Tensor:
        return torch.cat([make(first, min(BATCH, self.samples - first)) for first in range(0, self.samples, BATCH)])

    def students(self, sampler: Sampler, denoiser: Denoiser, seed: int) -> Tensor:
        def make(first: int, count: int) -> Tensor:
            return sampler.sample(
                denoiser,
                self.noise(seed, first, count, "initial"),
                lambda rung, like: self.noise(seed, first, count, f"rung {rung}")[..., : like.shape[2], :, :],
                self.text(first, count),
                self.negative,
            )

        return self.batches(make)

    def teachers(self, teacher: Denoiser, seed: int, guidance: float) -> Tensor:
        """By 40 Euler steps; kept on disk."""
        kept = self.cache / f"teacher-{self.samples}-guidance{guidance:g}-seed{seed}.safetensors"
        if not kept.is_file():
            sigmas = euler_sigmas(TEACHER_STEPS, TEACHER_SHIFT)
            latents = self.batches(
                lambda first, count: sample_euler(
                    teacher, self.noise(seed, first, count, "initial"), self.text(first, count), self.negative, sigmas,
                    guidance,
                )
            )  # fmt: skip
            write_through(kept, lambda path: save_file({"latents": latents}, path))
        return load_file(kept)["latents"]


def open_world(assembly: Assembly, samples: int, cache: Path) -> World:
    combinations = list(shapes.ALL_COMBINATIONS)
    embedded = assembly.embed([*(combination.caption for combination in combinations), assembly.negative_prompt])
    rows = torch.cat([embedded[combination.caption].rows_BLD for combination in combinations])
    shape = assembly.geometry.latent_shape(shapes.SIZE, shapes.SIZE, shapes.FRAMES)
    return World(rows, embedded[assembly.negative_prompt], shape, samples, cache)


def data_latents(assembly: Assembly, count: int) -> Tensor:
    """Clips that no run was trained on, encoded."""
    rng = np.random.default_rng(derive_seed("methods", "data") % 2**32)
    clips = [shapes.draw_clip(shapes.ALL_COMBINATIONS[i % len(shapes.ALL_COMBINATIONS)], rng) for i in range(count)]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return torch.cat([assembly.codec.encode(part) for part in pixels.split(32)])


def shown(assembly: Assembly, latents: Tensor, combinations: Sequence[shapes.Combination]) -> dict[str, float]:
    seen = []
    for part in latents.split(BATCH):
        pixels = assembly.codec.decode(part)
        frames = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
        seen += [measures.read_clip(clip) for clip in frames]
    rates = measures.obedience_of(seen, combinations)["all"]
    return {
        "obedience": rates["both"],
        "with_shape": rates["all_three"],
        "saturation": measures.mean_saturation(seen),
        "travel": measures.mean_travel(seen),
    }


# --- rows -----------------------------------------------------------------------------------------------------------


def measure(folder: Path, samples: int, seeds: int, cache: Path) -> dict[str, Any]:
    """All figures of one finished run; lists are over sampling seeds."""
    assembly = Assembly(open_run(folder), CPU)
    guidance = assembly.config.distillation.real_score_guidance_scale or 1.0
    world = open_world(assembly, samples, cache)
    data = data_latents(assembly, samples)
    rows: dict[str, list[Any]] = {}

    def note(**values: Any) -> None:
        for name, value in values.items():
            rows.setdefault(name, []).append(value)

    state = open_checkpoint(folder, "latest")
    fresh, _ = assembly.roles()
    saved = SavedStudent(assembly, state, raw=False)
    roles = saved.roles
    with saved.best(), evaluating(roles):
        for seed in range(seeds):
            reference = world.teachers(roles.teacher, 2 * seed, guidance)
            other = world.teachers(roles.teacher, 2 * seed + 1, guidance)
            student = world.students(assembly.student_sampler, assembly.sampled_student(roles), 2 * seed + 1)
            plain = world.students(*undistilled(assembly, fresh), 2 * seed + 1)
            note(
                distance=energy_distance(student, reference),
                undistilled=energy_distance(plain, reference),
                floor=energy_distance(other, reference),
                to_data=energy_distance(student, data),
                teacher_to_data=energy_distance(other, data),
            )
            for who, latents in (("student", student), ("teacher", other)):
                note(**{f"{who}_{name}": value for name, value in
                        shown(assembly, latents, world.combinations).items()})  # fmt: skip
        steps = assembly.student_sampler.forwards
    return {"steps": steps, **rows, **count_forwards(assembly, fresh, assembly.method(fresh))}


@contextmanager
def evaluating(roles: Roles) -> Iterator[None]:
    with roles.evaluating(), torch.no_grad():
        yield


def undistilled(assembly: Assembly, fresh: Roles) -> tuple[Sampler, Denoiser]:
    """The student's ladder and re-noising, walked by the teacher's weights over the whole clip at once; of a causal
    student without a ladder the same steps by a student that has not been trained."""
    sampler = assembly.student_sampler
    if not sampler.schedule.ladder:
        return sampler, assembly.sampled_student(fresh)
    return Sampler(sampler.schedule, sampler.renoise, sampler.steps, sampler.guidance), fresh.teacher


COLUMNS = (
    "method | steps | distance to the teacher | undistilled, same steps | gap closed | obedience | with shape | "
    "saturation | travel | distance to the data | minutes | forwards / update"
)


def line(title: str, row: dict[str, Any]) -> str:
    gap = [(u - d) / (u - f) for d, u, f in zip(row["distance"], row["undistilled"], row["floor"], strict=True)]

    def mean(key: str) -> float:
        return statistics.fmean(row[key])

    cells = [
        title,
        str(row["steps"]),
        spread(row["distance"], ".4f"),
        f"{mean('undistilled'):.4f}",
        f"{spread([100 * value for value in gap], '.0f')} %",
        f"{100 * mean('student_obedience'):.1f} %",
        f"{100 * mean('student_with_shape'):.1f} %",
        f"{100 * mean('student_saturation') / mean('teacher_saturation'):.0f} %",
        f"{100 * mean('student_travel') / mean('teacher_travel'):.0f} %",
        spread(row["to_data"], ".4f"),
        f"{row['minutes']:.1f}",
        f"{row['forwards']:.1f} ({row['backwards']:.1f} back)",
    ]
    return f"| {' | '.join(cells)} |"


def teacher_line(rows: dict[str, dict[str, Any]]) -> str:
    """Of the first row without guidance: the teacher itself, by all its steps."""
    row = next(iter(rows.values()))

    def mean(key: str) -> float:
        return statistics.fmean(row[key])

    cells = [
        "teacher",
        str(TEACHER_STEPS),
        f"{mean('floor'):.4f}",
        "",
        "100 %",
        f"{100 * mean('teacher_obedience'):.1f} %",
        f"{100 * mean('teacher_with_shape'):.1f} %",
        "100 %",
        "100 %",
        spread(row["teacher_to_data"], ".4f"),
        "",
        "",
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], form: str) -> str:
    text = format(statistics.fmean(values), form)
    return f"{text} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else text


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"| {COLUMNS} |", "|" + "---|" + "---:|" * (COLUMNS.count("|"))]
    return "\n".join([*lines, teacher_line(rows), *(line(RECIPES[name].title, row) for name, row in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/methods"), help="folder of runs, rows and table")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), help="these rows (default: all)")
    parser.add_argument("--samples", type=int, default=512, help="samples of each sampler and seed (512)")
    parser.add_argument("--seeds", type=int, default=2, help="sampling seeds (2)")
    parser.add_argument("--again", action="store_true", help="measure finished runs anew")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name, recipe in RECIPES.items():
        kept = options.out / "rows" / f"{name}.json"
        if name in (options.only or RECIPES) and (options.again or not kept.is_file()):
            if recipe.after is not None:
                train(recipe.after, RECIPES[recipe.after], options.out)
            train(name, recipe, options.out)
            began = time.perf_counter()
            figures = measure(options.out / name, options.samples, options.seeds, options.out / "teacher")
            row = {**figures, **(finished(options.out / name) or {}), "measuring_seconds": time.perf_counter() - began}
            write_json(kept, row)
            print(line(recipe.title, row), flush=True)
        if kept.is_file():
            rows[name] = json.loads(kept.read_text(encoding="utf-8"))
    text = table(rows)
    write_text(options.out / "table.md", text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
