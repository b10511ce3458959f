"""The one door to quantisation: which layers of a model are quantised, under the names users know.

Quantised are the linear layers of the blocks, attention and feed-forward. Embedders, modulation, norms and the head
are small and sensitive, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.wan.schemes import SCHEMES, Scheme

BLOCK_LISTS = ("blocks", "encoder.block")
"""Where the blocks are: in a Wan transformer, in UMT5."""


def in_blocks(name: str) -> bool:
    """Whether a module or tensor of this name belongs to the blocks of a model."""
    return name.startswith(tuple(f"{blocks}." for blocks in BLOCK_LISTS))


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that quantisation is about, by name, quantised already or not."""
    for name, module in model.named_modules():
        if in_blocks(name) and isinstance(module, nn.Linear):
            yield name, module


def quantise(model: nn.Module, precision: str, via: torch.device | None = None) -> int:
    """Quantises the linear layers of the model's blocks in place, one by one; returns how many.

    precision: a name of SCHEMES, or "no_change", which does nothing. via: the device that each layer is moved to, and
    stays on; None leaves it where it is.
    """
    if precision == "no_change":
        return 0
    names = [name for name, _ in linear_layers(model)]
    assert names, f"nothing was quantised to {precision}"
    for name in names:
        quantise_layer(model, name, SCHEMES[precision], via)
    return len(names)


@torch.no_grad()
def quantise_layer(model: nn.Module, name: str, scheme: Scheme, via: torch.device | None = None) -> nn.Module:
    """Puts the quantised layer in the place of the dense one, whose weight is free afterwards."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if via is not None:
        layer.to(via)
    quantised = scheme.quantise(layer)
    model.set_submodule(name, quantised)
    return quantised


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that a linear layer stands for, in whatever scheme it is."""
    weight: Any = layer.weight
    if type(weight) in (nn.Parameter, Tensor):
        return weight.detach()
    scheme = next(scheme for scheme in SCHEMES.values() if scheme.in_use and scheme.owns(layer))
    return scheme.dense(layer)
