"""DMD2: distribution matching distillation with a learned fake score (arXiv 2405.14867), for velocity models.

Each step trains the critic (the fake score) on the student's samples; every `generator_update_interval`-th step also
moves the student along the difference of the two scores. The critic's turn reuses the rollout of the student's turn of
the same step, detached. Teacher and critic are only ever evaluated without a graph in the student's turn.

What may be added is a term beside these, not another method: a discriminator (`discriminator.py`), a real score that
leans towards the critic (`weak_to_strong.py`), a pull towards the videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.discriminator import Adversary, AdversarySettings, VideoHead
from simpletuner_dmd.distill.losses import (
    MatchingDirection,
    direction_parts,
    matching_direction,
    matching_loss,
    velocity_loss,
)
from simpletuner_dmd.distill.method import Features, Ingredients, Method, NamedLoss, Stateless, Turn, linearised
from simpletuner_dmd.distill.ode_init import Initialised, OdeInit, OdeInitSettings
from simpletuner_dmd.distill.rollout import RollOut, Rollout, RolloutSettings, roll_out
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.distill.weak_to_strong import Score, Weakened, WeakToStrong, leaning, score
from simpletuner_dmd.flow import Batch, Denoiser, Routing, SigmaWindow, add_noise, velocity_from_x0
from simpletuner_dmd.randomness import RandomStream

CRITIC_LOW, CRITIC_HIGH = 0.001, 0.999  # the critic's noise levels, where no exit narrows them


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
    fake_score_ts_schedule: bool = False
    critic_noise_repeats: int = 1
    caption_dropout_probability: float = 0.0
    ground_truth_weight: float = 0.0
    weak_to_strong: WeakToStrong = WeakToStrong()
    adversary: AdversarySettings | None = None


@dataclass(frozen=True)
class Comparison:
    """Teacher and critic at one noised version of the student's samples.

    towards_truth: the direction to the batch's videos, where the settings ask for it.
    """

    matching: MatchingDirection
    towards_truth: Tensor | None
    metrics: dict[str, float]


class DMD(Stateless):
    """The Method. Roles: "student" and "critic"; the teacher never moves.

    roll_out: how the student makes its samples; None walks the ladder over the whole clip at once.
    head, blocks: the discriminator's, on the features of the critic after these blocks; it moves with the critic.
    weak: the critic at a fraction of its strength, for the settings' `exact-both`.
    """

    def __init__(
        self, teacher: Denoiser, student: Denoiser, critic: Denoiser, settings: DMDSettings, device: torch.device,
        *, roll_out: RollOut | None = None, weak: Weakened | None = None, head: nn.Module | None = None,
        blocks: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.teacher, self.student, self.critic, self.weak = teacher, student, critic, weak
        self.settings, self.device, self.own_roll_out = settings, device, roll_out
        self.needs_latents = bool(
            settings.rollout.source != "simulate" or settings.adversary or settings.ground_truth_weight
        )
        assert weak is not None or not self.exact_weak, "exact-both needs the critic at a fraction"
        self._shared: dict[tuple[int, ...], Rollout] = {}
        # Windows are checked here, once, so that a bad setting is reported before the first step.
        for rung in settings.rollout.rungs:
            self.score_window(rung)
        self.adversary: Adversary | None = None
        if settings.adversary is not None:
            assert head is not None and blocks, "the adversarial term needs a head, and blocks to read"
            host = cast(Features, critic)
            self.adversary = Adversary(host, head, blocks, settings.adversary, device)

    @property
    def exact_weak(self) -> bool:
        weak = self.settings.weak_to_strong
        return weak.weak_lora_scale > 0 and weak.weak_mode == "exact-both"

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
        """Where the student turn draws its noise: truncated to what lies below the exit, when asked (ts_schedule), and
        to what the teacher knows.

        Blocks that left at several rungs, from first_exit to exit_rung, share the smallest window that holds theirs.
        """
        s = self.settings
        floor, ceiling = self._around_exit(exit_rung, first_exit)
        if not s.ts_schedule:
            floor = max(floor, s.min_score_timestep / 1000)
        return SigmaWindow(max(s.min_timestep_ratio, floor), min(s.max_timestep_ratio, ceiling), s.timestep_shift)

    def critic_window(self, exit_rung: int, first_exit: int | None = None) -> SigmaWindow:
        """Where critic and discriminator look at the student's samples: everywhere that the teacher knows, or only
        where the student's turn may compare samples of this exit (fake_score_ts_schedule)."""
        s, known = self.settings, self.settings.rollout.known
        floor, ceiling = self._around_exit(exit_rung, first_exit) if s.fake_score_ts_schedule else (0.0, 1.0)
        floor, ceiling = max(floor, known.low), min(ceiling, known.high)
        return SigmaWindow(max(CRITIC_LOW, floor), min(CRITIC_HIGH, ceiling), s.timestep_shift)

    def _around_exit(self, exit_rung: int, first_exit: int | None) -> tuple[float, float]:
        """What ts_schedule and ts_schedule_max leave to samples of this exit, of the noise levels the teacher knows."""
        s, schedule, known = self.settings, self.settings.rollout.schedule, self.settings.rollout.known
        floor = schedule.next_sigma(exit_rung) if s.ts_schedule else 0.0
        ceiling = schedule.ladder[exit_rung if first_exit is None else first_exit] if s.ts_schedule_max else 1.0
        return max(floor, known.low), min(ceiling, known.high)

    def student_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        """One loss, whatever it is made of: all terms meet at x0, and one backward goes through the student."""
        settings = self.settings
        rollout = self._roll_out(batch, stream, with_grad=True)
        x0 = rollout.x0
        self._shared[batch.positions] = replace(rollout, x0=x0.detach())
        compared = self._compare(rollout, batch, stream)
        loss = matching_loss(x0, compared.matching.direction)
        shown, metrics = float(loss.detach()), compared.metrics
        if compared.towards_truth is not None:
            truth = matching_loss(x0, compared.towards_truth)
            loss = loss + settings.ground_truth_weight * truth
            metrics["ground_truth_loss"] = float(truth.detach())
        if self.adversary is not None and self.adversary.acts(stream.step) and self._is_judged(rollout):
            window = self.critic_window(rollout.exit_rung, rollout.first_exit)
            push = self.adversary.push(x0, compared.matching.direction / x0.numel(), batch, stream, window)
            loss = loss + linearised(push.loss, x0, push.gradient)
            metrics |= push.metrics
        yield NamedLoss("dmd_loss", loss, metrics, reported=shown)

    @torch.no_grad()
    def _compare(self, rollout: Rollout, batch: Batch, stream: RandomStream) -> Comparison:
        settings, x0 = self.settings, rollout.x0.detach()
        window = self.score_window(rollout.exit_rung, rollout.first_exit)
        sigma_B = window.sigma(stream.uniform("score/sigma")).to(self.device)
        noise = stream.normal(batch.latent_shape, "score/noise").to(self.device)
        x_t = add_noise(x0, noise, sigma_B)
        texts = (batch.text, batch.negative_text)
        critic = score(self.critic, x_t, sigma_B, *texts, settings.fake_score_guidance_scale)
        real = self._real_score(x_t, sigma_B, batch, critic, stream.step)
        matching = matching_direction(x0, x_t, sigma_B, real.velocity, critic.velocity)
        parts = direction_parts(sigma_B, real.conditional, real.velocity, critic.velocity, matching.normaliser_B)
        matched, guidance = (float(part.pow(2).mean().sqrt()) for part in parts)
        metrics = {
            "dmd_normaliser": float(matching.normaliser_B.mean()),
            "dmd_direction_rms": float(matching.direction.pow(2).mean().sqrt()),
            "dmd_matching_rms": matched,
            "dmd_guidance_rms": guidance,
            # A share, not a quotient: the matching part starts at exactly 0.
            "dmd_guidance_share": guidance / (guidance + matched) if guidance else 0.0,
            "score_gap_rms": float((real.velocity - critic.velocity).pow(2).mean().sqrt()),
            "student_latent_mean": float(x0.mean()),
            "student_latent_std": float(x0.std()),
            "exit_rung": float(rollout.exit_rung),
        }
        if not settings.ground_truth_weight:
            return Comparison(matching, None, metrics)
        assert batch.latents_BCFHW is not None, "the ground-truth term needs latents in the batch"
        exact = velocity_from_x0(x_t, batch.latents_BCFHW.float(), sigma_B)
        truth = matching_direction(x0, x_t, sigma_B, exact, critic.velocity)
        return Comparison(matching, truth.direction, metrics)

    def _real_score(self, x_t: Tensor, sigma_B: Tensor, batch: Batch, critic: Score, step: int) -> Score:
        """What the critic is compared with: the guided teacher, or one that leans towards the critic."""
        settings, fraction = self.settings, self.settings.weak_to_strong.fraction(step)
        network: Denoiser = self.teacher
        if self.exact_weak:
            assert self.weak is not None
            self.weak.scale = fraction
            network = self.weak
        real = score(network, x_t, sigma_B, batch.text, batch.negative_text, settings.real_score_guidance_scale)
        return leaning(real, critic, fraction) if fraction and not self.exact_weak else real

    def critic_losses(self, batch: Batch, stream: RandomStream) -> Iterator[NamedLoss]:
        rollout = self._shared.get(batch.positions) or self._roll_out(batch, stream, with_grad=False)
        x0 = rollout.x0
        text = with_dropped_captions(batch, stream, self.settings.caption_dropout_probability)
        window = self.critic_window(rollout.exit_rung, rollout.first_exit)
        repeats = self.settings.critic_noise_repeats
        for repeat in range(repeats):
            sigma_B = window.sigma(stream.uniform(f"critic/sigma {repeat}")).to(self.device)
            noise = stream.normal(batch.latent_shape, f"critic/noise {repeat}").to(self.device)
            routed = Routing(stream, f"critic/tread {repeat}")
            velocity = self.critic.velocity(add_noise(x0, noise, sigma_B), sigma_B, text, routed=routed)
            loss = velocity_loss(velocity, x0, noise).mean()
            yield NamedLoss("fake_score_loss", loss / repeats)
        if self.adversary is not None and self.adversary.learns(stream.step) and self._is_judged(rollout):
            yield from self.adversary.critic_losses(x0, batch, stream, window)

    def _is_judged(self, rollout: Rollout) -> bool:
        """Whether the discriminator looks at this rollout, on which all ranks agree."""
        adversary, last = self.settings.adversary, self.settings.rollout.rungs[-1]
        return adversary is not None and (rollout.first_exit == last or not adversary.last_step_only)

    def _roll_out(self, batch: Batch, stream: RandomStream, with_grad: bool) -> Rollout:
        if self.own_roll_out is not None:
            return self.own_roll_out(batch, stream, with_grad)
        return roll_out(self.student, batch, stream, self.settings.rollout, "rollout", self.device, with_grad)


