"""Fills the caches: encoders are called for what is missing, and for nothing else.

Shapes: B batch, T video frames, F latent frames, L text rows, D text width.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.scan import Rejected, VideoSample
from simpletuner_dmd.data.settings import DatasetSettings
from simpletuner_dmd.data.sharing import Claims, Saver, share_out
from simpletuner_dmd.data.store import LatentStore, latent_key
from simpletuner_dmd.data.text_store import TextStore, text_keys
from simpletuner_dmd.data.video import UnusableFile, read_clip

EncodeText = Callable[[list[str]], list[Tensor]]
"""Prompts -> for each its real rows [L_i, D], on the CPU."""

EncodeVideo = Callable[[Tensor], Tensor]
"""[B, 3, T, H, W] fp32 in [-1, 1] -> normalised latents [B, C, F, H, W]."""

# Prompts per call of the encoder: enough to fill it, few enough that the bar moves.
TEXT_BATCH = 16
# Clips are handed from thread to thread in lots of about this much of the encoder's time, or of so many batches if that
# is less: threads that take turns over every small clip cost several times what they do.
LOT_SECONDS, LOT_BATCHES = 0.25, 16
# Lots of latents that may wait for the disk.
LOTS_WAITING = 4


def clip_to_pixels(frames_THWC: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 to [3, T, H, W] fp32 in [-1, 1], the range of Wan's VAE."""
    pixels_3THW = torch.from_numpy(frames_THWC).permute(3, 0, 1, 2)
    return pixels_3THW.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def cache_text(
    store: TextStore,
    prompts: Iterable[str],
    fingerprint: str,
    encode: EncodeText,
    *,
    write_batch: int,
    max_rows: int,
    progress: bool,
) -> int:
    """Encodes the prompts that the store lacks, together with the processes beside this one; returns how many it did.

    What was encoded is written even if the encoder fails half-way.
    """
    named = dict(_named(prompts, fingerprint))
    missing = store.missing(list(named))
    if not missing:
        store.flush()
        return 0

    def not_saved(keys: list[str]) -> list[str]:
        store.refresh()
        return store.missing(keys)

    done = 0
    waiting: dict[str, Tensor] = {}
    with (
        Claims(store.folder) as claims,
        tqdm(total=len(missing), desc="text embeddings", unit="prompt", disable=not progress) as bar,
        Saver() as saver,
    ):

        def write() -> None:
            nonlocal waiting
            written, waiting = waiting, {}

            def job() -> None:
                store.save(written)
                claims.give_back(written)

            saver.save(job)

        try:
            for keys in share_out(missing, str, not_saved, claims, TEXT_BATCH):
                if keys is None:
                    write()
                    saver.settle()
                    continue
                chunk = [named[key] for key in keys]
                for key, prompt, rows_LD in zip(keys, chunk, encode(chunk), strict=True):
                    _check_rows(prompt, rows_LD, max_rows)
                    waiting[key] = rows_LD.detach().cpu()
                done += len(chunk)
                bar.update(len(chunk))
                if len(waiting) >= write_batch:
                    write()
        finally:
            write()
            saver.settle()
            store.flush()
    return done


def _named(prompts: Iterable[str], fingerprint: str) -> Iterator[tuple[str, str]]:
    unique = list(dict.fromkeys(prompts))
    return zip(text_keys(unique, fingerprint), unique, strict=True)


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


Decoded = tuple[list[Clip], Tensor, list[tuple[Clip, Rejected]]]
"""One batch: clips, their pixels [B, 3, T, H, W], and clips that failed."""

