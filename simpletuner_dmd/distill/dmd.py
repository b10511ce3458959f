"""DMD2: distribution matching distillation with a learned fake score (arXiv 2405.14867), for velocity models.

Each step trains the critic (the fake score) on the student's samples; every `generator_update_interval`-th step also
moves the student along the difference of the two scores. The critic's turn reuses the rollout of the student's turn of
the same step, detached. Teacher and critic are only ever evaluated without a graph in the student's turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner_dmd.distill.losses import matching_direction, matching_loss, velocity_loss
from simpletuner_dmd.distill.method import Ingredients, NamedLoss, Turn
from simpletuner_dmd.distill.rollout import RollOut, Rollout, RolloutSettings, roll_out
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import Batch, Denoiser, Routing, SigmaWindow, add_noise, guided_velocity
from simpletuner_dmd.randomness import RandomStream

CRITIC_LOW, CRITIC_HIGH = 0.001, 0.999  # the critic sees every noise level, whatever the student's exit


@dataclass(frozen=True)
class DMDSettings:
    """What the algorithm reads of `distillation_config` (documentation: the keys of the same names)."""

    rollout: RolloutSettings
    generator_update_interval: int = 1
    critic_warmup_steps: int = 0
    real_score_guidance_scale: float = 3.0
    fake_score_guidance_scale: float = 0.0
    min_timestep_ratio: float = 0.02
    max_timestep_ratio: float = 0.98
    timestep_shift: float = 1.0
    min_score_timestep: float = 0.0
    ts_schedule: bool = True
    ts_schedule_max: bool = False
    critic_noise_repeats: int = 1
    caption_dropout_probability: float = 0.0


class DMD:
    """The Method. Roles: "student" and "critic"; the teacher never moves.

    roll_out: how the student makes its samples; None walks the ladder over the whole clip at once.
    """

    def __init__(
        self, teacher: Denoiser, student: Denoiser, critic: Denoiser, settings: DMDSettings, device: torch.device,
        *, roll_out: RollOut | None = None,
    ) -> None:  # fmt: skip
        self.teacher, self.student, self.critic = teacher, student, critic
        self.settings, self.device, self.own_roll_out = settings, device, roll_out
        self.needs_latents = settings.rollout.source == "data_latent"
        self._shared: dict[tuple[int, ...], Tensor] = {}
        # Windows are checked here, once, so that a bad setting is reported before the first step.
        for rung in range(len(settings.rollout.schedule.ladder)):
            self.score_window(rung)
        self._critic_window = SigmaWindow(CRITIC_LOW, CRITIC_HIGH, settings.timestep_shift)

    # --- the plan of a step ---------------------------------------------------------------------------------------

    def is_student_step(self, step: int) -> bool:
        since = step - self.settings.critic_warmup_steps
        return since >= 0 and since % self.settings.generator_update_interval == 0

    def turns(self, step: int) -> Iterator[Turn]:
        if self.is_student_step(step):
            yield Turn("student", self.student_losses)
        yield Turn("critic", self.critic_losses)

    def updates(self, role: str, steps: int) -> int:
        if role == "critic":
            return steps
        after = max(0, steps - self.settings.critic_warmup_steps)
        return -(-after // self.settings.generator_update_interval)

    def end_step(self) -> None:
        self._shared.clear()

    # --- losses -----------------------------------------------------------------------------------------------------

    def score_window(self, exit_rung: int, first_exit: int | None = None) -> SigmaWindow:
        """Where the student turn draws its noise: truncated to what lies below the exit, when asked (ts_schedule).

        Blocks that left at several rungs, from first_exit to exit_rung, share the smallest window that holds theirs.
        """
        s, schedule = self.settings, self.settings.rollout.schedule
        floor = schedule.next_sigma(exit_rung) if s.ts_schedule else s.min_score_timestep / 1000
        ceiling = schedule.ladder[exit_rung if first_exit is None else first_exit] if s.ts_schedule_max else 1.0
        return SigmaWindow(max(s.min_timestep_ratio, floor), min(s.max_timestep_ratio, ceiling), s.timestep_shift)

    def student_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        settings = self.settings
        rollout = self._roll_out(batch, stream, with_grad=True)
        x0 = rollout.x0
        self._shared[batch.positions] = x0.detach()
        with torch.no_grad():
            window = self.score_window(rollout.exit_rung, rollout.first_exit)
            sigma_B = window.sigma(stream.uniform("score/sigma")).to(self.device)
            noise = stream.normal(batch.latent_shape, "score/noise").to(self.device)
            x_t = add_noise(x0.detach(), noise, sigma_B)
            teacher = guided_velocity(
                self.teacher, x_t, sigma_B, batch.text, batch.negative_text, settings.real_score_guidance_scale
            )
            critic = guided_velocity(
                self.critic, x_t, sigma_B, batch.text, batch.negative_text, settings.fake_score_guidance_scale
            )
            matching = matching_direction(x0, x_t, sigma_B, teacher, critic)
            metrics = {
                "dmd_normaliser": float(matching.normaliser_B.mean()),
                "dmd_direction_rms": float(matching.direction.pow(2).mean().sqrt()),
                "score_gap_rms": float((teacher - critic).pow(2).mean().sqrt()),
                "student_latent_mean": float(x0.mean()),
                "student_latent_std": float(x0.std()),
                "exit_rung": float(rollout.exit_rung),
            }
        yield NamedLoss("dmd_loss", matching_loss(x0, matching.direction), metrics)

    def critic_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        x0 = self._shared.get(batch.positions)
        if x0 is None:
            x0 = self._roll_out(batch, stream, with_grad=False).x0
        text = with_dropped_captions(batch, stream, self.settings.caption_dropout_probability)
        repeats = self.settings.critic_noise_repeats
        for repeat in range(repeats):
            sigma_B = self._critic_window.sigma(stream.uniform(f"critic/sigma {repeat}")).to(self.device)
            noise = stream.normal(batch.latent_shape, f"critic/noise {repeat}").to(self.device)
            routed = Routing(stream, f"critic/tread {repeat}")
            velocity = self.critic.velocity(add_noise(x0, noise, sigma_B), sigma_B, text, routed=routed)
            loss = velocity_loss(velocity, x0, noise).mean()
            yield NamedLoss("fake_score_loss", loss / repeats)

    def _roll_out(self, batch: Batch, stream: RandomStream, with_grad: bool) -> Rollout:
        if self.own_roll_out is not None:
            return self.own_roll_out(batch, stream, with_grad)
        return roll_out(self.student, batch, stream, self.settings.rollout, "rollout", self.device, with_grad)

    # --- resume -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {}  # every draw and every turn is a function of the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, f"unexpected method state {sorted(state)}"


def build(parts: Ingredients) -> DMD:
    """The method from `distillation_config`. Raises ValueError where a noise window is empty for one of the rungs."""
    options = parts.options
    assert parts.critic is not None, "DMD has a critic"
    settings = DMDSettings(
        rollout=RolloutSettings(parts.schedule, options.renoise, options.rollout, options.last_step_only),
        generator_update_interval=options.generator_update_interval,
        critic_warmup_steps=options.critic_warmup_steps,
        real_score_guidance_scale=options.real_score_guidance_scale,
        fake_score_guidance_scale=options.fake_score_guidance_scale,
        min_timestep_ratio=options.min_timestep_ratio,
        max_timestep_ratio=options.max_timestep_ratio,
        timestep_shift=options.timestep_shift,
        min_score_timestep=options.min_score_timestep,
        ts_schedule=options.ts_schedule,
        ts_schedule_max=options.ts_schedule_max,
        critic_noise_repeats=options.critic_noise_repeats,
        caption_dropout_probability=parts.caption_dropout_probability,
    )
    return DMD(parts.teacher, parts.student, parts.critic, settings, parts.device)
