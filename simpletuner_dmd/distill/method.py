"""What the trainer knows of an algorithm: which role moves at a step, and the losses that move it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from simpletuner_dmd.flow import Batch
from simpletuner_dmd.randomness import RandomStream


@dataclass
class NamedLoss:
    """One term of a turn's loss, back-propagated on its own so that peak memory is that of one term.

    value: scalar, a mean over the samples of the micro-batch. metrics: plain numbers worth logging beside it.
    """

    name: str
    value: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One optimizer update of one role within a step."""

    role: str  # "student" or "critic"
    losses: Callable[[Batch, RandomStream], Iterable[NamedLoss]]


class Method(Protocol):
    """An algorithm. `turns` is a pure function of the step, so that a resumed run takes the same ones."""

    needs_latents: bool

    def turns(self, step: int) -> Iterable[Turn]: ...

    def updates(self, role: str, steps: int) -> int:
        """How many updates `role` gets in `steps` trainer steps; its learning-rate schedule has that length."""
        ...

    def end_step(self) -> None:
        """Lets go of what the turns of one step shared."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
