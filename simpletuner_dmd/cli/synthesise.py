"""`simpletuner synthesise`: training data made by the teacher from a list of prompts.

The folder it writes is a `video` dataset: mp4 files with captions beside them, or, with --latents, latents in the form
of the cache, which train without a video ever being decoded or encoded. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_dmd.cli.common import LAUNCHED, add_config_arguments, arguments_again, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.config import LoadedConfig
    from simpletuner_dmd.data.scan import DatasetScan, PromptSample
    from simpletuner_dmd.data.store import LatentStore
    from simpletuner_dmd.flow import Denoiser
    from simpletuner_dmd.validation.sampling import Sampler

RECORD = ".synthesised.json"  # hidden, so that the folder holds nothing but videos and captions to those who list it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a .txt or .jsonl file of prompts")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the data goes")
    parser.add_argument("--latents", action="store_true", help="latents in the form of the cache instead of videos")
    parser.add_argument(
        "--handover", action="store_true",
        help="latents that the high-noise expert hands over, by the student of other_expert_run: what the low-noise "
        "one of t2v-14b-2.2 is trained from",
    )  # fmt: skip
    parser.add_argument("--size", metavar="WxH", help="default: the configuration's first validation_resolution")
    parser.add_argument("--frames", type=int, help="default: the configuration's validation_num_video_frames")
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="videos per prompt; default: 1")
    parser.add_argument("--batch", type=int, metavar="N", help="videos made at once; default: train_batch_size")
    parser.add_argument("--from-seed", type=int, default=42, metavar="SEED", help="what the seeds are derived from")
    add_config_arguments(parser)


@dataclass(frozen=True)
class Item:
    """One video to be made. name: of its files, without suffix. key: its entry among the latents, and its claim."""

    prompt: str
    seed: int
    name: str
    key: str


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every video is there; 2 for a person's mistake."""
    loaded = load_config(args)
    launched = LAUNCHED in os.environ
    if loaded.config.num_processes > 1 and not launched:
        from simpletuner_dmd.training.launch import launch

        return launch(loaded.config.num_processes, arguments_again("synthesise", args, _flags(args)), {LAUNCHED: "1"})
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.training.launch import end_with_mistake

    try:
        made, total = _synthesise(loaded, args)
    except UserError as error:
        if not launched:
            raise
        return end_with_mistake(str(error))
    kind = "latents" if args.latents else "videos"
    print(f"{args.out}: {total} {kind}, {made} made by this process; seeds and settings in {args.out / RECORD}")
    return 0


def _flags(args: argparse.Namespace) -> list[str]:
    flags = ["--prompts", str(args.prompts), "--out", str(args.out), "--per-prompt", str(args.per_prompt)]
    flags += ["--from-seed", str(args.from_seed), *(["--latents"] if args.latents else [])]
    flags += ["--handover"] if args.handover else []
    flags += ["--size", args.size] if args.size else []
    flags += ["--batch", str(args.batch)] if args.batch is not None else []
    return flags + (["--frames", str(args.frames)] if args.frames else [])


def _synthesise(loaded: LoadedConfig, args: argparse.Namespace) -> tuple[int, int]:
    """(how many this process made, how many there are)."""
    from accelerate import Accelerator
    from torch import cuda

    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.cli.common import quiet_libraries
    from simpletuner_dmd.data.encode import cache_text
    from simpletuner_dmd.data.settings import text_cache
    from simpletuner_dmd.data.store import LatentStore
    from simpletuner_dmd.data.text_store import TextStore

    quiet_libraries()
    config = loaded.config
    assembly = Assembly(loaded, Accelerator(cpu=not cuda.is_available()).device)
    if args.handover:
        _check_handover(assembly, args)
    scan = _prompts(assembly, args)
    items = _items(assembly, scan, args)
    store = LatentStore(args.out, config.compress_disk_cache) if args.latents else None
    if not (missing := [item for item in items if not _is_there(item, args.out, store)]):
        _finish(assembly, scan, items, args.out, store)
        return 0, len(items)
    folder, write_batch = text_cache([*loaded.datasets, loaded.text_embeds], config)
    text = TextStore(folder, config.compress_disk_cache)
    encoder = assembly.text_encoder
    cache_text(
        text, [assembly.negative_prompt, *(item.prompt for item in items)], encoder.fingerprint, encoder,
        write_batch=write_batch, max_rows=config.tokenizer_max_length, progress=True,
    )  # fmt: skip
    encoder.unload()
    made = _make(assembly, scan, missing, text, args, store)
    _finish(assembly, scan, items, args.out, store)
    return made, len(items)


