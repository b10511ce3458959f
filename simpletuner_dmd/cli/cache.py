"""`simpletuner cache`: fills the caches that a run would need, and `cache inspect` shows what is in them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_dmd.cli.common import LAUNCHED, add_config_arguments, arguments_again, load_config

if TYPE_CHECKING:
    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.config import LoadedConfig
    from simpletuner_dmd.data.encode import Clip
    from simpletuner_dmd.data.prepare import Caches
    from simpletuner_dmd.data.store import LatentStore

INSPECT = "inspect"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Any other word is an override of an option (KEY=VALUE), so the choice is made in `run`.
    parser.add_argument("action", nargs="?", metavar="inspect", help="write a video and a caption per cached sample")
    parser.add_argument("--all", action="store_true", help="also latents of videos that no loss of this run reads")
    parser.add_argument("--out", type=Path, help="inspect: folder for the videos; default: OUTPUT_DIR/cache-inspect")
    parser.add_argument("--limit", type=int, metavar="N", help="inspect: only the first N samples of each dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON document: estimate, text, datasets, …")
    add_config_arguments(parser)
    parser.usage = str(parser.usage).replace(parser.prog, f"{parser.prog} [inspect]", 1)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when everything is cached, or written; 2 for a person's mistake."""
    if args.action not in (None, INSPECT):
        if "=" not in args.action:
            from simpletuner_dmd.config import UserError

            raise UserError(
                f"`simpletuner cache` cannot {args.action!r}",
                fix="write `simpletuner cache` to fill the caches, or `simpletuner cache inspect` to look into them",
            )
        args.overrides, args.action = [args.action, *args.overrides], None
    with redirect_stdout(sys.stderr) if args.json else nullcontext():  # only the document goes to stdout
        loaded = load_config(args)
        document = _inspect(loaded, args) if args.action == INSPECT else _fill(loaded, args)
    if isinstance(document, int):
        return document
    if args.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    return 0


# --- filling ----------------------------------------------------------------------------------------------------------


def _fill(loaded: LoadedConfig, args: argparse.Namespace) -> dict[str, Any] | int:
    """The document of `--json`; an exit code where this is one of several processes, or one of those failed."""
    launched, began, estimate = LAUNCHED in os.environ, time.perf_counter(), None
    if not launched:
        from simpletuner_dmd.cli.train import examine_run

        examine_run(loaded)
        estimate = _estimate(loaded, args.all)
        if loaded.config.num_processes > 1:
            from simpletuner_dmd.training.launch import launch

            flags = ["--all"] if args.all else []
            code = launch(loaded.config.num_processes, arguments_again("cache", args, flags), {LAUNCHED: "1"})
            if code:
                return code
            # Everything is there now: what follows only reads it, and says so.
    from accelerate import Accelerator
    from torch import cuda

    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.cli.common import quiet_libraries
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.training.launch import end_with_mistake

    quiet_libraries()
    accelerator = Accelerator(cpu=not cuda.is_available())
    main = bool(accelerator.is_main_process)
    assembly = Assembly(loaded, accelerator.device)
    prompts = [] if loaded.config.validation_disable else list(loaded.validation_prompts.values())
    try:
        caches = assembly.caches(prompts, latents=args.all or assembly.needs_latents, main=main, progress=main)
    except UserError as error:
        if not launched:
            raise
        return end_with_mistake(str(error))
    if launched:
        return 0
    document = {"estimate": estimate, **_document(caches, time.perf_counter() - began)}
    _say(document)
    return document


def _estimate(loaded: LoadedConfig, all_latents: bool) -> dict[str, Any]:
    """Size and time of caches filled from nothing, said before anything is spent. Raises UserError."""
    from simpletuner_dmd.cli.check_data import cache_estimate, cost_in_words, geometry_of
    from simpletuner_dmd.data.prepare import look_at_dataset

    scans = [look_at_dataset(entry, loaded.config, geometry_of(loaded)) for entry in loaded.datasets]
    cost = cache_estimate(loaded, scans, all_latents)
    print(f"From nothing: {cost_in_words(cost)}; what is cached already is kept.", flush=True)
    return cost


