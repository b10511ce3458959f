"""Fills the caches: encoders are called for what is missing, and for nothing else.

Shapes: B batch, T video frames, F latent frames, L text rows, D text width.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.scan import Rejected, VideoSample
from simpletuner_dmd.data.settings import DatasetSettings
from simpletuner_dmd.data.store import LatentStore, TextStore, latent_key, text_key
from simpletuner_dmd.data.video import UnusableFile, read_clip

EncodeText = Callable[[list[str]], list[Tensor]]
"""Prompts -> for each its real rows [L_i, D], on the CPU."""

EncodeVideo = Callable[[Tensor], Tensor]
"""[B, 3, T, H, W] fp32 in [-1, 1] -> normalised latents [B, C, F, H, W]."""

# Prompts per call of the encoder: enough to fill it, few enough that the bar moves.
TEXT_BATCH = 16


def clip_to_pixels(frames_THWC: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 to [3, T, H, W] fp32 in [-1, 1], the range of Wan's VAE."""
    return torch.from_numpy(frames_THWC).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def cache_text(
    store: TextStore,
    prompts: Sequence[str],
    fingerprint: str,
    encode: EncodeText,
    *,
    write_batch: int,
    max_rows: int,
    progress: bool,
) -> None:
    """Encodes the prompts that the store lacks. What was encoded is written even if the encoder fails half-way."""
    missing = [prompt for prompt in dict.fromkeys(prompts) if text_key(prompt, fingerprint) not in store]
    waiting: dict[str, Tensor] = {}
    try:
        with tqdm(
            total=len(missing), desc="text embeddings", unit="prompt", disable=not progress or not missing
        ) as bar:
            for start in range(0, len(missing), TEXT_BATCH):
                chunk = missing[start : start + TEXT_BATCH]
                for prompt, rows_LD in zip(chunk, encode(chunk), strict=True):
                    _check_rows(prompt, rows_LD, max_rows)
                    waiting[text_key(prompt, fingerprint)] = rows_LD.detach().cpu()
                bar.update(len(chunk))
                if len(waiting) >= write_batch:
                    written, waiting = waiting, {}
                    store.save(written)
    finally:
        store.save(waiting)
        store.flush()


def _check_rows(prompt: str, rows_LD: Tensor, max_rows: int) -> None:
    """A wrong embedding in the cache would spoil every later run, so it stops here."""
    shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
    if rows_LD.ndim != 2 or not 1 <= len(rows_LD) <= max_rows:
        raise RuntimeError(f"the text encoder gave shape {tuple(rows_LD.shape)} for {shown!r}, not [1..{max_rows}, D]")
    if not torch.isfinite(rows_LD).all():
        raise RuntimeError(f"the text encoder gave numbers that are not finite for {shown!r}")
    if not rows_LD.any():
        raise RuntimeError(f"the text encoder gave only zeros for {shown!r}: its weights were not loaded")


@dataclass(frozen=True)
class Clip:
    """A sample to be cached: where it goes and which pixels it is."""

    sample: VideoSample
    settings: DatasetSettings
    key: str


def clip_of(sample: VideoSample, settings: DatasetSettings, store: LatentStore, fingerprint: str) -> Clip:
    """Names the latents of a sample by the file's bytes and all that decides which pixels the VAE sees.

    Raises UnusableFile when the file cannot be read.
    """
    try:
        content = store.memo.hash(sample.path)
    except OSError as error:
        raise UnusableFile(sample.path, f"cannot be read: {error.strerror}", damaged=False) from error
    return Clip(sample, settings, latent_key(content, _pixel_settings(sample, settings), fingerprint))


def _pixel_settings(sample: VideoSample, settings: DatasetSettings) -> dict[str, object]:
    crop = sample.crop
    return {
        "resize": [crop.resize_width, crop.resize_height],
        "crop": [crop.left, crop.top, crop.width, crop.height],
        "frames": sample.frames,
        "framerate": settings.framerate,
        "frame_interval": settings.frame_interval,
    }


def cache_latents(
    store: LatentStore,
    clips: Sequence[Clip],
    encode: EncodeVideo,
    geometry: LatentGeometry,
    *,
    batch_size: int,
    progress: bool,
) -> list[Rejected]:
    """Encodes the clips that the store lacks, in batches of one shape; returns those that turn out undecodable."""
    missing: dict[str, dict[str, Clip]] = defaultdict(dict)
    for clip in clips:
        if not store.has(clip.key):
            missing[clip.sample.bucket][clip.key] = clip
    batches = [
        list(bucket.values())[start : start + batch_size]
        for bucket in missing.values()
        for start in range(0, len(bucket), batch_size)
    ]
    rejected: list[Rejected] = []
    total = sum(map(len, batches))
    try:
        with tqdm(total=total, desc="video latents", unit="video", disable=not progress or not total) as bar:
            for group, pixels_B3THW in _decoded_ahead(batches, rejected):
                if group:
                    latents_BCFHW = encode(pixels_B3THW)
                    _check_latents(group, latents_BCFHW, geometry)
                    for clip, latents_CFHW in zip(group, latents_BCFHW, strict=True):
                        store.save(clip.key, latents_CFHW, _note(clip))
                bar.update(len(group))
    finally:
        store.flush()
    return rejected


def _decoded_ahead(batches: list[list[Clip]], rejected: list[Rejected]) -> Iterator[tuple[list[Clip], Tensor]]:
    """Decodes the next batch while the encoder works on this one. Clips that fail are moved to `rejected`."""

    def decode(batch: list[Clip]) -> tuple[list[Clip], Tensor]:
        good, pixels = [], []
        for clip in batch:
            try:
                frames_THWC = read_clip(
                    clip.sample.path,
                    num_frames=clip.sample.frames,
                    framerate=clip.settings.framerate,
                    frame_interval=clip.settings.frame_interval,
                    crop=clip.sample.crop,
                )
            except UnusableFile as error:
                rejected.append(Rejected(error.path, error.reason, error.damaged))
                continue
            good.append(clip)
            pixels.append(clip_to_pixels(frames_THWC))
        return good, torch.stack(pixels) if pixels else torch.empty(0)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        ahead = pool.submit(decode, batches[0]) if batches else None
        for following in [*batches[1:], None]:
            if ahead is None:
                return
            ready = ahead.result()
            ahead = pool.submit(decode, following) if following is not None else None
            yield ready


def _check_latents(group: list[Clip], latents_BCFHW: Tensor, geometry: LatentGeometry) -> None:
    first = group[0].sample
    expected = (len(group), *geometry.latent_shape(first.crop.width, first.crop.height, first.frames))
    if tuple(latents_BCFHW.shape) != expected:
        raise RuntimeError(f"the VAE gave {tuple(latents_BCFHW.shape)} for {first.bucket}, expected {expected}")
    if not torch.isfinite(latents_BCFHW).all():
        names = ", ".join(clip.sample.path.name for clip in group)
        raise RuntimeError(f"the VAE gave numbers that are not finite for {names}; nothing of it was cached")


def _note(clip: Clip) -> dict[str, str]:
    """What a person, or a run without the raw files, needs to know about cached latents."""
    return {
        "source": str(clip.sample.path),
        "captions": json.dumps(clip.sample.captions, ensure_ascii=False),
        "settings": json.dumps(_pixel_settings(clip.sample, clip.settings)),
    }
