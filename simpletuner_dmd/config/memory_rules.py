"""What the options of memory say about each other and about the rest of a configuration."""

from __future__ import annotations

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.schema import TrainConfig

ON_DEVICE = 2
"""Swapped blocks that are on the device at a time: the one that works, and the next one."""


def base_carries_adapters(config: TrainConfig) -> bool:
    """Whether a role that moves is an adapter on the frozen base."""
    settings = config.distillation_config
    return (
        config.model_type == "lora"
        or (config.critic is not None and config.critic.fake_score_type == "lora")
        or (settings is not None and settings.has_detail_expert)
    )


def offloads_teacher(config: TrainConfig) -> bool:
    """Whether the base is a bare teacher, on the host but for the layer that works."""
    settings = config.distillation_config
    no_gradient_passes = not base_carries_adapters(config) and not (settings is not None and settings.has_discriminator)
    plain = config.base_model_precision == "no_change" and not config.blocks_to_swap
    return config.enable_group_offload and no_gradient_passes and plain


def memory_problems(config: TrainConfig) -> list[Problem]:
    """Combinations that cannot work."""
    found = []
    settings = config.distillation_config
    if config.blocks_to_swap and config.compile:
        found.append(
            Problem("", "blocks_to_swap", "found beside compile: a block whose weights come and go is no fixed graph",
                    'set "compile": false, or "blocks_to_swap": 0')
        )  # fmt: skip
    if config.blocks_to_swap and not config.gradient_checkpointing and base_carries_adapters(config):
        found.append(
            Problem("", "blocks_to_swap", "found without gradient_checkpointing: the weights of every swapped block "
                    "would stay on the device until the backward pass", 'set "gradient_checkpointing": true')
        )  # fmt: skip
    if config.blocks_to_swap and config.base_model_precision.endswith("-bnb"):
        found.append(
            Problem("", "blocks_to_swap", f"found beside base_model_precision {config.base_model_precision}: weights "
                    "of bitsandbytes cannot be taken to the host and back", "use int8-quanto or int8-torchao")
        )  # fmt: skip
    if config.compile and settings is not None and settings.blockwise:
        found.append(
            Problem("", "compile", f"found with {config.distillation_method}: a student that works block of frames by "
                    "block of frames has another shape in each", 'set "compile": false')
        )  # fmt: skip
    return found


def depth_problems(config: TrainConfig, depth: int) -> list[Problem]:
    """More blocks to swap than a transformer of `depth` blocks has."""
    if config.blocks_to_swap <= depth:
        return []
    message = f"found {config.blocks_to_swap}, but this model has {depth} blocks"
    return [Problem("", "blocks_to_swap", message, f"use {depth} at most")]


def memory_notices(config: TrainConfig) -> list[str]:
    """What works, but not as a person might think."""
    given, found = config.model_fields_set, []
    idle = sorted({"gradient_checkpointing_interval", "gradient_checkpointing_backend"} & given)
    if idle and not config.gradient_checkpointing:
        found.append(f"{', '.join(idle)}: no effect without gradient_checkpointing.")
    if 0 < config.blocks_to_swap <= ON_DEVICE:
        found.append(
            f"blocks_to_swap {config.blocks_to_swap} saves nothing: {ON_DEVICE} swapped blocks are on the device at a "
            "time."
        )
    if config.enable_group_offload and not offloads_teacher(config):
        found.append(
            "enable_group_offload acts on the text encoder and the VAE; the base stays on the device, because "
            "gradients pass through it or it is quantised or swapped. blocks_to_swap moves parts of it."
        )
    if config.enable_group_offload and config.text_encoder_1_precision != "no_change":
        found.append(
            f"enable_group_offload leaves the text encoder on the device: it is {config.text_encoder_1_precision}."
        )
    if config.attention_mechanism.startswith("sage"):
        found.append(
            f"attention_mechanism {config.attention_mechanism} has no backward pass: it serves training passes without "
            "gradients, PyTorch's attention the others and the videos."
        )
    return found
