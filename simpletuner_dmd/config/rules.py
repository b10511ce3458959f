"""What options say about each other: combinations that cannot work, and those a person should know about."""

from __future__ import annotations

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.run_options import DEFAULT_MULTIPLE, SIZE_MULTIPLE
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.tread import tread_notices

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
    return problems + (config.distillation.problems(config) if config.distillation_config is not None else [])


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
    if config.use_ema and config.ema_validation == "none":
        found.append("ema_validation none: validation renders the trained weights; the export carries the average.")
    if config.push_checkpoints_to_hub and not config.push_to_hub:
        found.append("push_checkpoints_to_hub has no effect: push_to_hub is false.")
    found += tread_notices(config.tread_config, config.distillation_config)
    if config.distillation_config is not None:
        found += config.distillation.notices(config)
    return found
