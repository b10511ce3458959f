"""What a person sees while a run goes: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

SHOWN = {
    "loss": "loss", "critic_loss": "critic", "fake_score_loss": "critic", "dmd_loss": "dmd", "scm_loss": "scm",
    "lr": "lr",
}  # fmt: skip


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory this process has held: on CUDA its tensors, on MPS what the driver holds now, else resident."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if kind == "mps":
        return int(torch.mps.driver_allocated_memory())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def forget_peak(device: torch.device | str = "cpu") -> None:
    """From here `peak_bytes` is what is held from now on, where the system can forget (CUDA, Linux)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # a container that does not allow it: the peak stays that of the whole run


class Progress:
    """The progress of a run of `total` steps, of which `done` are behind it.

    On a terminal: a tqdm bar. Elsewhere: a line every `every_seconds`, or every `every_steps` where given, and at the
    end. enabled: False on all but the main process.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        device: torch.device | str = "cpu",
        every_seconds: float = 30.0,
        every_steps: int | None = None,
        stream: TextIO | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.done, self.device = total, done, device
        self.every_seconds, self.every_steps = every_seconds, every_steps
        self.stream = stream or sys.stderr
        self.enabled, self.clock = enabled, clock
        self._values: dict[str, float] = {}
        self._started_at, self._started_from = clock(), done
        self._said_at, self._said = clock(), done
        self._bar = None
        if enabled and self.stream.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", file=self.stream, dynamic_ncols=True)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """After step `step` (counted from 1). Values that a step did not make keep their last one on display."""
        self._values |= values
        advanced, self.done = step - self.done, step
        if self._bar is not None:
            self._bar.set_postfix_str(self.summary(), refresh=False)
            self._bar.update(advanced)
        elif self.enabled and self._due():
            self._say()

    def write(self, line: str) -> None:
        """A line of text above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        elif self.enabled:
            print(line, file=self.stream, flush=True)

    def seconds_per_step(self) -> float:
        """As the trainer measured it ("step_seconds"), else the mean over this session."""
        if "step_seconds" in self._values:
            return self._values["step_seconds"]
        return (self.clock() - self._started_at) / max(1, self.done - self._started_from)

    def summary(self) -> str:
        """Losses, seconds per step and peak memory, for example "dmd 0.412, critic 0.088, 1.3 s/step, peak 2.1 GB"."""
        parts = [f"{label} {self._values[key]:.3g}" for key, label in SHOWN.items() if key in self._values]
        parts += [f"{self.seconds_per_step():.3g} s/step", f"peak {peak_bytes(self.device) / 1e9:.1f} GB"]
        return ", ".join(parts)

    def close(self) -> None:
        """Ends the bar, or says the last line where it is not out yet."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self.enabled and self._said != self.done:
            self._say()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def _due(self) -> bool:
        if self.every_steps is not None and self.done - self._said >= self.every_steps:
            return True
        return self.clock() - self._said_at >= self.every_seconds

    def _say(self) -> None:
        print(f"step {self.done}/{self.total}: {self.summary()}", file=self.stream, flush=True)
        self._said_at, self._said = self.clock(), self.done


def free_memory() -> None:
    """Hands back, to the device too, what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
