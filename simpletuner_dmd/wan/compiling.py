"""Regional compilation: the blocks of a transformer, one graph for all of them, by diffusers' own door.

The blocks alone, so that what happens around them (`BlockRunner`) stays plain Python. Each state that a block can be
in has a graph: student, critic, bare base, with and without gradients, per shape. A graph that is compiled later must
not match an earlier state, or a recompute would take another graph than its forward did: so shapes are static and an
adapter's scale is a constant of its graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

GRAPHS = 64  # torch's limit per function is 8, which roles x (with, without gradients) x shapes soon reach


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """From now on each block compiles at its first call in each new state."""
    config: Any = torch._dynamo.config
    config.specialize_float = True
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    network: Any = transformer  # a stock WanTransformer3DModel
    network.compile_repeated_blocks(backend=backend, dynamic=False)


def why_not_compiled(device: torch.device) -> str | None:
    """Why nothing can be compiled on this machine, by trying; None where it can."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    try:
        torch.compile(probe)(torch.ones(4, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
