"""What options say about each other: combinations that cannot work, and those a person should know about."""

from __future__ import annotations

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.flavour_rules import flavour_notices, flavour_problems
from simpletuner_dmd.config.lycoris import NOT_FOR_COMFYUI, lycoris_problems
from simpletuner_dmd.config.memory_rules import memory_notices, memory_problems
from simpletuner_dmd.config.optimizer_options import optimizer_notices, optimizer_problems
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.tread import tread_notices

BELOW_8_BITS = ("int4-quanto", "int2-quanto", "nf4-bnb")


def cross_problems(config: TrainConfig) -> list[Problem]:
    """Combinations that cannot work. `file` is left empty: the loader knows which file each key came from."""
    problems = _length_problems(config) + _size_problems(config) + _noise_problems(config)
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
    problems += _adapter_problems(config) + flavour_problems(config)
    problems += optimizer_problems(config) + memory_problems(config)
    problems += _sampler_problems(config)
    return problems + (config.distillation.problems(config) if config.distillation_config is not None else [])


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
    multiple = config.flavour.size_multiple
    problems = []
    for size in config.validation_resolution:
        if any(side % multiple for side in size):
            width, height = (max(1, round(side / multiple)) * multiple for side in size)
            problems.append(
                Problem("", "validation_resolution", f"{size[0]}x{size[1]} cannot be made: "
                        f"this model's sizes are multiples of {multiple}", f"write {width}x{height}")
            )  # fmt: skip
    return problems


def _sampler_problems(config: TrainConfig) -> list[Problem]:
    key, found = "validation_noise_scheduler", config.validation_noise_scheduler
    settings = config.distillation_config
    by_blocks = settings is not None and settings.blockwise
    problems = []
    if found == "few-step" and (settings is None or config.distillation_method == "diffusion_forcing"):
        problems.append(Problem("", key, "found few-step, but this training makes no few-step ladder",
                                "use unipc, euler or euler-beta" if not by_blocks else "leave it out"))  # fmt: skip
    elif by_blocks and found != ("euler" if config.distillation_method == "diffusion_forcing" else "few-step"):
        problems.append(Problem("", key, f"found {found}, but this student works block by block, and no stock solver "
                                "does", "leave it out"))  # fmt: skip
    if config.validation_guidance_skip_layers_start >= config.validation_guidance_skip_layers_stop:
        start, stop = config.validation_guidance_skip_layers_start, config.validation_guidance_skip_layers_stop
        problems.append(
            Problem("", "validation_guidance_skip_layers_stop", f"found {stop:g}, which is not after the start "
                    f"{start:g}", "raise it; 0 to 1 is every step")
        )  # fmt: skip
    return problems


def _validation_notices(config: TrainConfig) -> list[str]:
    found, settings = [], config.distillation_config
    if settings is not None and not config.validation_disable:
        if config.validation_noise_scheduler != "few-step" and not settings.blockwise:
            found.append(
                f"validation_noise_scheduler {config.validation_noise_scheduler}: the student is trained for its "
                "ladder; by another solver its videos look worse than what is exported."
            )
        if config.validation_guidance_skip_layers:
            found.append("validation_guidance_skip_layers: no effect, a distilled student has its guidance built in.")
        if config.validation_guidance_rescale and config.validation_noise_scheduler == "few-step":
            found.append("validation_guidance_rescale: no effect, the ladder is walked without guidance.")
    if config.evaluation_type == "clip":
        found.append(
            "evaluation_type clip: not for video, it scores single pictures and needs a download. The measures "
            "against the teacher's videos and eval_dataset_id's loss take its place."
        )
    if config.eval_steps_interval and not config.eval_dataset_id:
        found.append("eval_steps_interval has no effect: no eval_dataset_id names what is held out.")
    if config.health_on_red == "stop" and (config.validation_disable or config.disable_benchmark):
        found.append("health_on_red stop: without validation and its reference videos most lights are never judged.")
    return found


DRAWS = ("flow_use_uniform_schedule", "flow_use_beta_schedule", "flow_custom_timesteps")
"""Each of them says alone where supervised noise levels are drawn; without any they are logit-normal."""


def _noise_problems(config: TrainConfig) -> list[Problem]:
    found = []
    chosen = [key for key in DRAWS if getattr(config, key)]
    if len(chosen) > 1:
        found.append(
            Problem("", chosen[-1], f"{' and '.join(chosen)} each say how noise levels are drawn", "keep one of them")
        )
    if config.flow_schedule_auto_shift and config.distillation_method:
        found.append(
            Problem("", "flow_schedule_auto_shift", "a few-step student has one ladder for every size, so its shift "
                    "cannot follow the size", "set it to false, and flow_schedule_shift to the shift you want")
        )  # fmt: skip
    elif config.flow_schedule_auto_shift and config.flow_schedule_shift is not None:
        found.append(
            Problem("", "flow_schedule_auto_shift",
                    f"found true beside flow_schedule_shift {config.flow_schedule_shift:g}: one shift follows the "
                    "size, the other is the same for all", "remove one of them")
        )  # fmt: skip
    return found


def _noise_notices(config: TrainConfig) -> list[str]:
    given = config.model_fields_set
    if config.distillation_method:
        named = [key for key in (*DRAWS, "flow_sigmoid_scale") if key in given and getattr(config, key)]
        return [f"{', '.join(named)}: no effect here; they rule fine-tuning, and {config.distillation_method} draws "
                "its own noise levels."] if named else []  # fmt: skip
    found = []
    chosen = next((key for key in DRAWS if getattr(config, key)), None)
    if chosen and "flow_sigmoid_scale" in given:
        found.append(f"flow_sigmoid_scale has no effect: {chosen} replaces the logit-normal draw.")
    parameters = [key for key in ("flow_beta_schedule_alpha", "flow_beta_schedule_beta") if key in given]
    if parameters and not config.flow_use_beta_schedule:
        found.append(f"{' and '.join(parameters)}: no effect without flow_use_beta_schedule.")
    if chosen == "flow_custom_timesteps" and config.flow_schedule_auto_shift:
        found.append("flow_schedule_auto_shift has no effect: flow_custom_timesteps are taken as they are.")
    if chosen == "flow_custom_timesteps" and config.flow_schedule_shift is not None:
        found.append("flow_schedule_shift acts on validation only: flow_custom_timesteps are taken as they are.")
    return found


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
        if precision in BELOW_8_BITS:
            found.append(f"{key} {precision}: Wan loses visibly below 8 bits; int8-quanto is nearly free.")
    found += _adapter_notices(config)
    if config.use_ema and config.ema_validation == "none":
        found.append("ema_validation none: validation renders the trained weights; the export carries the average.")
    if config.push_checkpoints_to_hub and not config.push_to_hub:
        found.append("push_checkpoints_to_hub has no effect: push_to_hub is false.")
    found += tread_notices(config.tread_config, config.distillation_config)
    found += _noise_notices(config) + flavour_notices(config)
    found += optimizer_notices(config, config.learning_rate) + memory_notices(config)
    found += _validation_notices(config)
    if config.distillation_config is not None:
        found += config.distillation.notices(config)
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
