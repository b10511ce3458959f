"""Datasets of the Hugging Face Hub, or parquet files on this machine, read row by row.

Of a parquet file only the columns that are asked for are read, and of the Hub's only their bytes travel. Videos are
written to the download folder as they pass; an index beside them says that a file was read whole, so the next start
reads nothing. A Hub dataset without parquet files (a folder of videos) is copied as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.disk import digest
from simpletuner_dmd.data.findings import BAD_ROW, CANNOT_FETCH, Rejected, UnusableFile
from simpletuner_dmd.data.kinds import suffix_of
from simpletuner_dmd.data.sources.download import copy_whole, fetch, inside, is_url, json_whole
from simpletuner_dmd.data.sources.items import Item, Listing, chosen
from simpletuner_dmd.data.sources.table import CAPTION_COLUMNS, captions_in, import_parquet

ROWS_AT_ONCE = 8  # videos of this many rows are in memory together


@dataclass(frozen=True)
class Shard:
    """A parquet file. place: how it is opened and shown; version: changes when its content does."""

    place: str
    version: str
    filesystem: Any = None

    def open(self, read_ahead: int) -> IO[bytes]:
        """read_ahead: bytes that are fetched beyond what is asked for, where the file is not on this machine."""
        if self.filesystem is None:
            return Path(self.place).open("rb")
        handle: IO[bytes] = self.filesystem.open(self.place, "rb", block_size=read_ahead)
        return handle


def find_shards(entry: DatasetEntry) -> list[Shard]:
    """The parquet files of the split, in order; empty where a Hub dataset has none. Raises UserError."""
    assert entry.dataset_name, "checked while loading"
    local = Path(entry.dataset_name)
    if local.exists():
        paths = [local] if local.is_file() else sorted(local.rglob("*.parquet"))
        names = _of_split([path.relative_to(local).as_posix() or path.name for path in paths], entry)
        shards = []
        for name in names:
            path = local if local.is_file() else local / name
            about = path.stat()
            shards.append(Shard(str(path), f"{about.st_size}-{about.st_mtime_ns}"))
        if not shards:
            raise _no_split(entry, f"{local} holds no parquet file")
        return shards
    return _hub_shards(entry)


def _hub_shards(entry: DatasetEntry) -> list[Shard]:
    filesystem, versions = _hub_files(entry)
    names = {path.split("/", 3)[-1]: path for path in versions if path.endswith(".parquet")}
    return [Shard(names[name], versions[names[name]], filesystem) for name in _of_split(sorted(names), entry)]


def _hub_files(entry: DatasetEntry) -> tuple[Any, dict[str, str]]:
    """(the Hub's file system, path -> version of each file of the dataset). Raises UserError."""
    from huggingface_hub import HfFileSystem

    filesystem = HfFileSystem(skip_instance_cache=True)
    root = f"datasets/{entry.dataset_name}" + (f"@{entry.revision}" if entry.revision else "")
    listed = _ask_hub(entry, lambda: filesystem.find(root, detail=True))
    return filesystem, {path: str(about.get("blob_id") or about["size"]) for path, about in listed.items()}


def content_of(entry: DatasetEntry, shards: list[Shard]) -> str:
    """The name of what the dataset holds: its `shards`, or all of its files; none of them is fetched.

    Raises UserError.
    """
    versions = {shard.place: shard.version for shard in shards} or _hub_files(entry)[1]
    return digest(json.dumps(sorted(versions.items())))


def _ask_hub(entry: DatasetEntry, question: Any) -> Any:
    """The Hub's answer; what goes wrong on the way is said in one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return question()
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the dataset {entry.dataset_name} cannot be read from the Hub: {words}",
            key=f"{entry.id}.dataset_name",
            fix="check its name and revision, your connection, and `hf auth login` for a private dataset",
        ) from error


def _of_split(names: list[str], entry: DatasetEntry) -> list[str]:
    """Files of the split: `train-00000-of-00002.parquet`, `train.parquet`, `train/…`; for train, else all."""
    if len(names) <= 1:
        return names

    def belongs(name: str) -> bool:
        path = PurePosixPath(name)
        return entry.split in path.parts[:-1] or path.stem == entry.split or path.stem.startswith(f"{entry.split}-")

    found = [name for name in names if belongs(name)]
    if found or entry.split == "train":
        return found or names
    raise _no_split(entry, f"no parquet file belongs to the split {entry.split}; there are {', '.join(names[:10])}")


def _no_split(entry: DatasetEntry, message: str) -> UserError:
    return UserError(message, key=f"{entry.id}.split", fix="correct split or dataset_name")


def read_captions(
    entry: DatasetEntry, shards: list[Shard], folder: Path
) -> tuple[list[tuple[str, ...]], list[Rejected]]:
    """The captions of every row; no other column is read, and of the Hub's each file once."""
    rows: list[tuple[str, ...]] = []
    rejected: list[Rejected] = []
    for shard in shards:

        def ask(shard: Shard = shard) -> list[tuple[str, ...]]:
            return [captions_in(record["caption"]) for _, record in _records(entry, shard, media=None)]

        for number, captions in enumerate(_remembered(shard, folder, f"captions {entry.caption_column}", ask), 1):
            if captions:
                rows.append(tuple(captions))
            else:
                rejected.append(Rejected(Path(shard.place), f"row {number} has no caption", kind=BAD_ROW))
    return chosen(rows, entry.max_num_samples, entry.id), rejected


def _remembered(shard: Shard, folder: Path, what: str, ask: Callable[[], Any]) -> Any:
    """What `ask` found, as JSON reads it back. Of a file on the Hub it is kept in `folder` and asked once."""
    if shard.filesystem is None:
        return ask()
    name = hashlib.sha256("\x1f".join([shard.place, shard.version, what]).encode()).hexdigest()[:16]
    kept = folder / f"{name}.json"
    try:
        return json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = ask()
    json_whole(kept, lambda file: json.dump(found, file, ensure_ascii=False))
    return found


def list_media(entry: DatasetEntry, shards: list[Shard], folder: Path) -> Listing:
    """Every row of the split, or a seeded choice of max_num_samples of them, as a file below `folder` with captions."""
    column = entry.image_column if entry.dataset_type == "image" else entry.video_column
    wanted: list[set[int] | None] = [None] * len(shards)
    if entry.max_num_samples is not None:
        # The footers say how many rows there are; of the videos only those that are chosen are read.
        counts = [_remembered(shard, folder, "rows", partial(_row_count, entry, shard)) for shard in shards]
        rows = [(index, row) for index, count in enumerate(counts) for row in range(1, count + 1)]
        taken = chosen(rows, entry.max_num_samples, entry.id)
        wanted = [{row for index, row in taken if index == number} for number in range(len(shards))]
    listing = Listing(content=content_of(entry, shards))
    for shard, rows_of_it in zip(shards, wanted, strict=True):
        one = _list_shard(entry, shard, column, folder, rows_of_it)
        listing.items += one.items
        listing.rejected += one.rejected
    return listing


def _row_count(entry: DatasetEntry, shard: Shard) -> int:
    with _parquet(entry, shard, read_ahead=1 << 16) as file:
        return int(file.metadata.num_rows)


def _list_shard(entry: DatasetEntry, shard: Shard, column: str, folder: Path, wanted: set[int] | None) -> Listing:
    rows = "all" if wanted is None else ",".join(map(str, sorted(wanted)))
    content = "\x1f".join([shard.place, shard.version, column])
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    # Another choice of rows, or another column of captions, is another index over the same files.
    index = folder / f"{name}-{hashlib.sha256(f'{entry.caption_column} {rows}'.encode()).hexdigest()[:8]}.json"
    known = _read_index(index, folder)
    if known is not None:
        return known
    listing = Listing()
    for number, record in _records(entry, shard, media=column, wanted=wanted):
        label = f"{PurePosixPath(shard.place).stem}-{number:06d}"
        try:
            path = _write_media(record["media"], folder / f"{name}-{number:06d}", shard, number, folder)
        except UnusableFile as error:
            listing.rejected.append(Rejected.of(error))
            continue
        listing.items.append(Item(label, path, captions_in(record["caption"])))
    found = {
        "source": shard.place,
        "items": [[item.name, str(item.path), list(item.captions)] for item in listing.items],
        "rejected": [[str(bad.path), bad.reason, bad.kind] for bad in listing.rejected],
    }
    json_whole(index, lambda file: json.dump(found, file, ensure_ascii=False))
    return listing


def _read_index(index: Path, folder: Path) -> Listing | None:
    """What an earlier start wrote, if all of its files are still there."""
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))
        items = [Item(name, Path(file), tuple(captions)) for name, file, captions in rows["items"]]
        rejected = [Rejected(Path(path), reason, kind=kind) for path, reason, kind in rows["rejected"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A failed download is tried again.
    return Listing(items, rejected) if not rejected and all(item.path.is_file() for item in items) else None


def _write_media(value: Any, stem: Path, shard: Shard, number: int, folder: Path) -> Path:
    """The file of one cell: its bytes, or what its path or URL names. Raises UnusableFile."""
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(value, bytes):
        content, name = value, None
    if content:
        target = stem.with_name(stem.name + suffix_of(content))
        if not (target.is_file() and target.stat().st_size == len(content)):
            try:
                copy_whole(target, io.BytesIO(content), len(content))
            except OSError as error:
                reason = f"row {number} of {shard.place} cannot be written: {error.strerror}"
                raise UnusableFile(target, reason, False, CANNOT_FETCH) from error
        return target
    where = Path(shard.place)
    if isinstance(name, str) and is_url(name):
        return fetch(name, folder)
    if isinstance(name, str) and name and shard.filesystem is None:
        beside = where.parent / name
        if beside.is_file():
            return beside
    raise UnusableFile(where, f"row {number} holds neither bytes nor a file that is there", False, BAD_ROW)


@contextmanager
def _parquet(entry: DatasetEntry, shard: Shard, *, read_ahead: int) -> Iterator[Any]:
    """The opened file; UserError for one that cannot be read."""
    parquet = import_parquet(f"{entry.id}.type")
    import pyarrow

    try:
        with shard.open(read_ahead) as handle, parquet.ParquetFile(handle) as file:
            yield file
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{shard.place} cannot be read as parquet: {error}", key=f"{entry.id}.dataset_name",
                        fix="fetch it again, or leave it out") from error  # fmt: skip


def _records(
    entry: DatasetEntry, shard: Shard, *, media: str | None, wanted: set[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, {"caption": cell, "media": cell}) of one file, a few rows at a time. Raises UserError.

    wanted: only these rows; groups of rows that hold none of them are not read.
    """
    # Captions lie between videos, so what comes after them is not wanted.
    with _parquet(entry, shard, read_ahead=5 << 20 if media else 1 << 16) as file:
        available = file.schema_arrow.names
        caption = _column(entry, entry.caption_column, available, shard, needed=media is None)
        if media is not None and media not in available:
            key = "image_column" if entry.dataset_type == "image" else "video_column"
            raise UserError(f'{shard.place} has no column "{media}"; it has {", ".join(available)}',
                            key=f"{entry.id}.{key}", fix="name one of these")  # fmt: skip
        columns = [name for name in (media, caption) if name is not None]
        first = 1
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            rows = range(first, first + count)
            first += count
            if wanted is not None and wanted.isdisjoint(rows):
                continue
            batches = file.iter_batches(ROWS_AT_ONCE if media else 4096, row_groups=[group], columns=columns)
            records = (record for batch in batches for record in batch.to_pylist())
            for number, record in zip(rows, records, strict=True):
                if wanted is None or number in wanted:
                    yield number, {"caption": record.get(caption), "media": record.get(media)}


def _column(entry: DatasetEntry, asked: str | None, available: list[str], shard: Shard, *, needed: bool) -> str | None:
    if asked is not None and asked in available:
        return asked
    found = next((name for name in CAPTION_COLUMNS if name in available), None) if asked is None else None
    if found is None and (needed or asked is not None):
        wanted = f'no column "{asked}"' if asked else "no column of captions"
        raise UserError(f"{shard.place} has {wanted}; it has {', '.join(available)}",
                        key=f"{entry.id}.caption_column", fix="name one of these")  # fmt: skip
    return found


def copy_repository(entry: DatasetEntry, folder: Path) -> None:
    """Copies the files of a Hub dataset into `folder`; files that are there and unchanged are not fetched again."""
    from huggingface_hub import HfApi, snapshot_download

    assert entry.dataset_name
    names = _ask_hub(entry, lambda: HfApi().list_repo_files(entry.dataset_name, revision=entry.revision,
                                                            repo_type="dataset"))  # fmt: skip
    for name in names:
        inside(folder, name, f"{entry.id}.dataset_name")
    _ask_hub(entry, lambda: snapshot_download(entry.dataset_name, repo_type="dataset", revision=entry.revision,
                                              local_dir=folder))  # fmt: skip
