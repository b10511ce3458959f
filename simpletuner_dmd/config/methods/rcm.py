"""Options of `distillation_config` for rCM: the consistency term beside those of distribution matching."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods.base import WHERE, RunOptions, steps_list
from simpletuner_dmd.config.methods.critic import CriticOptions

TORCH_ATTENTION = ("diffusers", "native")


class RcmConfig(CriticOptions):
    """Continuous-time consistency with distribution matching (rCM). Defaults are those of its paper, arXiv 2510.08431.

    Its weight of 100 on the consistency term belongs to a tangent of norm 1 and sums over elements. Ours has a root
    mean square of 1 and means, so that the two terms keep their ratio at every video size: 100 / sqrt(N), which for
    the paper's N = 16 x 20 x 60 x 104 elements is 0.07.
    """

    title: ClassVar[str] = "rCM"

    scm_weight: float = Field(
        0.07, gt=0, le=1e4,
        description="Weight of the consistency term, which keeps variety. 0.07 is the paper's 100 for 77 frames at "
        "480p, where the tangent is normalised to norm 1 instead of root mean square 1: 100 / sqrt(elements).",
    )  # fmt: skip
    dmd_weight: float = Field(1.0, gt=0, le=1e4, description="Weight of the matching term, which sharpens.")
    tangent_method: Literal["jvp", "finite_difference"] = Field(
        "jvp",
        description="The student's derivative along the trajectory: exact (`jvp`, any precision, much attention "
        "memory), or from two more forwards (`finite_difference`, any network, fp32 only). Default: `jvp`, but "
        "`finite_difference` where `mixed_precision` is `no`.",
    )
    tangent_step: float = Field(
        1e-4, ge=1e-6, le=1e-2,
        description="Distance in sigma of `finite_difference`. 1e-4 is 0.2% from exact on Wan, 1e-3 is 11%.",
    )  # fmt: skip
    tangent_warmup_steps: int = Field(
        1000, ge=0,
        description="Steps at the start in which the student alone moves, by consistency, and over which its "
        "derivative fades in. The paper: 1000, for 14B fewer or none.",
    )  # fmt: skip
    scm_logit_mean: float = Field(
        0.7, ge=-10, le=10,
        description="Consistency looks at noise levels with a log-normal ratio of noise to signal: mean of its log.",
    )  # fmt: skip
    scm_logit_std: float = Field(1.6, gt=0, le=10, description="Standard deviation of that logarithm.")
    dmd_denoising_steps: Annotated[tuple[float, ...], BeforeValidator(steps_list)] = Field(
        (1000.0, 933.8, 852.9, 609.0),
        description="The student's steps, as timesteps on the shifted scale, used literally. Default: the paper's four "
        "(1.5, 1.4 and 1.0 in its angles), from pure noise.",
    )
    last_step_only: bool = Field(
        False, description="Distribution matching always trains the last student step instead of a random one."
    )
    real_score_guidance_scale: float = Field(
        5.0, ge=0, le=30, description="Guidance of the teacher, built into the student; 1 and 0 are off."
    )
    generator_update_interval: int = Field(
        5, ge=1,
        description="After `tangent_warmup_steps`: the student is updated at every so many steps, the critic at every "
        "step. The paper: 5, for 14B 10.",
    )  # fmt: skip
    critic_warmup_steps: int = Field(
        0, ge=0, description="Steps after `tangent_warmup_steps` in which only the critic learns. 50 to 200 help."
    )
    timestep_shift: float = Field(
        5.0, gt=0, le=100,
        description="Moves the levels of distribution matching, and the critic's own, towards the noisy end.",
    )  # fmt: skip
    ts_schedule: bool = Field(
        False,
        description="Compares only at more noise than the student's next step has: the lower end follows the exit.",
    )

    @classmethod
    def complete(cls, given: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        given = super().complete(given, outside)
        if outside.get("mixed_precision") == "no":
            given.setdefault("tangent_method", "finite_difference")
        return given

    @property
    def needs_latents(self) -> bool:
        return True

    @property
    def student_interval(self) -> int:
        """As it is at the start, where a learning rate warms up."""
        return 1 if self.tangent_warmup_steps else self.generator_update_interval

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        alone, critic = self.tangent_warmup_steps, self.critic_warmup_steps
        if config.max_train_steps and critic < config.max_train_steps <= alone + critic:
            found.append(
                Problem("", WHERE + "tangent_warmup_steps",
                        f"found {alone}{f' and critic_warmup_steps {critic}' if critic else ''}, but the run has "
                        f"{config.max_train_steps} steps: distribution matching would never begin",
                        "lower it, for example to a quarter of max_train_steps")
            )  # fmt: skip
        return found + self._tangent_problems(config)

    def _tangent_problems(self, config: RunOptions) -> list[Problem]:
        key, quantised = WHERE + "tangent_method", config.base_model_precision != "no_change"
        if self.tangent_method == "finite_difference":
            if config.mixed_precision == "no":
                return []
            message = (f"the difference of two {config.mixed_precision} forwards is rounding noise (24 times the "
                       "derivative itself on the demo's Wan)")  # fmt: skip
            fix = 'set "mixed_precision": "no"' + ("" if quantised else ', or "tangent_method": "jvp"')
            return [Problem("", key, message, fix)]
        if quantised:
            return [Problem("", key, f"layers in {config.base_model_precision} have no forward derivative (jvp)",
                            'set "tangent_method": "finite_difference" and "mixed_precision": "no", '
                            'or "base_model_precision": "no_change"')]  # fmt: skip
        if config.attention_mechanism not in TORCH_ATTENTION:
            return [Problem("", key, f"{config.attention_mechanism} has no forward derivative (jvp); PyTorch's own "
                            "attention has one", 'set "attention_mechanism": "diffusers"')]  # fmt: skip
        return []

    def notices(self, config: RunOptions) -> list[str]:
        found = super().notices(config)
        if self.tangent_method == "jvp":
            found.append(
                "tangent_method jvp: PyTorch's fused attention has no forward derivative, so its pass uses plain "
                "attention, whose memory grows with the square of the tokens."
            )
        elif "tangent_step" in self.model_fields_set and self.tangent_step > 3e-4:
            found.append(
                f"tangent_step {self.tangent_step:g}: Wan's time embedding turns by {1000 * self.tangent_step:g} "
                "radians over it, so the derivative is visibly wrong; 1e-4 is good to 0.2%."
            )
        if self.tangent_method == "jvp" and "tangent_step" in self.model_fields_set:
            found.append("tangent_step has no effect: it belongs to tangent_method finite_difference.")
        return found
