"""What options say about each other: combinations that cannot work, and those a person should know about."""

from __future__ import annotations

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.lycoris import NOT_FOR_COMFYUI, lycoris_problems
from simpletuner_dmd.config.run_options import DEFAULT_MULTIPLE, SIZE_MULTIPLE
from simpletuner_dmd.config.schema import TrainConfig

SMALL_BATCH = 16
QUANTISED_4_BIT = ("int4-quanto",)


def cross_problems(config: TrainConfig) -> list[Problem]:
    """Combinations that cannot work. `file` is left empty: the loader knows which file each key came from."""
    problems = _length_problems(config) + _size_problems(config)
    if config.model_type == "full" and config.mixed_precision == "fp16":
        problems.append(
            Problem("", "mixed_precision", "fp16 has too few exponents for training every weight of Wan",
                    'set "mixed_precision": "bf16", or train a LoRA ("model_type": "lora")')
        )  # fmt: skip
    if config.lr_end > config.learning_rate:
        problems.append(
            Problem("", "lr_end", f"found {config.lr_end:g}, which is above learning_rate {config.learning_rate:g}",
                    "lower lr_end, or leave it out")
        )  # fmt: skip
    problems += _adapter_problems(config)
    return problems + (_dmd_problems(config) if config.distillation_config is not None else [])


def _adapter_problems(config: TrainConfig) -> list[Problem]:
    if config.model_type == "full":
        return []
    problems = []
    if config.lora_type == "lycoris":
        assert config.lycoris_config is not None, "filled in by default"
        problems += lycoris_problems(config.lycoris_config, config.base_model_precision)
        if config.use_dora:
            problems.append(
                Problem("", "use_dora", "found true beside lora_type lycoris: DoRA is made of a standard LoRA here",
                        'set "lora_type": "standard", or "use_dora": false')
            )  # fmt: skip
    elif config.init_lokr_norm is not None:
        problems.append(
            Problem("", "init_lokr_norm", f"found {config.init_lokr_norm:g}, but lora_type is standard: there is no "
                    "LoKr to start", 'set "lora_type": "lycoris", or leave it out')
        )  # fmt: skip
    if config.init_lokr_norm is not None and config.init_lora is not None:
        problems.append(
            Problem("", "init_lokr_norm", "init_lora says where the student starts", "leave one of them out")
        )
    if config.use_dora and config.base_model_precision != "no_change":
        problems.append(
            Problem("", "use_dora", f"found true beside base_model_precision {config.base_model_precision}: DoRA "
                    "measures the base's own weights, which are not there once they are quantised",
                    'set "base_model_precision": "no_change", or "use_dora": false')
        )  # fmt: skip
    if config.use_dora and config.lora_format == "comfyui":
        problems.append(
            Problem("", "lora_format", "found comfyui, but a DoRA is exported for diffusers only",
                    'set "lora_format": "diffusers"')
        )  # fmt: skip
    return problems


def _length_problems(config: TrainConfig) -> list[Problem]:
    if config.max_train_steps == 0 and config.num_train_epochs == 0:
        return [
            Problem("", "max_train_steps",
                    "max_train_steps and num_train_epochs are both 0: the run would have no length",
                    "set one of them, for example \"max_train_steps\": 4000")
        ]  # fmt: skip
    if config.max_train_steps and config.num_train_epochs and not config.strict_epoch_limit:
        return [
            Problem("", "num_train_epochs",
                    f"found {config.num_train_epochs} beside max_train_steps {config.max_train_steps}: "
                    "one of the two sets the length, the other must be 0",
                    "set one of them to 0, or \"strict_epoch_limit\": true to stop at whichever comes first")
        ]  # fmt: skip
    return []


def _size_problems(config: TrainConfig) -> list[Problem]:
    if config.validation_disable:
        return []
    multiple = SIZE_MULTIPLE.get(config.model_flavour, DEFAULT_MULTIPLE)
    problems = []
    for size in config.validation_resolution:
        if any(side % multiple for side in size):
            width, height = (max(1, round(side / multiple)) * multiple for side in size)
            problems.append(
                Problem("", "validation_resolution", f"{size[0]}x{size[1]} cannot be made: "
                        f"this model's sizes are multiples of {multiple}", f"write {width}x{height}")
            )  # fmt: skip
    return problems


def _dmd_problems(config: TrainConfig) -> list[Problem]:
    dmd, problems = config.dmd, []
    where = "distillation_config."
    given = dmd.model_fields_set
    try:
        config.student_timesteps()
    except ValueError as error:
        key = "student_steps" if dmd.student_steps is not None else "dmd_denoising_steps"
        problems.append(
            Problem("", where + key, str(error), 'write the steps from noise to clean, for example "1000,757,522"')
        )
    if dmd.student_steps is not None and given & {"dmd_denoising_steps", "warp_denoising_steps"}:
        problems.append(
            Problem("", where + "student_steps", "student_steps and dmd_denoising_steps both describe the ladder",
                    "remove one of them")
        )  # fmt: skip
    if dmd.fake_score_type == "full" and config.base_model_precision != "no_change":
        problems.append(
            Problem("", where + "fake_score_type",
                    f"a full critic cannot stand beside a base in {config.base_model_precision}: "
                    "its score would differ from the teacher's by the quantisation error",
                    'set "fake_score_type": "lora", or "base_model_precision": "no_change"')
        )  # fmt: skip
    if not dmd.min_timestep_ratio < dmd.max_timestep_ratio:
        problems.append(
            Problem("", where + "min_timestep_ratio",
                    f"found {dmd.min_timestep_ratio:g}, not below max_timestep_ratio {dmd.max_timestep_ratio:g}",
                    "the defaults are 0.02 and 0.98")
        )  # fmt: skip
    elif not dmd.ts_schedule and dmd.min_score_timestep / 1000 >= dmd.max_timestep_ratio:
        problems.append(
            Problem("", where + "min_score_timestep",
                    f"found {dmd.min_score_timestep:g}, not below max_timestep_ratio {dmd.max_timestep_ratio:g} x 1000"
                    ": no noise level is left",
                    "lower it, for example to 0")
        )  # fmt: skip
    if config.lora_dropout:
        problems.append(
            Problem("", "lora_dropout", f"found {config.lora_dropout:g}: dropout would make student and teacher differ "
                    "for reasons the critic cannot see", 'set "lora_dropout": 0')
        )  # fmt: skip
    if config.max_train_steps and dmd.critic_warmup_steps >= config.max_train_steps:
        problems.append(
            Problem("", where + "critic_warmup_steps",
                    f"found {dmd.critic_warmup_steps}, but the run has {config.max_train_steps} steps: "
                    "the student would never be updated", "set it below max_train_steps")
        )  # fmt: skip
    return problems


