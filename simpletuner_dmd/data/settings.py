"""The options of one dataset, resolved: what its entry says, else what config.json says, else the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.databackend import BUILTIN, DatasetEntry
from simpletuner_dmd.config.datasets import DOWNLOADS
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import LatentGeometry, SizeRules, parse_resolution

# Wan's native size, for prompts that name none.
DEFAULT_PROMPT_SIZE = (832, 480)
DEFAULT_RESOLUTION = 480.0
BUILTIN_PROMPTS = Path(__file__).parent / "prompts" / "builtin.txt"


@dataclass(frozen=True)
class DatasetSettings:
    """One entry of the data backend file with every default filled in.

    num_frames: of the form 4n + 1, at `framerate` and `frame_interval`. min_frames, max_frames: clips outside are
    listed and left out. repeats: extra passes per epoch. probability: weight against the other datasets.
    downloads: where copies of remote files are. max_num_samples: None for all.
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
    downloads: Path
    disable_multiline_split: bool
    max_num_samples: int | None


def first_set(name: str, *places: Any) -> Any:
    """The first value of attribute `name` that is not None."""
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def resolve(entry: DatasetEntry, config: TrainConfig, geometry: LatentGeometry) -> DatasetSettings:
    """Raises UserError for an id that is no folder name."""
    if not entry.id or entry.id in (".", "..") or any(mark in entry.id for mark in "/\\\0"):
        raise UserError(f"the id {entry.id!r} cannot be used: it names a folder of the cache", key="id",
                        fix="use letters, digits, - and _")  # fmt: skip
    video = entry.video
    asked = 1 if entry.dataset_type == "image" else video.num_frames
    num_frames = geometry.round_frames(asked)
    return DatasetSettings(
        id=entry.id,
        folder=_folder(entry),
        kind=entry.dataset_type,
        sizes=_size_rules(entry, config, geometry),
        num_frames=num_frames,
        asked_frames=asked,
        min_frames=num_frames if video.min_frames is None else video.min_frames,
        max_frames=video.max_frames,
        frame_interval=video.frame_interval,
        framerate=config.framerate,
        caption_strategy=entry.caption_strategy,
        instance_prompt=(first_set("instance_prompt", entry, config) or "").strip(),
        prepend_instance_prompt=entry.prepend_instance_prompt,
        minimum_image_size=float(first_set("minimum_image_size", entry, config) or 0),
        repeats=entry.repeats,
        probability=entry.probability,
        vae_cache=Path(entry.cache_dir_vae or Path(config.cache_dir_vae) / entry.id),
        downloads=Path(entry.download_dir or Path(DOWNLOADS) / entry.id),
        disable_multiline_split=entry.disable_multiline_split,
        max_num_samples=entry.max_num_samples,
    )


def _folder(entry: DatasetEntry) -> Path:
    """Where the samples are, or what the dataset is called where they are elsewhere."""
    if entry.type == "huggingface":
        return Path(entry.dataset_name or "")
    if entry.type == "aws":
        return Path(entry.aws_bucket_name or "") / (entry.instance_data_dir or "").strip("/")
    if entry.type == "csv" and not entry.instance_data_dir:
        return Path(entry.table.path or "").parent
    return BUILTIN_PROMPTS if entry.instance_data_dir == BUILTIN else Path(entry.instance_data_dir or "")


def _size_rules(entry: DatasetEntry, config: TrainConfig, geometry: LatentGeometry) -> SizeRules:
    resolution: float | str | None = first_set("resolution", entry, config)
    if entry.dataset_type == "prompts" and not isinstance(entry.resolution, str):
        # A number carries no aspect, and config.json's is meant for videos, which have their own.
        resolution = "x".join(map(str, DEFAULT_PROMPT_SIZE))
    maximum = first_set("maximum_image_size", entry, config)
    downsample = first_set("target_downsample_size", entry, config)
    return SizeRules(
        resolution=parse_resolution(resolution or DEFAULT_RESOLUTION),
        resolution_type=first_set("resolution_type", entry, config) or "pixel_area",
        multiple=geometry.multiple,
        rounding=config.aspect_bucket_rounding,
        crop=entry.crop,
        crop_aspect=entry.crop_aspect,
        crop_style=entry.crop_style,
        maximum_image_size=maximum,
        target_downsample_size=downsample,
    )


def text_cache(entries: Sequence[DatasetEntry], config: TrainConfig) -> tuple[Path, int]:
    """(folder of the text cache, prompts per write): the text_embeds entry's, else config's, else the defaults."""
    chosen = next((entry for entry in entries if entry.dataset_type == "text_embeds" and not entry.disabled), None)
    folder = (chosen.cache_dir if chosen else None) or config.cache_dir_text
    return Path(folder), (chosen.write_batch_size if chosen else None) or config.write_batch_size
