"""The files of any dataset, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.data.disk import digest
from simpletuner_dmd.data.findings import CANNOT_READ, Rejected, UnusableFile
from simpletuner_dmd.data.settings import DatasetSettings
from simpletuner_dmd.data.sources import bucket, hub
from simpletuner_dmd.data.sources.download import fetch, in_parallel, is_url
from simpletuner_dmd.data.sources.folder import list_files
from simpletuner_dmd.data.sources.items import Item, Listing, chosen
from simpletuner_dmd.data.sources.table import TABLE_NAMES, CaptionTable, Row, find_table, read_table

CAPTION_FILES = (".txt",)


def list_samples(
    entry: DatasetEntry, settings: DatasetSettings, skip: Sequence[Path]
) -> tuple[Listing, CaptionTable | None]:
    """Every file of a dataset of videos or pictures, and the table its captions are in, if there is one.

    skip: folders below the dataset's that hold something else. Remote files are fetched. Raises UserError.
    """
    if entry.type == "csv":
        return _from_rows(entry, settings), None
    if entry.type == "huggingface":
        shards = hub.find_shards(entry)
        if shards:
            return hub.list_media(entry, shards, settings.downloads), None
        content = hub.content_of(entry, [])  # before the copy: what changes meanwhile is then a change
        hub.copy_repository(entry, settings.downloads)
        table_path = sidecar_table(settings.downloads)
        listing, table = _from_folder(entry, settings, settings.downloads, skip, table_path)
        listing.content = content
        return listing, table
    failed: list[Rejected] = []
    folder, content = settings.folder, ""
    if entry.type == "aws":
        folder = settings.downloads
        failed, content = bucket.mirror(entry, folder)
    kind = entry.table_kind
    table_path = find_table(kind, entry.table, folder, entry.id) if kind else None
    listing, table = _from_folder(entry, settings, folder, skip, table_path)
    listing.rejected[:0] = failed
    listing.content = content
    return listing, table


def content_of(entry: DatasetEntry, settings: DatasetSettings) -> str:
    """`Listing.content` of a dataset from elsewhere as it is now, found without fetching a file. Raises UserError."""
    if entry.type == "huggingface":
        return hub.content_of(entry, hub.find_shards(entry))
    if entry.type == "aws":
        return bucket.content_of(entry, settings.downloads)
    return digest(find_table("csv", entry.table, settings.folder, entry.id).read_bytes())


def sidecar_table(folder: Path) -> Path | None:
    """The table that a folder on the Hub has under its usual name."""
    names = [name for names in TABLE_NAMES.values() for name in names]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _from_folder(
    entry: DatasetEntry, settings: DatasetSettings, folder: Path, skip: Sequence[Path], table_path: Path | None
) -> tuple[Listing, CaptionTable | None]:
    listing = Listing()
    captions: CaptionTable | None = None
    by_table = entry.caption_strategy in TABLE_NAMES
    if table_path is not None:
        needs = ("file", "caption") if by_table else ("file",)
        table = read_table(table_path, entry.table, entry.id, needs=needs)
        listing.rejected += table.rejected
        captions = CaptionTable(table, with_extension=entry.table.identifier_includes_extension)
    paths, failed = list_files(folder, skip)
    listing.rejected += failed
    listing.items = [
        Item(path.relative_to(folder).as_posix() if path != folder else path.name, path)
        for path in paths
        if path.suffix.lower() not in CAPTION_FILES and not _is_table(path, table_path)
    ]
    if captions is not None and table_path is not None:
        # Before any file is judged or left out by max_num_samples, so that what no file asks for is known.
        named = [item for item in listing.items if captions.knows(item.name)]
        if entry.metadata_backend != "discovery":
            listing.items = named
            listing.rejected += [
                Rejected(folder / name, f"{table_path.name} names it, and it is not there", kind=CANNOT_READ)
                for name in captions.unused
            ]
        elif captions.unused:
            shown = ", ".join(captions.unused[:5]) + (", …" if len(captions.unused) > 5 else "")
            count = len(captions.unused)
            listing.notices.append(f"{count} rows of {table_path.name} speak of files that are not there: {shown}")
    listing.items = chosen(listing.items, settings.max_num_samples, settings.id)
    return listing, captions if by_table or (entry.type == "huggingface" and captions) else None


def _is_table(path: Path, table: Path | None) -> bool:
    return table is not None and path.name == table.name and path.exists() and path.samefile(table)


def _from_rows(entry: DatasetEntry, settings: DatasetSettings) -> Listing:
    """A csv dataset: each row is a URL, which is fetched, or a path, from the table's folder if it is relative."""
    path = find_table("csv", entry.table, settings.folder, entry.id)
    content = digest(path.read_bytes())
    table = read_table(path, entry.table, entry.id, needs=("file",))
    rows = chosen(table.rows, settings.max_num_samples, settings.id)
    base = settings.folder if entry.instance_data_dir else path.parent

    def one(row: Row) -> Item:
        if row.file.startswith("s3://"):
            return Item(row.file, bucket.fetch_object(entry, row.file, settings.downloads), row.captions)
        if is_url(row.file):
            return Item(row.file, fetch(row.file, settings.downloads), row.captions)
        local = base / row.file
        if not local.is_file():
            reason = f"row {row.number} of {path.name} names it, and it is not there"
            raise UnusableFile(local, reason, damaged=False, kind=CANNOT_READ)
        return Item(row.file, local, row.captions)

    listing = Listing(rejected=list(table.rejected), content=content)
    for outcome in in_parallel(one, rows):
        if isinstance(outcome, UnusableFile):
            listing.rejected.append(Rejected.of(outcome))
        else:
            listing.items.append(outcome)
    return listing
