"""Every random draw of a training run, from (seed, step, position of the sample in the global batch, purpose).

No generator state is carried from step to step, so a resumed run repeats the same bits without saving any, and one
process draws what two processes draw together. Numbers are made on the CPU, so every device sees the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what names a draw."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator for one named draw."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class RandomStream:
    """The draws of one micro-batch at one step.

    positions: index of each of its samples in the step's global batch (over ranks and accumulation).
    """

    seed: int
    step: int
    positions: tuple[int, ...]

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal noise, [B, *shape] fp32 on the CPU; private to each sample."""
        return torch.stack(
            [torch.randn(tuple(shape), generator=generator(self.seed, self.step, position, purpose))
             for position in self.positions]
        )  # fmt: skip

    def uniform(self, purpose: str) -> Tensor:
        """[B] numbers in [0, 1), fp64 on the CPU; private to each sample."""
        return torch.cat(
            [torch.rand(1, dtype=torch.float64, generator=generator(self.seed, self.step, position, purpose))
             for position in self.positions]
        )  # fmt: skip

    def shared_index(self, count: int, purpose: str) -> int:
        """An integer in [0, count) that every rank and micro-batch of this step shares (the exit rung)."""
        return int(torch.randint(count, (1,), generator=generator(self.seed, self.step, "shared", purpose)))


def permutation(count: int, *parts: int | str) -> list[int]:
    """A seeded order of range(count), for example of an epoch: parts = (seed, "order", epoch)."""
    return torch.randperm(count, generator=generator(*parts)).tolist()
