"""The GPU of this machine, asked of its driver's own tool: torch would take seconds to load."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

CARDS = (12, 16, 24, 48, 80)
SECONDS = 10
NAMED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float
    """In GB, as cards are sold: 24 for a 24,564 MiB card."""


def find() -> Gpu | None:
    """The first GPU that nvidia-smi names; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, megabytes = (answer.splitlines() or [""])[0].rpartition(",")
    try:
        return Gpu(name.strip(), round(float(megabytes) / 1024))
    except ValueError:
        return None


def memory_of(text: str) -> float | None:
    """ "24", "24GB" -> 24.0; None if it says no amount."""
    match = NAMED.fullmatch(text)
    return float(match[1]) if match else None