def matching(parts: Ingredients, rollout: RolloutSettings, roll_out: RollOut | None = None) -> DMD:
    """DMD as `distillation_config` has it, on the caller's rollouts. Raises ValueError where a noise window is empty
    for one of the rungs."""
    options, head = parts.options, parts.discriminator
    assert parts.critic is not None, "DMD has a critic"
    settings = DMDSettings(
        rollout=rollout,
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
        fake_score_ts_schedule=options.fake_score_ts_schedule,
        critic_noise_repeats=options.critic_noise_repeats,
        caption_dropout_probability=parts.caption_dropout_probability,
        ground_truth_weight=options.ground_truth_weight,
        weak_to_strong=WeakToStrong(
            options.weak_lora_scale, options.weak_mode, options.weak_schedule, options.weak_schedule_steps
        ),
        adversary=_adversary(options),
    )
    assert head is None or isinstance(head, VideoHead), "the head of this method judges videos"
    return DMD(
        parts.teacher, parts.student, parts.critic, settings, parts.device, roll_out=roll_out,
        weak=cast(Weakened | None, parts.weak), head=head, blocks=() if head is None else head.blocks,
    )  # fmt: skip


def build(parts: Ingredients) -> Method:
    """The method from `distillation_config`: `matching`, after regression on the teacher's trajectories if asked."""
    options = parts.options
    source = RolloutSettings(parts.schedule, options.renoise, options.rollout, options.last_step_only, parts.known)
    method = matching(parts, source)
    if not options.regression_steps:
        return method
    regression = OdeInitSettings(parts.schedule, options.ode_steps, options.real_score_guidance_scale)
    first = OdeInit(parts.teacher, parts.student, regression, parts.device)
    return Initialised(first, options.regression_steps, method)


def _adversary(options: Any) -> AdversarySettings | None:
    if not options.gan_weight:
        return None
    return AdversarySettings(
        weight=options.gan_weight,
        weight_mode=options.gan_weight_mode,
        critic_weight=options.gan_critic_weight,
        start_step=options.gan_start_step,
        discriminator_warmup=options.gan_discriminator_warmup,
        detach_backbone=options.gan_detach_backbone,
        last_step_only=options.gan_last_step_only,
        r1_weight=options.gan_r1_weight,
        r1_sigma=options.gan_r1_sigma,
    )
