"""Losses as pure functions of tensors, the same on an analytic Gaussian in tests and on Wan in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from simpletuner_dmd.flow import spread

NORMALISER_FLOOR = 1e-6  # a sample whose x0 already equals the teacher's has nothing to be normalised by


def per_sample_mean(values: Tensor) -> Tensor:
    """[B, ...] to [B]."""
    return values.flatten(1).mean(dim=1)


def velocity_loss(predicted: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching MSE ||v - (e - x0)||^2 in fp32: [B], mean over all elements of each sample."""
    wide = torch.promote_types(predicted.dtype, torch.float32)
    return per_sample_mean((predicted.to(wide) - (noise - x0).to(wide)).pow(2))


@dataclass(frozen=True)
class MatchingDirection:
    """The direction along which distribution matching moves x0, and what is worth knowing about it.

    direction: shaped like x0, (x0_critic - x0_teacher) / normaliser; the student moves against it.
    normaliser_B: mean |x0_student - x0_teacher| per sample, over C, F, H and W.
    """

    direction: Tensor
    normaliser_B: Tensor


@torch.no_grad()
def matching_direction(
    x0_student: Tensor, x_t: Tensor, sigma_B: Tensor, teacher_velocity: Tensor, critic_velocity: Tensor
) -> MatchingDirection:
    """DMD's gradient with respect to the student's clean sample (DMD2 eq. 2-3 with the released weighting).

    x0_F - x0_T = s (v_T - v_F): formed from the velocities, in fp32, because subtracting two nearly equal x0 loses
    the signal. Per-sample normaliser |x0_G - x0_T|, never over the batch, never |x0_F - x0_T|.
    """
    wide = torch.promote_types(x_t.dtype, torch.float32)
    sigma = spread(sigma_B, x_t).to(wide)
    difference = sigma * (teacher_velocity.to(wide) - critic_velocity.to(wide))
    teacher_x0 = x_t.to(wide) - sigma * teacher_velocity.to(wide)
    normaliser_B = per_sample_mean((x0_student.detach().to(wide) - teacher_x0).abs())
    direction = difference / spread(normaliser_B.clamp_min(NORMALISER_FLOOR), difference)
    return MatchingDirection(direction, normaliser_B)


def matching_loss(x0_student: Tensor, direction: Tensor) -> Tensor:
    """1/2 mean (x0 - stopgrad(x0 - direction))^2: scalar, with gradient direction / (number of elements)."""
    target = (x0_student - direction).detach()
    return 0.5 * (x0_student - target).pow(2).mean()


@torch.no_grad()
def direction_parts(
    sigma_B: Tensor, conditional: Tensor, guided: Tensor, critic: Tensor, normaliser_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The two parts that `matching_direction` is the sum of, from velocities that are there anyway.

        x0_F - x0_T,g = (x0_F - x0_T,c) - (g - 1) (x0_T,c - x0_T,u)
    The first matches distributions and vanishes with the critic at the teacher; the second is the guidance that is
    being built in, and never vanishes (arXiv 2511.22677).
    """
    wide = torch.promote_types(conditional.dtype, torch.float32)
    scale = spread(sigma_B.to(wide) / normaliser_B.clamp_min(NORMALISER_FLOOR).to(wide), conditional)
    return scale * (conditional.to(wide) - critic.to(wide)), scale * (guided.to(wide) - conditional.to(wide))


def discriminator_loss(logit_B: Tensor, *, real: bool) -> Tensor:
    """softplus(-D) of real samples, softplus(D) of the student's: scalar. D then tends to log p_real / p_student."""
    return softplus(-logit_B if real else logit_B).mean()


def adversarial_loss(logit_B: Tensor) -> Tensor:
    """The student's term, softplus(-D): scalar."""
    return softplus(-logit_B).mean()