def _document(caches: Caches, seconds: float) -> dict[str, Any]:
    return {
        "text": {
            "folder": str(caches.text_store.folder),
            "prompts": caches.prompts,
            "encoded": caches.prompts_made,
            "bytes": caches.text_store.bytes_on_disk,
        },
        "datasets": [
            {
                "id": scan.settings.id,
                "usable": len(scan.usable),
                "left_out": [{"path": str(item.path), "reason": item.reason} for item in scan.rejected],
                "latents": len(caches.clips.get(scan.settings.id, [])),
                "folder": str(store.folder) if (store := caches.latent_stores.get(scan.settings.id)) else None,
                "notices": scan.notices,
            }
            for scan in caches.scans
        ],
        "latents_encoded": caches.latents_made,
        "findings": caches.findings,
        "seconds": round(seconds, 3),
    }


def _say(document: dict[str, Any]) -> None:
    text = document["text"]
    size = f"{text['bytes'] / 1e6:.1f} MB"
    print(f"text: {text['prompts']} prompts, {text['encoded']} encoded by this process; {text['folder']} holds {size}")
    for dataset in document["datasets"]:
        cached = f"{dataset['latents']} cached in {dataset['folder']}" if dataset["folder"] else "no latents needed"
        print(f"{dataset['id']}: {dataset['usable']} usable, {len(dataset['left_out'])} left out; {cached}")
        for item in dataset["left_out"]:
            print(f"  left out: {item['path']}: {item['reason']}")
        for notice in dataset["notices"]:
            print(f"  note: {notice}")
    for finding in document["findings"]:
        print(f"warning: {finding}")
    print(f"{document['latents_encoded']} videos encoded by this process; done in {document['seconds']:.1f} s")


# --- looking ----------------------------------------------------------------------------------------------------------


def _inspect(loaded: LoadedConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Writes each cached sample as OUT/DATASET/NAME.mp4 with its captions in NAME.txt."""
    from accelerate import Accelerator
    from torch import cuda

    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.cli.common import quiet_libraries
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.data.video import write_mp4
    from simpletuner_dmd.durable import write_text
    from simpletuner_dmd.validation.render import to_frames

    quiet_libraries()
    assembly = Assembly(loaded, Accelerator(cpu=not cuda.is_available()).device)
    out = args.out or Path(loaded.config.output_dir).expanduser() / "cache-inspect"
    written: list[str] = []
    for store, clips in _cached(assembly):
        for number, clip in enumerate(clips[: args.limit]):
            if not store.has(clip.key):
                continue
            path = out / clip.settings.id / f"{number:05d}-{_plain_name(clip.sample.path.stem)}.mp4"
            frames_THWC = to_frames(assembly.codec.decode(store.load(clip.key)[None])[0])
            write_mp4(path, frames_THWC, clip.settings.framerate / clip.settings.frame_interval)
            write_text(path.with_suffix(".txt"), "\n".join(clip.sample.captions) + "\n")
            print(path)
            written.append(str(path))
    if not written:
        raise UserError("nothing is cached yet that could be shown",
                        fix="run `simpletuner cache --all` with the same configuration")  # fmt: skip
    return {"written": written}


def _cached(assembly: Assembly) -> Iterator[tuple[LatentStore, list[Clip]]]:
    """(latents, samples) of each dataset, as the manifests of the caches name them."""
    from simpletuner_dmd.data.manifest import MADE_HERE, manifest_path, restore, stands_in
    from simpletuner_dmd.data.settings import resolve
    from simpletuner_dmd.data.store import LatentStore

    config, geometry = assembly.config, assembly.geometry
    for entry in assembly.loaded.datasets:
        if entry.dataset_type not in ("video", "image") or entry.disabled:
            continue
        settings = resolve(entry, config, geometry)
        # Of a dataset from elsewhere nothing need be asked: both are the same file.
        manifest = (stands_in(entry, config) if entry.type == "local" else None) or manifest_path(settings)
        if manifest.is_file():
            place = settings.folder if manifest.name == MADE_HERE else settings.vae_cache
            clips = restore(manifest, entry, config, geometry, assembly.codec.fingerprint)[1]
            yield LatentStore(place, config.compress_disk_cache), clips


def _plain_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:80] or "sample"