def combination_notices(config: TrainConfig) -> list[str]:
    """What works, but not as a person might think. One sentence each."""
    found: list[str] = []
    if config.max_train_steps and config.lr_warmup_steps >= config.max_train_steps:
        found.append(
            f"lr_warmup_steps {config.lr_warmup_steps} is as long as the run ({config.max_train_steps} steps): "
            "the learning rate rises to the end and never reaches a plateau or a decay."
        )
    if config.strict_epoch_limit and not config.num_train_epochs:
        found.append("strict_epoch_limit has no effect: num_train_epochs is 0.")
    for key, precision in (
        ("base_model_precision", config.base_model_precision),
        ("text_encoder_1_precision", config.text_encoder_1_precision),
    ):
        if precision in QUANTISED_4_BIT:
            found.append(f"{key} {precision}: Wan loses visibly at 4 bits; int8-quanto is nearly free.")
    found += _adapter_notices(config)
    if config.use_ema and config.ema_validation == "none":
        found.append("ema_validation none: validation renders the trained weights; the export carries the average.")
    if config.push_checkpoints_to_hub and not config.push_to_hub:
        found.append("push_checkpoints_to_hub has no effect: push_to_hub is false.")
    if config.distillation_config is not None:
        found += _dmd_notices(config)
    return found


def _adapter_notices(config: TrainConfig) -> list[str]:
    given = config.model_fields_set
    if config.model_type == "full":
        idle = sorted({"use_dora", "lycoris_config", "init_lokr_norm", "init_lora"} & given)
        return [f"{', '.join(idle)}: no effect, model_type is full and has no adapter."] if idle else []
    if config.lora_type == "lycoris":
        idle = sorted({"lora_rank", "lora_alpha", "lora_init_type", "lora_dropout", "peft_lora_target_modules"} & given)
        found = [f"{', '.join(idle)}: no effect, lora_type is lycoris; see lycoris_config."] if idle else []
        assert config.lycoris_config is not None, "filled in by default"
        if (unread := sorted(config.lycoris_config.algos & set(NOT_FOR_COMFYUI))) and config.lora_format != "diffusers":
            found.append(f"{', '.join(unread)}: no ComfyUI file is written, only lycoris' own.")
        return found
    if config.use_dora and config.lora_format == "both":
        return ["use_dora: no ComfyUI file is written, a DoRA is exported for diffusers only."]
    return []


def _dmd_notices(config: TrainConfig) -> list[str]:
    dmd, found = config.dmd, []
    if dmd.given_block_keys:
        found.append(
            f"{', '.join(dmd.given_block_keys)}: no effect here. They rule block-wise (causal) students; "
            "this student makes the whole clip at once, with one exit step."
        )
    if config.caption_dropout_probability:
        found.append(
            f"caption_dropout_probability {config.caption_dropout_probability:g} acts on the critic's turn only: "
            "the student's turn never drops a caption."
        )
    try:
        steps = len(config.student_timesteps())
    except ValueError:
        steps = config.validation_num_inference_steps  # reported as a problem already
    if config.validation_num_inference_steps != steps:
        found.append(
            f"validation_num_inference_steps {config.validation_num_inference_steps}: the student is rendered with the "
            f"{steps} steps of its own ladder instead."
        )
    if config.validation_guidance not in (0.0, 1.0):
        found.append(
            f"validation_guidance {config.validation_guidance:g} doubles the student's cost and saturates: the "
            f"teacher's guidance {dmd.real_score_guidance_scale:g} is built into a distilled student; 1 is usual."
        )
    if config.global_batch_size < SMALL_BATCH:
        found.append(
            f"{config.global_batch_size} samples per step is little for DMD, which is steadier with 16 to 64: raise "
            "train_batch_size or gradient_accumulation_steps."
        )
    if dmd.ts_schedule and dmd.min_score_timestep:
        found.append("min_score_timestep has no effect: ts_schedule sets the lower end of the noise levels.")
    rank = config.lycoris_config.linear_dim if config.lycoris_config is not None else config.lora_rank
    if dmd.fake_score_type == "lora" and config.model_type == "lora" and dmd.fake_score_lora_rank < min(rank, 4096):
        found.append(
            f"the critic's rank {dmd.fake_score_lora_rank} is below the student's {rank}: "
            "the critic may not be able to follow the student."
        )
    return found
