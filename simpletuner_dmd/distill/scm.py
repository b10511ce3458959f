"""The continuous-time consistency loss (sCM, arXiv 2410.11081) for networks that predict a rectified-flow velocity.

The student G names an end point of the teacher's probability-flow ODE from anywhere on it, f(x, s) = x - s G(x, s).
It is right where f does not change along the ODE, dx/ds = v_T(x, s):

    0 = df/ds = v_T - G - s dG/ds,    dG/ds = (dG/dx) v_T + dG/ds at fixed x,    hence    G* = v_T - s dG*/ds

There is no grid and no solver: one teacher velocity (guided or not) and one derivative of the student per sample.
f(x, 0) = x holds by construction; at s = 0 the target is v_T itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from simpletuner_dmd.distill.losses import matching_loss, per_sample_mean
from simpletuner_dmd.distill.method import NamedLoss
from simpletuner_dmd.distill.noise_levels import Draw, LogitNormal
from simpletuner_dmd.flow import Batch, Denoiser, TextEmbedding, add_noise, guided_velocity, spread
from simpletuner_dmd.randomness import RandomStream

NORM_OFFSET = 0.1  # sCM section 4.1, c in g / (||g|| + c)


@dataclass(frozen=True)
class ConsistencySettings:
    """What the loss reads of `distillation_config`.

    draw: of s; by default rCM's log-normal noise-to-signal ratio, N(0.7, 1.6^2) in its logarithm.
    """

    guidance: float = 1.0
    tangent_method: str = "jvp"  # or "finite_difference"
    tangent_step: float = 1e-4
    tangent_warmup_steps: int = 0
    draw: Draw = LogitNormal(0.7, 1.6)


# --- the derivative along the trajectory ------------------------------------------------------------------------------


@torch.no_grad()
def derivative_by_difference(
    student: Denoiser, x_s: Tensor, sigma_B: Tensor, direction: Tensor, text: TextEmbedding, step: float
) -> Tensor:
    """dG/ds along dx/ds = direction by a central difference of two forwards, each `step` away; one-sided at 0 and 1.

    Any network will do, but it must compute in fp32: Wan sees t = 1000 s, and its fastest embedding turns by one
    radian per unit of t, so the relative error is about (1000 step)^2 / 6, 0.2% at 1e-4, while the difference of two
    outputs at that distance is below the last digit of bf16.
    """
    high, low = (sigma_B + step).clamp(max=1.0), (sigma_B - step).clamp(min=0.0)
    # The distances as they came out after rounding, not as they were meant: x and s must move together.
    ahead = student.velocity(x_s + spread(high - sigma_B, x_s) * direction, high, text)
    behind = student.velocity(x_s + spread(low - sigma_B, x_s) * direction, low, text)
    return (ahead - behind) / spread(high - low, x_s)


@torch.no_grad()
def derivative_by_jvp(
    student: Denoiser, x_s: Tensor, sigma_B: Tensor, direction: Tensor, text: TextEmbedding
) -> Tensor:
    """dG/ds along dx/ds = direction by forward-mode differentiation: exact, in one pass of about two forwards' cost.

    Attention falls back to PyTorch's math kernel, the only one with a forward derivative; its memory grows with the
    square of the number of tokens.
    """
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.func.jvp(
            lambda x, sigma: student.velocity(x, sigma, text), (x_s, sigma_B), (direction, torch.ones_like(sigma_B))
        )
    derivative = found[1]
    assert isinstance(derivative, Tensor)
    return derivative


# --- the loss ---------------------------------------------------------------------------------------------------------


def raw_tangent(
    student_velocity: Tensor, teacher_velocity: Tensor, derivative: Tensor, sigma_B: Tensor, share: float = 1.0
) -> Tensor:
    """G - (v_T - share s dG/ds): how far the student is from its own target, -df/ds at share 1.

    share rises from 0 to 1 over the tangent warm-up (sCM section 4.1); at 0 the student imitates the teacher's
    velocity.
    """
    return student_velocity - teacher_velocity + share * spread(sigma_B, derivative) * derivative


def normalised_tangent(tangent: Tensor) -> Tensor:
    """sqrt(N) g / (||g|| + 0.1) per sample of N elements, the norm over all of them: root mean square just below 1.

    sCM's own is of norm 1. Ours keeps its size beside losses that are means over elements, whatever the video's size.
    """
    count = tangent[0].numel()
    norm_B = tangent.flatten(1).norm(dim=1)
    return tangent * spread(count**0.5 / (norm_B + NORM_OFFSET), tangent)


def consistency_loss(
    teacher: Denoiser,
    student: Denoiser,
    batch: Batch,
    stream: RandomStream,
    settings: ConsistencySettings,
    device: torch.device,
) -> NamedLoss:
    """1/2 mean (G - stopgrad(G - g))^2 on noised data latents: its gradient in G is g / N, g the normalised tangent.

    The value is 1/2 whatever happens, so the mean square of the tangent before normalisation is reported instead.
    """
    assert batch.latents_BCFHW is not None, "the consistency loss needs latents"
    sigma_B = settings.draw.levels(stream, "scm/sigma").float().to(device)
    noise = stream.normal(batch.latent_shape, "scm/noise").to(device)
    x_s = add_noise(batch.latents_BCFHW.float(), noise, sigma_B)
    with torch.no_grad():
        target = guided_velocity(teacher, x_s, sigma_B, batch.text, batch.negative_text, settings.guidance)
    if settings.tangent_method == "jvp":
        derivative = derivative_by_jvp(student, x_s, sigma_B, target, batch.text)
    else:
        derivative = derivative_by_difference(student, x_s, sigma_B, target, batch.text, settings.tangent_step)
    velocity = student.velocity(x_s, sigma_B, batch.text)
    share = min(1.0, stream.step / settings.tangent_warmup_steps) if settings.tangent_warmup_steps else 1.0
    tangent = raw_tangent(velocity.detach(), target, derivative, sigma_B, share)
    square = float(per_sample_mean(tangent.pow(2)).mean())
    metrics = {
        "tangent_rms": square**0.5,
        "tangent_share": share,
        "teacher_distance_rms": float((velocity.detach() - target).pow(2).mean().sqrt()),
    }
    return NamedLoss("scm_loss", matching_loss(velocity, normalised_tangent(tangent)), metrics, reported=square)
