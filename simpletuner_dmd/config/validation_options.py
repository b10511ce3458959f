"""Options of how a run is judged: what is rendered while training, what is measured, and when a light turns red."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import Options, frame_counts, frame_sizes, whole_numbers
from simpletuner_dmd.config.health import Band, read_bands
from simpletuner_dmd.config.run_options import DEFAULT_FRAMES, native_size

NoiseScheduler = Literal["unipc", "euler", "euler-beta", "few-step"]


class ValidationOptions(Options):
    """What is rendered while training, when, and what it is compared with."""

    validation_prompt: str | None = Field(None, description="A prompt to render at every validation.")
    validation_prompt_library: str | bool = Field(
        False,
        description="More prompts to render: a JSON file of `{short name: prompt}`, or a built-in set: `general` (also "
        "`true`) or `motion`, six prompts that need movement.",
    )
    validation_negative_prompt: str = Field(
        "", description="The negative prompt wherever guidance is on; also the teacher's, unless it has its own."
    )
    validation_guidance: float = Field(
        default_factory=lambda data: 1.0 if data.get("distillation_method") else 5.0,
        ge=0, le=30,
        description="Guidance scale of the validation videos; 1 and 0 are off. A distilled student has the teacher's "
        "guidance built in. Default: 1 for distillation, 5 for fine-tuning.",
    )  # fmt: skip
    validation_num_video_frames: Annotated[list[int], BeforeValidator(frame_counts)] = Field(
        [DEFAULT_FRAMES],
        description="Frames of the validation videos, a number or a list; rounded down to 4n+1. Every prompt is "
        "rendered at every size in every length.",
    )
    validation_resolution: Annotated[list[tuple[int, int]], BeforeValidator(frame_sizes)] = Field(
        default_factory=lambda data: frame_sizes(native_size(data.get("model_flavour", ""))),
        description='Size of the validation videos, "832x480", or a list. Default: the flavour\'s native size.',
    )
    validation_seed: int = Field(42, ge=0, description="Seed of the validation videos: the same noise every time.")
    validation_step_interval: int = Field(100, ge=1, description="A validation every so many steps.")
    validation_on_startup: bool = Field(False, description="Also renders before the first step.")
    validation_disable: bool = Field(False, description="Renders nothing, neither while training nor at the end.")
    num_validation_images: int = Field(
        1, ge=1, le=16, description="Videos per prompt, size and length: seeds count up from `validation_seed`."
    )
    validation_noise_scheduler: NoiseScheduler = Field(
        default_factory=lambda data: _sampler_of(data.get("distillation_method")),
        description="How validation videos are sampled. `few-step`: the ladder and the re-noising that the student is "
        "trained for. `unipc`, `euler`, `euler-beta`: diffusers' solvers, for a student without a ladder. "
        "Default: `few-step` for distillation, `unipc` for fine-tuning, `euler` for `diffusion_forcing`.",
    )
    validation_guidance_skip_layers: Annotated[list[int], BeforeValidator(whole_numbers)] = Field(
        default_factory=list,
        description="Skip-layer guidance: blocks (counted from 0, negative from the end) that a third pass leaves out; "
        "the video is pushed away from what comes out of it. Empty is off. Acts in fine-tuning, not on a ladder.",
    )
    validation_guidance_skip_layers_start: float = Field(
        0.01, ge=0, le=1, description="Share of the steps after which skip-layer guidance begins."
    )
    validation_guidance_skip_layers_stop: float = Field(
        0.2, ge=0, le=1, description="Share of the steps after which skip-layer guidance ends."
    )
    validation_guidance_skip_scale: float = Field(2.8, ge=0, le=30, description="Strength of skip-layer guidance.")
    validation_guidance_rescale: float = Field(
        0.0, ge=0, le=1,
        description="Takes guided predictions back towards the spread of the unguided ones, against over-exposure "
        "(arXiv 2305.08891, section 3.4); 0 is off, 1 all the way. Acts where a solver samples, not on a ladder.",
    )  # fmt: skip
    disable_benchmark: bool = Field(
        False,
        description="Skips the one-time reference videos: the teacher at its own steps and guidance, "
        "and the undistilled model at the student's steps.",
    )
    benchmark_num_inference_steps: int = Field(50, ge=1, le=1000, description="Steps of the teacher's reference video.")


class EvaluationOptions(Options):
    """The stable evaluation loss: held-out videos at fixed noise, so that two steps can be compared."""

    eval_dataset_id: str | None = Field(
        None, description="The dataset (its `id`) that is kept out of training for the evaluation loss."
    )
    eval_steps_interval: int | None = Field(
        None, ge=1, description="The evaluation loss every so many steps. Default: at every validation."
    )
    num_eval_images: int = Field(4, ge=1, le=1024, description="Held-out videos that the evaluation loss takes.")
    eval_timesteps: int = Field(
        28, ge=4, le=1000,
        description="Noise levels per video of the evaluation loss: evenly spread quantiles under the run's shift, "
        "reported in four bins.",
    )  # fmt: skip
    evaluation_type: Literal["none", "clip"] = Field(
        "none",
        description="`clip` is answered with a warning: CLIP's score looks at single pictures and needs a download; "
        "the measures against the teacher take its place.",
    )


class HealthOptions(Options):
    """Traffic lights, and what a red one does."""

    health_bands: Annotated[dict[str, Band], BeforeValidator(read_bands)] = Field(
        default_factory=dict,
        validate_default=True,
        description="Bands of the lights: `{light: [red below, yellow below, yellow above, red above]}`, `null` for "
        "no bound. Lights that are left out keep their own; documentation/VALIDATION.md lists them.",
    )
    health_on_red: Literal["continue", "stop"] = Field(
        "continue",
        description="`stop` saves and ends the run when a light turns red, exit code 3; the same command with "
        "`continue` goes on.",
    )
    health_grace_steps: int | None = Field(
        None, ge=0, description="Steps before which no light is judged. Default: a tenth of the run."
    )


def _sampler_of(method: str | None) -> NoiseScheduler:
    if method is None:
        return "unipc"
    return "euler" if method == "diffusion_forcing" else "few-step"
