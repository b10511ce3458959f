"""Looks at every file of every dataset before anything is spent: what can be used, and what cannot and why."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import CropPlan, LatentGeometry, crop_plan, frames_at, size_in
from simpletuner_dmd.data.settings import DatasetSettings, resolve
from simpletuner_dmd.data.video import UnusableFile, VideoInfo, check_reaches, probe

REJECTED_FOLDER = "rejected"
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


@dataclass(frozen=True)
class Rejected:
    """A file that is left out. damaged: its content cannot be decoded."""

    path: Path
    reason: str
    damaged: bool = False


@dataclass
class DatasetScan:
    """What a dataset holds. buckets: "WIDTHxHEIGHTxFRAMES" -> samples; notices: what a person should know."""

    entry: DatasetEntry
    settings: DatasetSettings
    usable: list[VideoSample] | list[PromptSample]
    rejected: list[Rejected]
    notices: list[str] = field(default_factory=list)

    @property
    def buckets(self) -> dict[str, int]:
        return dict(sorted(Counter(sample.bucket for sample in self.usable).items()))

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
    """Lists a dataset (see DatasetScan); changes nothing on disk unless `quarantine`.

    quarantine: move files that cannot be decoded into a `rejected` folder beside them, each with its reason; nothing
    is deleted. Raises UserError when the folder is missing, empty, or has no usable sample.
    """
    settings = resolve(entry, config, geometry)
    source = str(config.data_backend_config or "multidatabackend.json")
    key = f"{settings.id}.instance_data_dir"
    if not entry.instance_data_dir:
        raise UserError("no folder is given", file=source, key=key, fix="set it to the folder that holds the files")
    if not settings.folder.exists():
        raise UserError(f"{settings.folder} does not exist", file=source, key=key,
                        fix=f"create it or correct the path (looked at {settings.folder.absolute()})")  # fmt: skip
    if settings.kind == "prompts":
        result = _scan_prompts(entry, settings)
        wanted = "prompts, one per line of a .txt file or as caption in a .jsonl file"
    else:
        result = _scan_videos(entry, settings, config, geometry)
        wanted = "videos, each with a caption file of the same name ending in .txt"
    if quarantine:
        for item in result.rejected:
            if item.damaged:
                quarantine_file(item.path, item.reason)
    if not result.usable:
        found = "is empty" if not result.rejected else "has no usable sample"
        names = "".join(f"\n  {item.path}: {item.reason}" for item in result.rejected)
        raise UserError(f"{settings.folder} {found}{names}", file=source, key=key, fix=f"put {wanted}, there")
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


def list_files(folder: Path, skip: Sequence[Path] = ()) -> list[Path]:
    """Every file under `folder`, sorted, hidden ones and `rejected` folders left out; a file itself stands for itself.

    Links are followed; a folder that was seen already (a loop) is not entered again.
    """
    if folder.is_file():
        return [folder]
    skipped = {path.resolve() for path in skip}
    seen: set[Path] = set()

    def walk(place: Path) -> Iterator[Path]:
        real = place.resolve()
        if real in seen or real in skipped:
            return
        seen.add(real)
        with os.scandir(place) as entries:
            children = sorted(entries, key=lambda child: child.name)
        for child in children:
            if child.name.startswith("."):
                continue
            path = place / child.name
            if child.is_dir():
                if child.name != REJECTED_FOLDER:
                    yield from walk(path)
            else:
                yield path

    return list(walk(folder))


# --- videos -----------------------------------------------------------------------------------------------------------


def _scan_videos(
    entry: DatasetEntry, settings: DatasetSettings, config: TrainConfig, geometry: LatentGeometry
) -> DatasetScan:
    caches = [settings.vae_cache, Path(config.cache_dir_text), Path(config.cache_dir_vae), Path(config.output_dir)]
    skip = [cache for cache in caches if cache.resolve() != settings.folder.resolve()]
    paths = [path for path in list_files(settings.folder, skip) if path.suffix.lower() != ".txt"]

    def look(path: Path) -> VideoSample | Rejected:
        try:
            return _look_at(path, settings, geometry)
        except UnusableFile as error:
            return Rejected(path, error.reason, error.damaged)

    # libav releases the interpreter lock, so a few threads hide the disk.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        findings = list(pool.map(look, paths))
    usable = [finding for finding in findings if isinstance(finding, VideoSample)]
    rejected = [finding for finding in findings if isinstance(finding, Rejected)]
    return DatasetScan(entry, settings, usable, rejected, _video_notices(usable))


def _look_at(path: Path, settings: DatasetSettings, geometry: LatentGeometry) -> VideoSample:
    """The sample that `path` is. Raises UnusableFile."""
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
        )
    captions = _captions(path, settings)
    last_needed = (frames - 1) * settings.frame_interval / settings.framerate
    check_reaches(path, last_needed)
    # The relative name seeds a random crop, so moving the folder does not change it.
    name = path.relative_to(settings.folder).as_posix() if path != settings.folder else path.name
    crop = crop_plan(info.width, info.height, rules, name)
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
        raise UnusableFile(path, f"too short: {length}, {settings.min_frames} are needed (video.min_frames)", False)
    if settings.max_frames is not None and available > settings.max_frames:
        raise UnusableFile(path, f"too long: {length}, video.max_frames is {settings.max_frames}", False)
    return min(available, settings.num_frames)


def _captions(path: Path, settings: DatasetSettings) -> tuple[str, ...]:
    if settings.caption_strategy == "instanceprompt":
        if not settings.instance_prompt:
            raise UnusableFile(
                path, "no caption: caption_strategy is instanceprompt and instance_prompt is empty", False
            )
        return (settings.instance_prompt,)
    if settings.caption_strategy == "filename":
        captions = [path.stem.replace("_", " ").strip()]
    else:
        captions = _captions_beside(path)
    if settings.prepend_instance_prompt and settings.instance_prompt:
        captions = [f"{settings.instance_prompt} {caption}" for caption in captions]
    return tuple(captions)


def _captions_beside(path: Path) -> list[str]:
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UnusableFile(path, f"no caption: {beside.name} is missing", False) from None
    except UnicodeDecodeError:
        raise UnusableFile(path, f"no caption: {beside.name} is not UTF-8 text", False) from None
    except OSError as error:
        raise UnusableFile(path, f"no caption: {beside.name} cannot be read ({error.strerror})", False) from None
    captions = [line.strip() for line in text.split("\n") if line.strip()]
    if not captions:
        raise UnusableFile(path, f"no caption: {beside.name} is empty", False)
    return captions


def _video_notices(usable: Sequence[VideoSample]) -> list[str]:
    notices = []
    several = sum(len(sample.captions) > 1 for sample in usable)
    if several:
        notices.append(f"{several} caption files have several lines: each line is a caption, one is drawn per epoch")
    enlarged = [s for s in usable if s.crop.resize_width > s.info.width or s.crop.resize_height > s.info.height]
    if enlarged:
        example = f"{enlarged[0].path.name} ({enlarged[0].info.width}x{enlarged[0].info.height})"
        notices.append(
            f"{len(enlarged)} videos are smaller than their bucket and are enlarged, for example {example}; "
            "minimum_image_size leaves such videos out"
        )
    slow = [sample for sample in usable if sample.info.fps < 12]
    if slow:
        notices.append(
            f"{len(slow)} videos have fewer than 12 frames per second, so frames are shown twice, "
            f"for example {slow[0].path.name} ({slow[0].info.fps:.4g})"
        )
    return notices


# --- prompts ----------------------------------------------------------------------------------------------------------


def _scan_prompts(entry: DatasetEntry, settings: DatasetSettings) -> DatasetScan:
    rules = settings.sizes
    assert isinstance(rules.resolution, tuple), "the settings of prompts name width and height"
    crop = crop_plan(*rules.resolution, rules, settings.id)
    usable: list[PromptSample] = []
    rejected: list[Rejected] = []
    for path in list_files(settings.folder):
        try:
            prompts, bad_lines = _read_prompts(path)
        except UnusableFile as error:
            rejected.append(Rejected(path, error.reason))
            continue
        rejected += bad_lines
        if settings.prepend_instance_prompt and settings.instance_prompt:
            prompts = [f"{settings.instance_prompt} {prompt}" for prompt in prompts]
        usable += [
            PromptSample(settings.id, path, (prompt,), crop.width, crop.height, settings.num_frames)
            for prompt in prompts
        ]
    result = DatasetScan(entry, settings, usable, rejected)
    if rules.resolution != (crop.width, crop.height):
        result.notices.append(
            f"resolution {rules.resolution[0]}x{rules.resolution[1]} becomes {crop.width}x{crop.height}, "
            f"multiples of {rules.multiple}"
        )
    return result


def _read_prompts(path: Path) -> tuple[list[str], list[Rejected]]:
    """The prompts of a .txt (one per line) or .jsonl ({"caption" or "prompt": text}) file, and lines left out.

    Raises UnusableFile when nothing in it can be used.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UnusableFile(path, "not a prompt file: .txt and .jsonl are read", damaged=False)
    try:
        # Not splitlines(): it also cuts at the line separators that JSON allows inside a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UnusableFile(path, f"cannot be read as UTF-8 text ({error})", damaged=False) from error
    prompts: list[str] = []
    rejected: list[Rejected] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix.lower() == ".txt":
            prompts.append(line.strip())
            continue
        try:
            prompts.append(_prompt_of(line))
        except ValueError as error:
            rejected.append(Rejected(path, f"line {number} {error}"))
    if not prompts and not rejected:
        raise UnusableFile(path, "it holds no prompt", damaged=False)
    return prompts, rejected


def _prompt_of(line: str) -> str:
    """The text of one .jsonl line; raises ValueError with what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    text = row.get("caption", row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('has no "caption" or "prompt" text')
    return text.strip()
