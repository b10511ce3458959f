"""A LoRA that comes near to what a full student changed of its base: the largest singular values of each difference.

It is lossy. The error says how much of the change is missing: 0 is none, 1 is all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner_dmd.publish.dialects import comfyui_module

OVERSAMPLING, ITERATIONS = 16, 4  # of the randomised decomposition


@dataclass(frozen=True)
class Extraction:
    """tensors: PEFT names without prefix, alpha = rank. relative_error: of the layers a LoRA can carry, the size of
    what is missing over the size of the change. left_out: the size of the other changes (norms, biases, modulation,
    the patch embedding) over the size of all of it. worst_layer: the layer with the largest error of its own."""

    tensors: dict[str, Tensor]
    rank: int
    relative_error: float
    left_out: float
    worst_layer: str
    worst_error: float

    def as_dict(self) -> dict[str, Any]:
        """For distill.json."""
        return {
            "rank": self.rank, "relative_error": self.relative_error, "left_out": self.left_out,
            "worst_layer": self.worst_layer, "worst_error": self.worst_error,
        }  # fmt: skip


@torch.no_grad()
def extract_lora(student: Mapping[str, Tensor], base: Iterable[tuple[str, Tensor]], rank: int) -> Extraction:
    """student, base: the same names. rank: of the factors, less where a layer is smaller. Every layer is seen once."""
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}")
    tensors: dict[str, Tensor] = {}
    missing = carried = other = 0.0
    worst = ("", 0.0)
    for name, before in base:
        change = student[name].detach().float() - before.to(student[name].device, torch.float32)
        size = float(change.square().sum())
        layer = name.removesuffix(".weight")
        if change.ndim != 2 or layer == name or not _carries(layer):
            other += size
            continue
        up, down = factors(change, rank)
        lost = float((change - up @ down).square().sum())
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down.cpu(), up.cpu()
        missing, carried = missing + lost, carried + size
        if size and math.sqrt(lost / size) > worst[1]:
            worst = (layer, math.sqrt(lost / size))
    return Extraction(_same_rank(tensors, rank), rank, _ratio(missing, carried), _ratio(other, carried + other), *worst)


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [out, r], down [r, in]) of the best approximation of that rank, r = min(rank, out, in)."""
    rank = min(rank, *change.shape)
    if rank + OVERSAMPLING >= min(change.shape):
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        v = v.mT
    else:
        with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=rank + OVERSAMPLING, niter=ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).mT


def _same_rank(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Zeros up to the rank, so that a file has one: readers take alpha = rank of the whole."""
    padded = {}
    for name, tensor in tensors.items():
        axis = 0 if ".lora_A." in name else 1
        shape = list(tensor.shape)
        shape[axis] = rank - shape[axis]
        padded[name] = torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor.contiguous()
    return padded


def _carries(layer: str) -> bool:
    """Whether both readers of the export know this layer."""
    try:
        comfyui_module(layer)
    except ValueError:
        return False
    return True


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
