"""Starts the processes of a run on this machine; accelerate and torch.distributed read what is set for each.

Plainly, rather than with torch's `torchrun`: that ends every failure in its own traceback and exit code 1, where a
person's mistake has to stay a sentence and code 2, and it kills processes 30 seconds after Ctrl-C, which a long step
exceeds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

POLL_SECONDS = 0.02
MAIN_FIRST_SECONDS = 2.0
MISTAKE = 2
PR_SET_PDEATHSIG = 1


def launch(processes: int, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs `simpletuner ARGUMENTS` in `processes` processes; returns 0, or the exit code of the first that fails.

    Ctrl-C and SIGTERM are passed on, once each, so that the run can save. When one process fails, the others, which
    would wait for it for ever, are ended. If this process is killed, so are they.
    """
    inherited = dict(os.environ)
    inherited.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), **environment}
    command = [sys.executable, "-m", "simpletuner_dmd", *arguments]
    children: list[subprocess.Popen[bytes]] = []
    mistakes: list[int] = []
    try:
        with _passing_signals_to(children), _hearing_of_mistakes(mistakes):
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own: the terminal's Ctrl-C then reaches the children through this process only.
                children.append(
                    subprocess.Popen(
                        command,
                        env={**inherited, **shared, **own},
                        start_new_session=True,
                        preexec_fn=_dying_with_parent(),
                    )
                )
            return _first_failure(children, mistakes)
    finally:
        for child in reversed(children):  # the main process last: it has no one to complain about
            child.kill()
        for child in children:
            child.wait()


def end_with_mistake(said: str) -> int:
    """In a process that `launch` started: says what a person did wrong and waits for `launch` to end all processes.

    Leaving instead would close the connections, and the others would fill the terminal with tracebacks about that.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(MAIN_FIRST_SECONDS)  # mostly all find the same, and the main process says it
    print(f"\n{said}", file=sys.stderr, flush=True)
    if hasattr(signal, "SIGUSR1"):
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(5 * MAIN_FIRST_SECONDS)
    return MISTAKE


def _first_failure(children: Sequence[subprocess.Popen[bytes]], mistakes: Sequence[int]) -> int:
    """Waits for all to end well, or for one to fail. A death by signal N counts as 128 + N, as in a shell."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if mistakes:
            return MISTAKE
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


@contextmanager
def _passing_signals_to(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _hearing_of_mistakes(mistakes: list[int]) -> Iterator[None]:
    """SIGUSR1 is how a process says that a person's mistake ends the run; see `end_with_mistake`."""
    if not hasattr(signal, "SIGUSR1"):
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda number, frame: mistakes.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _dying_with_parent() -> Callable[[], None] | None:
    """Linux only: the kernel kills the child when this process is gone, so no half of a run lives on."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
