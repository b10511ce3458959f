"""Options of the training itself: length, rate, optimizer, precision, adapters, EMA, noise schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import Options, numbers, words
from simpletuner_dmd.config.lycoris import LycorisOptions

DEFAULT_STEPS = 4000
DISTILLATION_SHIFT = 5.0

LrScheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts", "polynomial",
    "constant", "constant_with_warmup", "sine",
]  # fmt: skip
Precision = Literal[
    "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto",
    "int8-torchao", "fp8-torchao", "nf4-bnb", "int8-bnb",
]  # fmt: skip


def _scheduler_name(value: Any) -> Any:
    return "cosine" if value == "cosine_with_warmup" else value


def _timesteps(value: Any) -> Any:
    if value is None:
        return None
    steps = numbers(value)
    if not steps:
        raise ValueError("must name at least one timestep")
    if any(not 0 < step <= 1000 for step in steps):
        raise ValueError("must be timesteps above 0 and up to 1000; values up to 1 are sigmas")
    return steps


class LengthOptions(Options):
    """How long, how much at once, how fast."""

    num_train_epochs: int = Field(
        0, ge=0, description="Passes over the data. 0 where `max_train_steps` sets the length."
    )
    max_train_steps: int = Field(
        default_factory=lambda data: 0 if data["num_train_epochs"] else DEFAULT_STEPS,
        ge=0,
        description="Trainer steps. In distillation the critic moves at every step and the student at every "
        f"`generator_update_interval`-th. 0 where `num_train_epochs` sets the length. Default: {DEFAULT_STEPS}, "
        "or 0 if epochs are given.",
    )
    strict_epoch_limit: bool = Field(
        False, description="With both lengths given: stop at whichever of epochs and steps is reached first."
    )
    train_batch_size: int = Field(1, ge=1, description="Samples per process and micro-batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per step.")
    num_processes: int = Field(1, ge=1, description="Processes to train on, one per device.")
    learning_rate: float = Field(
        default_factory=lambda data: 2e-6 if data.get("model_type") == "full" else 2e-5,
        gt=0, le=1,
        description="Peak learning rate of the student. Default: 2e-5 for a LoRA, 2e-6 for a full model.",
    )  # fmt: skip
    lr_scheduler: Annotated[LrScheduler, BeforeValidator(_scheduler_name)] = Field(
        "constant_with_warmup",
        description="Course of the learning rate over the whole run, after the warm-up. "
        "It is stretched over the updates that the student really makes.",
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Trainer steps over which the rate rises from 0.")
    lr_num_cycles: int = Field(1, ge=1, description="Cycles of `cosine_with_restarts` and `sine`.")
    lr_power: float = Field(0.8, gt=0, description="Exponent of `polynomial`.")
    lr_end: float = Field(
        default_factory=lambda data: min(4e-7, 0.1 * data["learning_rate"]),
        ge=0, le=1,
        description="Where `cosine_with_min_lr`, `polynomial` and the other decays end. Default: 4e-7, and never more "
        "than a tenth of the learning rate.",
    )  # fmt: skip
    seed: int = Field(42, ge=0, lt=2**63, description="Every random draw of the run follows from it.")


class PrecisionOptions(Options):
    """Number formats and memory."""

    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "bf16", description="Format of the forward passes. What trains is kept in fp32; fp16 is for LoRA only."
    )
    base_model_precision: Precision = Field(
        "no_change",
        description="Storage format of the linear layers in the frozen base's blocks. It never touches a full student. "
        "`-quanto` is optimum-quanto; `-torchao` and `-bnb` (bitsandbytes) need the extra `quantisation`. Wan loses "
        "visibly at 4 bits; int8 is nearly free. The start of a run prints what it costs.",
    )
    text_encoder_1_precision: Precision = Field(
        "no_change", description="Storage format of the text encoder, which is needed only while caching prompts."
    )
    quantize_via: Literal["cpu", "accelerator"] = Field(
        "accelerator",
        description="Where weights are quantised, one block at a time: `accelerator` is faster, `cpu` leaves the "
        "accelerator alone until the base is whole.",
    )
    attention_mechanism: Literal[
        "diffusers", "native", "cudnn", "flash-attn-2", "flash-attn-3", "flex", "xformers", "sageattention",
        "sageattention-int8-fp16-triton", "sageattention-int8-fp16-cuda", "sageattention-int8-fp8-cuda",
    ] = Field(
        "diffusers",
        description="Attention kernel. `diffusers` and `native` are PyTorch's own and run everywhere; SageAttention "
        "has no backward pass and serves only those training passes in which no gradient flows. What cannot run on "
        "this machine gives way to PyTorch's own, with a notice.",
    )  # fmt: skip


class LoraOptions(Options):
    """The student's adapter."""

    lora_type: Literal["standard", "lycoris"] = Field(
        "standard",
        description="`standard` is a LoRA as PEFT makes it; `lycoris` is a network of the library of that name, which "
        "`lycoris_config` describes.",
    )
    lora_rank: int = Field(16, ge=1, le=4096, description="Rank of the student's LoRA. 64 to 128 suits distillation.")
    lora_alpha: float = Field(
        default_factory=lambda data: float(data["lora_rank"]),
        gt=0,
        description="The LoRA acts with strength alpha / rank. Default: the rank, strength 1.",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in the adapter. Must be 0 in distillation.")
    lora_init_type: Literal["default", "gaussian"] = Field(
        "default", description="How the adapter's first factor starts; the second starts at 0, so nothing changes yet."
    )
    peft_lora_target_modules: Annotated[list[str] | None, BeforeValidator(words)] = Field(
        None, description="Names of the layers that get an adapter. Default: attention and feed-forward of every block."
    )
    use_dora: bool = Field(
        False,
        description="Also trains the length of every row of the adapted weights (DoRA). For `lora_type` standard; "
        "exported for diffusers only.",
    )
    lycoris_config: LycorisOptions | None = Field(
        default_factory=lambda data: LycorisOptions() if data.get("lora_type") == "lycoris" else None,
        description="The LyCORIS network of student and critic: an object, or the path of a JSON file that holds one. "
        "Default: LoKr of rank 16 in attention and feed-forward of every block.",
    )
    init_lokr_norm: float | None = Field(
        None, gt=0, le=1,
        description="The student's LoKr starts as noise of this share of each weight's norm instead of at 0, so it "
        "does not start as the teacher. Needs `full_matrix` in `lycoris_config`.",
    )  # fmt: skip
    init_lora: str | None = Field(
        None,
        description="The student starts from this adapter: a .safetensors file, an export folder, or the output folder "
        "of a finished run.",
    )
    teacher_lora: str | None = Field(
        None,
        description="A LoRA or LyCORIS file (or folder, as in `init_lora`) that is merged into the base before "
        "anything else, so that teacher, critic and student all start from this fine-tune; `path:0.8` sets its "
        "strength.",
    )
    lora_format: Literal["diffusers", "comfyui", "both"] = Field(
        "both", description="Key names of the exported LoRA: for diffusers, for ComfyUI, or one file of each."
    )


class EmaOptions(Options):
    """The running average of what trains."""

    use_ema: bool = Field(False, description="Keeps a running average (fp32) of the student's trained weights.")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="Share of the old average that survives a student update.")
    ema_update_interval: int = Field(
        1, ge=1, description="Student updates between two updates of the average; the decay is adjusted to it."
    )
    ema_start_step: int = Field(
        0, ge=0, description="Student updates before averaging begins; until then the average is a copy."
    )
    ema_validation: Literal["none", "ema_only", "comparison"] = Field(
        "comparison", description="Weights that validation renders: the trained ones, the average, or both."
    )


