"""An exponential moving average of the student's trained weights, in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.flow import Denoiser, TextEmbedding


class Ema:
    """shadow = d shadow + (1 - d) weights, once per student update, evaluated every `update_interval` updates.

    An evaluation after k updates uses d^k, so the interval changes the cost and not the memory of the average.
    Until `start_step` student updates are done the shadow follows the weights. device: where the shadow lives
    (default: beside each weight).
    """

    def __init__(
        self,
        named_params: Sequence[tuple[str, Parameter]],
        decay: float,
        update_interval: int = 1,
        start_step: int = 0,
        device: torch.device | str | None = None,
    ):
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), not {decay:g}", key="ema_decay", fix="use for example 0.99")
        assert update_interval >= 1
        self.parameters = dict(named_params)
        assert len(self.parameters) == len(named_params), "two parameters share a name"
        self.decay, self.update_interval, self.start_step = decay, update_interval, start_step
        self.updates = 0  # student updates that the shadow has seen
        self._swapped = False
        self.shadow = {
            name: parameter.detach().to(device=device or parameter.device, dtype=torch.float32, copy=True)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, student_updates: int) -> None:
        """Call after every student update with the number of student updates done so far."""
        assert not self._swapped, "an update while the average is in the model would average the average"
        if student_updates <= self.start_step:
            if student_updates % self.update_interval == 0 or student_updates == self.start_step:
                self._move(1.0, student_updates)
        elif student_updates % self.update_interval == 0:
            self._move(1 - self.decay ** (student_updates - self.updates), student_updates)

    def _move(self, share: float, student_updates: int) -> None:
        for name, parameter in self.parameters.items():
            shadow = self.shadow[name]
            weight = parameter.detach().to(device=shadow.device, dtype=torch.float32)
            if share == 1.0:
                shadow.copy_(weight)
            else:
                shadow.lerp_(weight, share)
        self.updates = student_updates

    @torch.no_grad()
    def restart(self, student_updates: int) -> None:
        """Begins at the weights as they are, after `student_updates` updates that no average has seen."""
        self._move(1.0, student_updates)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """The model holds the average inside the block, and its own weights, bit for bit, after it."""
        assert not self._swapped, "the average is in the model already"
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._swapped = True
        try:
            self._put(self.shadow)
            yield
        finally:
            self._put(own)
            self._swapped = False

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The shadow and the update count; decay and intervals come from the configuration."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError when the saved average is of other weights, instead of starting a new one silently."""
        saved: Mapping[str, Tensor] = state["shadow"]
        differing = sorted(saved.keys() ^ self.shadow.keys())
        differing += [name for name in self.shadow if name in saved and saved[name].shape != self.shadow[name].shape]
        if differing:
            raise UserError(
                f"the saved EMA is of other weights than this run trains: {len(differing)} differ, "
                f"for example {differing[0]}",
                key="resume_from_checkpoint",
                fix="restore the model and adapter settings of the checkpoint's config.resolved.json",
            )
        for name, shadow in self.shadow.items():
            shadow.copy_(saved[name])
        self.updates = int(state["updates"])


class AveragedDenoiser:
    """The student under its running average: the target of a consistency loss. Only ever without a graph, because the
    weights are put back before anybody could walk one."""

    def __init__(self, student: Denoiser, average: Ema) -> None:
        self.student, self.average = student, average

    @torch.no_grad()
    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        with self.average.swap():
            return self.student.velocity(x_t_BCFHW, sigma, text)
