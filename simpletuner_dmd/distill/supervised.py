"""Supervised flow matching on data latents: what trains a teacher, or fine-tunes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner_dmd.distill.losses import velocity_loss
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, Turn
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import Batch, Denoiser, Routing, add_noise, shifted
from simpletuner_dmd.randomness import RandomStream


@dataclass(frozen=True)
class SupervisedSettings:
    """shift: None draws sigma logit-normal; a number k warps that draw by k u / (1 + (k - 1) u)."""

    shift: float | None = None
    caption_dropout_probability: float = 0.0


class Supervised:
    """The Method: one role, "student", moved every step by ||v - (e - x0)||^2."""

    needs_latents = True

    def __init__(self, student: Denoiser, settings: SupervisedSettings, device: torch.device) -> None:
        self.student, self.settings, self.device = student, settings, device

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("student", self.losses)

    def updates(self, role: str, steps: int) -> int:
        return steps

    def end_step(self) -> None:
        pass

    def draw_sigma(self, stream: RandomStream) -> Tensor:
        """[B] fp32: sigmoid of a standard normal, then the shift."""
        u = torch.sigmoid(stream.normal((), "sigma").double())
        sigma = u if self.settings.shift is None else shifted(u, self.settings.shift)
        assert isinstance(sigma, Tensor)
        return sigma.float()

    def losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        assert batch.latents_BCFHW is not None, "supervised training needs latents"
        x0 = batch.latents_BCFHW.float()
        sigma_B = self.draw_sigma(stream).to(self.device)
        noise = stream.normal(batch.latent_shape, "noise").to(self.device)
        text = with_dropped_captions(batch, stream, self.settings.caption_dropout_probability)
        routed = Routing(stream, "tread")
        velocity = self.student.velocity(add_noise(x0, noise, sigma_B), sigma_B, text, routed=routed)
        yield NamedLoss("loss", velocity_loss(velocity, x0, noise).mean())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, f"unexpected method state {sorted(state)}"


def build(parts: Ingredients) -> Supervised:
    """The method from the noise options of the configuration."""
    settings = SupervisedSettings(parts.options.flow_schedule_shift, parts.caption_dropout_probability)
    return Supervised(parts.student, settings, parts.device)
