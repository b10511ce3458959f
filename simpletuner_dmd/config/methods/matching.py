"""Options of what may be added to distribution matching: a discriminator, weak-to-strong matching, ground truth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import numbers
from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import WHERE, RunOptions
from simpletuner_dmd.config.methods.critic import CriticOptions

ANNEALED_SHARE = 0.3  # of the run, after which linear_to_zero has reached 0


def _blocks(value: Any) -> Any:
    """ "auto", or block numbers counted from 0, each once and in order."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    try:
        blocks = sorted(set(numbers(value)))
    except ValueError:
        blocks = []
    if not blocks or any(block < 0 or not block.is_integer() for block in blocks):
        raise ValueError('must be "auto" or a list of block numbers counted from 0, for example "15,22,29"')
    return tuple(int(block) for block in blocks)


class MatchingOptions(CriticOptions):
    """Whoever matches distributions with a bidirectional critic may have these."""

    gan_weight: float = Field(
        0.0, ge=0, le=100,
        description="Weight of an adversarial term on top of distribution matching, as `gan_weight_mode` reads it; "
        "0 is off. Needs videos.",
    )  # fmt: skip
    gan_weight_mode: Literal["absolute", "ratio"] = Field(
        "absolute",
        description="`gan_weight` is the term's own weight, or the size of its gradient at the student's sample "
        "relative to that of distribution matching (0.1 to 0.3), which carries over between video sizes.",
    )
    gan_start_step: int = Field(500, ge=0, description="Step from which the adversarial term acts on the student.")
    gan_discriminator_warmup: int = Field(
        100, ge=0, description="Steps before `gan_start_step` in which the discriminator already learns."
    )
    gan_critic_weight: float = Field(
        1e-2, gt=0, le=100, description="Weight of the discriminator's own loss beside the critic's."
    )
    gan_blocks: Annotated[Literal["auto"] | tuple[int, ...], BeforeValidator(_blocks)] = Field(
        "auto",
        description="Transformer blocks of the critic, counted from 0, whose output the discriminator reads. `auto`: "
        "the middle one, the one at three quarters and the last.",
    )
    gan_detach_backbone: bool = Field(
        False, description="The discriminator's loss trains its head only, not the critic under it."
    )
    gan_last_step_only: bool = Field(
        False,
        description="The adversarial term looks only at samples of the student's last step, which are what it ships. "
        "Those of earlier steps are blurred by nature: a discriminator that sees them learns little else.",
    )
    gan_r1_weight: float = Field(
        0.0, ge=0, le=1e5,
        description="Weight, within the discriminator's loss, of a penalty on its change under small noise on real "
        "videos (approximate R1); 0 is off, 20 to 1000 are in use.",
    )  # fmt: skip
    gan_r1_sigma: float = Field(0.1, gt=0, le=1, description="Standard deviation of that noise.")
    weak_lora_scale: float = Field(
        0.0, ge=0, lt=1,
        description="Weak-to-strong matching (W2SVD): the teacher takes this fraction of the critic on; 0 is off, "
        "0.25 is the paper's best.",
    )  # fmt: skip
    weak_mode: Literal["linear", "exact-both"] = Field(
        "linear",
        description="How: by mixing velocities, at no cost, or by the critic's LoRA at that strength in both branches "
        "of the teacher's guidance.",
    )
    weak_schedule: Literal["constant", "linear_to_zero"] = Field(
        "constant", description="Course of that fraction over the run."
    )
    weak_schedule_steps: int = Field(
        1000, ge=1, description="Steps in which `linear_to_zero` reaches 0. Default: 30 % of `max_train_steps`."
    )
    ground_truth_weight: float = Field(
        0.0, ge=0, le=1,
        description="Weight of a pull towards your videos (W2SVD's regression term); 0 is off. It stills motion: never "
        "above 0.05. Needs videos.",
    )  # fmt: skip

    @classmethod
    def complete(cls, given: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        given = super().complete(given, outside)
        if given.get("weak_schedule") == "linear_to_zero" and outside.get("max_train_steps"):
            given.setdefault("weak_schedule_steps", max(1, round(ANNEALED_SHARE * outside["max_train_steps"])))
        return given

    @property
    def needs_latents(self) -> bool:
        return self.gan_weight > 0 or self.ground_truth_weight > 0

    @property
    def latents_are_for(self) -> tuple[str, str] | None:
        key = next((key for key in ("gan_weight", "ground_truth_weight") if getattr(self, key) > 0), None)
        return super().latents_are_for if key is None else (f"{key} {getattr(self, key):g}", f'set "{key}": 0')

    @property
    def weak_critic(self) -> bool:
        """Whether the critic is also evaluated at a fraction of its strength."""
        return self.weak_lora_scale > 0 and self.weak_mode == "exact-both"

    def depth_problems(self, depth: int, place: str) -> list[Problem]:
        if not self.gan_weight or self.gan_blocks == "auto" or self.gan_blocks[-1] < depth:
            return []
        return [
            Problem(place, WHERE + "gan_blocks",
                    f"found {', '.join(map(str, self.gan_blocks))}, but this model has {depth} blocks, "
                    f"0 to {depth - 1}",
                    'choose from these, or write "auto"')
        ]  # fmt: skip

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        if self.gan_weight and config.max_train_steps and self.gan_start_step >= config.max_train_steps:
            found.append(
                Problem("", WHERE + "gan_start_step",
                        f"found {self.gan_start_step}, but the run has {config.max_train_steps} steps: "
                        "the adversarial term would never act", "lower it, or set \"gan_weight\": 0")
            )  # fmt: skip
        if self.weak_critic and self.fake_score_type != "lora":
            found.append(
                Problem("", WHERE + "weak_mode", "exact-both needs a critic that is a LoRA on the teacher's weights, "
                        f"and fake_score_type is {self.fake_score_type}",
                        'set "weak_mode": "linear", or "fake_score_type": "lora"')
            )  # fmt: skip
        elif self.weak_critic and self.guided and not config.caption_dropout_probability:
            found.append(
                Problem("", WHERE + "weak_mode",
                        f"exact-both under guidance {self.real_score_guidance_scale:g} needs a critic that has learned "
                        "the negative prompt; untrained there, the fraction counts once per unit of guidance and may "
                        "push the student away",
                        'set "weak_mode": "linear", or "caption_dropout_probability": 0.1 beside distillation_config')
            )  # fmt: skip
        return found

    @property
    def guided(self) -> bool:
        return self.real_score_guidance_scale not in (0.0, 1.0)

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        for keys, reason in self._idle():
            found.append(f"{', '.join(keys)}: no effect, {reason}.")
        if self.ground_truth_weight:
            found.append(
                f"ground_truth_weight {self.ground_truth_weight:g} draws every sample to the mean of your videos, "
                "whatever its noise: it raises image scores and stills motion. Stay at or below 0.05."
            )
        if self.gan_weight and self.gan_discriminator_warmup > self.gan_start_step:
            found.append(
                f"gan_discriminator_warmup {self.gan_discriminator_warmup} is longer than gan_start_step "
                f"{self.gan_start_step}: the discriminator learns from the first step."
            )
        return found

    def _idle(self) -> list[tuple[list[str], str]]:
        """(keys that were written and do nothing, why)."""

        def written(prefix: str, *but: str) -> list[str]:
            return sorted(key for key in self.model_fields_set if key.startswith(prefix) and key not in but)

        found = []
        if not self.gan_weight:
            found.append((written("gan_", "gan_weight"), "gan_weight is 0"))
        elif not self.gan_r1_weight:
            found.append((written("gan_r1_sigma"), "gan_r1_weight is 0"))
        if not self.weak_lora_scale:
            found.append((written("weak_", "weak_lora_scale"), "weak_lora_scale is 0"))
        elif self.weak_schedule == "constant":
            found.append((written("weak_schedule_steps"), "weak_schedule is constant"))
        return [(keys, reason) for keys, reason in found if keys]
