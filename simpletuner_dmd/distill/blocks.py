"""Sampling block by block, as a causal student does: one function for training, validation and streaming.

For every block: walk the ladder given the cache of earlier blocks, then run the finished block once more at the noise
level of the context and add it to the cache (Self-Forcing, arXiv 2506.08009, algorithm 1). Training differs in two
numbers per block only: the rung at which the ladder is left, and whether that one call records a graph.

Shapes: B batch, C channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from simpletuner_dmd.distill.rollout import Rollout
from simpletuner_dmd.flow import (
    TIMESTEPS,
    Batch,
    Denoiser,
    Routing,
    Schedule,
    TextEmbedding,
    add_noise,
    guidance_is_off,
    guided,
    sample_few_step,
    x0_from_velocity,
)
from simpletuner_dmd.randomness import RandomStream

Cache = Any
"""What a causal denoiser remembers of finished blocks; None before the first. Algorithms only pass it on."""


class CausalDenoiser(Denoiser, Protocol):
    """A denoiser that can also work block by block.

    `velocity` sees a whole clip: each block at its own noise level, attending to itself and to earlier blocks as they
    are given. The other two see one block [B, C, f, H, W] that starts at latent frame `start_frame`, and a cache.
    """

    def block_velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Cache, start_frame: int
    ) -> Tensor:
        """e - x0 of the block. Gradients reach the block and the weights, never the cache."""
        ...

    def commit(self, x_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: Cache, start_frame: int) -> Cache:
        """A new cache that holds the finished block too; the old one stays as it was."""
        ...


@dataclass(frozen=True)
class BlockPlan:
    """The partition of a clip into blocks; a remainder makes the last block shorter, everywhere.

    independent_first_frame: the first block is one frame (Wan's first latent frame encodes one image).
    """

    frames: int
    frames_per_block: int = 3
    independent_first_frame: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames_per_block < 1:
            raise ValueError(f"{self.frames} frames cannot be cut into blocks of {self.frames_per_block}")

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each block, in latent frames."""
        starts = list(range(1 if self.independent_first_frame else 0, self.frames, self.frames_per_block))
        if self.independent_first_frame:
            starts = [0, *starts]
        return tuple(zip(starts, [*starts[1:], self.frames], strict=True))

    def per_frame(self, values_B: Sequence[Tensor]) -> Tensor:
        """One [B] tensor per block to [B, F], constant within a block."""
        spread = [value[:, None].expand(-1, stop - start)
                  for value, (start, stop) in zip(values_B, self.blocks, strict=True)]  # fmt: skip
        return torch.cat(spread, dim=1)


@dataclass(frozen=True)
class Exit:
    """Where a block leaves the ladder (0-based rung), and whether that call records a graph."""

    rung: int
    with_grad: bool = False


BlockNoise = Callable[[int, int, Tensor], Tensor]
"""(block, rung about to be entered or the length of the ladder for the context, a tensor to imitate) -> fresh noise."""


@dataclass(frozen=True)
class _AtBlock:
    """A causal denoiser at one block, as the plain denoiser that the few-step sampler walks with."""

    denoiser: CausalDenoiser
    cache: Cache
    start_frame: int

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        return self.denoiser.block_velocity(x_t_BCFHW, sigma, text, cache=self.cache, start_frame=self.start_frame)


def _level(sigma: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), sigma, dtype=torch.float32, device=like.device)


def stream_blocks(
    denoiser: CausalDenoiser,
    noise_BCFHW: Tensor,
    text: TextEmbedding,
    schedule: Schedule,
    renoise: str,
    fresh_noise: BlockNoise,
    plan: BlockPlan,
    context_noise: float = 0.0,
    exits: Sequence[Exit] | None = None,
) -> Iterator[Tensor]:
    """Yields x0 [B, C, f, H, W] of each block as soon as it is finished.

    context_noise: a timestep, 0 to 1000; the finished block is really noised to it before it becomes context.
    exits: one per block; None leaves every block at the last rung without a graph, which is inference.
    The order of draws is: per block, its rungs from the second on ("sde" only), then its context (if context_noise).
    """
    assert plan.frames == noise_BCFHW.shape[2], "the plan is for another number of frames"
    blocks, rungs = plan.blocks, len(schedule.ladder)
    leaving = exits if exits is not None else [Exit(rungs - 1)] * len(blocks)
    context = context_noise / TIMESTEPS
    cache: Cache = None
    for block, ((start, stop), leave) in enumerate(zip(blocks, leaving, strict=True)):
        here = _AtBlock(denoiser, cache, start)
        with torch.no_grad():
            x_t = sample_few_step(here, noise_BCFHW[:, :, start:stop], text, schedule, renoise,
                                  lambda rung, like, block=block: fresh_noise(block, rung, like),  # type: ignore[misc]
                                  stop_at=leave.rung)  # fmt: skip
        with torch.set_grad_enabled(leave.with_grad):
            sigma_B = _level(schedule.ladder[leave.rung], x_t)
            x0 = x0_from_velocity(x_t, here.velocity(x_t, sigma_B, text), sigma_B)
        # No grad mode is held across a yield: it would leak into the loop of whoever listens.
        yield x0
        if stop < plan.frames:  # nobody reads the last block's keys
            with torch.no_grad():
                finished, sigma_B = x0.detach(), _level(context, x0)
                if context > 0:
                    finished = add_noise(finished, fresh_noise(block, rungs, finished), sigma_B)
                cache = denoiser.commit(finished, sigma_B, text, cache=cache, start_frame=start)