class FlowOptions(Options):
    """Noise levels."""

    flow_schedule_shift: float | None = Field(
        default_factory=lambda data: DISTILLATION_SHIFT if data.get("distillation_method") else None,
        gt=0, le=100,
        description="Moves noise levels towards the noisy end: sigma = s u / (1 + (s - 1) u). "
        f"Default: {DISTILLATION_SHIFT:g} in distillation; unset in fine-tuning, which then draws logit-normal levels.",
    )  # fmt: skip
    flow_schedule_auto_shift: bool = Field(
        False,
        description="Fine-tuning: the shift follows the size of the video, as FLUX has it: exp(mu), mu from 0.5 at 256 "
        "tokens per frame to 1.15 at 4096. 832x480 gets 2.06, 1280x720 gets 2.90.",
    )
    flow_sigmoid_scale: float = Field(
        1.0, gt=0, le=10,
        description="Fine-tuning: spread of the logit-normal noise levels; more reaches further to both ends.",
    )  # fmt: skip
    flow_use_uniform_schedule: bool = Field(
        False, description="Fine-tuning: draws noise levels uniformly instead of logit-normal."
    )
    flow_use_beta_schedule: bool = Field(
        False, description="Fine-tuning: draws noise levels from a Beta distribution instead of logit-normal."
    )
    flow_beta_schedule_alpha: float = Field(
        2.0, ge=0.1, le=100, description="First parameter of `flow_use_beta_schedule`; more moves to the noisy end."
    )
    flow_beta_schedule_beta: float = Field(
        2.0, ge=0.1, le=100, description="Second parameter of `flow_use_beta_schedule`; more moves to the clean end."
    )
    flow_custom_timesteps: Annotated[tuple[float, ...] | None, BeforeValidator(_timesteps)] = Field(
        None,
        description="Fine-tuning: draws only these timesteps (0 to 1000; up to 1 they are sigmas), each as likely as "
        "the others, and no shift acts on them.",
    )
