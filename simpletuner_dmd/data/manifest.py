"""What a latent cache holds, written beside it: enough to train from the cache when the video files are gone.

Of a dataset from elsewhere it also says what the source held, so that copies which were deleted are not fetched again
while that is still the same.

`dataset-ID.json` lies in a dataset's latent cache and names its samples. `dataset.json` in the dataset's own folder
says the same of latents that never had a video file, as `simpletuner synthesise --latents` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import CropPlan, LatentGeometry
from simpletuner_dmd.data.disk import digest, write_whole
from simpletuner_dmd.data.encode import Clip
from simpletuner_dmd.data.findings import Rejected
from simpletuner_dmd.data.scan import DatasetScan, VideoSample
from simpletuner_dmd.data.settings import DatasetSettings, resolve
from simpletuner_dmd.data.sources.folder import list_files
from simpletuner_dmd.data.sources.listing import content_of
from simpletuner_dmd.data.store import CACHE_VERSION, LatentStore
from simpletuner_dmd.data.video import VideoInfo

MADE_HERE = "dataset.json"
WORDS = (".txt", ".csv", ".jsonl", ".json", ".parquet")
# The settings that decide which samples there are and which pixels the VAE sees.
DECIDING = ("sizes", "num_frames", "min_frames", "max_frames", "frame_interval", "framerate", "minimum_image_size")


# What an entry may change without changing its samples.
BESIDE_THE_SAMPLES = {"repeats", "probability", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"}


def write_manifest(path: Path, clips: Sequence[Clip], fingerprint: str, scan: DatasetScan | None) -> None:
    """scan: what the samples were chosen from; None where there were no files to choose from. Raises UserError."""
    document: dict[str, Any] = {
        "version": CACHE_VERSION,
        "vae": fingerprint,
        "settings": None if scan is None else _deciding(scan.settings),
        "samples": [_row(clip) for clip in clips],
    }
    if scan is not None and scan.entry.type != "local":
        document["source"] = [_identity(scan.entry, scan.settings), scan.content]
        document["rejected"] = [[str(bad.path), bad.reason, bad.kind] for bad in scan.rejected]
    data = (json.dumps(document, ensure_ascii=False) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)


def manifest_path(settings: DatasetSettings) -> Path:
    """Where the manifest of a dataset with video files lies."""
    return settings.vae_cache / f"dataset-{settings.id}.json"


def stands_in(entry: DatasetEntry, config: TrainConfig, fingerprint: str | None = None) -> Path | None:
    """The manifest to train from, because the dataset has no video files (any more).

    fingerprint: the VAE's, where latents are to be read. Raises UserError where a source elsewhere cannot be asked.
    """
    if entry.dataset_type not in ("video", "image"):
        return None
    settings = resolve(entry, config, LatentGeometry())
    if entry.type != "local":
        return manifest_path(settings) if _is_true_without_copies(entry, config, settings, fingerprint) else None
    if not entry.instance_data_dir:
        return None
    if (settings.folder / MADE_HERE).is_file():
        return settings.folder / MADE_HERE
    written = manifest_path(settings)
    if not written.is_file() or (settings.folder.exists() and any(_files(settings))):
        return None
    return written


def _is_true_without_copies(
    entry: DatasetEntry, config: TrainConfig, settings: DatasetSettings, fingerprint: str | None
) -> bool:
    """Whether no copy of a dataset from elsewhere is left, its cache is whole, and the source holds what it held."""
    try:
        document = json.loads(manifest_path(settings).read_text(encoding="utf-8"))
        identity, content = document["source"]
        rows = [(Path(row["path"]), str(row["key"])) for row in document["samples"]]
        made_with = document["version"], document["settings"], document["vae"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if made_with != (CACHE_VERSION, _deciding(settings), fingerprint or made_with[2]):
        return False
    if not all(path.is_relative_to(settings.downloads) and not path.exists() for path, _ in rows):
        return False  # a copy that is there is looked at as ever, and one that was deleted beside it is fetched again
    store = LatentStore(settings.vae_cache, config.compress_disk_cache)
    whole = bool(rows) and all(store.has(key) for _, key in rows)
    store.flush()
    return whole and identity == _identity(entry, settings) and content == content_of(entry, settings)


def _identity(entry: DatasetEntry, settings: DatasetSettings) -> str:
    """Names where a dataset is, and all that decides which samples and captions are taken of it."""
    return digest(entry.model_dump_json(exclude=BESIDE_THE_SAMPLES), settings.instance_prompt)


def _files(settings: DatasetSettings) -> list[Path]:
    """All but captions and tables, which people keep."""
    found = list_files(settings.folder, [settings.vae_cache])[0]
    return [path for path in found if path.suffix.lower() not in WORDS]


def restore(
    path: Path, entry: DatasetEntry, config: TrainConfig, geometry: LatentGeometry, fingerprint: str | None = None
) -> tuple[DatasetScan, list[Clip]]:
    """The scan and the clips that a manifest describes. fingerprint: the VAE's, where latents are to be read.

    Raises UserError where they were made with other settings, and cannot be made again.
    """
    settings = resolve(entry, config, geometry)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        recorded, samples = document["settings"], [_sample(row, settings.id) for row in document["samples"]]
        keys = [str(row["key"]) for row in document["samples"]]
        version, vae = document["version"], document["vae"]
        rejected = [Rejected(Path(bad), reason, kind=kind) for bad, reason, kind in document.get("rejected", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error})", fix="bring the video files back; it is then made anew"
        ) from error
    wanted = _deciding(settings)
    changed = [] if recorded is None else [name for name in DECIDING if recorded.get(name) != wanted[name]]
    if version != CACHE_VERSION:
        changed.append("the version of the cache")
    if fingerprint is not None and vae != fingerprint:
        changed.append("the VAE")
    if changed:
        raise UserError(
            f"the video files of {settings.id} are gone from {settings.folder}, and its cached latents were made with "
            f"other settings: {', '.join(changed)}",
            key=f"{settings.id}.instance_data_dir",
            fix="bring the files back, or the settings",
        )
    clips = [Clip(sample, settings, key) for sample, key in zip(samples, keys, strict=True)]
    where = "made without video files" if recorded is None else "the video files are gone, the cache stands in"
    if entry.type != "local":
        where = "its copies are gone and the source is unchanged, so the cache stands in and nothing is fetched"
    return DatasetScan(entry, settings, samples, rejected, [f"{len(samples)} samples from {path}: {where}"]), clips


def _deciding(settings: DatasetSettings) -> dict[str, Any]:
    """As JSON reads it back."""
    values = {name: getattr(settings, name) for name in DECIDING}
    values["sizes"] = asdict(settings.sizes)
    return dict(json.loads(json.dumps(values)))


def _row(clip: Clip) -> dict[str, Any]:
    sample = clip.sample
    return {
        "key": clip.key,
        "path": str(sample.path),
        "captions": list(sample.captions),
        "frames": sample.frames,
        "crop": asdict(sample.crop),
        "info": asdict(sample.info),
    }


def _sample(row: dict[str, Any], dataset: str) -> VideoSample:
    return VideoSample(
        dataset=dataset,
        path=Path(row["path"]),
        captions=tuple(row["captions"]),
        info=VideoInfo(**row["info"]),
        crop=CropPlan(**row["crop"]),
        frames=row["frames"],
    )
