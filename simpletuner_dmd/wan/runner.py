"""The one place where anything is attached to a Wan transformer: what runs each of its blocks.

Attached by the model's own `enable_gradient_checkpointing(gradient_checkpointing_func=...)`: while gradients are on,
the model hands every block and its arguments to the runner, outside of any checkpointed region. Whatever a block needs
when backward runs it again is an argument or captured; nothing is kept on modules, where a recompute would find the
state of a later forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from simpletuner_dmd.wan.adapters import AdapterSwitch
from simpletuner_dmd.wan.swap import BlockSwap
from simpletuner_dmd.wan.tread import Rotary, Router


@dataclass(frozen=True)
class Recompute:
    """Which blocks are run again in backward: every `interval`-th from the first, and all whose weights are swapped,
    which would else stay on the device until then. offloaded: their inputs wait in host memory."""

    interval: int = 1
    offloaded: bool = False


class Taps:
    """Collects the outputs of some blocks in one forward; the blocks after the last of them need not run."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self.blocks = tuple(blocks)
        self.last = max(blocks)
        self._found: dict[int, Tensor] = {}

    def record(self, block: int, x_BND: Tensor) -> None:
        if block in self.blocks:
            self._found[block] = x_BND

    def features(self) -> list[Tensor]:
        """[B, N, D] for each of `blocks`, in their order."""
        return [self._found[block] for block in self.blocks]


class BlockRunner:
    """Runs each block: on all tokens or a part of them, plainly or recomputed in backward, with its output tapped.

    A recompute happens under the adapter state of its forward, whatever is active by then. Without gradients the model
    does not call the runner.
    """

    def __init__(
        self,
        transformer: nn.Module,
        switch: AdapterSwitch | None,
        checkpointing: bool,
        recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
    ) -> None:
        self.transformer, self.switch, self.checkpointing = transformer, switch, checkpointing
        self.recompute = recompute
        self._router: Router | None = None
        self._taps: Taps | None = None
        self._skipped: frozenset[int] = frozenset()
        self._without_graph = False
        network: Any = transformer  # a stock WanTransformer3DModel
        network.enable_gradient_checkpointing(gradient_checkpointing_func=self)

    @classmethod
    def of(cls, transformer: nn.Module) -> BlockRunner:
        """The runner attached to a transformer; AssertionError if another function has taken its place."""
        runner = getattr(transformer, "_gradient_checkpointing_func", None)
        assert isinstance(runner, cls), f"no BlockRunner is attached to this transformer, but {runner!r}"
        assert runner.transformer is transformer, "the runner belongs to another transformer: attach one after a copy"
        return runner

    @contextmanager
    def asked(
        self,
        *,
        router: Router | None = None,
        taps: Taps | None = None,
        skipped: Sequence[int] = (),
        without_graph: bool = False,
    ) -> Iterator[None]:
        """What the one forward inside is to do. skipped: blocks that do not run, their input is their output.
        without_graph: each block runs under no_grad."""
        assert self._router is None and self._taps is None and not self._skipped, "one forward at a time"
        self._router, self._taps, self._without_graph = router, taps, without_graph
        self._skipped = frozenset(skipped)
        try:
            yield
        finally:
            self._router, self._taps, self._without_graph = None, None, False
            self._skipped = frozenset()

    def __call__(self, block: nn.Module, x_BND: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary) -> Tensor:
        router, taps = self._router, self._taps
        if router is None and taps is None and not self._skipped:
            return self._run(block, x_BND, text, modulation, rotary)
        index = self._index(block)
        if index in self._skipped:
            return x_BND
        if taps is not None and index > taps.last:
            return x_BND  # skipped, not stopped by an exception: the rest of the model's forward runs as ever
        if router is not None:
            x_BND, modulation, rotary = router.enter(index, x_BND, modulation, rotary)
        x_BND = self._run(block, x_BND, text, modulation, rotary)
        if router is not None:
            x_BND = router.leave(index, x_BND)
        if taps is not None:
            taps.record(index, x_BND)
        return x_BND

    def _index(self, block: nn.Module) -> int:
        blocks: Any = self.transformer.blocks
        return next(index for index, candidate in enumerate(blocks) if candidate is block)

    def _recomputed(self, block: nn.Module) -> bool:
        if not self.checkpointing or self.recompute.interval == 1:
            return self.checkpointing
        index, swap = self._index(block), BlockSwap.of(self.transformer)
        return index % self.recompute.interval == 0 or (swap is not None and index in swap.indices)

    def _run(self, block: nn.Module, x_BND: Tensor, *arguments: Any) -> Tensor:
        if self._without_graph:
            with torch.no_grad():
                return block(x_BND, *arguments)
        if not self._recomputed(block):
            return block(x_BND, *arguments)
        switch = self.switch
        state = None if switch is None else switch.state

        def run(inner_BND: Tensor) -> Tensor:
            if switch is None or state is None:
                return block(inner_BND, *arguments)
            with switch.use(*state):
                return block(inner_BND, *arguments)

        if not self.recompute.offloaded:
            return checkpoint(run, x_BND, use_reentrant=False)
        # The tokens alone: text, modulation and rotary embedding are the same tensors for every block.
        with save_on_cpu(pin_memory=x_BND.is_cuda):
            return checkpoint(run, x_BND, use_reentrant=False)
