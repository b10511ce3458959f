"""The data of a draft: what a folder or a file holds, the entry of multidatabackend.json for it, and its shape."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.config.databackend import BUILTIN, DatasetEntry
from simpletuner_dmd.config.datasets import complete, needs_videos, read_entries
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.flavours import flavour_of
from simpletuner_dmd.config.load import LoadedConfig, resolve_path
from simpletuner_dmd.config.prompts import BUILT_IN
from simpletuner_dmd.config.run_options import DEMO
from simpletuner_dmd.config.schema import TrainConfig, frames_4n1

VIDEOS = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".gif"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff"}
TEXTS = {".txt", ".jsonl", ".csv", ".parquet"}
SHAPE = re.compile(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*[xX×]\s*(\d+)\s*")
OWN_PROMPTS = 3
LOOKED_AT = 2000
NEAR = 1e-6


@dataclass
class Found:
    """What is at a place. kind: a dataset_type. captions: some of them, for the validation prompts."""

    kind: str
    lines: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


def kind_of(place: str, folders: tuple[Path, ...]) -> str:
    """The dataset_type that fits what is at a place. Raises UserError if there is nothing that can be used."""
    if place in (BUILTIN, DEMO):
        return "prompts"
    path = resolve_path(place, folders)
    if path.is_file():
        if path.suffix.lower() in TEXTS:
            return "prompts"
        raise UserError(f"{place} is a {path.suffix or 'file'}", fix="name a folder of videos, or a .txt, .jsonl, .csv "
                        "or .parquet file of prompts")  # fmt: skip
    if not path.is_dir():
        raise UserError(
            f"there is no {place}", fix="check the path; `builtin` means the prompts that come with the tool"
        )
    endings = set()
    for number, file in enumerate(path.rglob("*")):
        endings.add(file.suffix.lower())
        if endings & VIDEOS:
            return "video"
        if number > LOOKED_AT:
            break
    if endings & PICTURES:
        return "image"
    if endings & TEXTS:
        return "prompts"
    raise UserError(f"{place} has no videos and no prompts", fix="name a folder with .mp4 files, or a file of prompts")


def entry_of(draft: Draft) -> dict[str, Any] | None:
    """The first dataset to train on; None if there is none yet."""
    return next((one for one in draft.datasets if one.get("dataset_type", "video") != "text_embeds"), None)


def set_data(draft: Draft, place: str) -> Found:
    """Makes a place the draft's data. Raises UserError if it cannot be, and changes nothing then."""
    kind = "video" if place == DEMO and learns_from_videos(draft.options) else kind_of(place, draft.folders)
    if kind == "prompts" and (misfit := _misfit(draft.options)):
        raise UserError(misfit)
    size, frames = shape(draft)
    entry = entry_of(draft)
    if entry is None:
        entry = {"id": "training"}
        draft.datasets.insert(0, entry)
    if entry.get("instance_data_dir") != place or entry.get("dataset_type", "video") != kind:
        entry.update({"dataset_type": kind, "instance_data_dir": place})
        if kind == "video" and entry.get("caption_strategy") is None:
            entry["caption_strategy"] = "textfile"
    set_shape(draft, size, frames)
    return look(draft)


def _misfit(config: TrainConfig) -> str:
    problems: list[Problem] = needs_videos(config, [DatasetEntry(dataset_type="prompts")], "")
    return "" if not problems else f"{problems[0].message}: name a folder of videos"


def learns_from_videos(config: TrainConfig) -> bool:
    """Whether prompts alone are not enough for the method."""
    return bool(_misfit(config))


def default_place(draft: Draft) -> str:
    """What is offered where nothing is known yet."""
    entry = entry_of(draft)
    if entry is not None and isinstance(entry.get("instance_data_dir"), str):
        return str(entry["instance_data_dir"])
    if draft.is_demo:
        return DEMO
    return "datasets/my-videos" if learns_from_videos(draft.options) else BUILTIN


def set_converted(draft: Draft, datasets: list[dict[str, Any]] | None, prompts: str | None) -> None:
    """The data of another tool's configuration: its entries, or its file of prompts, at the size it validates at."""
    if datasets is not None:
        draft.datasets = datasets
        return
    options = draft.options
    width, height = options.validation_resolution[0]
    if prompts is not None:
        draft.datasets = [{"id": "training", "dataset_type": "prompts", "instance_data_dir": prompts,
                           "resolution": f"{width}x{height}",
                           "video": {"num_frames": frames_4n1(options.validation_num_video_frames[0])}}]  # fmt: skip


# --- its shape --------------------------------------------------------------------------------------------------------


def shape(draft: Draft) -> tuple[str, int]:
    """(width x height, frames) of the training videos: what the data file says, else what validation renders."""
    entry, options = entry_of(draft) or {}, draft.options
    size, frames = "x".join(map(str, options.validation_resolution[0])), options.validation_num_video_frames[0]
    video = entry.get("video")
    if isinstance(video, dict) and isinstance(video.get("num_frames"), int):
        frames = frames_4n1(video["num_frames"])
    if isinstance(entry.get("resolution"), str):
        size = entry["resolution"]
    return size, frames


