"""Looks at every file of every dataset before anything is spent: what can be used, and what cannot and why."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import CropPlan, LatentGeometry, crop_plan, frames_at, size_in
from simpletuner_dmd.data.captions import captions_of, prepended
from simpletuner_dmd.data.findings import FIXES, FRAME_COUNT, TOO_SHORT, TOO_SMALL, UnusableFile
from simpletuner_dmd.data.findings import Rejected as Rejected  # where it is looked for
from simpletuner_dmd.data.pictures import probe_picture
from simpletuner_dmd.data.settings import DatasetSettings, resolve
from simpletuner_dmd.data.sources.folder import REJECTED_FOLDER
from simpletuner_dmd.data.sources.items import Item
from simpletuner_dmd.data.sources.listing import list_samples
from simpletuner_dmd.data.sources.prompts import list_prompts
from simpletuner_dmd.data.sources.table import CaptionTable
from simpletuner_dmd.data.video import VideoInfo, check_reaches, probe

WAN = LatentGeometry()
UNITS = {"pixel": "pixels on the shorter edge", "pixel_area": "pixels (square root of the area)", "area": "megapixels"}


@dataclass(frozen=True, slots=True)
class VideoSample:
    """A video that can be used. captions: one of them is drawn per epoch (a caption file has one per line)."""

    dataset: str
    path: Path
    captions: tuple[str, ...]
    info: VideoInfo
    crop: CropPlan
    frames: int

    @property
    def bucket(self) -> str:
        return f"{self.crop.width}x{self.crop.height}x{self.frames}"


@dataclass(frozen=True, slots=True)
class PromptSample:
    """A prompt with the size of the video to be made of it."""

    dataset: str
    path: Path
    captions: tuple[str, ...]
    width: int
    height: int
    frames: int

    @property
    def bucket(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass
class DatasetScan:
    """What a dataset holds. buckets: "WIDTHxHEIGHTxFRAMES" -> samples; notices: what a person should know.

    content: what a source elsewhere held, as `Listing.content`; "" for a folder.
    """

    entry: DatasetEntry
    settings: DatasetSettings
    usable: list[VideoSample] | list[PromptSample]
    rejected: list[Rejected]
    notices: list[str] = field(default_factory=list)
    content: str = ""

    @property
    def buckets(self) -> dict[str, int]:
        return dict(sorted(Counter(sample.bucket for sample in self.usable).items()))

    @property
    def counts(self) -> dict[str, int]:
        """ "usable" and every kind of finding that occurs -> how many, in the order of FIXES."""
        kinds = Counter(item.kind for item in self.rejected)
        return {"usable": len(self.usable), **{kind: kinds[kind] for kind in FIXES if kinds[kind]}}

    def lines(self) -> list[str]:
        """The scan in words, one finding per line."""
        found = [f"{self.settings.id}: {len(self.usable)} usable, {len(self.rejected)} left out"]
        found += [f"  left out: {item.path}: {item.reason}" for item in self.rejected]
        return found + [f"  note: {notice}" for notice in self.notices]


def scan_all(
    datasets: Sequence[DatasetEntry], config: TrainConfig, *, geometry: LatentGeometry = WAN, quarantine: bool = False
) -> list[DatasetScan]:
    """Scans every enabled dataset that holds samples. Raises UserError with the problems of all of them at once."""
    scans, problems = [], []
    for entry in datasets:
        if entry.disabled or not entry.is_training_data:
            continue
        try:
            scans.append(scan(entry, config, geometry=geometry, quarantine=quarantine))
        except UserError as error:
            problems += error.problems
    if not scans and not problems:
        problems = [
            Problem(
                str(config.data_backend_config or "multidatabackend.json"),
                "",
                "no dataset is enabled that holds videos or prompts",
                'add an entry with "dataset_type": "video" or "prompts"',
            )
        ]
    if problems:
        raise UserError(problems)
    return scans


def scan(
    entry: DatasetEntry, config: TrainConfig, *, geometry: LatentGeometry = WAN, quarantine: bool = False
) -> DatasetScan:
    """As `look`, for training: raises UserError also when there is no usable sample.

    quarantine: move files that cannot be decoded into a `rejected` folder beside them, each with its reason; nothing
    is deleted.
    """
    result = look(entry, config, geometry=geometry)
    if quarantine:
        for item in result.rejected:
            if item.damaged and item.path.is_file():
                quarantine_file(item.path, item.reason)
    if not result.usable:
        kind = result.settings.kind
        wanted = f"{kind}s, each with a caption file of the same name ending in .txt"
        if kind == "prompts":
            wanted = "prompts, one per line of a .txt file or as caption in a .jsonl or .csv file"
        found = "is empty" if not result.rejected else "has no usable sample"
        names = "".join(f"\n  {item.path}: {item.reason}" for item in result.rejected)
        raise UserError(
            f"{result.settings.folder} {found}{names}",
            file=str(config.data_backend_config or "multidatabackend.json"),
            key=f"{result.settings.id}.instance_data_dir",
            fix=f"put {wanted}, there",
        )
    return result


def look(entry: DatasetEntry, config: TrainConfig, *, geometry: LatentGeometry = WAN) -> DatasetScan:
    """Lists a dataset (see DatasetScan). Changes nothing on disk, but for the copies of files from elsewhere.

    Raises UserError when the dataset cannot be reached, or its table cannot be read.
    """
    settings = resolve(entry, config, geometry)
    source = str(config.data_backend_config or "multidatabackend.json")
    key = f"{settings.id}.instance_data_dir"
    if entry.type == "local":
        if not entry.instance_data_dir:
            raise UserError("no folder is given", file=source, key=key, fix="set it to the folder that holds the files")
        if not settings.folder.exists():
            raise UserError(f"{settings.folder} does not exist", file=source, key=key,
                            fix=f"create it or correct the path (looked at {settings.folder.absolute()})")  # fmt: skip
    try:
        if settings.kind == "prompts":
            result = _scan_prompts(entry, settings)
        else:
            result = _scan_clips(entry, settings, config, geometry)
    except UserError as error:
        raise UserError([Problem(p.file or source, p.key, p.message, p.fix) for p in error.problems]) from error
    if settings.asked_frames != settings.num_frames:
        result.notices.append(
            f"num_frames {settings.asked_frames} is rounded down to {settings.num_frames} "
            f"({geometry.temporal}n + 1, the lengths the VAE can encode)"
        )
    return result


def quarantine_file(path: Path, reason: str) -> Path:
    """Moves a file into `rejected/` beside it, with `<name>.reason.txt`; returns where it is now."""
    folder = path.parent / REJECTED_FOLDER
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while target.exists():
        target, number = folder / f"{path.stem}-{number}{path.suffix}", number + 1
    shutil.move(path, target)
    target.with_name(target.name + ".reason.txt").write_text(reason + "\n", encoding="utf-8")
    return target


# --- videos and pictures ----------------------------------------------------------------------------------------------


def _scan_clips(
    entry: DatasetEntry, settings: DatasetSettings, config: TrainConfig, geometry: LatentGeometry
) -> DatasetScan:
    caches = [settings.vae_cache, Path(config.cache_dir_text), Path(config.cache_dir_vae), Path(config.output_dir)]
    skip = [cache for cache in caches if cache.resolve() != settings.folder.resolve()]
    listing, table = list_samples(entry, settings, skip)

    def judge(item: Item) -> VideoSample | Rejected:
        try:
            return _look_at(item, settings, geometry, table)
        except UnusableFile as error:
            return Rejected.of(error)

    # libav releases the interpreter lock, so a few threads hide the disk.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        findings = list(pool.map(judge, listing.items))
    usable = [finding for finding in findings if isinstance(finding, VideoSample)]
    rejected = [finding for finding in findings if isinstance(finding, Rejected)]
    notices = [*listing.notices, *_clip_notices(usable)]
    return DatasetScan(entry, settings, usable, [*listing.rejected, *rejected], notices, listing.content)


def _look_at(
    item: Item, settings: DatasetSettings, geometry: LatentGeometry, table: CaptionTable | None
) -> VideoSample:
    """The sample that a file is. Raises UnusableFile."""
    path = item.path
    if settings.kind == "image":
        width, height = probe_picture(path)
        info = VideoInfo(width, height, frames=1, fps=settings.framerate, seconds=1 / settings.framerate, rotation=0)
        frames = 1
    else:
        info = probe(path)
        frames = geometry.round_frames(_usable_frames(path, info, settings))
    rules = settings.sizes
    size = size_in(info.width, info.height, rules.resolution_type)
    if size < settings.minimum_image_size:
        raise UnusableFile(
            path,
            f"too small: {info.width}x{info.height} is {size:.4g} {UNITS[rules.resolution_type]}, "
            f"minimum_image_size is {settings.minimum_image_size:g}",
            damaged=False,
            kind=TOO_SMALL,
        )
    captions = captions_of(item, settings, table)
    if settings.kind != "image":
        check_reaches(path, (frames - 1) * settings.frame_interval / settings.framerate)
    crop = crop_plan(info.width, info.height, rules, item.name)
    return VideoSample(settings.id, path, captions, info, crop, frames)


def _usable_frames(path: Path, info: VideoInfo, settings: DatasetSettings) -> int:
    """Frames to take from the video, before rounding. Raises UnusableFile when it is too short or too long."""
    available = frames_at(info.seconds, settings.framerate, settings.frame_interval)
    every = "" if settings.frame_interval == 1 else f", one in {settings.frame_interval} taken"
    length = (
        f"{info.seconds:.2f} s ({info.frames} frames at {info.fps:.4g} per second) give {available} frames "
        f"at {settings.framerate:g} per second{every}"
    )
    if available < settings.min_frames:
        raise UnusableFile(
            path, f"too short: {length}, {settings.min_frames} are needed (video.min_frames)", False, TOO_SHORT
        )
    if settings.max_frames is not None and available > settings.max_frames:
        raise UnusableFile(path, f"too long: {length}, video.max_frames is {settings.max_frames}", False, FRAME_COUNT)
    return min(available, settings.num_frames)


def _clip_notices(usable: Sequence[VideoSample]) -> list[str]:
    notices = []
    several = sum(len(sample.captions) > 1 for sample in usable)
    if several:
        files = "1 caption file has" if several == 1 else f"{several} caption files have"
        notices.append(f"{files} several lines: each line is a caption, one is drawn per epoch")
    enlarged = [s for s in usable if s.crop.resize_width > s.info.width or s.crop.resize_height > s.info.height]
    if enlarged:
        example = f"{enlarged[0].path.name} ({enlarged[0].info.width}x{enlarged[0].info.height})"
        notices.append(
            f"files smaller than their bucket, which are enlarged: {len(enlarged)}, for example {example}; "
            "minimum_image_size leaves such files out"
        )
    slow = [sample for sample in usable if sample.info.fps < 12]
    if slow:
        notices.append(
            f"videos with fewer than 12 frames per second, of which frames are shown twice: {len(slow)}, "
            f"for example {slow[0].path.name} ({slow[0].info.fps:.4g})"
        )
    return notices


# --- prompts ----------------------------------------------------------------------------------------------------------


def _scan_prompts(entry: DatasetEntry, settings: DatasetSettings) -> DatasetScan:
    rules = settings.sizes
    assert isinstance(rules.resolution, tuple), "the settings of prompts name width and height"
    crop = crop_plan(*rules.resolution, rules, settings.id)
    listing = list_prompts(entry, settings)
    usable = [
        PromptSample(
            settings.id, path, tuple(prepended(list(captions), settings)), crop.width, crop.height, settings.num_frames
        )
        for path, captions in listing.prompts
    ]
    result = DatasetScan(entry, settings, usable, listing.rejected)
    if rules.resolution != (crop.width, crop.height):
        result.notices.append(
            f"resolution {rules.resolution[0]}x{rules.resolution[1]} becomes {crop.width}x{crop.height}, "
            f"multiples of {rules.multiple}"
        )
    return result
