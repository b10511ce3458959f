"""Writing so that a reader never sees half a file: beside the target, to the disk, then renamed over it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """A full disk under its own name, whatever library met it."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """`write` fills a temporary file beside `path`, which then takes its name. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers apart; the suffix stays last because some libraries choose a format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with _as_os_error(path):
            write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    return write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def write_json(path: Path, document: Any) -> Path:
    return write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """As `write_atomically`, for a folder: the old one is moved aside, the new one takes its name, the old one goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")
    for leftover in (temporary, former):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir()
        with _as_os_error(path):
            write(temporary)
        if path.exists():
            path.rename(former)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists() and former.exists():
            former.rename(path)
        shutil.rmtree(former, ignore_errors=True)
    return path


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