def _check_handover(assembly: Assembly, args: argparse.Namespace) -> None:
    """Raises UserError where there is no high-noise student to hand over, or nothing to hand over in."""
    from simpletuner_dmd.config import UserError

    if assembly.config.flavour.expert != "low":
        raise UserError(f"--handover: found {assembly.config.model_flavour}, to which nobody hands over",
                        key="model_flavour", fix='use the configuration of the "t2v-14b-2.2-low" run')  # fmt: skip
    if assembly.partner is None:
        raise UserError("--handover needs a finished run of the high-noise expert", key="other_expert_run",
                        fix="name that run's output folder")  # fmt: skip
    if not args.latents or not assembly.schedule.ladder:
        raise UserError("--handover makes latents for a student with a ladder", key="--handover",
                        fix="add --latents, and train with dmd")  # fmt: skip


def _prompts(assembly: Assembly, args: argparse.Namespace) -> DatasetScan:
    """The prompts of the file, with the size of their videos. Raises UserError."""
    from simpletuner_dmd.config import DatasetEntry, UserError
    from simpletuner_dmd.config.coerce import frame_size
    from simpletuner_dmd.data.scan import scan

    config = assembly.config
    if args.per_prompt < 1:
        raise UserError(f"--per-prompt {args.per_prompt}: nothing would be made", fix="write 1 or more")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: nothing would be made", fix="write 1 or more")
    try:
        size = frame_size(args.size) if args.size else config.validation_resolution[0]
    except ValueError as error:
        raise UserError(f"--size {args.size}: {error}", fix="write WIDTHxHEIGHT, for example 832x480") from error
    width, height = assembly.fitting(*size)
    entry = DatasetEntry(
        id=args.out.name or "synthetic",
        dataset_type="prompts",
        instance_data_dir=str(args.prompts),
        resolution=f"{width}x{height}",
        video={"num_frames": args.frames or config.validation_num_video_frames[0]},
    )
    return scan(entry, config, geometry=assembly.geometry)


def _settings(assembly: Assembly, scan: DatasetScan) -> dict[str, Any]:
    """Everything that decides what a prompt and a seed become."""
    config, sampler = assembly.config, assembly.teacher_sampler
    first: PromptSample = scan.usable[0]  # type: ignore[assignment]
    return {
        "model": assembly.source.fingerprint("transformer"),
        "model_name": config.pretrained_model_name_or_path,
        "precision": [config.mixed_precision, config.base_model_precision],
        "vae": assembly.codec.fingerprint,
        "text_encoder": assembly.text_encoder.fingerprint,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "shift": sampler.schedule.shift,
        "negative_prompt": assembly.negative_prompt,
        "size": [first.width, first.height, first.frames],
        "framerate": config.framerate,
    }


