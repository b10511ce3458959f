"""Sampling for people to look at: the same ladder, the same arithmetic and the same noise order as a stock pipeline's.

Shapes: B batch, C channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from simpletuner_dmd.distill.blocks import BlockPlan, CausalDenoiser, sample_blocks_euler, stream_blocks
from simpletuner_dmd.flow import (
    Denoiser,
    NoiseRange,
    NoiseSource,
    Schedule,
    TextEmbedding,
    euler_sigmas,
    sample_euler,
    sample_few_step,
)
from simpletuner_dmd.validation.solvers import Guidance, SkipLayers, scheduler_of, solve


def reference_noise(seed: int, shape: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, NoiseSource]:
    """The noise that a stock pipeline draws after `torch.manual_seed(seed)`: (first noise, noise of the rungs).

    One generator, in this order: the first noise, then one draw for each rung that is entered. The global generator is
    left alone. shape: [B, C, F, H, W] of the latents.
    """
    generator = torch.Generator(device).manual_seed(seed)
    first = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)

    def fresh(rung: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like.device)

    return first, fresh


class VideoSampler(Protocol):
    """Makes latents with a denoiser."""

    @property
    def forwards(self) -> int: ...

    def __call__(
        self, denoiser: Denoiser, text: TextEmbedding, negative: TextEmbedding, shape: Sequence[int], seed: int,
        device: torch.device,
    ) -> Tensor: ...  # fmt: skip


@dataclass(frozen=True)
class BlockSampling:
    """How a causal student is sampled: the keys of `distillation_config` of the same names, in latent frames."""

    num_frame_per_block: int
    independent_first_frame: bool = False
    context_noise: float = 0.0
    sink_frames: int = 0
    local_attn_frames: int = 0

    def plan(self, frames: int) -> BlockPlan:
        return BlockPlan(frames, self.num_frame_per_block, self.independent_first_frame)


@dataclass(frozen=True)
class Sampler:
    """How one network is sampled: a few-step ladder, or a stock solver with guidance where the ladder is empty.

    blocks: of a causal student, which walks its ladder, or Euler steps, block by block. solver: "euler", "unipc" or
    "euler-beta". guidance, rescale, skip: of a solver; the guidance of a ladder is built into its student.
    """

    schedule: Schedule
    renoise: str = "sde"
    steps: int = 50
    guidance: float = 1.0
    blocks: BlockSampling | None = None
    solver: str = "euler"
    rescale: float = 0.0
    skip: SkipLayers | None = None

    @property
    def forwards(self) -> int:
        """Steps, as people count them (a guided step is two forwards)."""
        return len(self.schedule.ladder) or self.steps

    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, text: TextEmbedding, negative: TextEmbedding, shape: Sequence[int], seed: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        """Normalised latents [B, C, F, H, W], fp32; shape is that of the result."""
        first, fresh = reference_noise(seed, shape, device)
        return self.sample(denoiser, first, fresh, text.expand(shape[0]), negative)

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, first: Tensor, fresh: NoiseSource, text: TextEmbedding, negative: TextEmbedding
    ) -> Tensor:
        """As a call, with the noise given: `first` [B, C, F, H, W], and `fresh` where the ladder re-noises."""
        if self.schedule.ladder and self.blocks is not None:
            return torch.cat(list(self.stream(denoiser, first, fresh, text)), dim=2)
        if self.schedule.ladder:
            return sample_few_step(denoiser, first, text, self.schedule, self.renoise, fresh)
        if self.blocks is not None:
            sigmas = euler_sigmas(self.steps, self.schedule.shift)
            plan, student = self.blocks.plan(first.shape[2]), cast(CausalDenoiser, denoiser)
            return sample_blocks_euler(student, first, text, negative, sigmas, self.guidance, plan)
        guidance = Guidance(self.guidance, self.rescale, self.skip)
        scheduler = scheduler_of(self.solver, self.steps, self.schedule.shift)
        return solve(
            scheduler,
            first,
            lambda x, sigma_B, step: guidance.velocity(denoiser, x, sigma_B, text, negative, step, self.steps),
        )

    def stream(self, denoiser: Denoiser, first: Tensor, fresh: NoiseSource, text: TextEmbedding) -> Iterator[Tensor]:
        """Each block [B, C, f, H, W] of a causal student's video as soon as it is finished."""
        assert self.blocks is not None and hasattr(denoiser, "block_velocity"), "not a causal student"
        plan, draws = self.blocks.plan(first.shape[2]), len(self.schedule.ladder) + 1
        # No grad mode is held across a yield; `stream_blocks` records no graph of its own.
        yield from stream_blocks(
            cast(CausalDenoiser, denoiser), first, text, self.schedule, self.renoise,
            # Every draw of the video has a number of its own, whichever block it is for.
            lambda block, rung, like: fresh(block * draws + rung, like),
            plan, self.blocks.context_noise,
        )  # fmt: skip


@dataclass(frozen=True)
class HandedOver:
    """A student that is one of two experts, with an undistilled network as the other.

    The student walks its own rungs; the other makes its part of the way in the teacher's many guided steps. They change
    at the first rung of the low-noise expert. known: the student's noise levels.
    """

    student: Sampler
    other: Denoiser
    teacher: Sampler
    known: NoiseRange

    @property
    def forwards(self) -> int:
        """Steps of the whole video."""
        return len(self._own) + len(self._others)

    @property
    def _own(self) -> range:
        return self.known.rungs(self.student.schedule.ladder)

    @property
    def _others(self) -> tuple[float, ...]:
        """The sigmas of the other's Euler steps."""
        ladder, own = self.student.schedule.ladder, self._own
        many = euler_sigmas(self.teacher.steps, self.teacher.schedule.shift)
        if own.start:
            return tuple(sigma for sigma in many if sigma > ladder[own.start])
        if own.stop == len(ladder):
            return ()
        change = ladder[own.stop]
        return (change, *(sigma for sigma in many if sigma < change))

    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, text: TextEmbedding, negative: TextEmbedding, shape: Sequence[int], seed: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        """As `Sampler`. denoiser: the student's expert."""
        first, fresh = reference_noise(seed, shape, device)
        text, schedule, renoise = text.expand(shape[0]), self.student.schedule, self.student.renoise
        own, guidance = self._own, self.teacher.guidance
        if own.start:
            change = schedule.ladder[own.start]
            x = sample_euler(self.other, first, text, negative, self._others, guidance, end=change)
            return sample_few_step(denoiser, x, text, schedule, renoise, fresh, start_at=own.start)
        x = sample_few_step(denoiser, first, text, schedule, renoise, fresh, stop_at=own.stop)
        return sample_euler(self.other, x, text, negative, self._others, guidance) if self._others else x
