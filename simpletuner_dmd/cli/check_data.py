"""The data part of `simpletuner check`: one table of what can be used, duplicates, and what the caches will cost."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpletuner_dmd.config import DatasetEntry, LoadedConfig, Problem, TrainConfig
    from simpletuner_dmd.data.buckets import LatentGeometry
    from simpletuner_dmd.data.plan import DataPlan
    from simpletuner_dmd.data.scan import DatasetScan

SHOWN = 20
LONGEST_NAME = 80
# Of the encoder of Wan 2.1's VAE per pixel of every frame, counted by torch.utils.flop_counter on 9 frames; 81 frames
# take 3% less per frame. tests/cli/test_check_data.py counts again.
VAE_FLOPS_PER_PIXEL = 5.19e6
# The part of a matrix product's speed that the encoder reaches: 34 of 45 GFLOP/s, 5 frames of 64 x 64 on one core of an
# AMD EPYC in fp32.
VAE_EFFICIENCY = 0.74
TEXT_WIDTH = 4096  # of UMT5-XXL
TOKENS_PER_WORD = 1.4
BYTES_PER_NUMBER = {"no": 4, "bf16": 2, "fp16": 2}
TIMED_CLIPS = 2


def geometry_of(loaded: LoadedConfig) -> LatentGeometry:
    """How the VAE of the flavour cuts a video, before anything of it is loaded."""
    from simpletuner_dmd.data.buckets import LatentGeometry
    from simpletuner_dmd.wan.flavours import published_config

    flavour = loaded.config.flavour
    vae, transformer = published_config(flavour, "vae"), published_config(flavour, "transformer")
    return LatentGeometry(
        channels=vae["z_dim"],
        spatial=vae["scale_factor_spatial"],
        temporal=vae["scale_factor_temporal"],
        patch=transformer["patch_size"][1],
    )


def folder_problem(entry: DatasetEntry, config: TrainConfig) -> Problem | None:
    """A dataset whose folder is missing or empty, and that no cache stands in for.

    Datasets from elsewhere are asked for when they are scanned.
    """
    from simpletuner_dmd.config import Problem
    from simpletuner_dmd.config.databackend import BUILTIN
    from simpletuner_dmd.data.manifest import stands_in

    if entry.type != "local" or entry.instance_data_dir in (None, BUILTIN) or stands_in(entry, config) is not None:
        return None
    folder = Path(entry.instance_data_dir)
    where = f'dataset "{entry.id}"'
    if not folder.exists():
        return Problem(where, "instance_data_dir", f"there is no {folder}", "correct the path, or put the files there")
    if folder.is_file():
        if entry.dataset_type == "prompts":
            return None
        return Problem(where, "instance_data_dir", f"{folder} is a file, not a folder", "name the folder it is in")
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        return Problem(where, "instance_data_dir", f"{folder} cannot be listed: {error.strerror}",
                       "check that you may read it")  # fmt: skip
    if empty:
        return Problem(where, "instance_data_dir", f"{folder} is empty", "put the files there")
    return None


def duplicates(scans: Sequence[DatasetScan]) -> list[list[str]]:
    """Usable files of the same bytes, within and across datasets. Only files of equal size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for scan in scans:
        if scan.settings.kind == "prompts":
            continue
        for path in {sample.path for sample in scan.usable if sample.path.is_file()}:  # or only its latents are left
            by_size[path.stat().st_size].append(path)
    groups: list[list[str]] = []
    for paths in by_size.values():
        if len(paths) < 2:
            continue
        by_content: dict[bytes, list[str]] = defaultdict(list)
        for path in sorted(paths):
            by_content[_content(path)].append(str(path))
        groups += [same for same in by_content.values() if len(same) > 1]
    return sorted(groups)


