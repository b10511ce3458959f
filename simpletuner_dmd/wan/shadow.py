"""What a computation holds and does, found by running it on the meta device, where tensors have a size and no content.

The code that trains is the code that is counted: `Shadow` sees every operation of its forwards and backwards, adds up
the storages that are alive, and the floating-point operations. Nothing is computed and no memory is taken.

A transformer of 40 equal blocks need not be run: `Observation.deeper` draws the line through two shallow ones, for each
moment of the computation on its own, so that a peak that wanders from one moment to another is found.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Moment = tuple[str | int | bool, ...]
"""Where in the computation: (turn, number of the pass, in backward, block)."""

FIRST, LAST, BETWEEN, OUTSIDE = "first block", "last block", "between", "outside"


@dataclass
class Observation:
    """peaks: the most bytes alive at each moment, beyond what was there before. flops: of the blocks, and of the rest.
    passes: forwards of the transformers, by turn."""

    depth: int
    peaks: dict[Moment, int] = field(default_factory=dict)
    block_flops: float = 0.0
    other_flops: float = 0.0
    passes: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    @property
    def flops(self) -> float:
        return self.block_flops + self.other_flops

    def deeper(self, other: Observation, depth: int) -> Observation:
        """The same computation in a network of `depth` blocks, from this one and one of more blocks."""
        assert other.depth > self.depth
        share = (depth - self.depth) / (other.depth - self.depth)
        common = self.peaks.keys() & other.peaks.keys()
        peaks = {at: round(self.peaks[at] + share * (other.peaks[at] - self.peaks[at])) for at in common}
        return Observation(depth, peaks, self.block_flops * depth / self.depth, self.other_flops, self.passes)

    def at_depth(self, depth: int) -> Observation:
        """Its operations in a network of `depth` blocks; the memory is that of this one."""
        return Observation(depth, self.peaks, self.block_flops * depth / self.depth, self.other_flops, self.passes)


class Shadow(TorchDispatchMode):
    """Counts while it is active. `turn` names what is going on; set it as the computation goes."""

    def __init__(self, transformers: Iterable[nn.Module], held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.transformers = list(transformers)
        depth = max((len(network.blocks) for network in self.transformers), default=1)  # type: ignore[arg-type]
        self.seen = Observation(depth)
        self.turn, self.live = "", 0
        self._block, self._pass, self._inside = OUTSIDE, 0, False
        self._known: dict[int, Any] = {}
        for tensor in held:
            self._hold(tensor)
        for network in self.transformers:
            for tensor in (*network.parameters(), *network.buffers()):
                self._hold(tensor)

    def _hold(self, tensor: Tensor) -> None:
        """What was there before: neither it nor a view of it counts."""
        for inner in _plain(tensor):
            storage = inner.untyped_storage()
            self._known[storage._cdata] = storage

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if operation is aten._local_scalar_dense.default and arguments[0].is_meta:
            return {torch.bool: True}.get(arguments[0].dtype, 1 if not arguments[0].is_floating_point() else 1.0)
        if operation is aten._to_copy.default and arguments[0].is_meta and named.get("device") == torch.device("cpu"):
            return torch.zeros(arguments[0].shape, dtype=named.get("dtype") or arguments[0].dtype)
        result = operation(*arguments, **named)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self._count_flops(operation, arguments, named, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        for inner in _plain(tensor):
            if not inner.is_meta:
                continue
            storage = inner.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, self._forget(key, size))
            self.live += size
        at = (self.turn, self._pass, torch._C._current_graph_task_id() != -1, self._block)
        if self.live > self.seen.peaks.get(at, -1):
            self.seen.peaks[at] = self.live

    def _forget(self, key: int, size: int) -> Any:
        def gone(reference: object) -> None:
            self.live -= size
            del self._known[key]

        return gone

    def _count_flops(self, operation: Any, arguments: Any, named: Any, result: Any) -> None:
        packet = operation._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*arguments, **named, out_val=result)
        elif str(packet) == "quanto.qbytes_mm":
            rows, columns = arguments[0].shape[0], arguments[0].shape[1]
            flops = 2 * rows * columns * arguments[1].shape[0]
            # Its kernels restore the weight for the length of the product, except that of int8 on the CPU.
            at = (self.turn, self._pass, torch._C._current_graph_task_id() != -1, self._block)
            restored = arguments[1].numel() * arguments[2].element_size()
            self.seen.peaks[at] = max(self.seen.peaks[at], self.live + restored)
        else:
            return
        if self._inside:
            self.seen.block_flops += flops
        else:
            self.seen.other_flops += flops

    # --- places -------------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[Shadow]:
        """Counts what happens inside, and knows of each operation in which block it is."""
        handles: list[Any] = []
        for network in self.transformers:
            blocks: Any = network.blocks
            handles.append(network.register_forward_pre_hook(self._opened))
            for number, block in enumerate(blocks):
                where = FIRST if number == 0 else LAST if number == len(blocks) - 1 else BETWEEN
                handles.append(block.register_forward_pre_hook(self._entered(where)))
                handles.append(block.register_forward_hook(self._left))
        try:
            with _attention_of_a_kernel(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _opened(self, network: nn.Module, arguments: Any) -> None:
        self._pass += 1
        self.seen.passes[self.turn] = self.seen.passes.get(self.turn, 0) + 1

    def _entered(self, where: str) -> Any:
        def enter(block: nn.Module, arguments: Any) -> None:
            self._block, self._inside = where, True

        return enter

    def _left(self, block: nn.Module, arguments: Any, output: Any) -> None:
        # In backward what follows a recomputed block is its own gradient.
        if torch._C._current_graph_task_id() == -1:
            self._block, self._inside = OUTSIDE, False

    def begin_backward(self) -> None:
        """Most of a backward is of blocks, whether it runs them again or not."""
        self._block, self._inside = LAST, True

    def end_backward(self) -> None:
        self._block, self._inside = OUTSIDE, False


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the bytes: a quantised one has several."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in _plain(getattr(tensor, name))]


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all these tensors, each storage once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for inner in _plain(tensor):
            storage = inner.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


@contextmanager
def _attention_of_a_kernel() -> Iterator[None]:
    """On the meta device torch would write attention out, with its quadratic matrix. No device that trains does, but
    under forward-mode differentiation, where nothing else can be had."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(query):
            return written(query, key, value, *others, **named)
        scale = named.get("scale")
        attended: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
        return attended

    written = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = written


