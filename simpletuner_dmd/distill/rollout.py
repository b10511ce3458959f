"""The student's own few-step sampling during training: from pure noise (simulate) or from noised latents.

An expert of two walks the rungs it knows. The low-noise one begins where the other hands over: at its first rung, from
the other's clean prediction with fresh noise (handover), which is what sampling re-noises between two rungs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner_dmd.flow import (
    ALL_NOISE,
    Batch,
    Denoiser,
    NoiseRange,
    Schedule,
    add_noise,
    sample_few_step,
    x0_from_velocity,
)
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
    """source: "simulate" from pure noise; "handover" from latents noised to the student's first rung; "data_latent"
    from latents noised to the exit rung. known: the noise levels of the student. Raises ValueError without a rung."""

    schedule: Schedule
    renoise: str = "sde"  # "sde" fresh noise at each rung, "ode" Euler
    source: str = "simulate"
    last_step_only: bool = False
    known: NoiseRange = ALL_NOISE

    def __post_init__(self) -> None:
        ladder = self.schedule.ladder
        if ladder and not self.rungs:
            low, high = (f"{1000 * level:g}" for level in (self.known.low, self.known.high))
            steps = ", ".join(f"{timestep:g}" for timestep in self.schedule.timesteps)
            raise ValueError(f"no step of the ladder {steps} is between {low} and {high}: this expert has none to make")
        if ladder and self.source == "simulate" and self.rungs.start:
            raise ValueError("an expert that does not make the first step cannot start from pure noise")

    @property
    def rungs(self) -> range:
        """The places of the student's own rungs."""
        return self.known.rungs(self.schedule.ladder)


def exit_rung(settings: RolloutSettings, stream: RandomStream, purpose: str) -> int:
    """The rung whose prediction is used: uniform, the same on every rank and in every micro-batch of the step."""
    rungs = settings.rungs
    return rungs[-1] if settings.last_step_only else rungs[stream.shared_index(len(rungs), f"{purpose}/exit")]


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

    Rungs after the exit are never run. The input of the ladder's first rung is N(0, I).
    """
    schedule, first = settings.schedule, settings.rungs.start
    rung = exit_rung(settings, stream, purpose)

    def draw(name: str) -> Callable[[], Tensor]:
        return lambda: stream.normal(batch.latent_shape, f"{purpose}/{name}").to(device)

    def level(place: int) -> Tensor:
        return torch.full((len(batch.positions),), schedule.ladder[place], dtype=torch.float32, device=device)

    def noised(place: int) -> Tensor:
        assert batch.latents_BCFHW is not None, f"{settings.source} rollouts need latents in the batch"
        return add_noise(batch.latents_BCFHW.float(), draw("data noise")(), level(place))

    sigma_B = level(rung)
    with torch.no_grad():
        if settings.source == "data_latent":
            x_t = noised(rung)
        else:
            x_t = sample_few_step(
                student,
                noised(first) if settings.source == "handover" else draw("initial noise")(),
                batch.text,
                schedule,
                settings.renoise,
                lambda at, like: draw(f"renoise {at}")(),
                stop_at=rung,
                start_at=first,
            )
    with torch.set_grad_enabled(with_grad):
        velocity = student.velocity(x_t, sigma_B, batch.text)
        x0 = x0_from_velocity(x_t, velocity, sigma_B)
    return Rollout(x0, rung)
