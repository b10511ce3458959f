"""Options of what moves the weights: the optimizer, its own settings, clipping."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import NONE_WORDS, Options, to_meaning
from simpletuner_dmd.config.errors import Problem

OptimizerName = Literal[
    "adamw_bf16", "torch-adamw", "torch-muon",
    "optimi-adamw", "optimi-lion", "optimi-stableadamw", "optimi-adan", "optimi-ranger",
    "bnb-adamw", "bnb-adamw8bit", "bnb-adamw-paged", "bnb-adamw8bit-paged",
    "bnb-lion", "bnb-lion8bit", "bnb-lion-paged", "bnb-lion8bit-paged",
    "ao-adamw8bit", "ao-adamw4bit", "prodigy", "adafactor",
]  # fmt: skip

_MUON: dict[str, type] = {"momentum": float, "nesterov": bool, "ns_steps": int}
_PRODIGY: dict[str, type] = {
    "d0": float, "d_coef": float, "growth_rate": float, "beta3": float, "slice_p": int,
    "use_bias_correction": bool, "safeguard_warmup": bool,
}  # fmt: skip
_ADAFACTOR: dict[str, type] = {"beta1": float, "clip_threshold": float, "decay_rate": float, "scale_parameter": bool}

SETTINGS: dict[str, dict[str, type]] = {
    "torch-adamw": {"amsgrad": bool},
    "torch-muon": _MUON,
    "optimi-ranger": {"k": int, "alpha": float},
    "bnb-adamw8bit": {"min_8bit_size": int},
    "bnb-adamw8bit-paged": {"min_8bit_size": int},
    "bnb-lion8bit": {"min_8bit_size": int},
    "bnb-lion8bit-paged": {"min_8bit_size": int},
    "ao-adamw8bit": {"block_size": int},
    "ao-adamw4bit": {"block_size": int},
    "prodigy": _PRODIGY,
    "adafactor": _ADAFACTOR,
}
"""What `optimizer_config` may set: the arguments of the library that no option of ours stands for."""

WITHOUT_MOMENTS = ("adafactor",)
WITHOUT_EPSILON = ("adafactor", "optimi-lion", "bnb-lion", "bnb-lion8bit", "bnb-lion-paged", "bnb-lion8bit-paged")


def _settings(value: Any) -> Any:
    """ "momentum=0.9,nesterov=false" or an object -> a dictionary of plain values."""
    if isinstance(value, str) and value.strip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError("is not a valid JSON object") from error
    if isinstance(value, str):
        pairs = [part.split("=", 1) for part in value.split(",") if part.strip()]
        if any(len(pair) != 2 or not pair[0].strip() for pair in pairs):
            raise ValueError('must be pairs of name and value, for example "d_coef=0.5,safeguard_warmup=true"')
        value = {name.strip(): text.strip() for name, text in pairs}
    return value or {}


class OptimizerOptions(Options):
    """How gradients become steps."""

    optimizer: OptimizerName = Field(
        "adamw_bf16",
        description="`adamw_bf16`: AdamW that keeps the small steps bf16 weights would lose. `torch-adamw`: PyTorch's. "
        "`torch-muon`: PyTorch's Muon for the matrices of the blocks, AdamW for the rest. `optimi-*`: of torch-optimi. "
        "`bnb-*`: of bitsandbytes, with 8-bit state or state that may leave the GPU (`-paged`). `ao-*`: of torchao, "
        "with 8- or 4-bit state. `prodigy`: finds its own learning rate, of which `learning_rate` is a factor (1 is "
        "usual). `adafactor`: of transformers, hardly any state.",
    )
    optimizer_config: Annotated[dict[str, bool | int | float | str], BeforeValidator(_settings)] = Field(
        default_factory=dict,
        description="Settings of the optimizer that have no option of their own, as `name=value,name=value`. "
        "documentation/MEMORY.md lists them. The critic's optimizer gets them too.",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_weight_decay: float = Field(0.01, ge=0, le=1, description="Decoupled weight decay of the student.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the denominator of the update.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clipping threshold of the student's gradient; 0 is off.")
    grad_clip_method: Literal["value", "norm"] = Field(
        "norm",
        description="`norm` scales the whole gradient down to `max_grad_norm`; `value` clips every element to it.",
    )

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """`optimizer_config`, each value as its setting's type; checked by `optimizer_problems`."""
        kinds = SETTINGS.get(self.optimizer, {})
        return {name: kinds[name](_typed(value, kinds[name])) for name, value in self.optimizer_config.items()}


def _typed(value: Any, kind: type) -> Any:
    """The value as `kind`; ValueError where it is none."""
    if isinstance(value, str) and value.lower() in NONE_WORDS:
        raise ValueError
    meant = to_meaning(value, kind)
    if kind is bool:
        if not isinstance(meant, bool):
            raise ValueError
        return meant
    if isinstance(meant, bool) or kind(float(meant)) != float(meant):
        raise ValueError
    return kind(float(meant))


def optimizer_problems(options: OptimizerOptions) -> list[Problem]:
    """Settings that the chosen optimizer does not have, or that are not of their kind."""
    allowed, found = SETTINGS.get(options.optimizer, {}), []
    listed = ", ".join(sorted(allowed)) or "nothing"
    for name, value in options.optimizer_config.items():
        if name not in allowed:
            ours = {"lr": "learning_rate", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}
            ours |= {"weight_decay": "adam_weight_decay"}
            fix = f"use {ours[name]}" if name in ours else f"it takes {listed}"
            found.append(Problem("", "optimizer_config", f"{options.optimizer} has no setting {name!r}", fix))
            continue
        try:
            _typed(value, allowed[name])
        except ValueError:
            kind = {bool: "true or false", int: "a whole number", float: "a number"}[allowed[name]]
            found.append(Problem("", "optimizer_config", f"{name} is {value!r}", f"write {kind}"))
    return found


def optimizer_notices(options: OptimizerOptions, learning_rate: float) -> list[str]:
    """What an optimizer does not take from the options that are given, and a rate that it hardly moves at."""
    given, name = options.model_fields_set, options.optimizer
    idle = {"adam_beta1", "adam_beta2"} & given if name in WITHOUT_MOMENTS else set()
    idle |= {"adam_epsilon"} & given if name in WITHOUT_EPSILON else set()
    found = [f"{', '.join(sorted(idle))}: no effect, {name} has no such number."] if idle else []
    if name == "prodigy" and learning_rate < 0.1:
        found.append(
            f"optimizer prodigy finds its own rate and multiplies it by learning_rate; {learning_rate:g} will hardly "
            "move anything, 1 is usual."
        )
    return found
