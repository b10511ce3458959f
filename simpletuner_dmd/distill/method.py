"""What the trainer knows of an algorithm: which role moves at a step, and the losses that move it.

An algorithm is one file in this room with a function `build(parts: Ingredients) -> Method`, and its settings in
`config/methods/`. Several roles may share one network; a loss reaches only the parameters of the role whose turn it is,
so nothing is ever frozen or thawed between a forward and its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simpletuner_dmd.flow import ALL_NOISE, Batch, Denoiser, NoiseRange, Schedule, TextEmbedding
from simpletuner_dmd.randomness import RandomStream


@dataclass
class NamedLoss:
    """One term of a turn's loss, back-propagated on its own so that peak memory is that of one term.

    value: scalar, a mean over the samples of the micro-batch. metrics: plain numbers worth logging beside it.
    reported: what is logged under the name where that is not `value` itself (terms that share one graph are summed).
    """

    name: str
    value: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    reported: float | None = None


def linearised(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """A scalar with `value`'s number and, with respect to `at`, exactly `gradient`.

    So a term whose own graph is expensive can be differentiated up to `at` at once, its graph freed, and the rest of
    the way (through the student) gone together with the other terms.
    """
    return value.detach() + (gradient.detach() * (at - at.detach())).sum()


@dataclass(frozen=True)
class Turn:
    """One optimizer update of one role within a step."""

    role: str  # "student", "critic", "discriminator", …: whose parameters and optimizer
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


class Stateless:
    """A Method whose draws and turns are all functions of the step: a resume needs nothing of it."""

    def end_step(self) -> None:
        """Nothing was shared between turns."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, f"unexpected method state {sorted(state)}"


class OneRole(Stateless):
    """A Method that moves the student alone, at every step, by `losses`."""

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("student", self.losses)

    def updates(self, role: str, steps: int) -> int:
        return steps if role == "student" else 0

    def losses(self, batch: Batch, stream: RandomStream) -> Iterable[NamedLoss]:
        raise NotImplementedError


class Features(Protocol):
    """A denoiser whose inner activations can be read, for discriminators and feature matching."""

    def features(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]) -> list[Tensor]:
        """[B, N, D] after each of `blocks`, with the graph to x_t; blocks after the last are not run."""
        ...


@dataclass(frozen=True)
class Ingredients:
    """What an algorithm is made of.

    options: the validated `distillation_config` (of supervised training: the configuration itself); its attributes are
    the keys of the same names. discriminator: a head on features, where the options ask for one.
    weak: the critic at a fraction of its strength (weak-to-strong matching). target: the student under its running
    average, where there is one. detail: the low-noise expert of a two-expert student, whose high-noise expert is
    `student`. known: the noise levels that the teacher was made for, where it is one of two experts.
    """

    teacher: Denoiser
    student: Denoiser
    schedule: Schedule
    options: Any
    device: torch.device
    caption_dropout_probability: float = 0.0
    critic: Denoiser | None = None
    weak: Denoiser | None = None
    target: Denoiser | None = None
    detail: Denoiser | None = None
    discriminator: nn.Module | None = None
    known: NoiseRange = ALL_NOISE
