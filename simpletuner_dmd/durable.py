"""Files that are either whole or absent: written beside, flushed to the disk, then renamed.

The one place where caches, checkpoints, exports and settings are written from. A temporary file lies in the folder of
its target, because a rename is atomic only within one file system, and carries the process and a random number in its
name, because several processes may write the same file. What a killed process left is removed by `sweep`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

from simpletuner_dmd.config.errors import UserError

CHUNK = 16 * 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
LEFTOVER = re.compile(r"\.\d+-[0-9a-f]{8}\.partial")
DAY = 24 * 3600.0
FLUSHES_AT_ONCE = 8

T = TypeVar("T")


# Every change of the disk goes through one of these, so that a test can end the "process" at each of them.


def _write(descriptor: int, chunk: bytes | memoryview) -> int:
    return os.write(descriptor, chunk)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def _replace(source: Path, target: Path) -> None:
    source.replace(target)


def rename(source: Path, target: Path) -> None:
    """Atomic; replaces a file, and a folder only where it is empty. The parent folder is flushed."""
    _replace(source, target)
    sync_folder(target.parent)


def remove_folder(path: Path) -> None:
    shutil.rmtree(path)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable (POSIX; elsewhere the system does not offer it)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


class NewFile:
    """A new file that counts what is written, and is on the disk when the block ends without an error."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._flushed = False

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        return self

    def write(self, content: bytes | memoryview) -> None:
        self._flushed = False
        view = memoryview(content)
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            self._seen(chunk)
            while chunk:
                chunk = chunk[_write(self._descriptor, chunk) :]
        self.size += len(view)

    def flush(self) -> None:
        """Everything written is on the disk when this returns."""
        _sync(self._descriptor)
        self._flushed = True

    def _seen(self, chunk: memoryview) -> None:
        """For those who look at what is written."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            if kind is None and not self._flushed:
                self.flush()
        finally:
            os.close(self._descriptor)


class HashingFile(NewFile):
    """A `NewFile` that also hashes what is written."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._digest = hashlib.sha256()

    def _seen(self, chunk: memoryview) -> None:
        self._digest.update(chunk)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _beside(path: Path) -> Path:
    """A new name in the folder of `path`. The suffix stays last: some libraries choose a format by it."""
    return path.with_name(f".{path.stem[:64]}.{os.getpid()}-{uuid4().hex[:8]}.partial{path.suffix}")


def write_atomically(path: Path, content: bytes) -> Path:
    """Replaces `path`; a reader, and a crash, see the old content or the new. Returns `path`."""
    write_several({path: content})
    return path


def write_several(contents: Mapping[Path, bytes]) -> None:
    """As `write_atomically` for each, with fewer waits for the disk.

    Every file is flushed before the first takes its name, and each folder once after the last. An error leaves those
    that have their name, and nothing of the others.
    """
    beside = {path: _beside(path) for path in contents}
    try:
        with ExitStack() as stack:
            files = []
            for path, content in contents.items():
                make_folder(path.parent)
                files.append(stack.enter_context(NewFile(beside[path])))
                files[-1].write(content)
            _at_once(NewFile.flush, files)
        for path, temporary in beside.items():
            _replace(temporary, path)
        _at_once(sync_folder, list(dict.fromkeys(path.parent for path in contents)))
    except OSError:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
        raise


def _at_once(flush: Callable[[T], None], things: list[T]) -> None:
    """Flushes each, several at a time: a journal writes down together what is asked for together."""
    if len(things) == 1:
        flush(things[0])
        return
    from concurrent.futures import ThreadPoolExecutor  # here, because the light verbs write one file at most

    with ThreadPoolExecutor(min(len(things), FLUSHES_AT_ONCE), thread_name_prefix="flush") as pool:
        for _ in pool.map(flush, things):
            pass


def write_text(path: Path, text: str) -> Path:
    """As `write_atomically`, in UTF-8."""
    return write_atomically(path, text.encode())


def write_json(path: Path, document: Any) -> Path:
    """As `write_atomically`, indented and in UTF-8."""
    return write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_through(path: Path, write: Callable[[Path], None]) -> Path:
    """As `write_atomically`, for a library that writes files itself: `write` fills the path it is given."""
    make_folder(path.parent)
    beside = _beside(path)
    try:
        with _as_os_error(path):
            write(beside)
        _sync_file(beside)
        rename(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """As `write_through`, for a folder: the old one is moved aside, the new one takes its name, the old one goes."""
    make_folder(path.parent)
    beside, former = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")
    for leftover in (beside, former):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        beside.mkdir()
        with _as_os_error(path):
            write(beside)
        for file in beside.rglob("*"):
            if file.is_file():
                _sync_file(file)
        if path.exists():
            rename(path, former)
        rename(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if not path.exists() and former.exists():
            former.rename(path)
        shutil.rmtree(former, ignore_errors=True)
    return path


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """A full disk under its own name, whatever library met it."""
    from safetensors import SafetensorError  # here, because the settings are written by verbs that load no tensors

    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def sweep(folder: Path) -> None:
    """Removes temporary files that a killed process left in `folder` (not below it).

    Younger ones stay: they may belong to a process beside this one.
    """
    try:
        with os.scandir(folder) as entries:
            leftovers = [Path(entry.path) for entry in entries if LEFTOVER.search(entry.name)]
    except OSError:
        return
    for leftover in leftovers:
        try:
            if time.time() - leftover.stat().st_mtime > DAY:
                leftover.unlink()
        except OSError:
            continue  # gone, or not ours: harmless either way


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk_full(path: Path, needed: int, what: str, consequence: str) -> UserError:
    """The sentence for a full disk: what was being written, bytes needed and free, what became of it, what to do."""
    return UserError(
        f"the disk is too full for {what}: {needed:,} bytes are needed, {free_bytes(path):,} are free. {consequence}",
        file=str(path),
        fix="free some space, lower checkpoints_total_limit or move output_dir; the same command then goes on",
    )


@contextmanager
def explaining(path: Path, needed: int, what: str, consequence: str) -> Iterator[None]:
    """Turns a full or read-only disk into a UserError; every other error stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_full(path, needed, what, consequence) from error
        if error.errno in NOT_WRITABLE:
            raise UserError(
                f"{what} cannot be written: {error.strerror}. {consequence}",
                file=str(path),
                fix="make the folder writable or choose another output_dir",
            ) from error
        raise
