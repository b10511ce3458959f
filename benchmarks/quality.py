"""How close a distilled student of the demo came to its teacher.

    python benchmarks/quality.py --run output/demo

Draws the same prompts (all 32 captions in turn, so also those the demo kept out of its training set) with the same
noise from the teacher at 40 Euler steps, from the teacher at few, from the undistilled model on the student's own
ladder and re-noising, and from the exported student, loaded by stock diffusers. Then prints

- the energy distance of each set of latents to the teacher's 40-step samples (demo/measures.py), per seed and over
  seeds, and the share of the gap between the undistilled model and the noise floor that the student closed. The
  floor is the distance between two independent halves of the teacher's own samples. Every other set is made from the
  noise of the second half, so none shares noise with the reference and all differ from the floor by their sampler
  alone. Prompts that come in turn instead of at random make every figure, the floor too, smaller by the same amount:
  within a set a prompt meets itself once less than between two sets.
- what the decoded pixels of teacher and student show (first seed): obedience to the caption, saturation, travel.

`--guidance 3` compares with the teacher at guidance 3; the undistilled model stays without, as a student runs.
The teacher's samples are the slow part and are kept on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.run_options import DEMO
from simpletuner_dmd.demo import measures, shapes
from simpletuner_dmd.durable import write_json, write_through
from simpletuner_dmd.flow import Schedule, TextEmbedding, euler_sigmas, guidance_is_off, sample_euler, sample_few_step
from simpletuner_dmd.randomness import derive_seed, generator
from simpletuner_dmd.validation.measures import energy_distance
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.encoders import TextEncoder, VideoCodec
from simpletuner_dmd.wan.loading import Storage, load_transformer
from simpletuner_dmd.wan.sources import ModelSource

BATCH = 64
FEW_EULER_STEPS = (3, 4, 8)
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Prompts:
    """combinations: what each caption says, in turn; text_NLD: its embedding; negative: the unconditional one."""

    combinations: list[shapes.Combination]
    text_NLD: Tensor
    negative: TextEmbedding


@dataclass
class Bench:
    """A run, opened: its teacher, its exported student, and how each samples."""

    teacher: WanDenoiser
    student: WanDenoiser
    schedule: Schedule
    renoise: str
    teacher_shift: float
    teacher_key: str
    codec: VideoCodec
    prompts: Prompts
    latent_shape: tuple[int, int, int, int]
    guidance: float
    cache: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def noise(self, seed: int, first: int, count: int, purpose: str) -> Tensor:
        """[count, C, F, H, W], private to (seed, sample, purpose), so batches and counts do not change it."""
        draws = [generator(seed, "quality", index, purpose) for index in range(first, first + count)]
        return torch.stack([torch.randn(self.latent_shape, generator=draw) for draw in draws])

    def text(self, first: int, count: int) -> TextEmbedding:
        rows = [(first + index) % len(self.prompts.text_NLD) for index in range(count)]
        return TextEmbedding(self.prompts.text_NLD[rows])

    def combinations(self, first: int, count: int) -> list[shapes.Combination]:
        return [self.prompts.combinations[(first + i) % len(self.prompts.combinations)] for i in range(count)]


# --- opening a run --------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there", fix="give the output folder of a finished run as --run") from error


def open_run(run: Path, model: Path | None, guidance: float, cache: Path) -> Bench:
    """Loads teacher and student of the run in fp32; `model` replaces the pipeline folder that its config names."""
    resolved = read_json(run / "config.resolved.json")
    options = {key: entry["value"] if isinstance(entry, dict) and "value" in entry else entry
               for key, entry in resolved.items()}  # fmt: skip
    document = read_json(run / "export" / "distill.json")
    schedule = Schedule(shift=float(document["shift"]), ladder=tuple(document["ladder"]["sigmas"]))
    if not schedule.ladder:
        raise UserError("this export has no ladder: it was trained without distillation", file=str(run / "export"))
    source = model_source(options, model)
    recipe = options.get("distillation_config") or {}
    trained_guidance = float(recipe.get("real_score_guidance_scale", guidance) or 1.0)
    if trained_guidance != guidance:
        print(f"note: this student was trained for guidance {trained_guidance:g}, the teacher samples at {guidance:g}")
    student = load_student(source, run / "export", document)
    teacher = load_transformer(source, torch.float32).eval()
    codec = VideoCodec(source, device=DEVICE)
    encoder = TextEncoder(source, dtype=torch.float32, storage=Storage(),
                          max_length=int(options["tokenizer_max_length"]), device=DEVICE)  # fmt: skip
    scheduler = Path(source.base) / "scheduler" / "scheduler_config.json"
    shift = float(read_json(scheduler)["shift"])
    negative_prompt = str(recipe.get("negative_prompt") or "")
    parts = (source.fingerprint("transformer"), encoder.fingerprint, negative_prompt, shift)
    return Bench(
        teacher=WanDenoiser(teacher, None, None),
        student=WanDenoiser(student, None, None),
        schedule=schedule,
        renoise=str(document["renoise"]),
        teacher_shift=shift,
        teacher_key=f"{derive_seed(*map(str, parts)):016x}",
        codec=codec,
        prompts=embed_prompts(encoder, negative_prompt),
        latent_shape=latent_shape(codec, teacher),
        guidance=guidance,
        cache=cache,
    )


def model_source(options: dict[str, Any], model: Path | None) -> ModelSource:
    base = str(model) if model is not None else str(options["pretrained_model_name_or_path"])
    if base == DEMO:
        from simpletuner_dmd.demo.path import model_path

        base = str(model_path())
    if not Path(base).is_dir():
        raise UserError(f"the run's model {base!r} is not a folder", fix="this benchmark is for the demo; try --model")

    def part(name: str) -> str:
        own = options.get(f"pretrained_{name}_model_name_or_path")
        return base if own in (None, DEMO) or model is not None else str(own)

    return ModelSource(base=base, transformer=part("transformer"), vae=part("vae"), text_encoder=part("t5"))


def load_student(source: ModelSource, export: Path, document: dict[str, Any]) -> nn.Module:
    """The exported weights, as any user of diffusers loads them."""
    folder = export / "diffusers"
    if document["model_type"] == "full":
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32).eval()
    transformer: Any = load_transformer(source, torch.float32)
    file = export / next((name for name in document["adapter"]["files"] if name.startswith("diffusers/")), "missing")
    if not file.is_file():
        raise UserError(f"{file} is not there", fix="export the run in the diffusers format")
    transformer.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="transformer")
    # Keys that diffusers does not know are only a log line; then no adapter is active.
    if not getattr(transformer, "_hf_peft_config_loaded", False) or not transformer.active_adapters():
        raise UserError(f"diffusers found no adapter in {file}", fix="export the run again")
    return transformer.eval()


def embed_prompts(encoder: TextEncoder, negative_prompt: str) -> Prompts:
    combinations = list(shapes.ALL_COMBINATIONS)
    rows = encoder([*(combination.caption for combination in combinations), negative_prompt])
    text = torch.zeros(len(rows), encoder.max_length, rows[0].shape[1])
    for index, row in enumerate(rows):
        text[index, : len(row)] = row
    encoder.unload()
    return Prompts(combinations, text[:-1], TextEmbedding(text[-1:]))


def latent_shape(codec: VideoCodec, transformer: Any) -> tuple[int, int, int, int]:
    config = codec.vae.config
    side = shapes.SIZE // config.scale_factor_spatial
    return transformer.config.in_channels, (shapes.FRAMES - 1) // config.scale_factor_temporal + 1, side, side


# --- sampling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_batches(count: int, first: int, sample: Callable[[int, int], Tensor]) -> Tensor:
    """sample(first index, count) over batches, joined."""
    starts = range(first, first + count, BATCH)
    return torch.cat([sample(start, min(BATCH, first + count - start)) for start in starts])


def teacher_samples(bench: Bench, seed: int, first: int, count: int, steps: int) -> Tensor:
    """The teacher's Euler samples number first … first + count - 1 of a seed, from disk where they were made before."""
    name = f"{bench.teacher_key}-{steps}steps-guidance{bench.guidance:g}-seed{seed}-{first}-{count}.safetensors"
    kept = bench.cache / name
    if kept.is_file():
        return load_file(kept)["latents"]
    sigmas = euler_sigmas(steps, bench.teacher_shift)

    def sample(start: int, size: int) -> Tensor:
        noise = bench.noise(seed, start, size, "initial")
        text = bench.text(start, size)
        return sample_euler(bench.teacher, noise, text, bench.prompts.negative, sigmas, bench.guidance)

    latents = in_batches(count, first, sample)
    write_through(kept, lambda path: save_file({"latents": latents.contiguous()}, path))
    return latents


