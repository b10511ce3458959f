"""The options of one dataset, resolved: what its entry says, else what config.json says, else the default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.buckets import LatentGeometry, SizeRules, parse_resolution

# Wan's native clip: five seconds at 16 frames per second, 4n + 1.
DEFAULT_FRAMES = 81
DEFAULT_PROMPT_SIZE = (832, 480)
DEFAULT_RESOLUTION = 480.0


@dataclass(frozen=True)
class DatasetSettings:
    """One entry of the data backend file with every default filled in.

    num_frames: of the form 4n + 1, at `framerate` and `frame_interval`. min_frames, max_frames: clips outside are
    listed and left out. repeats: extra passes per epoch. probability: weight against the other datasets.
    """

    id: str
    folder: Path
    kind: str
    sizes: SizeRules
    num_frames: int
    asked_frames: int
    min_frames: int
    max_frames: int | None
    frame_interval: int
    framerate: float
    caption_strategy: str
    instance_prompt: str
    prepend_instance_prompt: bool
    minimum_image_size: float
    repeats: int
    probability: float
    vae_cache: Path


def first_set(name: str, *places: Any) -> Any:
    """The first value of attribute `name` that is not None."""
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def resolve(entry: Any, config: Any, geometry: LatentGeometry) -> DatasetSettings:
    """`entry` a DatasetEntry, `config` a TrainConfig. Raises UserError for an id that is no folder name."""
    if not entry.id or entry.id in (".", "..") or any(mark in entry.id for mark in "/\\\0"):
        raise UserError(f"the id {entry.id!r} cannot be used: it names a folder of the cache", key="id",
                        fix="use letters, digits, - and _")  # fmt: skip
    video = getattr(entry, "video", None)
    asked = int(first_set("num_frames", video) or DEFAULT_FRAMES)
    num_frames = geometry.round_frames(asked)
    minimum = first_set("min_frames", video)
    return DatasetSettings(
        id=entry.id,
        folder=Path(entry.instance_data_dir) if entry.instance_data_dir else Path(),
        kind=entry.dataset_type,
        sizes=_size_rules(entry, config, geometry),
        num_frames=num_frames,
        asked_frames=asked,
        min_frames=num_frames if minimum is None else int(minimum),
        max_frames=first_set("max_frames", video),
        frame_interval=int(first_set("frame_interval", video) or 1),
        framerate=float(first_set("framerate", config) or 16),
        caption_strategy=first_set("caption_strategy", entry) or "textfile",
        instance_prompt=(first_set("instance_prompt", entry, config) or "").strip(),
        prepend_instance_prompt=bool(first_set("prepend_instance_prompt", entry)),
        minimum_image_size=float(first_set("minimum_image_size", entry, config) or 0),
        repeats=int(first_set("repeats", entry) or 0),
        probability=float(1.0 if (weight := first_set("probability", entry)) is None else weight),
        vae_cache=_vae_cache(entry, config),
    )


def _size_rules(entry: Any, config: Any, geometry: LatentGeometry) -> SizeRules:
    if entry.dataset_type == "prompts":
        resolution: Any = first_set("resolution", entry) or "x".join(map(str, DEFAULT_PROMPT_SIZE))
    else:
        resolution = first_set("resolution", entry, config) or DEFAULT_RESOLUTION
    rounding = first_set("aspect_bucket_rounding", config)
    maximum = first_set("maximum_image_size", entry, config)
    downsample = first_set("target_downsample_size", entry, config)
    return SizeRules(
        resolution=parse_resolution(resolution),
        resolution_type=first_set("resolution_type", entry, config) or "pixel_area",
        multiple=geometry.multiple,
        rounding=2 if rounding is None else int(rounding),
        crop=bool(first_set("crop", entry)),
        crop_aspect=first_set("crop_aspect", entry) or "square",
        crop_style=first_set("crop_style", entry) or "center",
        maximum_image_size=float(maximum) if maximum else None,
        target_downsample_size=float(downsample) if downsample else None,
    )


def _vae_cache(entry: Any, config: Any) -> Path:
    # A video entry's `cache_dir` is the short form in SimpleTuner's DMD guide.
    own = first_set("cache_dir_vae", entry) or first_set("cache_dir", entry)
    return Path(own) if own else Path(first_set("cache_dir_vae", config) or "cache/vae") / entry.id


def text_cache(entries: list[Any], config: Any) -> tuple[Path, int]:
    """(folder of the text cache, prompts per write): the text_embeds entry's, else config's, else the defaults."""
    chosen = next((e for e in entries if e.dataset_type == "text_embeds" and not getattr(e, "disabled", False)), None)
    folder = first_set("cache_dir", chosen) or first_set("cache_dir_text", config) or "cache/text"
    return Path(folder), int(first_set("write_batch_size", chosen, config) or 128)
