"""One daemon thread that does optional work in order: a service that is slow or away never holds up the run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class BackgroundWorker:
    """Runs submitted jobs one after the other. A job reports its own failures; one that forgets to is logged.

    limit: jobs that may wait; one more is refused, so a dead service cannot eat memory.
    """

    def __init__(self, name: str, limit: int = 64) -> None:
        self._name = name
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=limit)
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> bool:
        """Queues the job; False if the queue is full."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self, timeout: float) -> bool:
        """Waits for what is queued, `timeout` seconds at most. True if all of it was done."""
        if self._thread is None:
            return True
        try:
            self._jobs.put(None, timeout=timeout)
        except queue.Full:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - the outermost edge of an optional service
                log.warning("%s: %s", self._name, type(error).__name__)
