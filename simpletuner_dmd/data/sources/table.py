"""Tables of files and captions: csv, jsonl and parquet.

A row is a file (name, path or URL), captions, or both. Which columns hold them is said in the dataset's `table` block,
or found by their usual names.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner_dmd.config.databackend import TableOptions
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.findings import BAD_ROW, Rejected
from simpletuner_dmd.data.sources.items import missing_extra

FILE_COLUMNS = ("file_name", "filename", "file", "path", "video", "video_path", "image", "image_path", "url",
                "video_url", "image_url")  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "prompt", "text", "description")
TABLE_NAMES = {
    "csv": ("metadata.csv", "metadata.tsv"),
    "jsonl": ("metadata.jsonl", "metadata.json"),
    "parquet": ("metadata.parquet",),
}
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Row:
    """number: from 1; of csv and parquet, the header does not count. file: "" where the table names none."""

    number: int
    file: str
    captions: tuple[str, ...]


@dataclass
class Table:
    """A table that was read. rejected: the rows that could not be used, each with its number."""

    path: Path
    rows: list[Row]
    rejected: list[Rejected]


def find_table(kind: str, options: TableOptions, folder: Path, where: str) -> Path:
    """The file that holds the table. Raises UserError."""
    if options.path:
        path = Path(options.path)
        if path.is_file():
            return path
        raise UserError(f"there is no {path}", key=f"{where}.table.path", fix="correct the path")
    looked = [folder / name for name in TABLE_NAMES[kind]]
    found = next((path for path in looked if path.is_file()), None)
    if found is None:
        raise UserError(f"found no {kind} table; looked for {', '.join(map(str, looked))}", key=f"{where}.table.path",
                        fix='add "table": {"path": "my-table.' + kind + '"}')  # fmt: skip
    return found


def read_table(path: Path, options: TableOptions, where: str, *, needs: Sequence[str] = ("file", "caption")) -> Table:
    """Reads csv, jsonl or parquet, by the file's ending.

    needs: "file", "caption" or both; a table without that column is a mistake, a row without it is rejected.
    Raises UserError naming `where`, the dataset.
    """
    kind = SUFFIXES.get(path.suffix.lower(), "csv")
    rejected: list[Rejected] = []
    readers: dict[str, Callable[[Path, str, list[Rejected]], Iterable[tuple[int, dict[str, Any]]]]] = {
        "csv": _csv_rows,
        "jsonl": _json_rows,
        "parquet": _parquet_rows,
    }
    try:
        records = list(readers[kind](path, where, rejected))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", key=f"{where}.table.path",
                        fix="check that it is there, in UTF-8, and yours to read") from error  # fmt: skip
    if not records:
        return Table(path, [], rejected)
    columns = list(dict.fromkeys(column for _, record in records for column in record))
    files = _columns(options.filename_column, FILE_COLUMNS, columns, path, f"{where}.table.filename_column",
                     "file" in needs)  # fmt: skip
    captions = _columns(options.caption_column, CAPTION_COLUMNS, columns, path, f"{where}.table.caption_column",
                        "caption" in needs)  # fmt: skip
    if options.fallback_caption_column:
        captions = [*captions, options.fallback_caption_column]
    rows = []
    for number, record in records:
        texts = next((found for name in captions if (found := captions_in(record.get(name)))), ())
        name = next((value.strip() for name in files if isinstance(value := record.get(name), str)), "")
        if "file" in needs and not name:
            rejected.append(Rejected(path, f'line {number} has no "{files[0]}"', kind=BAD_ROW))
        elif "file" not in needs and not texts:
            words = " or ".join(f'"{name}"' for name in captions)
            rejected.append(Rejected(path, f"line {number} has no {words} text", kind=BAD_ROW))
        else:
            rows.append(Row(number, name, texts))
    return Table(path, rows, rejected)


def captions_in(value: Any) -> tuple[str, ...]:
    """A cell as captions: a text is one (several lines stay together), a list is several."""
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    if isinstance(value, list | tuple):
        return tuple(text for cell in value for text in captions_in(cell))
    return ()


def _columns(
    asked: str | None, usual: Sequence[str], columns: Sequence[str], path: Path, key: str, needed: bool
) -> list[str]:
    """The column that is asked for, else those of usual names: rows of a jsonl need not all have the same."""
    if asked is not None:
        if asked in columns:
            return [asked]
        raise UserError(
            f'{path} has no column "{asked}"; it has {", ".join(columns)}', key=key, fix="name one of these"
        )
    found = [name for name in usual if name in columns]
    if not found and needed:
        raise UserError(f"{path} has no column of a usual name ({', '.join(usual)}); it has {', '.join(columns)}",
                        key=key, fix="name the column")  # fmt: skip
    return found


def _csv_rows(path: Path, where: str, rejected: list[Rejected]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # captions may be longer than the default of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for number, record in enumerate(reader, 1):
            if None in record:
                # The usual cause: a comma inside a caption that is not quoted. Half a caption is worse than none.
                reason = f"line {number} has more values than the header has columns; put texts with commas in quotes"
                rejected.append(Rejected(path, reason, kind=BAD_ROW))
            else:
                yield number, record


def _json_rows(path: Path, where: str, rejected: list[Rejected]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object per line, or one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}", key=f"{where}.table.path", fix="correct it") from error
        lines: Iterable[tuple[int, Any]] = enumerate(whole, 1)
    else:
        lines = _json_lines(path, text, rejected)
    for number, record in lines:
        if isinstance(record, dict):
            yield number, record
        else:
            rejected.append(Rejected(path, f"line {number} is no object {{...}}", kind=BAD_ROW))


def _json_lines(path: Path, text: str, rejected: list[Rejected]) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also cuts at the line separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"line {number} is not JSON: {error.msg} at column {error.colno}"
            rejected.append(Rejected(path, reason, kind=BAD_ROW))


def _parquet_rows(path: Path, where: str, rejected: list[Rejected]) -> Iterator[tuple[int, dict[str, Any]]]:
    parquet = import_parquet(f"{where}.table.path")
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(columns=_text_columns(file.schema_arrow)):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole parquet file: {error}", key=f"{where}.table.path",
                        fix="fetch it again") from error  # fmt: skip


def _text_columns(schema: Any) -> list[str]:
    """Columns of texts and of lists of texts: everything else, pictures above all, stays unread."""
    import pyarrow.types as types

    def is_text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    return [
        column.name
        for column in schema
        if is_text(column.type)
        or (types.is_list(column.type) or types.is_large_list(column.type))
        and is_text(column.type.value_type)
    ]


def import_parquet(key: str) -> Any:
    """pyarrow.parquet, or a UserError that says what to install."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("parquet", "pyarrow", "reading parquet", key) from error
    return pyarrow.parquet


class CaptionTable:
    """Captions by file: a row speaks of the file whose path below the folder it holds, else whose name it holds."""

    def __init__(self, table: Table, *, with_extension: bool) -> None:
        self.path, self.with_extension = table.path, with_extension
        self._captions: dict[str, tuple[str, ...]] = {}
        for row in table.rows:
            name = row.file.replace("\\", "/").removeprefix("./")
            self._captions.setdefault(name, row.captions)
        self._unused = set(self._captions)

    def knows(self, name: str) -> bool:
        """Whether a row speaks of the file of this path below the dataset's folder."""
        return self._row(name) is not None

    def find(self, name: str) -> tuple[str, ...]:
        """The captions of that file; empty where no row speaks of it."""
        row = self._row(name)
        return () if row is None else self._captions[row]

    def _row(self, name: str) -> str | None:
        path = PurePosixPath(name)
        if not self.with_extension:
            path = path.with_suffix("")
        found = next((known for known in (path.as_posix(), path.name) if known in self._captions), None)
        if found is not None:
            self._unused.discard(found)
        return found

    @property
    def unused(self) -> list[str]:
        """Rows that no file asked for."""
        return sorted(self._unused)
