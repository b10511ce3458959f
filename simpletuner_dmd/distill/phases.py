"""Self-consistency along the teacher's trajectory, in phases: what LCM, PCM and DCM have in common.

Edges 0 = e_0 < ... < e_M = 1 cut the trajectory into phases. Within phase m the student jumps from anywhere to its end,

    f_m(x, s) = x + (e_(m-1) - s) G(x, s)        e_(m-1): the end of the phase, its less noisy edge

with G the network's velocity, so that f_m(x, e_(m-1)) = x holds for any network. Training asks that a point and the
next one on the teacher's trajectory jump to the same place: the partner is one teacher step away, its jump is a
constant (stop-gradient), and at the end of the phase it is the teacher's point itself. Where that holds on every grid
point, f_m is the teacher's own solver run over the grid points of the phase. One phase: LCM (arXiv 2310.04378).
Several: PCM (arXiv 2405.18407). Two, each with weights of its own: DCM (arXiv 2506.03123).

Noise levels are sigmas, in fp64 on the CPU until a network sees them; there are indices only inside `PhaseGrid`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from simpletuner_dmd.distill.losses import per_sample_mean
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.flow import (
    Batch,
    Denoiser,
    TextEmbedding,
    add_noise,
    guidance_is_off,
    guided_velocity,
    shifted,
    spread,
    unshifted,
)
from simpletuner_dmd.randomness import RandomStream

# --- where samples are and where they go ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jumps:
    """One jump per sample: [B] sigmas, fp64 on the CPU, start > partner >= end.

    start: the input's level. partner: the next grid point towards clean. end: where the sample's phase ends.
    first_B, last_B: indices of the grid points of that phase, its end not among them.
    """

    start_B: Tensor
    partner_B: Tensor
    end_B: Tensor
    first_B: Tensor
    last_B: Tensor


@dataclass(frozen=True)
class PhaseGrid:
    """Noise levels of consistency training.

    sigmas: N + 1 levels, ascending from 0 to 1. edges: indices of the phases' edges among them, ascending from 0 to N.
    """

    sigmas: tuple[float, ...]
    edges: tuple[int, ...]

    @property
    def points(self) -> int:
        return len(self.sigmas) - 1

    def index_of(self, sigma: float) -> int:
        """The grid point at exactly this level."""
        return self.sigmas.index(sigma)

    def jumps(self, uniform_B: Tensor, first: int = 1, last: int | None = None) -> Jumps:
        """Starts uniformly at one of the points first ... last. uniform_B: [B] in [0, 1)."""
        start_B = _pick(uniform_B, first, self.points if last is None else last)
        phases = [bisect_left(self.edges, index) for index in start_B.tolist()]
        lower_B = torch.tensor([self.edges[phase - 1] for phase in phases])
        upper_B = torch.tensor([self.edges[phase] for phase in phases])
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        return Jumps(sigmas[start_B], sigmas[start_B - 1], sigmas[lower_B], lower_B + 1, upper_B)

    def level_within(self, jumps: Jumps, uniform_B: Tensor) -> Tensor:
        """A level drawn uniformly from the grid points of each sample's phase, its end not among them: [B] fp64."""
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        return sigmas[_pick(uniform_B, jumps.first_B, jumps.last_B)]


def _pick(uniform_B: Tensor, first: int | Tensor, last: int | Tensor) -> Tensor:
    """Integers first ... last, both included, of numbers in [0, 1)."""
    return (first + (uniform_B * (last - first + 1)).floor()).long()


def phase_grid(points: int, shift: float, inner_edges: Sequence[float] = ()) -> PhaseGrid:
    """`points` + 1 levels, uniform in u and warped by the shift; the points nearest to the edges are moved onto them.

    inner_edges: sigmas between 0 and 1, in any order. Raises ValueError where there are too few points for them.
    """
    sigmas = [float(shifted(index / points, shift)) for index in range(points + 1)]
    edges = []
    for sigma in sorted(inner_edges):
        nearest = round(unshifted(sigma, shift) * points)
        if not 0 < nearest < points or nearest in edges:
            raise ValueError(f"{points} grid points are too few for a phase that ends at timestep {1000 * sigma:g}")
        sigmas[nearest] = sigma
        edges.append(nearest)
    return PhaseGrid(tuple(sigmas), (0, *edges, points))


# --- moving along the trajectory --------------------------------------------------------------------------------------


def at_level(sigma_B: Tensor, like: Tensor) -> Tensor:
    """fp64 levels of the grid as a network takes them: fp32, beside its input."""
    return sigma_B.float().to(like.device)


