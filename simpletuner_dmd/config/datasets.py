"""Reads multidatabackend.json into entries that are complete: every default filled in from config.json."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from simpletuner_dmd.config.coerce import means_none
from simpletuner_dmd.config.databackend import (
    BUILTIN,
    PLAIN_NAME,
    DatasetEntry,
    TableOptions,
    VideoOptions,
    idle_keys,
)
from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.layers import bare
from simpletuner_dmd.config.mistakes import refusals, unknown_key
from simpletuner_dmd.config.read import exists, is_file
from simpletuner_dmd.config.run_options import DEMO, native_size
from simpletuner_dmd.config.schema import TrainConfig, frames_4n1
from simpletuner_dmd.config.simpletuner_keys import DATASET_ABSENT_KEYS, TABLE_ABSENT_KEYS, VIDEO_ABSENT_KEYS, Absent

DATASET_ALIASES = {
    "disable": "disabled",
    "aws_data_prefix": "instance_data_dir",
    "csv_cache_dir": "download_dir",
    "parquet": "table",
}
# SimpleTuner's names for what the `table` block says here.
TABLE_KEYS = {"csv_file": "path", "csv_url_column": "filename_column", "csv_caption_column": "caption_column"}
# Sizes in the unit of `resolution_type`, which config.json gives where an entry has none.
SIZE_KEYS = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
CROP_KEYS = ("crop_aspect", "crop_style", "maximum_image_size", "target_downsample_size")
HUB = "huggingface"
DOWNLOADS = "cache/downloads"
BLOCKS: dict[str, tuple[type[BaseModel], dict[str, Absent]]] = {
    "video": (VideoOptions, VIDEO_ABSENT_KEYS),
    "table": (TableOptions, TABLE_ABSENT_KEYS),
}
TOP_LEVEL_VIDEO_KEYS = tuple(VideoOptions.model_fields)

ENVIRONMENT = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")

Resolve = Callable[[str], Path]


@dataclass
class Datasets:
    """What a data file holds: entries to train on, the text cache, and what was wrong or worth saying."""

    entries: list[DatasetEntry] = field(default_factory=list)
    text_embeds: DatasetEntry | None = None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_entries(content: Any, file: str) -> Datasets:
    """Types and checks every entry; a bare object is a list of one. Problems are collected, nothing is raised."""
    found = Datasets()
    if isinstance(content, dict):
        found.notices.append(f"{file} holds one dataset without the list around it; read as a list of one.")
        content = [content]
    if not isinstance(content, list):
        found.problems.append(Problem(file, "", "must hold a JSON list of datasets", 'start with [ { "id": ... } ]'))
        return found
    for number, raw in enumerate(content, 1):
        if not isinstance(raw, dict):
            found.problems.append(Problem(file, f"entry {number}", "must be an object {...}"))
            continue
        entry = _read_entry(raw, number, file, found)
        if entry is None:
            continue
        if entry.disabled:
            found.notices.append(f"dataset {entry.id or number} is disabled and left out.")
        elif entry.is_training_data:
            found.entries.append(entry)
        elif found.text_embeds is not None:
            found.problems.append(
                Problem(file, f"{_name(raw, number)}: dataset_type", "is the second text_embeds entry in use: "
                        "one cache serves every dataset", 'set "disabled": true on the others')
            )  # fmt: skip
        else:
            found.text_embeds = entry
            if not entry.default:
                found.notices.append(f"dataset {entry.id}: it serves every dataset, whatever `default` says.")
    if not found.entries and not found.problems:
        found.problems.append(
            Problem(file, "", "holds no dataset to train on", 'add an entry with "dataset_type": "video" or "prompts"')
        )
    _check_names(found, file)
    return found


def _name(raw: dict[str, Any], number: int) -> str:
    return f'dataset "{raw["id"]}"' if isinstance(raw.get("id"), str) and raw["id"] else f"dataset {number}"


def _read_entry(raw: dict[str, Any], number: int, file: str, found: Datasets) -> DatasetEntry | None:
    name = _name(raw, number)
    values = {DATASET_ALIASES.get(bare(key), bare(key)): value for key, value in raw.items()}
    problems_before = len(found.problems)
    _fill_environment(values, name, file, found)
    _accept_other_names(values)
    _accept_short_form(values, name, found)
    _drop_unknown(values, f"{name}: ", file, DatasetEntry, DATASET_ABSENT_KEYS, found)
    for block, (model, absent) in BLOCKS.items():
        if isinstance(values.get(block), dict):
            values[block] = dict(values[block])
            _drop_unknown(values[block], f"{name}: {block}.", file, model, absent, found)
    try:
        entry = DatasetEntry.model_validate(values)
    except ValidationError as error:
        for path, message, fix in refusals(error, DatasetEntry):
            found.problems.append(Problem(file, f"{name}: {'.'.join(map(str, path))}", message, fix))
        return None
    if not entry.disabled:
        found.problems += _entry_problems(entry, name, file)
        idle = idle_keys(entry)
        if idle:
            found.notices.append(
                f"{name}: {', '.join(idle)} has no effect on dataset_type {entry.dataset_type}, type {entry.type}."
            )
        if entry.dataset_type != "image" and entry.video.num_frames != frames_4n1(entry.video.num_frames):
            rounded = frames_4n1(entry.video.num_frames)
            found.notices.append(f"{name}: num_frames {entry.video.num_frames} -> {rounded}: Wan takes 4n+1 frames.")
    return entry if entry.disabled or len(found.problems) == problems_before else None


def _fill_environment(values: dict[str, Any], name: str, file: str, found: Datasets) -> None:
    """{env:NAME} inside a value is what the environment says, so that secrets need not stand in the file."""
    for key, value in values.items():
        if not isinstance(value, str):
            continue
        for variable in ENVIRONMENT.findall(value):
            if variable not in os.environ:
                found.problems.append(
                    Problem(file, f"{name}: {key}", f"the environment has no variable {variable}",
                            f"set it before the start: export {variable}=...")
                )  # fmt: skip
        values[key] = ENVIRONMENT.sub(lambda match: os.environ.get(match[1], ""), value)


def _accept_other_names(values: dict[str, Any]) -> None:
    """What SimpleTuner spreads over keys of their own: the Hub's in a block, a table's outside of one."""
    if isinstance(values.get(HUB), dict):
        for key, value in values.pop(HUB).items():
            values.setdefault(key, value)
    if values.get("type") == HUB:
        # There a table of its own names files and captions, so these say nothing more.
        for key in ("caption_strategy", "metadata_backend"):
            if values.get(key) == HUB:
                del values[key]
        if "cache_dir" in values:
            values.setdefault("download_dir", values.pop("cache_dir"))
    table = {inner: values.pop(key) for key, inner in TABLE_KEYS.items() if key in values}
    if table:
        values["table"] = {**table, **(values["table"] if isinstance(values.get("table"), dict) else {})}


def _accept_short_form(values: dict[str, Any], name: str, found: Datasets) -> None:
    """The entry of the DMD guide: frame counts and the cache folder at the top level."""
    moved = [key for key in TOP_LEVEL_VIDEO_KEYS if key in values]
    if moved:
        video = values.get("video")
        inner = dict(video) if isinstance(video, dict) else {}
        for key in moved:
            inner.setdefault(key, values.pop(key))
            values.pop(key, None)
        values["video"] = inner
        found.notices.append(f"{name}: {', '.join(moved)} at the top level; read as if inside its `video` block.")
    kind = values.get("dataset_type", "video")
    if kind in ("video", "image") and "cache_dir" in values:
        folder = values.pop("cache_dir")
        values.setdefault("cache_dir_vae", folder)
        found.notices.append(f"{name}: cache_dir on a {kind} dataset; read as cache_dir_vae.")


def _drop_unknown(values: dict[str, Any], prefix: str, file: str, model: type[BaseModel], absent: dict[str, Absent],
                  found: Datasets) -> None:  # fmt: skip
    """Takes unknown keys out (each a problem or a notice), and keys that are null, which count as unset."""
    known = set(model.model_fields)
    for key in list(values):
        if key not in known:
            problem, notice = unknown_key(file, key, values.pop(key), known, absent, prefix)
            found.problems += [problem] if problem else []
            found.notices += [notice] if notice else []
        elif means_none(values[key], model.model_fields[key].annotation):
            del values[key]


def _place_problems(entry: DatasetEntry, name: str, file: str) -> list[Problem]:
    """Whether the entry says where its samples are."""
    if entry.type == "huggingface":
        if entry.dataset_name:
            return []
        return [Problem(file, f"{name}: dataset_name", "is missing: nothing says which dataset of the Hub",
                        'add "dataset_name": "owner/name", or a folder of parquet files')]  # fmt: skip
    if entry.type == "aws":
        if entry.aws_bucket_name:
            return []
        return [Problem(file, f"{name}: aws_bucket_name", "is missing: nothing says which bucket",
                        'add "aws_bucket_name": "my-bucket"')]  # fmt: skip
    if entry.type == "csv":
        if entry.table.path:
            return []
        return [Problem(file, f"{name}: csv_file", "is missing: nothing says where the table is",
                        'add "csv_file": "path/to/the/table.csv"')]  # fmt: skip
    if entry.instance_data_dir:
        return []
    return [Problem(file, f"{name}: instance_data_dir", "is missing: nothing says where the samples are",
                    'add "instance_data_dir": "path/to/the/folder"')]  # fmt: skip


def _entry_problems(entry: DatasetEntry, name: str, file: str) -> list[Problem]:
    problems = _place_problems(entry, name, file) if entry.is_training_data else []
    if entry.instance_data_dir == BUILTIN and entry.dataset_type not in ("prompts", "text_embeds"):
        problems.append(
            Problem(file, f"{name}: instance_data_dir",
                    f'"{BUILTIN}" is a set of prompts, not of {entry.dataset_type}s',
                    'set "dataset_type": "prompts", or name a folder')
        )  # fmt: skip
    if {entry.caption_strategy, entry.metadata_backend} >= {"csv", "parquet"}:
        problems.append(
            Problem(file, f"{name}: metadata_backend", "found parquet beside csv; one table serves both",
                    "write the same kind in caption_strategy and metadata_backend")
        )  # fmt: skip
    if entry.dataset_type == "prompts" and entry.resolution is not None and entry.size is None:
        problems.append(
            Problem(file, f"{name}: resolution", f"found {entry.resolution:g}; prompts have no shape of their own, "
                    "so both sides must be given", 'for example "resolution": "832x480"')
        )  # fmt: skip
    if entry.dataset_type in ("video", "image") and entry.size is not None:
        problems.append(
            Problem(file, f"{name}: resolution", f'found "{entry.resolution}"; videos keep their own shapes, '
                    "so this is one number", 'for example "resolution": 480 with "resolution_type": "pixel_area"')
        )  # fmt: skip
    least, most = entry.video.min_frames, entry.video.max_frames
    if most is not None and most < (least or frames_4n1(entry.video.num_frames)):
        problems.append(
            Problem(file, f"{name}: video.max_frames", f"found {most}, fewer than the frames a sample needs: "
                    "every clip would be left out", "raise it, or leave it out")
        )  # fmt: skip
    return problems


def _check_names(found: Datasets, file: str) -> None:
    """Names entries after their folders where they have no id, and refuses two of one name."""
    taken: set[str] = set()
    for entry in found.entries:
        if not entry.id:
            place = entry.dataset_name or entry.aws_bucket_name or entry.table.path
            if entry.type == "local":
                place = entry.instance_data_dir
            stem = Path(place or "dataset").expanduser().stem
            # Characters that could leave the cache folder become dashes.
            entry.id = "".join(c if PLAIN_NAME.fullmatch(f"a{c}") else "-" for c in stem).strip(".- ") or "dataset"
        if entry.id in taken:
            found.problems.append(
                Problem(file, f'dataset "{entry.id}": id', "two datasets have this name", "give each its own id")
            )
        taken.add(entry.id)


def complete(found: Datasets, config: TrainConfig, resolve: Resolve, cwd: Path) -> None:
    """Fills what the entries leave out from config.json, and makes their folders absolute; caches go below `cwd`."""
    file = config.data_backend_config or "multidatabackend.json"
    for entry in found.entries:
        found.problems += _inherited_problems(entry, config, file)
        found.notices += _without_effect(entry, config)
        if entry.instance_data_dir and entry.type != "aws" and entry.instance_data_dir not in (DEMO, BUILTIN):
            entry.instance_data_dir = str(resolve(entry.instance_data_dir))
        if entry.table.path:
            # Beside the files it speaks of, or where a path of the config file is looked for.
            inside = Path(entry.instance_data_dir or "") / entry.table.path
            entry.table.path = str(inside if entry.instance_data_dir and is_file(inside) else resolve(entry.table.path))
        if entry.type == "huggingface" and entry.dataset_name and exists(resolve(entry.dataset_name)):
            entry.dataset_name = str(resolve(entry.dataset_name))
        if entry.dataset_type == "image":
            entry.video = VideoOptions(num_frames=1)
        entry.download_dir = _cache(entry.download_dir or f"{DOWNLOADS}/{entry.id}", cwd)
        if entry.resolution is None:
            has_shapes = entry.dataset_type != "prompts"
            entry.resolution = float(config.resolution) if has_shapes else native_size(config.model_flavour)
        entry.resolution_type = entry.resolution_type or config.resolution_type
        if entry.minimum_image_size is None:
            entry.minimum_image_size = config.minimum_image_size
        entry.maximum_image_size = entry.maximum_image_size or config.maximum_image_size
        downsample = entry.target_downsample_size or config.target_downsample_size
        entry.target_downsample_size = downsample or entry.maximum_image_size
        entry.instance_prompt = entry.instance_prompt or config.instance_prompt
        entry.cache_dir_vae = _cache(entry.cache_dir_vae or Path(config.cache_dir_vae) / entry.id, cwd)
        asked_for = entry.video.min_frames
        entry.video.num_frames = frames_4n1(entry.video.num_frames)
        entry.video.min_frames = entry.video.num_frames if asked_for is None else asked_for
    text = found.text_embeds or DatasetEntry(id="text-embeds", dataset_type="text_embeds")
    text.cache_dir = _cache(text.cache_dir or config.cache_dir_text, cwd)
    text.write_batch_size = text.write_batch_size or config.write_batch_size
    found.text_embeds = text


def _inherited_problems(entry: DatasetEntry, config: TrainConfig, file: str) -> list[Problem]:
    """What an entry needs of config.json and does not get, or gets in another unit."""
    name, problems = f'dataset "{entry.id}"', []
    needs_prompt = entry.caption_strategy == "instanceprompt" or entry.prepend_instance_prompt
    if needs_prompt and not (entry.instance_prompt or config.instance_prompt):
        problems.append(Problem(file, f"{name}: instance_prompt", "is needed and missing", "add the prompt's text"))
    unit, theirs = entry.resolution_type or config.resolution_type, config.resolution_type
    if entry.dataset_type == "prompts" or (unit == "area") == (theirs == "area"):
        return problems
    return problems + [
        Problem(file, f"{name}: {key}", f"is missing: config.json's {getattr(config, key):g} is in the unit of "
                f'resolution_type "{theirs}", this dataset counts in "{unit}"', "write it in the entry")
        for key in SIZE_KEYS
        if getattr(entry, key) is None and getattr(config, key)
    ]  # fmt: skip


def _without_effect(entry: DatasetEntry, config: TrainConfig) -> list[str]:
    """Keys of the crop on an entry that does not reach them."""
    name = f'dataset "{entry.id}"'
    written = [
        key for key in CROP_KEYS if key in entry.model_fields_set and getattr(entry, key) not in (None, "preserve")
    ]
    if entry.dataset_type == "prompts":
        return []  # said already, as of every key that does nothing for prompts
    if written and not entry.crop:
        return [f"{name}: {', '.join(written)} act only with crop: true; each video keeps its own shape."]
    if "target_downsample_size" in written and not (entry.maximum_image_size or config.maximum_image_size):
        return [f"{name}: target_downsample_size acts only on files above maximum_image_size, which is not set."]
    return []


def _cache(folder: str | Path, cwd: Path) -> str:
    return str((cwd / Path(folder).expanduser()).absolute())


def hold_out(config: TrainConfig, entries: list[DatasetEntry], file: str) -> list[Problem]:
    """Takes the dataset of the evaluation loss out of training, by giving it no weight."""
    if config.eval_dataset_id is None:
        return []
    key = "eval_dataset_id"
    entry = next((entry for entry in entries if entry.id == config.eval_dataset_id), None)
    if entry is None:
        known = ", ".join(entry.id for entry in entries)
        return [Problem(file, key, f"there is no dataset {config.eval_dataset_id}", f"choose one of {known}")]
    if entry.dataset_type == "prompts":
        return [Problem(file, key, f"{entry.id} holds prompts only, and the loss needs videos", "name a video dataset")]
    if all(other is entry or other.probability == 0 for other in entries):
        return [Problem(file, key, f"{entry.id} is the only dataset: held out, nothing is left to train on",
                        "add another dataset, or move some of its videos into one of their own")]  # fmt: skip
    entry.probability = 0.0
    return []


def needs_videos(config: TrainConfig, entries: list[DatasetEntry], file: str) -> list[Problem]:
    """Losses that read videos, on a run that only has prompts."""
    entries = [entry for entry in entries if entry.probability > 0]
    if not entries or any(entry.dataset_type != "prompts" for entry in entries):
        return []
    if config.distillation_config is None:
        return [
            Problem(file, "dataset_type", "fine-tuning needs videos, and every dataset here is prompts",
                    'add a "video" dataset, or set "distillation_method": "dmd"')
        ]  # fmt: skip
    if config.distillation.needs_latents:
        who, instead = config.distillation.latents_are_for or (str(config.distillation_method), "")
        fix = 'add a "video" dataset' + (f", or {instead}" if instead else "")
        return [Problem(file, "dataset_type", f"{who} learns from videos, and every dataset here is prompts", fix)]
    return []


def size_notices(config: TrainConfig, entries: list[DatasetEntry]) -> list[str]:
    """Where validation renders what training never sees."""
    found = []
    trained_frames = sorted({entry.video.num_frames for entry in entries if entry.dataset_type != "image"})
    if config.frames_cap is not None:
        trained_frames = sorted({min(frames, config.frames_cap) for frames in trained_frames})
    unseen = [frames for frames in config.validation_num_video_frames if frames not in trained_frames]
    if not config.validation_disable and trained_frames and unseen:
        found.append(
            f"validation renders {', '.join(map(str, unseen))} frames, training sees "
            f"{', '.join(map(str, trained_frames))}: the videos may look different from what was trained."
        )
    areas = [area for entry in entries if (area := _area(entry)) is not None]
    if not config.validation_disable and areas:
        for width, height in config.validation_resolution:
            if all(not 0.75 <= width * height / area <= 1.34 for area in areas):
                found.append(
                    f"validation renders {width}x{height}, training sees about "
                    f"{', '.join(f'{round(area**0.5)}² pixels' for area in areas)}: "
                    "the videos may look different from what was trained."
                )
    return found


def _area(entry: DatasetEntry) -> float | None:
    """Pixels of a training frame, where the entry says so; `pixel` sizes depend on each video's shape."""
    if entry.size is not None:
        return entry.size[0] * entry.size[1]
    if isinstance(entry.resolution, float | int):
        if entry.resolution_type == "area":
            return entry.resolution * 1e6
        if entry.resolution_type == "pixel_area":
            return entry.resolution**2
    return None
