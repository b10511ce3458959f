"""What a machine has: memory, and how fast it multiplies. Measured where it is this one, else from a data sheet."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from functools import cache

import torch

from simpletuner_dmd.config import UserError

GIB = 2**30

# Name -> (memory in GiB, dense bf16 tensor TFLOP/s with fp32 accumulation), from NVIDIA's data sheets.
CARDS: dict[str, tuple[float, float]] = {
    "rtx-3060": (12, 25.6), "rtx-4080": (16, 97.5), "rtx-3090": (24, 71.2), "rtx-4090": (24, 165.2),
    "rtx-5090": (32, 209.5), "a100-40": (40, 312), "a6000": (48, 154.8), "l40s": (48, 362),
    "a100-80": (80, 312), "h100": (80, 989), "h200": (141 * 1e9 / GIB, 989), "b200": (180 * 1e9 / GIB, 2250),
}  # fmt: skip

SHARE_OF_MATMUL = {"cuda": 0.45, "mps": 0.45, "cpu": 0.6}
"""Part of a large matrix product's speed that a whole training step reaches. cpu: measured, benchmarks/memory.py. The
others are assumed."""


@dataclass(frozen=True)
class Machine:
    """device: what trains. memory: bytes that limit a run. rate: floating-point operations per second of a training
    step. sentence: where the rate is from. named: the limit was asked for, not found."""

    device: str
    memory: int
    rate: float
    sentence: str
    named: bool = False


def named_card(name: str) -> Machine:
    """A card by its name in CARDS, or a number of GB. Raises UserError."""
    written = name.strip().lower().removesuffix("gb").replace(" ", "-").replace("_", "-")
    if written in CARDS:
        memory, tflops = CARDS[written]
        return _of_data_sheet(written, memory, tflops)
    try:
        memory = float(written)
    except ValueError:
        raise UserError(
            f"no card is called {name!r}", file="command line", key="--card",
            fix=f"give its memory in GB, or one of: {', '.join(CARDS)}",
        ) from None  # fmt: skip
    near = min(CARDS, key=lambda card: (abs(CARDS[card][0] - memory), CARDS[card][1]))
    return _of_data_sheet(near, memory, CARDS[near][1])


def _of_data_sheet(name: str, memory: float, tflops: float) -> Machine:
    share = SHARE_OF_MATMUL["cuda"]
    return Machine(
        "cuda", round(memory * GIB), tflops * 1e12 * share,
        f"the time is a guess: {100 * share:.0f}% of {name}'s {tflops:g} TFLOP/s (data sheet), not measured", True,
    )  # fmt: skip


def this_machine(precision: str) -> Machine:
    """The device that a run here would train on. precision: `mixed_precision`, for its speed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _host_memory()
    measured = matmul_rate(device, {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision])
    share = SHARE_OF_MATMUL[device]
    return Machine(
        device, memory, measured * share,
        f"the time is an estimate: {100 * share:.0f}% of the {measured / 1e12:.3g} TFLOP/s that a matrix product "
        "reaches here",
    )  # fmt: skip


@cache
def matmul_rate(device: str, dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, the best of a few."""
    size, repeats = (512, 4) if device == "cpu" else (8192, 8)
    factor = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        product = factor @ factor
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def host_now() -> int:
    """Bytes of host memory that this process holds now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (no file of a disk)
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most it has held
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _host_memory() -> int:
    """Bytes of memory that the machine, or the container this runs in, allows."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:  # noqa: PTH123
            allowed = file.read().strip()
    except OSError:
        return whole
    return min(whole, int(allowed)) if allowed.isdigit() else whole
