"""Prompts of a dataset: text files, tables, the Hub, a bucket, or the set that comes with the tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner_dmd.config.databackend import DatasetEntry, TableOptions
from simpletuner_dmd.data.findings import BAD_ROW, WRONG_KIND, Rejected, UnusableFile
from simpletuner_dmd.data.settings import DatasetSettings
from simpletuner_dmd.data.sources import bucket, hub
from simpletuner_dmd.data.sources.folder import list_files
from simpletuner_dmd.data.sources.items import chosen
from simpletuner_dmd.data.sources.table import read_table

READ = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass
class PromptListing:
    """prompts: (file, prompt and its other wordings)."""

    prompts: list[tuple[Path, tuple[str, ...]]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def list_prompts(entry: DatasetEntry, settings: DatasetSettings) -> PromptListing:
    """All prompts of a dataset. Raises UserError."""
    listing = PromptListing()
    if entry.type == "huggingface" and (shards := hub.find_shards(entry)):
        rows, listing.rejected = hub.read_captions(entry, shards, settings.downloads)
        listing.prompts = [(settings.folder, captions) for captions in rows]
        return listing
    folder = settings.folder
    if entry.type == "huggingface":
        folder = settings.downloads
        hub.copy_repository(entry, folder)
    elif entry.type == "aws":
        folder = settings.downloads
        listing.rejected += bucket.mirror(entry, folder)[0]
    elif entry.type == "csv":
        folder = Path(entry.table.path or "")
    paths, failed = list_files(folder)
    listing.rejected += failed
    for path in paths:
        try:
            prompts, bad = read_prompts(path, entry.table, entry.id)
        except UnusableFile as error:
            listing.rejected.append(Rejected.of(error))
            continue
        listing.rejected += bad
        listing.prompts += [(path, captions) for captions in prompts]
    listing.prompts = chosen(listing.prompts, settings.max_num_samples, settings.id)
    return listing


def read_prompts(path: Path, options: TableOptions, where: str) -> tuple[list[tuple[str, ...]], list[Rejected]]:
    """The prompts of a file and the lines left out: one per line of a .txt, one per row of a table.

    Raises UnusableFile when nothing in it can be used, UserError for a table without captions.
    """
    if path.suffix.lower() not in READ:
        raise UnusableFile(path, f"not a prompt file: {', '.join(READ)} are read", damaged=False, kind=WRONG_KIND)
    if path.suffix.lower() == ".txt":
        prompts: list[tuple[str, ...]] = [(line,) for line in _lines(path)]
        rejected: list[Rejected] = []
    else:
        table = read_table(path, options, where, needs=("caption",))
        prompts, rejected = [row.captions for row in table.rows], table.rejected
    if not prompts and not rejected:
        raise UnusableFile(path, "it holds no prompt", damaged=False, kind=BAD_ROW)
    return prompts, rejected


def _lines(path: Path) -> Sequence[str]:
    try:
        # Not splitlines(): it also cuts at characters that may stand inside a prompt.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UnusableFile(path, f"cannot be read as UTF-8 text ({error})", damaged=False) from error
    return [line.strip() for line in lines if line.strip()]
