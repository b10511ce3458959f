"""Work on one cache shared by several processes, and saved while the encoder goes on.

There is no master and no queue on the network: whoever is free takes the next entry that nobody has. So the processes
of one run share the work, on one machine or on several with a common disk, and so do two runs that meet in a folder.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from simpletuner_dmd.data.disk import explained

try:
    import fcntl
except ImportError:  # Windows: processes then work on the same entries twice, and both are right
    fcntl = None  # type: ignore[assignment]

CLAIMS_NAME = "claims.lock"
TAKEN = (errno.EAGAIN, errno.EACCES)

Item = TypeVar("Item")


class Claims:
    """Which entries of a folder this process is making, so that processes and runs beside it make others.

    One byte-range lock per entry on one file: the kernel drops them when the process ends, however it ends, so no
    claim outlives a kill. Where the file system has no locks every claim is granted: work is then done twice, and
    both results are right. One object per folder and process: closing it drops every claim of the process there.
    """

    def __init__(self, folder: Path, name: str = CLAIMS_NAME) -> None:
        self.path = folder / name

    def __enter__(self) -> Self:
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._works = fcntl is not None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        os.close(self._descriptor)

    def take(self, key: str) -> bool:
        """Whether the entry is now this process's to make. key: hex digits."""
        return self._lock(key, wait=False)

    def wait(self, key: str) -> None:
        """Takes the entry once the process that has it lets go, or is gone."""
        self._lock(key, wait=True)

    def give_back(self, keys: Iterable[str]) -> None:
        if self._works:
            for key in keys:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._place(key))

    @staticmethod
    def _place(key: str) -> int:
        return int(key[:15], 16)

    def _lock(self, key: str, *, wait: bool) -> bool:
        if not self._works:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, self._place(key))
        except OSError as error:
            if error.errno in TAKEN:
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            self._works = False  # this file system has no locks
        return True


def share_out(
    items: Sequence[Item],
    name: Callable[[Item], str],
    missing: Callable[[list[Item]], list[Item]],
    claims: Claims,
    batch: int,
) -> Iterator[list[Item] | None]:
    """Batches of `items` that are this process's to make, until every item is made by someone or was handed out.

    name: the entry of an item. missing: those of some items that no process has saved by now. The taker gives the
    claims back once its batch is saved. None means: finish and give back everything before asking for more. The rest
    is then with other processes, and to wait for them while holding something they may wait for would last for ever.
    """
    waiting = list(items)
    while waiting:
        mine: list[Item] = []
        elsewhere: list[Item] = []
        for item in waiting:
            (mine if claims.take(name(item)) else elsewhere).append(item)
            if len(mine) == batch:
                if made := _still(mine, name, missing, claims):
                    yield made
                mine = []
        if mine and (made := _still(mine, name, missing, claims)):
            yield made
        if elsewhere:
            yield None
            claims.wait(name(elsewhere[0]))
        waiting = _still(elsewhere, name, missing, claims)


def _still(
    items: list[Item], name: Callable[[Item], str], missing: Callable[[list[Item]], list[Item]], claims: Claims
) -> list[Item]:
    """The items that are still missing; the claims of the others are given back."""
    left = missing(items) if items else []
    names = {name(item) for item in left}
    claims.give_back(name(item) for item in items if name(item) not in names)
    return left


class Saver:
    """Saves in a thread of its own, one job after the other, so that the encoder does not wait for the disk.

    What was handed over is saved also when the block ends with an error. An error of saving comes out of a later call,
    and what was handed over after it is not saved. depth: jobs that may wait, so that one slow flush of the disk does
    not stop the encoder; each holds its data in memory.
    """

    def __init__(self, depth: int = 1) -> None:
        self._depth = depth

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._jobs: deque[Future[None]] = deque()
        self._failed = False
        return self

    def save(self, job: Callable[[], None]) -> None:
        """Runs `job` beside the caller, after those before it."""
        while self._jobs and (len(self._jobs) >= self._depth or self._jobs[0].done()):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        self._failed = True
        job()
        self._failed = False

    def settle(self) -> None:
        """Waits until everything is saved. Raises what saving raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            self.settle()
        finally:
            self._pool.shutdown()