def shape_problem(draft: Draft, text: str) -> str:
    """What is wrong with "832x480x81", in a line; "" where it can be made."""
    match = SHAPE.fullmatch(text)
    if not match:
        return "write WIDTHxHEIGHTxFRAMES, for example 832x480x81"
    width, height, frames = map(int, match.groups())
    multiple = flavour_of(draft.options.model_flavour).size_multiple
    if width % multiple or height % multiple or not (width and height):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        return f"this model's sizes are multiples of {multiple}: {near}x{frames}"
    if frames < 1 or frames != frames_4n1(frames):
        return f"Wan takes 4n+1 frames: {width}x{height}x{max(1, frames_4n1(frames))}"
    return ""


def split_shape(text: str) -> tuple[str, int]:
    """ "832x480x81" -> ("832x480", 81). Only of a text without `shape_problem`."""
    match = SHAPE.fullmatch(text)
    assert match is not None, "checked before"
    return f"{match[1]}x{match[2]}", int(match[3])


def set_shape(draft: Draft, size: str, frames: int) -> None:
    """Training, validation and rollout all at one size and length."""
    draft.set("validation_resolution", size)
    draft.set("validation_num_video_frames", frames)
    key, latent = "distillation_config.num_training_frames", (frames - 1) // 4 + 1
    settings = draft.options.distillation_config
    if settings is not None and (latent > settings.num_training_frames or draft.has(key)):
        draft.set(key, latent)
    entry = entry_of(draft)
    if entry is None:
        return
    kind = entry.get("dataset_type", "video")
    video = entry.get("video")
    if kind != "image":
        entry["video"] = {**(video if isinstance(video, dict) else {}), "num_frames": frames}
    if kind == "prompts":
        entry["resolution"] = size
        entry.pop("resolution_type", None)
        return
    width, height = map(int, size.split("x"))
    side = round(math.sqrt(width * height))
    unit = entry.get("resolution_type")
    if unit in (None, "pixel_area") or isinstance(entry.get("resolution"), str):
        entry.update({"resolution": side, "resolution_type": "pixel_area"})
    elif unit == "area" and abs(entry.get("resolution", 0) - width * height / 1e6) > NEAR:
        entry["resolution"] = round(width * height / 1e6, 4)
    elif unit == "pixel":
        entry["resolution"] = min(width, height)


def reset_shape(draft: Draft) -> None:
    """Back to the size and length of the recipe, for training too."""
    for key in ("validation_resolution", "validation_num_video_frames", "distillation_config.num_training_frames"):
        draft.set(key, None)
    options = draft.options
    set_shape(draft, "x".join(map(str, options.validation_resolution[0])), options.validation_num_video_frames[0])


# --- what it holds ----------------------------------------------------------------------------------------------------


def loaded(draft: Draft) -> LoadedConfig:
    """The draft as a run would load it. Raises UserError with every mistake in it."""
    from simpletuner_dmd.cli.common import with_demo_paths

    merged = draft.merged()
    datasets = read_entries(draft.datasets, draft.data_path.name)
    complete(datasets, merged.options, lambda value: resolve_path(value, draft.folders), draft.cwd)
    problems = [*merged.problems, *datasets.problems]
    if problems:
        raise UserError(problems)
    assert datasets.text_embeds is not None, "complete fills it in"
    return with_demo_paths(
        LoadedConfig(merged.options, draft.path, merged.origins, datasets.entries, datasets.text_embeds, {}, [])
    )


def look(draft: Draft) -> Found:
    """Opens the files of the first dataset, as `check` does. Raises UserError if none of them can be used."""
    from simpletuner_dmd.cli.check import nothing_usable
    from simpletuner_dmd.cli.check_data import geometry_of
    from simpletuner_dmd.data.prepare import look_at_dataset

    run = loaded(draft)
    entry = run.datasets[0]
    scan = look_at_dataset(entry, run.config, geometry_of(run))
    if problem := nothing_usable(scan):
        raise UserError(problem)
    captions = list(dict.fromkeys(caption for sample in scan.usable for caption in sample.captions))
    buckets = ", ".join(f"{count} of {bucket}" for bucket, count in list(scan.buckets.items())[:4])
    lines = [f"{len(scan.usable)} usable: {buckets}"]
    if scan.rejected:
        kinds = ", ".join(f"{count} {kind}" for kind, count in scan.counts.items() if kind != "usable")
        lines.append(f"{len(scan.rejected)} left out: {kinds}")
    return Found(entry.dataset_type, lines, captions)


def library(found: Found, demo: bool) -> dict[str, str]:
    """Validation prompts: some of the data's own captions, spread over it, then prompts that ask for motion.

    The tiny Wan of the demo knows nothing but its own captions.
    """
    most = 2 * OWN_PROMPTS if demo else OWN_PROMPTS
    step = max(1, len(found.captions) // most)
    chosen = [caption for caption in found.captions[::step] if caption.strip()][:most]
    own = {f"own-{number}": caption for number, caption in enumerate(chosen, 1)}
    return {**own, **dict(list(BUILT_IN.items())[: 2 * OWN_PROMPTS - len(own)])}
