"""The student's own few-step sampling during training: from pure noise (simulate) or from noised data latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner_dmd.flow import Batch, Denoiser, Schedule, add_noise, sample_few_step, x0_from_velocity
from simpletuner_dmd.randomness import RandomStream


@dataclass(frozen=True)
class Rollout:
    """Where a rollout left the ladder and what came out.

    x0: the student's clean prediction at the exit rung, fp32, with a graph only if it was asked for.
    """

    x0: Tensor
    exit_rung: int

    @property
    def first_exit(self) -> int:
        """The earliest rung that a part of the clip left at; here the clip is one part."""
        return self.exit_rung


RollOut = Callable[[Batch, RandomStream, bool], Rollout]
"""(batch, draws, whether the student's exit call records a graph) -> the student's samples."""


@dataclass(frozen=True)
class RolloutSettings:
    schedule: Schedule
    renoise: str = "sde"  # "sde" fresh noise at each rung, "ode" Euler
    source: str = "simulate"  # "simulate" from pure noise, "data_latent" from noised cached latents
    last_step_only: bool = False


def exit_rung(settings: RolloutSettings, stream: RandomStream, purpose: str) -> int:
    """The rung whose prediction is used: uniform, the same on every rank and in every micro-batch of the step."""
    rungs = len(settings.schedule.ladder)
    return rungs - 1 if settings.last_step_only else stream.shared_index(rungs, f"{purpose}/exit")


def roll_out(
    student: Denoiser,
    batch: Batch,
    stream: RandomStream,
    settings: RolloutSettings,
    purpose: str,
    device: torch.device,
    with_grad: bool,
) -> Rollout:
    """Walks the ladder to the exit rung without a graph, then makes the one call that may carry one.

    Rungs after the exit are never run. The input of the first rung is N(0, I).
    """
    schedule = settings.schedule
    rung = exit_rung(settings, stream, purpose)

    def draw(name: str) -> Callable[[], Tensor]:
        return lambda: stream.normal(batch.latent_shape, f"{purpose}/{name}").to(device)

    sigma_B = torch.full((len(batch.positions),), schedule.ladder[rung], dtype=torch.float32, device=device)
    with torch.no_grad():
        if settings.source == "data_latent":
            assert batch.latents_BCFHW is not None, "data_latent rollouts need latents in the batch"
            x_t = add_noise(batch.latents_BCFHW.float(), draw("data noise")(), sigma_B)
        else:
            x_t = sample_few_step(
                student,
                draw("initial noise")(),
                batch.text,
                schedule,
                settings.renoise,
                lambda at, like: draw(f"renoise {at}")(),
                stop_at=rung,
            )
    with torch.set_grad_enabled(with_grad):
        velocity = student.velocity(x_t, sigma_B, batch.text)
        x0 = x0_from_velocity(x_t, velocity, sigma_B)
    return Rollout(x0, rung)