def _items(assembly: Assembly, scan: DatasetScan, args: argparse.Namespace) -> list[Item]:
    """What is to be made, recorded in the folder first. Raises UserError where the folder holds something else.

    Names and seeds follow from the prompt, so a longer or reordered file adds to what is there.
    """
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.data.disk import digest, explained
    from simpletuner_dmd.data.store import latent_key
    from simpletuner_dmd.durable import write_json
    from simpletuner_dmd.randomness import derive_seed

    settings = {"kind": "latents" if args.latents else "videos", **_settings(assembly, scan)}
    if args.handover:
        settings |= _handover_settings(assembly)
    items = []
    for prompt in dict.fromkeys(sample.captions[0] for sample in scan.usable):
        for copy in range(args.per_prompt):
            seed = derive_seed(args.from_seed, "synthesise", prompt, copy) % 2**31
            words = re.sub(r"[^\w]+", "-", prompt)[:40].strip("-")
            key = latent_key(f"synthesised:{prompt}:{seed}", settings, assembly.codec.fingerprint)
            items.append(Item(prompt, seed, f"{words}-{digest(prompt)[:8]}-seed{seed}", key))
    record, former = args.out / RECORD, {}
    if record.is_file():
        former = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if former["settings"].get(name) != value]
        if changed:
            raise UserError(f"{args.out} holds data made with other settings: {', '.join(changed)}",
                            fix="name another --out folder, or go on with the settings in its " + RECORD)  # fmt: skip
    samples = {row["name"]: row for row in former.get("samples", [])}
    samples |= {item.name: {"name": item.name, "seed": item.seed, "prompt": item.prompt} for item in items}
    if not former or len(samples) > len(former["samples"]):
        with explained(record):
            write_json(record, {"settings": settings, "samples": list(samples.values())})
    return items


def _handover_settings(assembly: Assembly) -> dict[str, Any]:
    """What decides the latents that are handed over: the student's weights and its steps, not the teacher's."""
    from simpletuner_dmd.durable import sha256_of

    assert assembly.partner is not None
    files = sorted(assembly.partner.folder.rglob("*.safetensors"))
    high = assembly.source.other_expert("transformer")
    return {
        "model": high.fingerprint("transformer"),
        "kind": "handover",
        "student": [sha256_of(file) for file in files],
        "ladder": list(assembly.schedule.timesteps),
        "steps": len(assembly.schedule.ladder), "guidance": 1.0,
    }  # fmt: skip


def _is_there(item: Item, out: Path, store: LatentStore | None) -> bool:
    return (out / f"{item.name}.mp4").is_file() if store is None else store.has(item.key)


