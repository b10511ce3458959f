"""What the settings of every distillation method have in common, and the groups of options that several share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import Options, numbers
from simpletuner_dmd.config.errors import Problem

TIMESTEPS = 1000.0
WHERE = "distillation_config."


def warp(u: float, shift: float) -> float:
    """1000 k u / (1 + (k - 1) u), as `flow.shifted`, which this room cannot import: it stays free of torch."""
    return TIMESTEPS * shift * u / (1 + (shift - 1) * u)


def uniform_timesteps(steps: int, shift: float) -> tuple[float, ...]:
    """1000 (n - k) / n for k = 0 .. n - 1, warped by the shift."""
    return tuple(warp((steps - k) / steps, shift) for k in range(steps))


def ladder_mistake(timesteps: tuple[float, ...]) -> str | None:
    """Why a few-step sampler cannot walk these timesteps (scale 0 to 1000), or None if it can."""
    if not timesteps:
        return "has no steps"
    if any(later >= earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False)):
        return "must decrease strictly"
    if not 990 < timesteps[0] <= TIMESTEPS:
        return "must start in (990, 1000], because sampling starts from pure noise"
    if timesteps[-1] <= 0:
        return "must stay above 0"
    return None


class RunOptions(Protocol):
    """What the checks of a method read of the whole configuration, which is `schema.TrainConfig`."""

    @property
    def attention_mechanism(self) -> str: ...

    @property
    def base_model_precision(self) -> str: ...

    @property
    def caption_dropout_probability(self) -> float: ...

    @property
    def flow_schedule_shift(self) -> float | None: ...

    @property
    def global_batch_size(self) -> int: ...

    @property
    def init_lora(self) -> str | None: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def lora_dropout(self) -> float: ...

    @property
    def lora_rank(self) -> int: ...

    @property
    def lora_type(self) -> str: ...

    @property
    def lycoris_config(self) -> Any: ...

    @property
    def max_train_steps(self) -> int: ...

    @property
    def mixed_precision(self) -> str: ...

    @property
    def model_fields_set(self) -> set[str]: ...

    @property
    def model_type(self) -> str: ...

    @property
    def use_ema(self) -> bool: ...

    @property
    def validation_guidance(self) -> float: ...

    @property
    def validation_num_inference_steps(self) -> int: ...

    def student_timesteps(self) -> tuple[float, ...]: ...


class DistillationOptions(Options):
    """Options of `distillation_config` that every method has, and the facts that the rest of the tool asks a method.

    A method's settings derive from this class; `config/methods/__init__.py` lists them by name.
    """

    title: ClassVar[str] = ""
    has_critic: ClassVar[bool] = False
    """A second network learns the score of the student's samples."""
    has_detail_expert: ClassVar[bool] = False
    """The student is two experts: "student" at high noise, "detail" below `boundary`."""
    student_routes: ClassVar[bool] = False
    """TREAD acts in the student's own loss (it always does in the critic's)."""

    real_score_guidance_scale: float = Field(
        3.0, ge=0, le=30, description="Guidance of the teacher, built into the student; 1 and 0 are off."
    )
    negative_prompt: str = Field(
        "", description="The teacher's unconditional prompt. Default: `validation_negative_prompt`."
    )
    num_training_frames: int = Field(
        21, ge=1, description="The most latent frames that a rollout has; 21 is 81 frames."
    )

    @classmethod
    def complete(cls, given: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        """Fills what follows from options outside `distillation_config`: `outside` holds those read so far."""
        if outside.get("validation_negative_prompt"):
            given.setdefault("negative_prompt", outside["validation_negative_prompt"])
        return given

    # --- facts ------------------------------------------------------------------------------------------------------

    def timesteps(self, shift: float) -> tuple[float, ...]:
        """The student's ladder on the shifted scale, 1000 = pure noise; empty for a student that samples as the
        teacher does. Raises ValueError if it cannot be walked."""
        raise NotImplementedError

    @property
    def ladder_key(self) -> str:
        """The option that describes the ladder, for a message about it."""
        return "student_steps" if getattr(self, "student_steps", None) is not None else "dmd_denoising_steps"

    def ladder_shift(self, shift: float) -> float:
        """The shift that the ladder was made with: `flow_schedule_shift`, unless the method has its own."""
        return shift

    @property
    def transition(self) -> str:
        """Between two rungs of the student's ladder: "sde" or "ode"."""
        return "sde"

    @property
    def has_discriminator(self) -> bool:
        """A head on features is trained as a role of its own."""
        return False

    def feature_blocks(self, depth: int) -> tuple[int, ...]:
        """Blocks (0-based) of a teacher of `depth` whose features that role judges."""
        return ()

    @property
    def blockwise(self) -> bool:
        """The student is causal: it makes a clip block by block."""
        return False

    @property
    def boundary(self) -> float:
        """The sigma from which on, upwards, the high-noise expert of a two-expert student works."""
        return 0.0

    @property
    def needs_latents(self) -> bool:
        """Whether a loss reads data latents, so that prompts alone are not enough."""
        return False

    @property
    def latents_are_for(self) -> tuple[str, str] | None:
        """(the option that asks for data latents, what to set to do without); None where the method itself does."""
        return None

    @property
    def student_interval(self) -> int:
        """The student is updated at every so many steps."""
        return 1

    @property
    def given_block_keys(self) -> list[str]:
        """Keys that rule block-wise students, given to a method whose student is none."""
        return []

    def depth_problems(self, depth: int, place: str) -> list[Problem]:
        """Blocks that a model of `depth` blocks does not have; `place` is where they were written."""
        return []

    def problems(self, config: RunOptions) -> list[Problem]:
        """Combinations that cannot work. `file` is left empty: the loader knows which file each key came from."""
        found = []
        try:
            config.student_timesteps()
        except ValueError as error:
            found.append(
                Problem(
                    "",
                    WHERE + self.ladder_key,
                    str(error),
                    'write the steps from noise to clean, for example "1000,757,522"',
                )
            )
        if config.lora_dropout:
            found.append(
                Problem("", "lora_dropout", f"found {config.lora_dropout:g}: dropout would make student and teacher "
                        "differ for reasons no loss can see", 'set "lora_dropout": 0')
            )  # fmt: skip
        return found

    def notices(self, config: RunOptions) -> list[str]:
        """What works, but not as a person might think. One sentence each."""
        found = []
        try:
            steps = len(config.student_timesteps())
        except ValueError:
            steps = 0  # reported as a problem already
        if steps and config.validation_num_inference_steps != steps:
            found.append(
                f"validation_num_inference_steps {config.validation_num_inference_steps}: the student is rendered with "
                f"the {steps} steps of its own ladder instead."
            )
        built_in = self.real_score_guidance_scale not in (0.0, 1.0)
        if steps and built_in and config.validation_guidance not in (0.0, 1.0):
            found.append(
                f"validation_guidance {config.validation_guidance:g} doubles the student's cost and saturates: the "
                f"teacher's guidance {self.real_score_guidance_scale:g} is built into a distilled student; 1 is usual."
            )
        return found


def steps_list(value: Any) -> list[float] | None:
    """Timesteps as people write them; None stays None."""
    if value is None:
        return None
    steps: list[float] = numbers(value)
    if len(steps) > 1 and steps[-1] == 0:
        steps = steps[:-1]  # SimpleTuner's files may end with the 0 that sampling always ends with
    return steps


class LadderOptions(DistillationOptions):
    """The student's few steps, written out or counted."""

    dmd_denoising_steps: Annotated[tuple[float, ...], BeforeValidator(steps_list)] = Field(
        (1000.0, 757.0, 522.0),
        description="The student's steps, as timesteps on the shifted scale, used literally.",
    )
    student_steps: int | None = Field(
        None, ge=1, le=100,
        description="Number of student steps, evenly spaced and warped by `flow_schedule_shift`, "
        "instead of a list in `dmd_denoising_steps`.",
    )  # fmt: skip
    warp_denoising_steps: bool = Field(
        False, description="`dmd_denoising_steps` is on the unshifted scale: warp it by `flow_schedule_shift`."
    )
    renoise: Literal["sde", "ode"] = Field(
        "sde", description="Between two student steps: fresh noise (`sde`) or the straight line on (`ode`)."
    )

    def timesteps(self, shift: float) -> tuple[float, ...]:
        if self.student_steps is not None:
            steps = uniform_timesteps(self.student_steps, shift)
        elif self.warp_denoising_steps:
            steps = tuple(warp(step / TIMESTEPS, shift) for step in self.dmd_denoising_steps)
        else:
            steps = tuple(self.dmd_denoising_steps)
        mistake = ladder_mistake(steps)
        if mistake:
            raise ValueError(f"the ladder {', '.join(f'{step:g}' for step in steps)} {mistake}")
        return steps

    @property
    def transition(self) -> str:
        return self.renoise

    def problems(self, config: RunOptions) -> list[Problem]:
        found = super().problems(config)
        if self.student_steps is not None and self.model_fields_set & {"dmd_denoising_steps", "warp_denoising_steps"}:
            found.append(
                Problem("", WHERE + "student_steps", "student_steps and dmd_denoising_steps both describe the ladder",
                        "remove one of them")
            )  # fmt: skip
        return found
