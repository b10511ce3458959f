"""Files that are either whole or absent: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from simpletuner_dmd.config.errors import UserError

CHUNK = 16 * 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


# Every change of the disk goes through one of these, so that a test can end the "process" at each of them.


def _write(descriptor: int, chunk: bytes | memoryview) -> int:
    return os.write(descriptor, chunk)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def rename(source: Path, target: Path) -> None:
    """Atomic; replaces a file, and a folder only where it is empty. The parent folder is flushed."""
    source.replace(target)
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
    finally:
        os.close(descriptor)


class HashingFile:
    """A new file that counts and hashes what is written, and is on the disk when the block ends without an error."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> HashingFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        return self

    def write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            self._digest.update(chunk)
            while chunk:
                chunk = chunk[_write(self._descriptor, chunk) :]
        self.size += len(view)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            if kind is None:
                _sync(self._descriptor)
        finally:
            os.close(self._descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path`; a reader, and a crash, see the old content or the new."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with HashingFile(beside) as file:
            file.write(content)
        rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


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