def few_step_samples(bench: Bench, denoiser: WanDenoiser, seed: int, first: int, count: int) -> Tensor:
    """Samples of a model on the student's ladder, with the student's re-noising."""

    def sample(start: int, size: int) -> Tensor:
        return sample_few_step(
            denoiser,
            bench.noise(seed, start, size, "initial"),
            bench.text(start, size),
            bench.schedule,
            bench.renoise,
            lambda rung, like: bench.noise(seed, start, size, f"rung {rung}"),
        )

    return in_batches(count, first, sample)


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One sampler's distances to the reference, one per seed; forwards: evaluations of the network per video."""

    name: str
    forwards: int
    distances: list[float]


def measure_distances(
    bench: Bench, samples: int, seeds: int, teacher_steps: int
) -> tuple[list[Row], dict[str, Tensor]]:
    """The rows of the table in its order, and the first seed's latents of teacher and student for `show_pixels`."""
    rows: dict[str, Row] = {}
    shown: dict[str, Tensor] = {}
    for seed in range(seeds):
        found, latents = measure_seed(bench, seed, samples, teacher_steps)
        shown = shown or latents
        for name, forwards, distance in found:
            rows.setdefault(name, Row(name, forwards, [])).distances.append(distance)
        print(f"seed {seed}: " + ", ".join(f"{name} {distance:.4f}" for name, _, distance in found), flush=True)
    return list(rows.values()), shown


