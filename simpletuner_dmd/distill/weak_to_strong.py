"""The real score of distribution matching: the guided teacher, or one that leans towards the critic (W2SVD).

Weak-to-strong matching (MagicDistillation, arXiv 2503.13319) compares the critic with the base plus a fraction a of the
critic's own LoRA, which is nearer to the student's samples than the bare base. For a network that is linear in its LoRA
the direction is (1 - a) times DMD's: the fixed point stays.

Guidance makes that a question the paper's guidance-embedded base did not have. With the fraction on the conditional
branch only it would count g times, and for g a > 1 push the student away. So there are two forms, both right:
    linear       v_u + g (v_c - v_u) + a (v_F - v_c)      of velocities that DMD has already computed
    exact-both   v_u(a) + g (v_c(a) - v_u(a))             the fraction on both branches
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from simpletuner_dmd.flow import Denoiser, TextEmbedding, guidance_is_off, guided


class Weakened(Denoiser, Protocol):
    """The critic at a fraction of its strength: 0 is the teacher, 1 the critic."""

    scale: float


@dataclass(frozen=True)
class Score:
    """Velocities of one network at one input, fp32. velocity: guided. conditional: of the prompt alone."""

    velocity: Tensor
    conditional: Tensor


def score(
    denoiser: Denoiser, x_t: Tensor, sigma_B: Tensor, text: TextEmbedding, negative: TextEmbedding, guidance: float
) -> Score:
    """As `flow.guided_velocity`, with the conditional branch kept: two forwards, or one where guidance is off."""
    conditional = denoiser.velocity(x_t, sigma_B, text).float()
    if guidance_is_off(guidance):
        return Score(conditional, conditional)
    unconditional = denoiser.velocity(x_t, sigma_B, negative.expand(len(x_t))).float()
    return Score(guided(unconditional, conditional, guidance), conditional)


def leaning(teacher: Score, critic: Score, fraction: float) -> Score:
    """The linear form: both velocities move by the same a (v_F - v_c), so the guidance part stays what it was."""
    shift = fraction * (critic.conditional - teacher.conditional)
    return Score(teacher.velocity + shift, teacher.conditional + shift)


@dataclass(frozen=True)
class WeakToStrong:
    """What the method reads of `distillation_config`: the keys of the same names; 0 is plain DMD.

    weak_schedule: "constant", or "linear_to_zero" within weak_schedule_steps trainer steps.
    """

    weak_lora_scale: float = 0.0
    weak_mode: str = "linear"  # or "exact-both"
    weak_schedule: str = "constant"
    weak_schedule_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0.0 <= self.weak_lora_scale < 1.0:
            # At 1 the two scores are the same, and beyond it the student is pushed away.
            raise ValueError(f"weak_lora_scale must be in [0, 1), not {self.weak_lora_scale:g}")

    def fraction(self, step: int) -> float:
        """a at a trainer step."""
        if self.weak_schedule == "constant":
            return self.weak_lora_scale
        return self.weak_lora_scale * max(0.0, 1 - step / self.weak_schedule_steps)
