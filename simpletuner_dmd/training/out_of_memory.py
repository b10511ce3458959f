"""Running out of memory: what it looks like, and how a run ends that did."""

from __future__ import annotations

from pathlib import Path

import torch

EXIT_CODE = 3
"""Of a run that ran out of memory: a script can tell it from a mistake (2) and from an interruption (130)."""


class OutOfMemory(Exception):  # noqa: N818 - an end of the run, as KeyboardInterrupt is
    """Memory ran out in the step after `step`. saved: the checkpoint of the finished steps, if it could be written."""

    def __init__(self, step: int, reason: str, saved: Path | None) -> None:
        super().__init__(reason)
        self.step, self.reason, self.saved = step, reason, saved


def is_out_of_memory(error: BaseException) -> bool:
    """An accelerator's, Python's own, or that of torch's allocator on the CPU, which has no class of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
