"""Supervised flow matching on data latents: what trains a teacher, or fine-tunes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner_dmd.distill.losses import velocity_loss
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, OneRole
from simpletuner_dmd.distill.noise_levels import Beta, Draw, Listed, LogitNormal, NoiseLevels, Uniform
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import ALL_NOISE, TIMESTEPS, Batch, Denoiser, NoiseRange, Routing, add_noise
from simpletuner_dmd.randomness import RandomStream


@dataclass(frozen=True)
class SupervisedSettings:
    """levels: where on the noise scale the loss looks."""

    levels: NoiseLevels = NoiseLevels()
    caption_dropout_probability: float = 0.0


class Supervised(OneRole):
    """The Method: one role, "student", moved every step by ||v - (e - x0)||^2."""

    needs_latents = True

    def __init__(self, student: Denoiser, settings: SupervisedSettings, device: torch.device) -> None:
        self.student, self.settings, self.device = student, settings, device

    def losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        assert batch.latents_BCFHW is not None, "supervised training needs latents"
        x0 = batch.latents_BCFHW.float()
        sigma_B = self.settings.levels.sigma(stream, batch.latent_shape).to(self.device)
        noise = stream.normal(batch.latent_shape, "noise").to(self.device)
        text = with_dropped_captions(batch, stream, self.settings.caption_dropout_probability)
        routed = Routing(stream, "tread")
        velocity = self.student.velocity(add_noise(x0, noise, sigma_B), sigma_B, text, routed=routed)
        yield NamedLoss("loss", velocity_loss(velocity, x0, noise).mean())


def noise_levels(options: Any, known: NoiseRange = ALL_NOISE) -> NoiseLevels:
    """The `flow_*` options as a draw and a shift, within what the network knows."""
    draw: Draw = LogitNormal(scale=options.flow_sigmoid_scale)
    if options.flow_use_uniform_schedule:
        draw = Uniform()
    elif options.flow_use_beta_schedule:
        draw = Beta(options.flow_beta_schedule_alpha, options.flow_beta_schedule_beta)
    elif options.flow_custom_timesteps is not None:
        # As SimpleTuner reads them: up to 1 they are sigmas already.
        draw = Listed(tuple(t if t <= 1 else t / TIMESTEPS for t in options.flow_custom_timesteps))
    return NoiseLevels(draw, options.flow_schedule_shift, options.flow_schedule_auto_shift, known)


def build(parts: Ingredients) -> Supervised:
    """The method from the noise options of the configuration."""
    settings = SupervisedSettings(noise_levels(parts.options, parts.known), parts.caption_dropout_probability)
    return Supervised(parts.student, settings, parts.device)