def moved(x: Tensor, velocity: Tensor, start_B: Tensor, end_B: Tensor) -> Tensor:
    """x + (end - start) v, per sample. Formed in fp64: neighbours on a shift-17 grid are .0012 apart."""
    return x + spread((end_B - start_B).to(x.device, x.dtype), x) * velocity.to(x.dtype)


def jump(network: Denoiser, x: Tensor, start_B: Tensor, end_B: Tensor, text: TextEmbedding) -> Tensor:
    """f(x, s) = x + (e - s) G(x, s). x [B, C, F, H, W] fp32; levels [B] fp64 on the CPU."""
    return moved(x, network.velocity(x, at_level(start_B, x), text), start_B, end_B)


VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, F, H, W], sigma [B] fp32) -> velocity."""


def solve(field: VelocityField, x: Tensor, start_B: Tensor, end_B: Tensor, solver: str, substeps: int) -> Tensor:
    """The trajectory dx/ds = v from start to end in `substeps` equal steps in sigma.

    "euler": one call a step. "heun": two, the second at the step's end; a sample whose step ends at sigma 0 takes an
    Euler step, because networks are not trained there.
    """
    levels = [torch.lerp(start_B, end_B, step / substeps) for step in range(substeps)] + [end_B]
    for here_B, there_B in zip(levels, levels[1:], strict=False):
        velocity = field(x, at_level(here_B, x)).to(x.dtype)
        if solver == "heun" and bool((there_B > 0).any()):
            second = field(moved(x, velocity, here_B, there_B), at_level(there_B, x)).to(x.dtype)
            clean = spread((there_B == 0).to(x.device), x)
            velocity = torch.where(clean, velocity, (velocity + second) / 2)
        x = moved(x, velocity, here_B, there_B)
    return x


# --- the loss ---------------------------------------------------------------------------------------------------------


def consistency_distance(prediction: Tensor, target: Tensor, loss_type: str, huber_c: float) -> Tensor:
    """[B], mean over the elements of a sample: "l2" r^2, or "huber" sqrt(r^2 + c^2) - c of the residual r, in fp32."""
    squared = (prediction.float() - target.float()).pow(2)
    if loss_type == "l2":
        return per_sample_mean(squared)
    # The same number without the cancellation of sqrt(r^2 + c^2) - c at r << c.
    return per_sample_mean(squared / ((squared + huber_c**2).sqrt() + huber_c))


def loss_weight(jumps: Jumps, weighting: str) -> Tensor:
    """[B] fp64. "none": 1. "inverse_sigma": 1 / (start - end), which turns the distance of jumps into one of
    velocities. "inverse_interval": 1 / (start - partner), as if the error of each teacher step counted the same."""
    if weighting == "inverse_sigma":
        return 1 / (jumps.start_B - jumps.end_B)
    if weighting == "inverse_interval":
        return 1 / (jumps.start_B - jumps.partner_B)
    return torch.ones_like(jumps.start_B)


@dataclass(frozen=True)
class ConsistencySettings:
    """What the loss reads of `distillation_config` (documentation: the keys of the same names).

    guidance: the teacher's, standard form. guidance_range: drawn uniformly per sample instead.
    """

    grid: PhaseGrid
    guidance: float = 1.0
    guidance_range: tuple[float, float] | None = None
    solver: str = "euler"
    teacher_substeps: int = 1
    loss_type: str = "huber"
    huber_c: float = 0.001
    loss_weighting: str = "none"
    caption_dropout_probability: float = 0.0


@dataclass(frozen=True)
class ConsistencyPair:
    """Two jumps that should end in the same place. prediction: with the student's graph; target: without any."""

    prediction: Tensor
    target: Tensor
    jumps: Jumps
    text: TextEmbedding

    def detached(self) -> ConsistencyPair:
        return replace(self, prediction=self.prediction.detach())