def measure_seed(
    bench: Bench, seed: int, samples: int, teacher_steps: int
) -> tuple[list[tuple[str, int, float]], dict[str, Tensor]]:
    """((sampler, forwards, distance to the reference) of each sampler, latents of teacher and student)."""
    per_step = 1 if guidance_is_off(bench.guidance) else 2
    rungs = len(bench.schedule.ladder)
    with bench.timed("teacher"):
        reference = teacher_samples(bench, seed, 0, samples, teacher_steps)
        floor = teacher_samples(bench, seed, samples, samples, teacher_steps)
        euler = {steps: teacher_samples(bench, seed, samples, samples, steps) for steps in FEW_EULER_STEPS}
    with bench.timed("few-step"):
        undistilled = few_step_samples(bench, bench.teacher, seed, samples, samples)
        student = few_step_samples(bench, bench.student, seed, samples, samples)
    sets = [
        ("undistilled", rungs, undistilled),
        *((f"Euler {steps}", steps * per_step, latents) for steps, latents in euler.items()),
        ("student", rungs, student),
        ("floor", teacher_steps * per_step, floor),
    ]
    with bench.timed("distances"):
        found = [(name, forwards, energy_distance(latents, reference)) for name, forwards, latents in sets]
    return found, {"teacher": floor, "student": student}