@torch.no_grad()
def sample_blocks(
    denoiser: CausalDenoiser,
    noise_BCFHW: Tensor,
    text: TextEmbedding,
    schedule: Schedule,
    renoise: str,
    fresh_noise: BlockNoise,
    plan: BlockPlan,
    context_noise: float = 0.0,
) -> Tensor:
    """The student's video latents [B, C, F, H, W] from pure noise, all blocks. Arguments as in `stream_blocks`."""
    parts = stream_blocks(denoiser, noise_BCFHW, text, schedule, renoise, fresh_noise, plan, context_noise)
    return torch.cat(list(parts), dim=2)


@torch.no_grad()
def sample_blocks_euler(
    denoiser: CausalDenoiser,
    noise_BCFHW: Tensor,
    text: TextEmbedding,
    negative: TextEmbedding,
    sigmas: Sequence[float],
    guidance: float,
    plan: BlockPlan,
) -> Tensor:
    """Many guided Euler steps per block, as `flow.sample_euler` for whole clips: for a causal model without a ladder.

    Prompt and negative prompt each have their own cache of the finished blocks, which are clean.
    """
    prompts = [text] if guidance_is_off(guidance) else [text, negative.expand(len(noise_BCFHW))]
    caches: list[Cache] = [None] * len(prompts)
    parts = []
    for start, stop in plan.blocks:
        x = noise_BCFHW[:, :, start:stop].float()
        for sigma, to in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            conditional, *rest = (
                denoiser.block_velocity(x, _level(sigma, x), prompt, cache=cache, start_frame=start)
                for prompt, cache in zip(prompts, caches, strict=True)
            )
            x = x + (to - sigma) * (guided(rest[0], conditional, guidance) if rest else conditional)
        parts.append(x)
        if stop < plan.frames:
            clean = _level(0.0, x)
            caches = [denoiser.commit(x, clean, prompt, cache=cache, start_frame=start)
                      for prompt, cache in zip(prompts, caches, strict=True)]  # fmt: skip
    return torch.cat(parts, dim=2)


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRollout(Rollout):
    """A rollout whose blocks may have left the ladder at different rungs.

    exit_rung is the latest of them and first_exit the earliest. One noise level serves the whole clip when teacher and
    critic look at it, so its window is the smallest that holds the window of every block: the lower end follows the
    latest exit (the smallest next sigma), the upper end the earliest (the largest exit sigma).
    """

    exit_rungs: tuple[int, ...] = ()

    @property
    def first_exit(self) -> int:
        return min(self.exit_rungs)


@dataclass(frozen=True)
class BlockRolloutSettings:
    """What a block-wise rollout reads of `distillation_config` (the keys of the same names).

    start_gradient_frame: blocks that start before this latent frame record no graph; negative counts from the end, so
    -21 trains the last 21 frames.
    """

    schedule: Schedule
    renoise: str = "sde"
    num_frame_per_block: int = 3
    independent_first_frame: bool = False
    context_noise: float = 0.0
    same_step_across_blocks: bool = False
    last_step_only: bool = False
    start_gradient_frame: int = 0

    def plan(self, frames: int) -> BlockPlan:
        return BlockPlan(frames, self.num_frame_per_block, self.independent_first_frame)


def draw_exits(
    settings: BlockRolloutSettings, plan: BlockPlan, stream: RandomStream, purpose: str, with_grad: bool
) -> list[Exit]:
    """The exit of each block: uniform over the rungs, the same on every rank and in every micro-batch of the step.

    Raises ValueError if the gradient window holds no block.
    """
    rungs, blocks = len(settings.schedule.ladder), plan.blocks
    shared = stream.shared_index(rungs, f"{purpose}/exit")
    first = settings.start_gradient_frame
    first += plan.frames if first < 0 else 0
    if blocks[-1][0] < first:
        raise ValueError(
            f"start_gradient_frame {settings.start_gradient_frame} leaves nothing to train: "
            f"the last block of {plan.frames} latent frames starts at {blocks[-1][0]}"
        )
    exits = []
    for block, (start, _) in enumerate(blocks):
        if settings.last_step_only:
            rung = rungs - 1
        elif settings.same_step_across_blocks:
            rung = shared
        else:
            rung = stream.shared_index(rungs, f"{purpose}/exit {block}")
        exits.append(Exit(rung, with_grad and start >= first))
    return exits


def roll_out_blocks(
    student: CausalDenoiser,
    batch: Batch,
    stream: RandomStream,
    settings: BlockRolloutSettings,
    purpose: str,
    device: torch.device,
    with_grad: bool,
) -> BlockRollout:
    """The student's own clip from noise, for training: x0 [B, C, F, H, W], each block from its exit rung.

    Only the exit calls inside the gradient window record a graph; earlier blocks reach later ones as detached keys and
    values, so a block's graph ends at its own frames.
    """
    channels, frames, height, width = batch.latent_shape
    plan = settings.plan(frames)
    exits = draw_exits(settings, plan, stream, purpose, with_grad)

    def fresh(block: int, rung: int, like: Tensor) -> Tensor:
        shape = (channels, like.shape[2], height, width)
        return stream.normal(shape, f"{purpose}/renoise {block} {rung}").to(device)

    noise = stream.normal(batch.latent_shape, f"{purpose}/initial noise").to(device)
    parts = stream_blocks(student, noise, batch.text, settings.schedule, settings.renoise, fresh, plan,
                          settings.context_noise, exits)  # fmt: skip
    rungs = tuple(leave.rung for leave in exits)
    return BlockRollout(torch.cat(list(parts), dim=2), max(rungs), rungs)
