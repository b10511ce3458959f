"""The caches on disk: VAE latents, one file per sample. Text embeddings are in text_store.py.

A key names the content and every setting that changes the result, so a change of either is a miss, never a stale hit.
Tensors are safetensors, never pickles, with zstd around them where `compress_disk_cache` asks.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.disk import HashMemo, digest, write_several_whole
from simpletuner_dmd.durable import sweep

# Part of every key: raised when the meaning of what is stored changes.
CACHE_VERSION = "1"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MEMO_NAME = "hashes.json"


class DamagedEntryError(ValueError):
    """A cache entry whose bytes are not what was written."""


def latent_key(content: str, settings: Mapping[str, object], fingerprint: str) -> str:
    """content: hash of the video file; settings: everything that decides which pixels reach the VAE."""
    return digest("latent", CACHE_VERSION, fingerprint, content, json.dumps(settings, sort_keys=True))


# --- one tensor as bytes ----------------------------------------------------------------------------------------------


def encode_tensor(tensor: Tensor, note: Mapping[str, str], compress: bool) -> bytes:
    """A safetensors file in memory, with a hash of the tensor inside and zstd around it if `compress`."""
    tensor = tensor.detach().cpu().contiguous()
    metadata = {**note, "blake2b": _tensor_hash(tensor)}
    data = save_bytes({"tensor": tensor}, metadata=metadata)
    if compress:
        import zstandard

        data = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)
    return data


def decode_tensor(data: bytes) -> tuple[Tensor, dict[str, str]]:
    """(tensor, note) of `encode_tensor`'s bytes. Raises DamagedEntryError unless they are exactly what was written."""
    if data[:4] == ZSTD_MAGIC:
        import zstandard

        try:
            data = zstandard.ZstdDecompressor().decompress(data)
        except zstandard.ZstdError as error:
            raise DamagedEntryError(f"cannot be decompressed ({error})") from error
    try:
        (length,) = struct.unpack("<Q", data[:8])
        note = dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))
        tensor = load_bytes(data)["tensor"]
    except (struct.error, ValueError, KeyError, AttributeError, SafetensorError, OverflowError) as error:
        raise DamagedEntryError(f"is not a whole safetensors file ({error})") from error
    if note.pop("blake2b", None) != _tensor_hash(tensor):
        raise DamagedEntryError("does not match its own checksum")
    return tensor, note


def _tensor_hash(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return digest(str(tensor.dtype), str(tuple(tensor.shape)), raw)


def damaged(path: Path, error: Exception) -> UserError:
    """What a person is told when an entry turns out damaged while training, after it had been verified."""
    return UserError(
        f"the cache file {path} {error}",
        fix="run the same command again: a damaged entry is made anew (and look at the disk: it was whole at start)",
    )


# --- latents ----------------------------------------------------------------------------------------------------------


class LatentStore:
    """`folder`/<2 digits>/<key>.safetensors[.zst], one per sample: [C, F, H, W] normalised latents."""

    def __init__(self, folder: Path, compress: bool) -> None:
        self.folder, self.compress = folder, compress
        self.memo = HashMemo(folder / MEMO_NAME)
        for place in (folder, *folder.glob("[0-9a-f][0-9a-f]")):
            sweep(place)

    def _path(self, key: str, compressed: bool) -> Path:
        return self.folder / key[:2] / (f"{key}.safetensors" + (".zst" if compressed else ""))

    def _existing(self, key: str) -> Path | None:
        """The entry's file, compressed or not: turning `compress_disk_cache` over costs nothing."""
        choices = (self._path(key, self.compress), self._path(key, not self.compress))
        return next((path for path in choices if path.is_file()), None)

    def has(self, key: str) -> bool:
        """Whether a whole entry is there. A damaged one is removed, so that it is made anew."""
        path = self._existing(key)
        if path is None:
            return False
        if self._is_verified(path):
            return True
        try:
            decode_tensor(path.read_bytes())
        except DamagedEntryError:
            path.unlink(missing_ok=True)
            return self.has(key)
        self._mark_verified(path)
        return True

    def save(self, key: str, latents_CFHW: Tensor, note: Mapping[str, str]) -> None:
        """As `save_several`."""
        self.save_several([(key, latents_CFHW, note)])

    def save_several(self, entries: Iterable[tuple[str, Tensor, Mapping[str, str]]]) -> None:
        """(key, latents, note) of one or more. Raises UserError when the disk is full; nothing half-written is left."""
        files = {
            self._path(key, self.compress): encode_tensor(latents_CFHW, note, self.compress)
            for key, latents_CFHW, note in entries
        }
        write_several_whole(files)
        for path in files:
            self._mark_verified(path)

    def load(self, key: str) -> Tensor:
        """[C, F, H, W] in the stored precision. Raises UserError for an entry that vanished or rotted."""
        path = self._existing(key)
        if path is None:
            raise damaged(self._path(key, self.compress), DamagedEntryError("is gone"))
        try:
            return decode_tensor(path.read_bytes())[0]
        except DamagedEntryError as error:
            path.unlink(missing_ok=True)
            raise damaged(path, error) from error

    def note(self, key: str) -> dict[str, str]:
        """What was written beside the tensor: source file, caption, settings."""
        path = self._existing(key)
        return decode_tensor(path.read_bytes())[1] if path else {}

    def flush(self) -> None:
        self.memo.save()

    # An entry that was read whole once is not read again at the next start while its size and time stay the same.
    def _is_verified(self, path: Path) -> bool:
        return self.memo.known(path)

    def _mark_verified(self, path: Path) -> None:
        self.memo.remember(path, "whole")