@dataclass(frozen=True)
class Consistency:
    """The loss on data latents. Forwards of a micro-batch: teacher, substeps x (1 Euler, 2 Heun) x (2 where guided);
    target network, 1 on the samples whose partner is not the end of the phase, 0 where there is none; student, 1."""

    teacher: Denoiser
    settings: ConsistencySettings
    device: torch.device

    def pair(self, student: Denoiser, target: Denoiser, batch: Batch, stream: RandomStream, first: int = 1,
             last: int | None = None) -> ConsistencyPair:  # fmt: skip
        """Draws a grid point first ... last per sample, and jumps from it and from its partner.

        target: the student itself, or its running average; called without a graph.
        """
        assert batch.latents_BCFHW is not None, "consistency training needs latents"
        settings, x0 = self.settings, batch.latents_BCFHW.float()
        jumps = settings.grid.jumps(stream.uniform("consistency/level"), first, last)
        noise = stream.normal(batch.latent_shape, "consistency/noise").to(self.device)
        x = add_noise(x0, noise, at_level(jumps.start_B, x0))
        text = self._text(batch, stream)
        with torch.no_grad():
            field = self._teacher_field(batch, stream, text)
            partner = solve(field, x, jumps.start_B, jumps.partner_B, settings.solver, settings.teacher_substeps)
            goal = end_of_phase(target, partner, jumps, text)
        return ConsistencyPair(jump(student, x, jumps.start_B, jumps.end_B, text), goal, jumps, text)

    def loss(self, pair: ConsistencyPair, extra_B: Tensor | float = 0.0) -> Tensor:
        """Scalar: the weighted mean over samples of their distance, and of `extra_B` [B] that is weighted alike."""
        settings = self.settings
        distance_B = consistency_distance(pair.prediction, pair.target, settings.loss_type, settings.huber_c)
        weight_B = loss_weight(pair.jumps, settings.loss_weighting).to(distance_B)
        return (weight_B * (distance_B + extra_B)).mean()

    def _text(self, batch: Batch, stream: RandomStream) -> TextEmbedding:
        """Without the teacher's guidance in it a student can be guided later, if it knows the negative prompt too."""
        if self.settings.guidance_range is None and guidance_is_off(self.settings.guidance):
            return with_dropped_captions(batch, stream, self.settings.caption_dropout_probability)
        return batch.text

    def _teacher_field(self, batch: Batch, stream: RandomStream, text: TextEmbedding) -> VelocityField:
        settings, negative = self.settings, batch.negative_text
        if settings.guidance_range is None:
            return lambda x, sigma: guided_velocity(self.teacher, x, sigma, text, negative, settings.guidance)
        low, high = settings.guidance_range
        scale_B = (low + (high - low) * stream.uniform("consistency/guidance")).float().to(self.device)

        def guided_per_sample(x: Tensor, sigma: Tensor) -> Tensor:
            conditional = self.teacher.velocity(x, sigma, text).float()
            unconditional = self.teacher.velocity(x, sigma, negative.expand(len(x))).float()
            return unconditional + spread(scale_B, x) * (conditional - unconditional)

        return guided_per_sample


def end_of_phase(network: Denoiser, x: Tensor, jumps: Jumps, text: TextEmbedding) -> Tensor:
    """Jumps from the partners to the ends of their phases; a partner that is there already stays as it is, bit for bit,
    and the network is not asked about it."""
    on_the_way = (jumps.partner_B > jumps.end_B).nonzero().flatten()
    if len(on_the_way) == 0:
        return x
    rows = on_the_way.to(x.device)
    said = TextEmbedding(text.rows_BLD[rows])
    jumped = jump(network, x[rows], jumps.partner_B[on_the_way], jumps.end_B[on_the_way], said)
    return x.index_copy(0, rows, jumped)


@torch.no_grad()
def pair_metrics(pair: ConsistencyPair) -> dict[str, float]:
    """The residual, and what the two jumps look like: a spread that dies away is a student that learns averages."""
    return {
        "consistency_error_rms": float((pair.prediction - pair.target).pow(2).mean().sqrt()),
        "prediction_std": float(pair.prediction.std()),
        "target_std": float(pair.target.std()),
        "sigma": float(pair.jumps.start_B.mean()),
    }


# --- from options -----------------------------------------------------------------------------------------------------


def consistency_settings(parts: Ingredients, grid: PhaseGrid, **special: Any) -> ConsistencySettings:
    """What every consistency method reads of its options; `special` overrides."""
    options = parts.options
    common: dict[str, Any] = {
        "guidance": options.real_score_guidance_scale,
        "solver": options.solver,
        "teacher_substeps": options.teacher_substeps,
        "loss_type": options.loss_type,
        "huber_c": options.huber_c,
        "loss_weighting": options.loss_weighting,
        "caption_dropout_probability": parts.caption_dropout_probability,
    }
    return ConsistencySettings(grid=grid, **(common | special))


def target_network(parts: Ingredients) -> Denoiser:
    """What the target's jump is made with: the student as it is, or its running average."""
    if parts.options.target == "student":
        return parts.student
    assert parts.target is not None, "the student's average is the target, and there is none"
    return parts.target