# --- autocast ---------------------------------------------------------------------------------------------------------

_CAST = {nn.functional.linear, nn.functional.conv3d, torch.matmul, torch.bmm}


class _Casting(TorchFunctionMode):
    """torch.autocast, which has no meta device: products in `dtype`, weights rounded once per outermost region."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.depth = dtype, 0
        self.rounded: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function not in _CAST and getattr(function, "__name__", "") != "attention":
            return function(*arguments, **named)
        return function(*map(self._cast, arguments), **{key: self._cast(value) for key, value in named.items()})

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not value.is_leaf or not value.requires_grad:
            return value.to(self.dtype)
        if id(value) not in self.rounded:
            self.rounded[id(value)] = value.to(self.dtype)
        return self.rounded[id(value)]


def cast_products(network: nn.Module, dtype: torch.dtype) -> None:
    """Every forward of the network, and every block that backward runs again, computes as under autocast to `dtype`."""
    casting = _Casting(dtype)

    def enter(module: nn.Module, arguments: Any) -> None:
        casting.depth += 1
        if casting.depth == 1:
            casting.__enter__()

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        casting.depth -= 1
        if casting.depth == 0:
            casting.__exit__(None, None, None)
            casting.rounded.clear()

    blocks: Any = network.blocks
    for module in (network, *blocks):
        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=True)


def no_content(module: nn.Module) -> Mapping[str, Tensor]:
    """Its parameters and buffers, all on the meta device (asserted)."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    real = [name for name, tensor in tensors.items() if not all(inner.is_meta for inner in _plain(tensor))]
    assert not real, f"memory was taken by {real[:3]}"
    return tensors
