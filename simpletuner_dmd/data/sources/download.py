"""Copies of remote files in a dataset's `download_dir`: whole or not there, fetched once."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.findings import CANNOT_FETCH, UnusableFile

ATTEMPTS = 3
TIMEOUT_SECONDS = 60
AT_ONCE = 8
GONE = (400, 401, 403, 404, 410)  # asking again changes nothing
SAFE_SUFFIX = 12

T = TypeVar("T")
R = TypeVar("R")


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://", "s3://"))


def copy_whole(target: Path, source: AbstractContextManager[IO[bytes]], size: int | None) -> None:
    """Writes `source` to `target`, which appears whole or not at all. Raises OSError when bytes are missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is kept short: names may have the longest length that a file system allows.
    temporary = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.{os.getpid()}.tmp")
    try:
        with source as reader, temporary.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
            written = writer.tell()
        if size is not None and written != size:
            raise OSError(f"{written:,} of {size:,} bytes arrived")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(url: str, folder: Path) -> Path:
    """The local copy of an http(s) URL, fetched where it is not there yet. Raises UnusableFile.

    The copy is named by the URL, so that one URL is one file; delete it to have it fetched again.
    """
    suffix = PurePosixPath(urllib.parse.urlsplit(url).path).suffix[:SAFE_SUFFIX]
    plain = suffix if suffix[1:].isalnum() else ""
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}{plain}"
    if target.is_file():
        return target
    for attempt in range(1, ATTEMPTS + 1):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "simpletuner-dmd"})
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            length = response.headers.get("Content-Length")
            copy_whole(target, response, int(length) if length else None)
            return target
        except urllib.error.HTTPError as error:
            why, final = f"the server answers {error.code} {error.reason}", error.code in GONE
        except (HTTPException, ValueError) as error:
            why, final = str(error) or type(error).__name__, isinstance(error, ValueError)
        except OSError as error:
            why, final = str(getattr(error, "reason", error)), _is_local(error)
        if final or attempt == ATTEMPTS:
            break
        time.sleep(0.5 * attempt)
    raise UnusableFile(target, f"cannot fetch {url}: {why}", damaged=False, kind=CANNOT_FETCH)


def _is_local(error: OSError) -> bool:
    """Whether the fault is on this machine, such as a full disk, where trying again does not help."""
    return error.errno is not None and not isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError)


def in_parallel(work: Callable[[T], R], everything: Iterable[T]) -> list[R | UnusableFile]:
    """`work` on each, several at once, in order; an UnusableFile comes back instead of being raised."""

    def one(item: T) -> R | UnusableFile:
        try:
            return work(item)
        except UnusableFile as error:
            return error

    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return list(pool.map(one, everything))


def inside(folder: Path, relative: str, where: str) -> Path:
    """`folder`/`relative`, for names that others chose. Raises UserError for one that would leave the folder."""
    parts = PurePosixPath(relative).parts
    if not parts or relative.startswith("/") or ".." in parts or "\0" in relative or "\\" in relative:
        raise UserError(f"the name {relative!r} would be written outside of {folder}", key=where,
                        fix="rename it at its source")  # fmt: skip
    return folder.joinpath(*parts)


def json_whole(path: Path, write: Callable[[IO[str]], Any]) -> None:
    """Writes a text file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
