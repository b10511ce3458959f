"""Blocks of a frozen transformer whose weights live in host memory and are on the device for their turn only.

A block's weights are copied before its forward and dropped after it; nothing is ever copied back, because nothing in
them changes. While one swapped block runs, the next one's copy is under way on a stream of its own.

The copies take the places of the parameters in their modules for the length of the forward, as plain tensors. Setting
`parameter.data` instead would be wrong without any error: autograd saves a frozen parameter itself, and would find the
host's data in it when backward comes. Forward hooks do it, so passes without gradients, recomputed blocks and stock
pipelines are all served, and a recompute that torch stops early still ends with the weights back on the host.

Memory is taken from the compute stream's own pool, in the order of the program, and the copy waits until that stream
has reached the taking. So two blocks are on the device at most, however far the program runs ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner_dmd.config.errors import UserError


def swapped_indices(depth: int, count: int) -> list[int]:
    """Which `count` of `depth` blocks are swapped: evenly spread, so that each copy has other blocks to hide behind."""
    return [int((number + 0.5) * depth / count) for number in range(count)]


@dataclass(frozen=True)
class Place:
    """Where a weight belongs: the module's own table (parameters or buffers) and the name in it."""

    table: dict[str, Any]
    name: str


class SwappedBlock:
    """The weights of one block: on the host for good, on the device while they are fetched."""

    def __init__(self, block: nn.Module, pin: bool) -> None:
        self.weights: list[tuple[Place, Tensor]] = []
        for module in block.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        host = _map(tensor.detach(), lambda part: _to_host(part, pin))
                        if isinstance(tensor, nn.Parameter):
                            host = nn.Parameter(host, requires_grad=False)
                        table[name] = host
                        self.weights.append((Place(table, name), host))

    def put(self, copies: Sequence[Tensor]) -> None:
        for (place, _), copy in zip(self.weights, copies, strict=True):
            place.table[place.name] = copy

    def put_back(self) -> None:
        for place, host in self.weights:
            place.table[place.name] = host

    @property
    def bytes(self) -> int:
        return sum(_bytes(host) for _, host in self.weights)


class BlockSwap:
    """Attached to a transformer, which it freezes: keeps `count` of its blocks on the host, the rest on `device`.

    Attach before adapters are added: what comes later is no part of it and stays where it is made.
    copied: blocks fetched so far, for those who ask what happened.
    """

    def __init__(self, transformer: nn.Module, count: int, device: torch.device) -> None:
        network: Any = transformer  # a stock WanTransformer3DModel
        blocks = list(network.requires_grad_(False).blocks)
        assert 0 < count <= len(blocks), f"{count} of {len(blocks)} blocks cannot be swapped"
        self.device, self.copied = device, 0
        self.indices = swapped_indices(len(blocks), count)
        self.blocks = [SwappedBlock(blocks[index], pin=device.type == "cuda") for index in self.indices]
        self._ready: tuple[int, list[Tensor], Any] | None = None
        self._turn: dict[int, list[Tensor]] = {}
        self._previous, self._kept = -1, False
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        for child in transformer.children():
            if child is not network.blocks:
                child.to(device)
        for index, block in enumerate(blocks):
            if index not in self.indices:
                block.to(device)
        for own in (*transformer.parameters(recurse=False), *transformer.buffers(recurse=False)):
            own.data = own.data.to(device)
        for number, index in enumerate(self.indices):
            blocks[index].register_forward_pre_hook(self._before(number))
            blocks[index].register_forward_hook(self._after(number), always_call=True)
        network._block_swap = self

    @classmethod
    def of(cls, transformer: nn.Module) -> BlockSwap | None:
        """The swap attached to a transformer, if there is one."""
        return getattr(transformer, "_block_swap", None)

    @property
    def bytes(self) -> int:
        """Host memory that the swapped weights take."""
        return sum(block.bytes for block in self.blocks)

    # --- what the hooks do ------------------------------------------------------------------------------------------

    def _before(self, number: int) -> Callable[..., None]:
        def fetch(block: nn.Module, arguments: tuple[Any, ...]) -> None:
            copies = self._take(number)
            self.blocks[number].put(copies)
            self._turn[number] = copies
            following = self._following(number)
            self._previous, self._kept = number, following == number
            if not self._kept:
                self._prefetch(following)

        return fetch

    def _after(self, number: int) -> Callable[..., None]:
        def drop(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.blocks[number].put_back()
            copies = self._turn.pop(number, None)
            if copies is not None and self._kept:
                self._ready = (number, copies, None)  # needed again at once: the turn from forward to backward

        return drop

    def _following(self, number: int) -> int:
        """Which block's turn is likely next. A wrong guess costs a copy, never a wrong result."""
        last = len(self.blocks) - 1
        if last == 0:
            return 0
        if number == 0:
            return 1
        if number == last:
            # Forward ends here: backward starts here too. Without gradients the next forward starts at the first.
            going_down = self._previous == last
            return last - 1 if going_down else (last if torch.is_grad_enabled() else 0)
        return number - 1 if self._previous >= number else number + 1

    def _take(self, number: int) -> list[Tensor]:
        """The block's weights on the device, for use on the current stream."""
        if self._ready is None or self._ready[0] != number:
            self._prefetch(number)
        assert self._ready is not None
        _, copies, event = self._ready
        self._ready = None
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return copies

    def _prefetch(self, number: int) -> None:
        if self._ready is not None and self._ready[0] == number:
            return
        if self._ready is not None and self._ready[2] is not None:
            # Dropped unused: its memory may be given to others only after the copy into it has ended.
            torch.cuda.current_stream(self.device).wait_event(self._ready[2])
        self._ready = None
        self.copied += 1
        pairs: list[tuple[Tensor, Tensor]] = []

        def room(host: Tensor) -> Tensor:
            # Not empty_like: autograd must not see these as of the parameter's kind.
            copy = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
            pairs.append((host, copy))
            return copy

        with torch.no_grad():
            copies = [_map(host.detach(), room) for _, host in self.blocks[number].weights]
            if self._stream is None:
                for host, copy in pairs:
                    copy.copy_(host)
                self._ready = (number, copies, None)
                return
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for host, copy in pairs:
                    copy.copy_(host, non_blocking=True)
            self._ready = (number, copies, self._stream.record_event())


def _map(tensor: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """`act` on a plain tensor, or on the plain tensors that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        if type(tensor) is not Tensor:
            raise UserError(
                f"blocks_to_swap cannot move weights of the kind {type(tensor).__name__}",
                key="blocks_to_swap",
                fix="set it to 0, or use another base_model_precision",
            )
        return act(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: _map(getattr(tensor, name), act) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def _to_host(part: Tensor, pin: bool) -> Tensor:
    host = part.to("cpu")
    return host.pin_memory() if pin else host


def _bytes(tensor: Tensor) -> int:
    sizes: list[int] = []

    def count(part: Tensor) -> Tensor:
        sizes.append(part.numel() * part.element_size())
        return part

    _map(tensor.detach(), count)
    return sum(sizes)
