"""Fills a model that has shapes but no storage, block by block, quantising each block before the next is read.

The host never holds the dense model: at most what is quantised already, the embedders and head, and one dense block.
Where the velocity of the dense model is wanted for comparison, one forward pass drives the loading: each block is read
before its own turn and quantised after it, so that the dense velocity costs a pass and no memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from simpletuner_dmd.wan.checkpoints import Checkpoint
from simpletuner_dmd.wan.quantisation import BLOCK_LISTS, in_blocks, linear_layers, quantise_layer
from simpletuner_dmd.wan.schemes import Scheme

T = TypeVar("T")


class Merge(Protocol):
    """A fine-tune that becomes part of the weights while they are loaded. fingerprint: names it and its strength."""

    @property
    def fingerprint(self) -> str: ...

    def start(self, model: nn.Module) -> None:
        """Called once, before any weight is there. UserError where the fine-tune is of another model."""

    def __call__(self, name: str, layer: nn.Linear) -> None:
        """Called with every linear layer once its dense weight is there; may change it in place."""


@dataclass(frozen=True)
class Precision:
    """dtype: of every floating tensor, but for those below modules named in `keep_in_fp32`."""

    dtype: torch.dtype
    keep_in_fp32: frozenset[str] = frozenset()

    def of(self, name: str) -> torch.dtype:
        return torch.float32 if self.keep_in_fp32.intersection(name.split(".")) else self.dtype


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of this model must hold; a tensor that is in two places counts once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def group_of(name: str) -> str:
    """The block that a tensor belongs to, "blocks.3"; "" for what is outside of the blocks."""
    for blocks in BLOCK_LISTS:
        if name.startswith(f"{blocks}."):
            return f"{blocks}.{name.removeprefix(f'{blocks}.').partition('.')[0]}"
    return ""


def groups_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group -> its tensors: first what is outside of the blocks, then the blocks in the order of their names."""
    groups: dict[str, list[str]] = {"": []}
    for name in names:
        groups.setdefault(group_of(name), []).append(name)
    return groups


@torch.no_grad()
def stream(
    model: nn.Module,
    checkpoint: Checkpoint,
    precision: Precision,
    *,
    scheme: Scheme | None = None,
    merge: Merge | None = None,
    via: torch.device | None = None,
    drive: Callable[[nn.Module], T] | None = None,
) -> T | None:
    """Fills `model` (parameters on the meta device) from a checkpoint that fits it.

    scheme: quantises the linear layers of the blocks. via: the device on which each block is put together, and stays.
    drive: given the model, runs its forward once, and sees the dense model, fine-tune included; what it returns is
    returned. Without a scheme it is not called.
    """
    if merge is not None:
        merge.start(model)
    groups = groups_of(checkpoint.places)

    def fill(names: Sequence[str]) -> None:
        for name in names:  # one by one: what a file maps is given back before the next
            tensor = checkpoint.read([name])[name]
            if tensor.is_floating_point():
                tensor = tensor.to(precision.of(name))
            put(model, name, tensor if via is None else tensor.to(via))
        if merge is not None:
            for name in _linear_layers(model, names):
                merge(name, model.get_submodule(name))  # type: ignore[arg-type]

    def quantise_these(names: Sequence[str]) -> None:
        if scheme is not None:
            for name in _linear_layers(model, names):
                quantise_layer(model, name, scheme)
            give_back()

    fill(groups.pop(""))
    if drive is None or scheme is None:
        for names in groups.values():
            for layer in _by_owner(names):
                fill(layer)
                quantise_these(layer)
        return None
    if via is not None:
        for name, buffer in list(model.named_buffers()):
            put(model, name, buffer.to(via))
    return _driven(model, groups, fill, quantise_these, drive)


def _driven(
    model: nn.Module,
    groups: Mapping[str, list[str]],
    before: Callable[[list[str]], None],
    after: Callable[[list[str]], None],
    drive: Callable[[nn.Module], T],
) -> T:
    """`before` and `after` around the only forward of each block."""
    handles = []
    for group, names in groups.items():
        block = model.get_submodule(group)
        # The names are bound now; a loop variable would be the last block's by the time a hook runs.
        handles.append(block.register_forward_pre_hook(lambda *_, names=names: before(names)))
        handles.append(block.register_forward_hook(lambda *_, names=names: after(names)))
    try:
        return drive(model)
    finally:
        for handle in handles:
            handle.remove()


def give_back() -> None:
    """Returns freed memory to the system: between quantised layers, the holes of dense ones are too small for more.

    A C library without `malloc_trim` has allocators that do so themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of the model's own, frozen, whatever device that was on."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def _by_owner(names: Iterable[str]) -> list[list[str]]:
    """The names, those of one module together."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    return list(owners.values())


def _linear_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The linear layers whose tensors these are."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [owner for owner in owners if isinstance(model.get_submodule(owner), nn.Linear)]


def restore(
    model: nn.Module,
    checkpoint: Checkpoint,
    scheme: Scheme,
    precision: Precision,
    notes: Mapping[str, str],
    via: torch.device | None,
) -> None:
    """Fills `model` from what `saved_tensors` gave of it: layers of the blocks in the scheme, everything else dense."""
    for group, names in groups_of(checkpoint.places).items():
        tensors = checkpoint.read(names)
        if via is not None:
            tensors = {name: tensor.to(via) for name, tensor in tensors.items()}
        for name, layer in [item for item in linear_layers(model) if group and group_of(item[0]) == group]:
            inner = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
            layer.to(precision.of(f"{name}.weight"))  # still without storage: what it will say its weight was
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in inner.items()}
            model.set_submodule(name, scheme.restore(layer, own, notes.get(name, "")))
        for name, tensor in tensors.items():
            put(model, name, tensor)


def saved_tensors(model: nn.Module, scheme: Scheme) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a model whose blocks are quantised, on the CPU, and the notes of its layers, by name."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    quantised = {name for name, module in model.named_modules() if in_blocks(name) and scheme.owns(module)}
    for name in quantised:
        inner, note = scheme.save(model.get_submodule(name))
        tensors |= {f"{name}.{key}": tensor for key, tensor in inner.items()}
        if note:
            notes[name] = note
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in quantised:
            tensors[name] = parameter.detach()
    return {name: _on_cpu(tensor) for name, tensor in sorted(tensors.items())}, notes


def _on_cpu(tensor: Tensor) -> Tensor:
    """Without a copy, but for small tensors, which some libraries share between layers and a file may not."""
    tensor = tensor.cpu().contiguous()
    return tensor.clone() if tensor.numel() < 4096 else tensor