def show_pixels(bench: Bench, shown: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Obedience, saturation and travel of each set of latents, decoded."""
    result: dict[str, dict[str, Any]] = {}
    for name, latents in shown.items():
        seen = []
        for part in latents.split(BATCH):
            pixels = bench.codec.decode(part)
            frames = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
            seen += [measures.read_clip(clip) for clip in frames]
        said = bench.combinations(len(latents), len(latents))  # the second half: prompts number N … 2N - 1
        result[name] = {
            "obedience": measures.obedience_of(seen, said),
            "saturation": measures.mean_saturation(seen),
            "travel": measures.mean_travel(seen),
        }
    return result


def gaps(rows: Sequence[Row], name: str) -> list[float]:
    """Gap closed by a row, per seed."""
    by_name = {row.name: row.distances for row in rows}
    each = zip(by_name[name], by_name["undistilled"], by_name["floor"], strict=True)
    return [(undistilled - own) / (undistilled - floor) for own, undistilled, floor in each]


# --- printing -------------------------------------------------------------------------------------------------------


def mean_spread(values: Sequence[float], form: str = ".4f") -> str:
    """ "mean ± standard deviation over seeds"; the mean alone of one value."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def distance_table(rows: Sequence[Row], ladder: str) -> str:
    words = {
        "undistilled": f"undistilled model, the student's ladder ({ladder})",
        "student": f"student ({ladder})",
        "floor": "teacher, all steps (floor)",
    }
    lines = ["| sampler | forwards | energy distance | gap closed |", "|---|---:|---:|---:|"]
    for row in rows:
        name = words.get(row.name, row.name.replace("Euler", "teacher, Euler"))
        closed = mean_spread([100 * gap for gap in gaps(rows, row.name)], ".1f")
        lines.append(f"| {name} | {row.forwards} | {mean_spread(row.distances)} | {closed} % |")
    return "\n".join(lines)


def versus_euler(rows: Sequence[Row]) -> str:
    """Per seed and with the same noise, so that the spread is that of the difference."""
    by_name = {row.name: row.distances for row in rows}
    parts = []
    for steps in FEW_EULER_STEPS:
        differences = [a - b for a, b in zip(by_name["student"], by_name[f"Euler {steps}"], strict=True)]
        parts.append(f"Euler {steps} {mean_spread(differences, '+.4f')}")
    return f"student minus teacher at few steps (below 0: the student is closer): {', '.join(parts)}"


def pixel_table(pixels: dict[str, dict[str, Any]]) -> str:
    """Teacher and student beside each other, and the student in percent of the teacher."""

    teacher, student = pixels["teacher"], pixels["student"]

    def line(name: str, of_teacher: float, of_student: float, form: str) -> str:
        share = f"{100 * of_student / of_teacher:.1f} %" if of_teacher else "–"
        return f"| {name} | {format(of_teacher, form)} | {format(of_student, form)} | {share} |"

    rates = [
        ("obedience (colour and direction)", "all", "both"),
        ("obedience, captions of the training set", "seen", "both"),
        ("obedience, captions held out", "held_out", "both"),
        ("colour", "all", "colour"),
        ("direction", "all", "direction"),
        ("shape", "all", "shape"),
        ("colour, direction and shape", "all", "all_three"),
    ]
    lines = ["| decoded pixels | teacher | student | student / teacher |", "|---|---:|---:|---:|"]
    for name, group, rate in rates:
        if group in teacher["obedience"]:
            of_teacher, of_student = (100 * side["obedience"][group][rate] for side in (teacher, student))
            lines.append(line(f"{name}, %", of_teacher, of_student, ".1f"))
    lines.append(line("saturation of the object", teacher["saturation"], student["saturation"], ".3f"))
    lines.append(line("travel of the object, pixels", teacher["travel"], student["travel"], ".1f"))
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, default=Path("output/demo"), help="output folder of a finished run")
    parser.add_argument("--samples", type=int, default=512, help="samples of each sampler and seed (512)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on (3)")
    parser.add_argument("--guidance", type=float, default=1.0, help="the teacher's guidance; 1 is off (1)")
    parser.add_argument("--teacher-steps", type=int, default=40, help="Euler steps of the reference samples (40)")
    parser.add_argument("--model", type=Path, help="pipeline folder of the teacher instead of the run's own")
    parser.add_argument("--cache", type=Path, help="folder of the teacher's samples (RUN/quality-cache)")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    if options.samples < 2 or options.seeds < 1 or options.teacher_steps < 1:
        parser.error("--samples must be at least 2, --seeds and --teacher-steps at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    try:
        bench = open_run(options.run, options.model, options.guidance, options.cache or options.run / "quality-cache")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows, shown = measure_distances(bench, options.samples, options.seeds, options.teacher_steps)
    with bench.timed("pixels"):
        pixels = show_pixels(bench, shown)
    taken = time.perf_counter() - began
    ladder = ", ".join(f"{timestep:.6g}" for timestep in bench.schedule.timesteps) + f"; {bench.renoise}"
    print(
        f"\n{options.samples} samples, {options.seeds} seeds (mean ± standard deviation), guidance {options.guidance:g}"
    )
    print(f"reference: the teacher at {options.teacher_steps} Euler steps, shift {bench.teacher_shift:g}\n")
    print(distance_table(rows, ladder), versus_euler(rows), pixel_table(pixels), sep="\n\n")
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in bench.seconds.items())
    print(f"\ntook {taken:.0f} s ({stages}) on {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.json:
        document = {
            "run": str(options.run), "samples": options.samples, "seeds": options.seeds, "guidance": options.guidance,
            "teacher_steps": options.teacher_steps, "teacher_shift": bench.teacher_shift, "renoise": bench.renoise,
            "ladder": list(bench.schedule.timesteps),
            "distances": {row.name: row.distances for row in rows},
            "gap_closed": {row.name: gaps(rows, row.name) for row in rows},
            "pixels": pixels, "seconds": {"total": taken, **bench.seconds},
        }  # fmt: skip
        write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