def _make(
    assembly: Assembly, scan: DatasetScan, items: list[Item], text: Any, args: argparse.Namespace,
    store: LatentStore | None,
) -> int:  # fmt: skip
    """Renders what nobody else has made; returns how many."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

    from simpletuner_dmd.data.sharing import Claims, share_out

    out: Path = args.out

    def missing(some: list[Item]) -> list[Item]:
        return [item for item in some if not _is_there(item, out, store)]

    made, render = 0, _renderer(assembly, scan, text, args.handover)
    at_once = args.batch or assembly.config.train_batch_size
    with Claims(out, ".claims") as claims, tqdm(total=len(items), desc="synthesise", unit="video") as bar:
        for batch in share_out(items, lambda item: item.key, missing, claims, at_once):
            for item, latents_CFHW in zip(batch or [], render(batch) if batch else [], strict=True):
                _write(assembly, item, latents_CFHW, out, store)
                claims.give_back([item.key])
                made += 1
                bar.update()
    if store is not None:
        store.flush()
    return made


def _renderer(assembly: Assembly, scan: DatasetScan, text: Any, handover: bool) -> Callable[[list[Item]], Tensor]:
    """items -> normalised latents [B, C, F, H, W] by the teacher's own steps and guidance; with handover by the
    high-noise student's steps, its last clean prediction.

    The noise of each follows from its seed alone, so a batch changes nothing but the order of sums in floating point.
    """
    import torch

    from simpletuner_dmd.data.text_store import text_key
    from simpletuner_dmd.flow import TextEmbedding
    from simpletuner_dmd.validation.sampling import reference_noise

    maker, sampler = _handing_over(assembly) if handover else (_teacher(assembly), assembly.teacher_sampler)
    first: PromptSample = scan.usable[0]  # type: ignore[assignment]
    shape = assembly.geometry.latent_shape(first.width, first.height, first.frames)
    fingerprint, length = assembly.text_encoder.fingerprint, assembly.config.tokenizer_max_length

    def embedded(prompts: list[str]) -> TextEmbedding:
        rows = [text.load(text_key(prompt, fingerprint)) for prompt in prompts]
        padded = torch.zeros(len(rows), length, rows[0].shape[1])
        for place, rows_LD in zip(padded, rows, strict=True):
            place[: len(rows_LD)] = rows_LD
        return TextEmbedding(padded).to(assembly.device)

    negative = embedded([assembly.negative_prompt])

    def render(items: list[Item]) -> Tensor:
        draws = [reference_noise(item.seed, (1, *shape), assembly.device) for item in items]
        latents: Tensor = sampler.sample(
            maker,
            torch.cat([noise for noise, _ in draws]),
            lambda rung, like: torch.cat([fresh(rung, like[:1]) for _, fresh in draws]),
            embedded([item.prompt for item in items]),
            negative.expand(len(items)),
        )
        return latents.cpu()

    return render


def _teacher(assembly: Assembly) -> Denoiser:
    """The teacher, with both of its experts where it has two."""
    from simpletuner_dmd.cli.other_expert import load_other, paired
    from simpletuner_dmd.wan.attention import choose_attention
    from simpletuner_dmd.wan.denoiser import WanDenoiser

    network = assembly.base_transformer(swapped=True).eval()
    choose_attention(network, assembly.config.attention_mechanism, assembly.device)
    own = WanDenoiser(network, None, None)
    return own if assembly.config.flavour.expert is None else paired(assembly, own, load_other(assembly, None))


def _handing_over(assembly: Assembly) -> tuple[Denoiser, Sampler]:
    """The high-noise student, and its part of the ladder."""
    from simpletuner_dmd.cli.other_expert import load_other
    from simpletuner_dmd.flow import Schedule
    from simpletuner_dmd.validation.sampling import Sampler

    schedule = assembly.schedule
    ladder = tuple(sigma for sigma in schedule.ladder if sigma not in assembly.known_noise)
    own = Sampler(Schedule(schedule.shift, ladder), assembly.config.distillation.transition)
    return load_other(assembly, assembly.partner), own


def _write(assembly: Assembly, item: Item, latents_CFHW: Tensor, out: Path, store: LatentStore | None) -> None:
    """The caption first, the video last: a video that is there has its caption."""
    from simpletuner_dmd.data.disk import explained
    from simpletuner_dmd.data.video import write_mp4
    from simpletuner_dmd.durable import write_text
    from simpletuner_dmd.validation.render import to_frames

    if store is not None:
        store.save(item.key, latents_CFHW, {"prompt": item.prompt, "seed": str(item.seed)})
        return
    path = out / f"{item.name}.mp4"
    with explained(path):
        write_text(path.with_suffix(".txt"), item.prompt + "\n")
        write_mp4(path, to_frames(assembly.codec.decode(latents_CFHW[None])[0]), assembly.config.framerate)


def _finish(assembly: Assembly, scan: DatasetScan, items: list[Item], out: Path, store: LatentStore | None) -> None:
    """Latents: the manifest that makes the folder a dataset of these prompts."""
    if store is None:
        return
    from simpletuner_dmd.data.manifest import MADE_HERE, write_manifest

    write_manifest(out / MADE_HERE, list(_clips(assembly, scan, items, out)), assembly.codec.fingerprint, None)


def _clips(assembly: Assembly, scan: DatasetScan, items: list[Item], out: Path) -> Iterator[Any]:
    from simpletuner_dmd.data.buckets import CropPlan
    from simpletuner_dmd.data.encode import Clip
    from simpletuner_dmd.data.scan import VideoSample
    from simpletuner_dmd.data.video import VideoInfo

    first: PromptSample = scan.usable[0]  # type: ignore[assignment]
    rate = assembly.config.framerate
    info = VideoInfo(first.width, first.height, first.frames, rate, first.frames / rate, 0)
    crop = CropPlan(first.width, first.height, first.width, first.height, 0, 0)
    for item in items:
        sample = VideoSample(scan.settings.id, out / item.name, (item.prompt,), info, crop, first.frames)
        yield Clip(sample, scan.settings, item.key)
