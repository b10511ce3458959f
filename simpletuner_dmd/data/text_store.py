"""Text embeddings on disk: shards of safetensors with the real rows of many prompts each, and an index of all shards.

A shard is one safetensors file that any tool can open:

    rows    [sum of L_i, D]  the embeddings end to end, without padding; or, compressed,
    frames  [bytes]          one zstd frame per prompt, end to end
    ends    [N] int64        where in rows (in bytes) or frames each prompt ends
    keys    [N, 2] int64     what names each prompt (16 bytes), see `text_key`
    hashes  [N, 2] int64     16 bytes of hash of each prompt's key and stored bytes

The tables come first in the file, so that one that lost its end loses only the last prompts.

A shard is written once and never changed, so processes need no lock to read or add. The index is one small file with
the place of every prompt in every shard, and size and time of the shards when they were last read whole. It is derived:
a lost, old or damaged one costs a reading of the shards it does not know, and nothing else. So a start reads one file,
looks at the folder once and finds all prompts in a sorted array, 56 bytes per prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from simpletuner_dmd.data.disk import digest, write_whole
from simpletuner_dmd.data.store import CACHE_VERSION, DamagedEntryError, damaged
from simpletuner_dmd.durable import sweep

INDEX = "index.safetensors"
SHARD = "text-*.safetensors"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
MERGE_AT = 1 << 13
# What one prompt's place is: the two halves of its key, its shard, its first byte in that file, bytes, their hash.
PLACE = np.dtype(
    [("key", "<u8"), ("rest", "<u8"), ("shard", "<i4"), ("start", "<i8"), ("size", "<i4"), ("hash", "V16")]
)


def text_key(caption: str, fingerprint: str) -> str:
    """32 hex digits. fingerprint: what names the tokenizer, the encoder, its weights and its precision."""
    return digest("text", CACHE_VERSION, fingerprint, caption)


def text_keys(captions: Iterable[str], fingerprint: str) -> list[str]:
    """`text_key` of each, at a fifth of the cost: what they share is hashed once."""
    shared = hashlib.blake2b(digest_size=16)
    for part in ("text", CACHE_VERSION, fingerprint):
        shared.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    keys = []
    for caption in captions:
        data, state = caption.encode(), shared.copy()
        state.update(len(data).to_bytes(8, "little") + data)
        keys.append(state.hexdigest())
    return keys


@dataclass(frozen=True)
class Shard:
    """A file of the store, as it was when it was read whole."""

    name: str
    size: int
    changed: int  # st_mtime_ns
    dtype: str
    width: int
    compressed: bool

    def is_unchanged(self, status: os.stat_result) -> bool:
        return (self.size, self.changed) == (status.st_size, status.st_mtime_ns)


class TextStore:
    """Embeddings of prompts by `text_key`: of each only its real rows [L_i, D], never the padding.

    Safe to use from two threads, and from several processes that share the folder.
    """

    def __init__(self, folder: Path, compress: bool) -> None:
        self.folder, self.compress = folder, compress
        self._shards: list[Shard] = []
        self._set_places(np.empty(0, PLACE))
        self._recent: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._changed = False
        self._lock = threading.RLock()
        sweep(folder)
        self._open_index()
        self._look(verify=True)

    def __len__(self) -> int:
        with self._lock:
            self._merge()
            return len(self._places)

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])

    # --- reading ----------------------------------------------------------------------------------------------------

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that the store does not hold, in order."""
        with self._lock:
            recent = self._recent
            asked = np.frombuffer(bytes.fromhex("".join(keys)), "<u8").reshape(-1, 2)
            found = self._find(asked) >= 0
            return [key for key, there in zip(keys, found.tolist(), strict=True) if not there and key not in recent]

    def load(self, key: str) -> Tensor:
        """[L, D] in the stored precision. Raises KeyError if absent, UserError for an entry that vanished or rotted."""
        place, shard = self._place_of(key)
        path = self.folder / shard.name
        try:
            with path.open("rb") as file:
                file.seek(int(place["start"]))
                blob = file.read(int(place["size"]))
            if _entry_hash(bytes.fromhex(key), shard.dtype, shard.width, blob) != place["hash"].tobytes():
                raise DamagedEntryError("does not match its own checksum")
            return _rows_of(blob, shard)
        except (OSError, DamagedEntryError) as error:
            self._distrust(shard)
            raise damaged(path, error) from error

    def _place_of(self, key: str) -> tuple[Any, Shard]:
        with self._lock:
            place = self._recent.get(key)
            if place is None:
                (at,) = self._find(np.frombuffer(bytes.fromhex(key), "<u8").reshape(1, 2))
                if at < 0:
                    raise KeyError(key)
                place = self._places[at]
            return place, self._shards[place["shard"]]

    def _find(self, asked: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Of each key (two halves) its place in the sorted array, or -1."""
        first = np.searchsorted(self._sorted, asked[:, 0])
        found = np.full(len(asked), -1, np.int64)
        for step in range(len(self._places)):  # one round, unless the first 64 bits of two keys are equal
            at = first + step
            open_ = (found < 0) & (at < len(self._places))
            open_[open_] = self._sorted[at[open_]] == asked[open_, 0]
            if not open_.any():
                break
            right = open_.copy()
            right[open_] = self._places["rest"][at[open_]] == asked[open_, 1]
            found[right] = at[right]
        return found

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self, embeddings: Mapping[str, Tensor]) -> None:
        """Writes one shard: key -> [L_i, D], all of one width and type. Raises UserError when the disk is full."""
        if not embeddings:
            return
        data, name = _shard_bytes(embeddings, self.compress)
        path = self.folder / name
        write_whole(path, data)
        with self._lock:
            self._take_in(path, verify=False)

    def refresh(self) -> None:
        """Takes in the shards that other processes have written since.

        Only their tables are read, as this process does not read again what it wrote: a shard has its name only once
        it is whole, and each entry is checked when it is loaded.
        """
        with self._lock:
            self._look(verify=False)

    def _look(self, *, verify: bool) -> None:
        for path in sorted(self.folder.glob(SHARD)):
            if path.name not in self._seen:
                self._take_in(path, verify=verify)

    def flush(self) -> None:
        """Writes the index, if shards have come or gone. Raises UserError when the disk is full."""
        with self._lock:
            self.refresh()
            if not self._changed:
                return
            self._merge()
            shards = json.dumps([list(vars(shard).values()) for shard in self._shards])
            places = torch.from_numpy(self._places.view(np.uint8).reshape(-1, PLACE.itemsize))
            write_whole(
                self.folder / INDEX, save_bytes({"places": places}, {"version": CACHE_VERSION, "shards": shards})
            )
            self._changed = False

    @property
    def bytes_on_disk(self) -> int:
        """Of all shards."""
        return sum({shard.name: shard.size for shard in self._shards if shard.name in self._seen}.values())

    # --- the index --------------------------------------------------------------------------------------------------

    def _open_index(self) -> None:
        """What the index says of shards that are as they were; of the others nothing is taken on trust."""
        try:
            data = (self.folder / INDEX).read_bytes()
            note, tensors = _header(data)["__metadata__"], load_bytes(data)
            shards = [Shard(*row) for row in json.loads(note["shards"])]
            if note["version"] != CACHE_VERSION:
                return
            places = tensors["places"].numpy().reshape(-1).view(PLACE)
        except (OSError, ValueError, KeyError, TypeError, struct.error, SafetensorError):
            return
        unchanged = []
        for shard in shards:
            try:
                unchanged.append(shard.is_unchanged((self.folder / shard.name).stat()))
            except OSError:
                unchanged.append(False)
        self._shards = shards
        self._seen = {shard.name for shard, same in zip(shards, unchanged, strict=True) if same}
        if not all(unchanged):
            places = places[np.asarray(unchanged, bool)[places["shard"]]]
            self._changed = True
        self._set_places(places)

    def _take_in(self, path: Path, *, verify: bool) -> None:
        """Notes the entries of a shard; with `verify` it is read whole, and what is damaged is left out."""
        self._seen.add(path.name)
        try:
            shard, places = _read_shard(path, verify=verify)
        except (OSError, DamagedEntryError):
            return
        places["shard"] = len(self._shards)
        self._shards.append(shard)
        names = np.stack([places["key"], places["rest"]], axis=1).tobytes().hex()
        self._recent.update({names[32 * i : 32 * i + 32]: place for i, place in enumerate(places)})
        self._changed = True
        if len(self._recent) >= MERGE_AT:
            self._merge()

    def _merge(self) -> None:
        """Moves recent entries into the sorted array."""
        if not self._recent:
            return
        merged = np.concatenate([np.array(list(self._recent.values()), PLACE), self._places])
        order = np.lexsort((merged["rest"], merged["key"]))
        merged = merged[order]
        again = np.zeros(len(merged), bool)
        again[1:] = (merged["key"][1:] == merged["key"][:-1]) & (merged["rest"][1:] == merged["rest"][:-1])
        self._set_places(merged[~again])
        self._recent = {}

    def _set_places(self, places: NDArray[Any]) -> None:
        """places: sorted by key. Their keys once more on their own, because a search copies what is not contiguous."""
        self._places, self._sorted = places, np.ascontiguousarray(places["key"])

    def _distrust(self, shard: Shard) -> None:
        """The next start reads this shard whole."""
        with self._lock:
            self._merge()
            number = self._shards.index(shard)
            self._shards[number] = Shard(**{**vars(shard), "changed": -1})
            self._changed = True
            self.flush()


# --- shards -----------------------------------------------------------------------------------------------------------


def _entry_hash(key: bytes, dtype: str, width: int, blob: bytes) -> bytes:
    return bytes.fromhex(digest(key, dtype, str(width), blob))


def _shard_bytes(embeddings: Mapping[str, Tensor], compress: bool) -> tuple[bytes, str]:
    """(content, file name) of a shard. It is named by what it holds: a damaged one is replaced only by its equal."""
    kinds = {(rows_LD.dtype, rows_LD.shape[1]) for rows_LD in embeddings.values()}
    assert len(kinds) == 1, f"embeddings of one encoder are of one type and width, not {kinds}"
    ((kind, width),) = kinds
    dtype = str(kind).removeprefix("torch.")
    blobs = [_raw(rows_LD) for rows_LD in embeddings.values()]
    if compress:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=1)  # of bf16 embeddings level 3 saves 0.02% more, in 1.3 x the time
        blobs = [compressor.compress(blob) for blob in blobs]
    keys = [bytes.fromhex(key) for key in embeddings]
    hashes = [_entry_hash(key, dtype, width, blob) for key, blob in zip(keys, blobs, strict=True)]
    joined = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8)
    tensors = {
        "ends": torch.tensor([len(blob) for blob in blobs]).cumsum(0),
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).reshape(-1, 2),
        "hashes": torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64).reshape(-1, 2),
    }
    tensors |= {"frames": joined} if compress else {"rows": joined.view(kind).reshape(-1, width)}
    note = {"version": CACHE_VERSION, "dtype": dtype, "width": str(width)}
    return save_bytes(tensors, note), f"text-{digest(*keys, *hashes)}.safetensors"


def _raw(rows_LD: Tensor) -> bytes:
    return rows_LD.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _rows_of(blob: bytes, shard: Shard) -> Tensor:
    """[L, D] of the stored bytes of one prompt."""
    if shard.compressed:
        import zstandard

        try:
            blob = zstandard.ZstdDecompressor().decompress(blob)
        except zstandard.ZstdError as error:
            raise DamagedEntryError(f"cannot be decompressed ({error})") from error
    return torch.frombuffer(bytearray(blob), dtype=DTYPES[shard.dtype]).reshape(-1, shard.width)


def _header(start: bytes) -> dict[str, Any]:
    """The header of a safetensors file, of which `start` is the beginning. Raises ValueError or struct.error."""
    (length,) = struct.unpack("<Q", start[:8])
    header = json.loads(start[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    return header


def _read_shard(path: Path, *, verify: bool) -> tuple[Shard, NDArray[Any]]:
    """A shard and the places of its entries (`shard` is left 0); `verify`: of those whose bytes are what was written.

    Raises DamagedEntryError where not even its own table can be read, and OSError.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > status.st_size:
                raise ValueError("header beyond the end of the file")
            file.seek(0)
            header = _header(file.read(8 + length))
            note, first = header["__metadata__"], 8 + length
            shard = Shard(path.name, status.st_size, status.st_mtime_ns, note["dtype"], int(note["width"]),
                          "frames" in header)  # fmt: skip
            if note["version"] != CACHE_VERSION or shard.dtype not in DTYPES:
                raise ValueError("of another version")
            keys = _column(file, first, header["keys"], np.dtype("V16"))
            hashes = _column(file, first, header["hashes"], np.dtype("V16"))
            ends = _column(file, first, header["ends"], np.dtype("<i8"))
            start = first + int(header["frames" if shard.compressed else "rows"]["data_offsets"][0])
        except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise DamagedEntryError(f"is not a whole shard ({error})") from error
        places = _places(keys, hashes, ends, start)
        if not len(places) or int(places["start"][-1] + places["size"][-1]) > shard.size or (places["size"] < 0).any():
            # A table of nonsense, or the end of the file is missing: each entry is looked at, whoever asks.
            verify = True
        return shard, places[_are_whole(file, shard, places)] if verify else places


def _column(file: BinaryIO, first: int, entry: Mapping[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    file.seek(first + int(begin))
    return np.frombuffer(file.read(int(end) - int(begin)), dtype)


def _places(keys: NDArray[Any], hashes: NDArray[Any], ends: NDArray[Any], start: int) -> NDArray[Any]:
    if not len(keys) == len(hashes) == len(ends):
        raise DamagedEntryError("has a table that contradicts itself")
    places = np.zeros(len(keys), PLACE)
    sizes = np.diff(ends, prepend=0)
    places["key"], places["rest"] = np.frombuffer(keys.tobytes(), "<u8").reshape(-1, 2).T
    places["start"], places["size"], places["hash"] = start + ends - sizes, sizes, hashes
    return places


def _are_whole(file: BinaryIO, shard: Shard, places: NDArray[Any]) -> NDArray[np.bool_]:
    whole = np.zeros(len(places), bool)
    for number, place in enumerate(places):
        size = int(place["size"])
        if not 0 < size <= shard.size or not 0 < int(place["start"]) <= shard.size:
            continue
        file.seek(int(place["start"]))
        key = place["key"].tobytes() + place["rest"].tobytes()
        whole[number] = _entry_hash(key, shard.dtype, shard.width, file.read(size)) == place["hash"].tobytes()
    return whole
