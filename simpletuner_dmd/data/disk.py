"""What caches need of the disk: whole files, and hashes of contents that are not taken twice."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from simpletuner_dmd import durable
from simpletuner_dmd.config.errors import UserError

SAVED_EVERY = 256  # news of a memo, or an eighth of it where that is more


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a full or write-protected disk into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in durable.NO_SPACE:
            raise UserError(f"the disk is full: {path} could not be written", fix=(
                "free some space, or move the cache (cache_dir_vae, cache_dir_text, or the dataset's own); what is "
                "cached so far is kept, and the same command goes on from there")) from error  # fmt: skip
        if error.errno in (*durable.NOT_WRITABLE, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} cannot be written: {error.strerror}",
                            fix="choose a cache folder that this user may write to") from error  # fmt: skip
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Writes `path` so that a reader, or a run after a crash, sees all of `data` or no file. Raises UserError."""
    write_several_whole({path: data})


def write_several_whole(files: Mapping[Path, bytes]) -> None:
    """As `write_whole` for each of at least one file, with fewer waits for the disk. Raises UserError."""
    with explained(next(iter(files))):
        durable.write_several(files)


def digest(*parts: bytes | str) -> str:
    """32 hex digits that name `parts`; lengths are hashed too, so ("ab", "c") differs from ("a", "bc")."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def hash_file(path: Path) -> str:
    """32 hex digits of the bytes of a file."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


class HashMemo:
    """Content hashes of files, remembered by (path, size, modification time) across runs. Safe to use from two threads.

    A lost or broken memo costs a re-hash and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._known = self._read()
        self._changed = 0

    def _read(self) -> dict[str, list[int | str]]:
        try:
            loaded = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(loaded, dict):
            return {}
        return {k: v for k, v in loaded.items() if isinstance(v, list) and len(v) == 3}

    def known(self, path: Path) -> bool:
        """Whether the file is the one that was remembered: same size, same time."""
        try:
            status = path.stat()
        except OSError:
            return False
        entry = self._known.get(str(path.absolute()))
        return entry is not None and entry[:2] == [status.st_size, status.st_mtime_ns]

    def remember(self, path: Path, content: str) -> None:
        """Notes what is known of the file as it is now. Raises OSError."""
        self._note(path, path.stat(), content)

    def _note(self, path: Path, status: os.stat_result, content: str) -> None:
        with self._lock:
            self._known[str(path.absolute())] = [status.st_size, status.st_mtime_ns, content]
            self._changed += 1
            # A kill must not cost what was learnt of thousands of large files, and the whole memo is written each time.
            if self._changed >= max(SAVED_EVERY, len(self._known) // 8):
                self.save()

    def hash(self, path: Path) -> str:
        """The hash of the file's bytes, taken only if the file changed. Raises OSError."""
        if self.known(path):
            return str(self._known[str(path.absolute())][2])
        status = path.stat()  # before reading: a file that changes meanwhile is hashed again next time
        content = hash_file(path)
        self._note(path, status, content)
        return content

    def save(self) -> None:
        """Writes what is new, beside what other processes have written meanwhile. Raises UserError."""
        with self._lock:
            if self._changed:
                self._known = {**self._read(), **self._known}
                write_whole(self.path, json.dumps(self._known, ensure_ascii=False).encode())
                self._changed = 0