Encoded = tuple[list[Clip], Tensor]
"""One batch: clips and their latents [B, C, F, H, W]."""


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
) -> tuple[int, list[Rejected]]:
    """Encodes the clips that the store lacks, in batches of one shape, together with the processes beside this one.

    Returns how many this process encoded, and the files that turn out undecodable.
    """
    missing: dict[str, dict[str, Clip]] = defaultdict(dict)
    for clip in clips:
        if not store.has(clip.key):
            missing[clip.sample.bucket][clip.key] = clip
    rejected: list[Rejected] = []
    total, done = sum(map(len, missing.values())), 0
    if not total:
        store.flush()
        return 0, rejected
    with (
        Claims(store.folder) as claims,
        tqdm(total=total, desc="video latents", unit="video", disable=not progress) as bar,
        Saver(LOTS_WAITING) as saver,
    ):
        batches = chain.from_iterable(
            share_out(list(bucket.values()), _key, _not_in(store), claims, batch_size) for bucket in missing.values()
        )
        pace = Pace()
        try:
            for lot in _decoded_ahead(_lots(batches, pace), saver):
                encoded: list[Encoded] = []
                began = time.perf_counter()
                try:
                    for group, pixels_B3THW, failed in lot:
                        claims.give_back(clip.key for clip, _ in failed)
                        rejected += [why for _, why in failed]
                        bar.update(len(group) + len(failed))
                        if not group:
                            continue
                        latents_BCFHW = encode(pixels_B3THW)
                        _check_latents(group, latents_BCFHW, geometry)
                        encoded.append((group, latents_BCFHW))
                        done += len(group)
                finally:
                    if encoded:
                        saver.save(partial(_save_lot, store, claims, encoded))
                pace.learn(len(lot), time.perf_counter() - began)
        finally:
            saver.settle()
            store.flush()
    return done, rejected


class Pace:
    """How many batches make a lot: as many as the encoder has lately done in LOT_SECONDS."""

    def __init__(self) -> None:
        self.batches = 1

    def learn(self, batches: int, seconds: float) -> None:
        """Lots grow slowly, so that the processes which share a small dataset each get some of it."""
        fitting = int(LOT_SECONDS * batches / max(seconds, 1e-9))
        self.batches = max(1, min(fitting, 2 * self.batches, LOT_BATCHES))


def _key(clip: Clip) -> str:
    return clip.key


def _not_in(store: LatentStore) -> Callable[[list[Clip]], list[Clip]]:
    return lambda clips: [clip for clip in clips if not store.has(clip.key)]


def _save_lot(store: LatentStore, claims: Claims, encoded: list[Encoded]) -> None:
    store.save_several(
        (clip.key, latents_CFHW, _note(clip))
        for group, latents_BCFHW in encoded
        for clip, latents_CFHW in zip(group, latents_BCFHW, strict=True)
    )
    claims.give_back(clip.key for group, _ in encoded for clip in group)


def _lots(batches: Iterable[list[Clip] | None], pace: Pace) -> Iterator[list[list[Clip]] | None]:
    """`batches` in lots as large as `pace` says; None, which ends a lot, is passed on."""
    lot: list[list[Clip]] = []
    for batch in batches:
        if batch is not None:
            lot.append(batch)
            if len(lot) < pace.batches:
                continue
        if lot:
            yield lot
            lot = []
        if batch is None:
            yield None
    if lot:
        yield lot


def _decoded_ahead(lots: Iterable[list[list[Clip]] | None], saver: Saver) -> Iterator[list[Decoded]]:
    """Decodes the next lot while the encoder works on this one.

    Where `lots` says None, everything before it is encoded and saved first.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        ahead: Future[list[Decoded]] | None = None
        for lot in lots:
            following = pool.submit(_decode_lot, lot) if lot is not None else None
            if ahead is not None:
                yield ahead.result()
            ahead = following
            if lot is None:
                saver.settle()
        if ahead is not None:
            yield ahead.result()


def _decode_lot(lot: list[list[Clip]]) -> list[Decoded]:
    return [_decode(batch) for batch in lot]


def _decode(batch: list[Clip]) -> Decoded:
    good, pixels, failed = [], [], []
    for clip in batch:
        try:
            frames_THWC = read_clip_of(clip)
        except UnusableFile as error:
            failed.append((clip, Rejected(error.path, error.reason, error.damaged)))
            continue
        good.append(clip)
        pixels.append(clip_to_pixels(frames_THWC))
    if len(pixels) == 1:
        return good, pixels[0][None], failed  # without another copy
    return good, torch.stack(pixels) if pixels else torch.empty(0), failed


def read_clip_of(clip: Clip) -> np.ndarray:
    """[T, H, W, 3] uint8: the pictures of a clip as the VAE sees them. Raises UnusableFile."""
    return read_clip(
        clip.sample.path,
        num_frames=clip.sample.frames,
        framerate=clip.settings.framerate,
        frame_interval=clip.settings.frame_interval,
        crop=clip.sample.crop,
    )


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