def _content(path: Path) -> bytes:
    digest = blake2b()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def cache_estimate(loaded: LoadedConfig, scans: Sequence[DatasetScan], all_latents: bool = False) -> dict[str, Any]:
    """Size and time of filling both caches from nothing, in bytes and seconds on this machine.

    The time of the latents is measured decoding plus the arithmetic of Wan 2.1's VAE at the measured speed of a matrix
    product; that of the text encoder is not counted. latent_bytes is 0 where no loss reads latents, unless
    `all_latents`.
    """
    from simpletuner_dmd.data.scan import VideoSample

    geometry = geometry_of(loaded)
    captions = {caption for scan in scans for sample in scan.usable for caption in sample.captions}
    most = loaded.config.tokenizer_max_length
    rows = sum(min(most, round(len(caption.split()) * TOKENS_PER_WORD) + 1) for caption in captions)
    samples = [sample for scan in scans for sample in scan.usable if isinstance(sample, VideoSample)]
    if not (all_latents or needs_latents(loaded)):
        samples = []
    numbers = sum(_count(geometry.latent_shape(s.crop.width, s.crop.height, s.frames)) for s in samples)
    pixels = sum(s.crop.width * s.crop.height * s.frames for s in samples)
    return {
        "text_bytes": rows * TEXT_WIDTH * BYTES_PER_NUMBER[loaded.config.mixed_precision],
        "captions": len(captions),
        "latent_bytes": numbers * 4,
        "clips": len(samples),
        "seconds": round(_decode_seconds(scans, pixels) + pixels * VAE_FLOPS_PER_PIXEL / _flops() / VAE_EFFICIENCY, 1)
        if samples
        else 0.0,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def needs_latents(loaded: LoadedConfig) -> bool:
    """Whether a loss of this run reads encoded videos."""
    config = loaded.config
    return config.distillation_config is None or config.distillation_config.needs_latents


def _decode_seconds(scans: Sequence[DatasetScan], pixels: int) -> float:
    """Time of decoding all clips, from that of the first of each dataset."""
    from simpletuner_dmd.data.findings import UnusableFile
    from simpletuner_dmd.data.scan import VideoSample
    from simpletuner_dmd.data.video import read_clip

    spent, read = 0.0, 0
    for scan in scans:
        for sample in [s for s in scan.usable if isinstance(s, VideoSample)][:TIMED_CLIPS]:
            start = time.perf_counter()
            try:
                clip = read_clip(sample.path, num_frames=sample.frames, framerate=scan.settings.framerate,
                                 frame_interval=scan.settings.frame_interval, crop=sample.crop)  # fmt: skip
            except UnusableFile:
                continue  # found while caching, and listed there
            spent, read = spent + time.perf_counter() - start, read + clip.shape[0] * clip.shape[1] * clip.shape[2]
    return spent * pixels / read if read else 0.0


def _flops() -> float:
    """Floating-point operations per second of a large fp32 matrix product on this machine's accelerator, or its CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    size, repeats = (1024, 4) if device == "cpu" else (8192, 8)
    factor = torch.ones(size, size, device=device)
    product = factor @ factor
    float(product[0, 0])  # waits for the device
    start = time.perf_counter()
    for _ in range(repeats):
        product = factor @ factor
    float(product[0, 0])
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def as_json(scans: Sequence[DatasetScan], plan: DataPlan, same: list[list[str]]) -> list[dict[str, Any]]:
    """The `data` block: one object per dataset."""
    planned = {dataset["id"]: dataset for dataset in plan.as_dict()["datasets"]}
    return [
        {
            "id": scan.entry.id,
            "type": scan.entry.type,
            "dataset_type": scan.entry.dataset_type,
            "folder": str(scan.settings.folder),
            "usable": len(scan.usable),
            "counts": scan.counts,
            "rejected": planned[scan.settings.id]["left_out"],
            "buckets": scan.buckets,
            "plan": planned[scan.settings.id]["buckets"],
            "notices": scan.notices,
            "duplicates": [group for group in same if any(str(s.path) in group for s in scan.usable)],
        }
        for scan in scans
    ]


def print_data(scans: Sequence[DatasetScan], plan: DataPlan, same: list[list[str]], cost: dict[str, Any]) -> None:
    """The table, what is left out with the fix of each kind, buckets, duplicates and the cost of the caches."""
    from simpletuner_dmd.data.findings import FIXES

    kinds = [kind for kind in FIXES if any(kind in scan.counts for scan in scans)]
    rows = [["dataset", "usable", *kinds]]
    rows += [[scan.settings.id, *(str(scan.counts.get(kind, 0)) for kind in ("usable", *kinds))] for scan in scans]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print("\nData:")
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    for scan in scans:
        for kind in kinds:
            _print_left_out(scan, kind)
    print("\nBuckets (width x height x frames):")
    for bucket in plan.buckets:
        line = f"{bucket.dataset}  {bucket.bucket}: {bucket.samples}"
        if bucket.repeats:
            line += f", {bucket.passes} per epoch"
        if bucket.cropped and max(bucket.cropped) > 0:
            mean = 100 * sum(bucket.cropped) / len(bucket.cropped)
            line += f", the crop removes {mean:.1f}% (at most {100 * max(bucket.cropped):.1f}%)"
        _say(line if bucket.takes_part else line + ", left out")
    notices = [*(f"{scan.settings.id}: {notice}" for scan in scans for notice in scan.notices), *plan.notices()]
    notices += [f"the same bytes: {', '.join(_short(path, scans) for path in group)}" for group in same[:SHOWN]]
    notices += [f"and {len(same) - SHOWN} more groups of the same bytes; --json lists all"] if same[SHOWN:] else []
    if notices:
        print("\nNotes on the data:")
    for notice in notices:
        _say(f"- {notice}")
    print()
    _say(f"Caches: {cost_in_words(cost)}", indent="")


def _print_left_out(scan: DatasetScan, kind: str) -> None:
    from simpletuner_dmd.data.findings import FIXES

    bad = [item for item in scan.rejected if item.kind == kind]
    if not bad:
        return
    print(f"\nLeft out of {scan.settings.id}: {kind} ({len(bad)}), in {scan.settings.folder}")
    for item in bad[:SHOWN]:
        _say(f"{_short(item.path, [scan])}: {item.reason.removeprefix(kind + ': ')}")
    if len(bad) > SHOWN:
        print(f"  and {len(bad) - SHOWN} more; --json lists all")
    _say(f"Fix: {FIXES[kind]}")


def _say(line: str, indent: str = "  ") -> None:
    """Prints a line that the terminal would break in the middle of words, and under its own beginning."""
    width = max(40, min(120, shutil.get_terminal_size((100, 24)).columns))
    print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent + "    ",
                        break_long_words=False, break_on_hyphens=False))  # fmt: skip


def _short(path: str | Path, scans: Sequence[DatasetScan]) -> str:
    """The path below its dataset's folder; the middle of a very long name is left out."""
    path = Path(path)
    folder = next((scan.settings.folder for scan in scans if path.is_relative_to(scan.settings.folder)), None)
    name = str(path.relative_to(folder)) if folder is not None and path != folder else str(path)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 24]}…{name[-20:]}"


def cost_in_words(cost: dict[str, Any]) -> str:
    """What `cache_estimate` found, in one line."""
    words = f"{cost['captions']} captions, about {_size(cost['text_bytes'])} before compression"
    if cost["clips"]:
        words += f"; latents of {cost['clips']} clips, about {_size(cost['latent_bytes'])} before compression"
        words += f" and {_duration(cost['seconds'])} on this machine"
    else:
        words += "; no loss reads latents, so no video is encoded"
    return words


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
