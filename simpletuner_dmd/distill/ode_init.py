"""ODE initialisation: the student learns where the teacher's own trajectories end, from the states at its rungs.

DMD's regression pairs (arXiv 2311.18828, section 3.3) and the warm start of causal students (CausVid, arXiv 2412.07772,
section 4.3). The trajectories are made on the fly from prompts: no data, nothing on disk. The solver's grid is warped
by the same shift as the student's ladder and contains the ladder itself, so the states are those the student will meet.

Shapes: B batch, C channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner_dmd.distill.blocks import BlockPlan
from simpletuner_dmd.distill.losses import per_sample_mean
from simpletuner_dmd.distill.method import Ingredients, Method, NamedLoss, OneRole, Turn
from simpletuner_dmd.flow import (
    Batch,
    Denoiser,
    Schedule,
    TextEmbedding,
    euler_sigmas,
    guided_velocity,
    spread,
    x0_from_velocity,
)
from simpletuner_dmd.randomness import RandomStream

SAME_SIGMA = 1e-6  # a grid point this near a rung is that rung


def trajectory_sigmas(schedule: Schedule, steps: int) -> tuple[float, ...]:
    """The teacher's Euler grid: `steps` shifted-uniform sigmas with every rung of the ladder among them.

    It starts at the first rung, whose state is pure noise, as the student's own sampler does.
    """
    ladder = schedule.ladder
    between = [sigma for sigma in euler_sigmas(steps, schedule.shift)
               if sigma < ladder[0] and all(abs(sigma - rung) > SAME_SIGMA for rung in ladder)]  # fmt: skip
    return tuple(sorted((*ladder, *between), reverse=True))


@dataclass(frozen=True)
class Trajectory:
    """states: one [B, C, F, H, W] per rung of the ladder, the first is the noise. end: the teacher's x0. fp32."""

    states: tuple[Tensor, ...]
    end: Tensor


@torch.no_grad()
def teacher_trajectory(
    teacher: Denoiser,
    noise_BCFHW: Tensor,
    text: TextEmbedding,
    negative: TextEmbedding,
    schedule: Schedule,
    steps: int,
    guidance: float,
) -> Trajectory:
    """Euler from noise to sigma 0 over `trajectory_sigmas`, as `flow.sample_euler`, keeping the states at the rungs."""
    sigmas, states = trajectory_sigmas(schedule, steps), []
    x = noise_BCFHW.float()
    for sigma, to in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        if sigma in schedule.ladder:
            states.append(x)
        sigma_B = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        x = x + (to - sigma) * guided_velocity(teacher, x, sigma_B, text, negative, guidance)
    return Trajectory(tuple(states), x)


@dataclass(frozen=True)
class OdeInitSettings:
    """What the method reads of `distillation_config`.

    plan: how a causal student's clip is cut, (num_frame_per_block, independent_first_frame); each block then has its
    own rung. None for a plain student: one rung for the clip. rungs_per_trajectory: updates of the loss that one
    trajectory serves, each block at another rung every time. huber_c: None is the squared error, a number the scale of
    the pseudo-Huber loss sqrt(d^2 + c^2) - c.
    """

    schedule: Schedule
    ode_steps: int = 48
    guidance_scale: float = 3.0
    rungs_per_trajectory: int = 1
    huber_c: float | None = None
    plan: tuple[int, bool] | None = None

    def __post_init__(self) -> None:
        rungs = len(self.schedule.ladder)
        if not 1 <= self.rungs_per_trajectory <= rungs:
            raise ValueError(f"a trajectory has {rungs} rungs to learn from, not {self.rungs_per_trajectory}")


def regression_loss(predicted: Tensor, target: Tensor, huber_c: float | None) -> Tensor:
    """[B], mean over all elements of each sample."""
    squared = (predicted - target).pow(2)
    return per_sample_mean(squared if huber_c is None else (squared + huber_c**2).sqrt() - huber_c)


class OdeInit(OneRole):
    """The Method: one role, "student", moved every step towards the ends of fresh teacher trajectories."""

    needs_latents = False

    def __init__(self, teacher: Denoiser, student: Denoiser, settings: OdeInitSettings, device: torch.device) -> None:
        self.teacher, self.student, self.settings, self.device = teacher, student, settings, device

    def draw_rungs(self, frames: int, stream: RandomStream) -> Tensor:
        """The first rung of every sample and block: [B, F], or [B, 1] where the clip is one part."""
        settings, rungs = self.settings, len(self.settings.schedule.ladder)
        plan = BlockPlan(frames, frames) if settings.plan is None else BlockPlan(frames, *settings.plan)
        drawn = [(stream.uniform(f"ode/rung {block}") * rungs).long() for block in range(len(plan.blocks))]
        return drawn[0][:, None] if settings.plan is None else plan.per_frame(drawn)

    def losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        settings = self.settings
        ladder = torch.tensor(settings.schedule.ladder, dtype=torch.float32, device=self.device)
        noise = stream.normal(batch.latent_shape, "ode/noise").to(self.device)
        path = teacher_trajectory(self.teacher, noise, batch.text, batch.negative_text, settings.schedule,
                                  settings.ode_steps, settings.guidance_scale)  # fmt: skip
        first = self.draw_rungs(batch.latent_shape[1], stream).to(self.device)
        for repeat in range(settings.rungs_per_trajectory):
            # Going on by one from a uniform start keeps every repeat uniform and never takes a rung twice.
            rung = (first + repeat) % len(ladder)
            x_t = sum(torch.where(spread(rung == index, state), state, 0.0) for index, state in enumerate(path.states))
            assert isinstance(x_t, Tensor)
            sigma = ladder[rung] if settings.plan is not None else ladder[rung][:, 0]
            x0 = x0_from_velocity(x_t, self.student.velocity(x_t, sigma, batch.text), sigma)
            loss = regression_loss(x0, path.end, settings.huber_c).mean()
            yield NamedLoss("ode_loss", loss / settings.rungs_per_trajectory)


class Initialised:
    """A Method that begins with `steps` steps of ODE initialisation and goes on as another, whose step 0 comes then."""

    def __init__(self, first: OdeInit, steps: int, then: Method) -> None:
        self.first, self.steps, self.then = first, steps, then
        self.needs_latents = then.needs_latents

    def turns(self, step: int) -> Iterator[Turn]:
        yield from self.first.turns(step) if step < self.steps else self.then.turns(step - self.steps)

    def updates(self, role: str, steps: int) -> int:
        begun = min(steps, self.steps)
        return self.first.updates(role, begun) + self.then.updates(role, steps - begun)

    def end_step(self) -> None:
        self.first.end_step()
        self.then.end_step()

    def state_dict(self) -> dict[str, Any]:
        return self.then.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.then.load_state_dict(state)


def build(parts: Ingredients) -> OdeInit:
    """The method from `distillation_config`; a causal student gets a rung per block."""
    options = parts.options
    settings = OdeInitSettings(
        schedule=parts.schedule,
        ode_steps=options.ode_steps,
        guidance_scale=options.real_score_guidance_scale,
        rungs_per_trajectory=options.rungs_per_trajectory,
        huber_c=options.ode_huber_c if options.ode_loss_type == "pseudo_huber" else None,
        plan=(options.num_frame_per_block, options.independent_first_frame) if options.causal else None,
    )
    return OdeInit(parts.teacher, parts.student, settings, parts.device)
