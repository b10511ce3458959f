"""Whether a model folder is what `model_flavour` says: its configs against the published ones. Imports no torch.

A transformer that has the dimensions of another flavour, or takes other channels than it gives, is refused: training
would run and make nothing of use. One with dimensions that nobody published (a tiny Wan, a pruned one) is a custom Wan
and trains, as long as its own parts fit each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.wan.flavours import FLAVOURS, Flavour, published_config

CLASS = "WanTransformer3DModel"
DIMENSIONS = (
    "in_channels", "out_channels", "image_dim", "added_kv_proj_dim", "num_layers", "num_attention_heads",
    "attention_head_dim", "ffn_dim", "text_dim", "patch_size",
)  # fmt: skip
"""Keys of a transformer's config that tell the published models apart, the most telling first."""
MASK_CHANNELS = 4  # of a picture host's input: which frames are given, for each of the 4 frames in a latent one


@dataclass(frozen=True)
class ModelConfigs:
    """What a model says about itself. names: part -> the file to name in a message.

    index: model_index.json of the base, empty where there is none. text_encoder: empty where it is not looked at.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    names: Mapping[str, str]
    index: Mapping[str, Any]
    text_encoder: Mapping[str, Any]


def check_fit(flavour: Flavour, model: ModelConfigs) -> str | None:
    """A line for a custom Wan, None for the flavour itself. Raises UserError, naming file, key, found and expected."""
    _check_class(flavour, model)
    _check_channels(flavour, model)
    if not (custom := _differences(published_config(flavour, flavour.transformer), model.transformer)):
        _check_experts(flavour, model)
        _check_parts(model)
        return None
    others = [other for other in FLAVOURS.values()
              if not _differences(published_config(other, other.transformer), model.transformer)]  # fmt: skip
    if others:
        key = custom[0]
        raise _misfit(flavour, model, key, published_config(flavour, flavour.transformer)[key], others)
    _check_experts(flavour, model)
    _check_parts(model)
    shown = ", ".join(f"{key} {model.transformer[key]}" for key in custom[:3] if key in model.transformer)
    return (
        f"{model.names['transformer']}: a custom Wan ({shown}), none of the published models; it is treated as "
        f"{flavour.name}."
    )


def _differences(published: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The dimensions in which a config differs; what a file leaves out says nothing."""
    return [key for key in DIMENSIONS if key in found and _plain(found[key]) != _plain(published[key])]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _check_class(flavour: Flavour, model: ModelConfigs) -> None:
    named = model.transformer.get("_class_name", CLASS)
    if named != CLASS:
        raise _misfit(flavour, model, "_class_name", CLASS, [])


def _check_channels(flavour: Flavour, model: ModelConfigs) -> None:
    """A picture host takes the latents of a picture and a mask beside what it makes; all others take what they make."""
    config = model.transformer
    if "in_channels" not in config or "out_channels" not in config:
        return
    makes = config["out_channels"]
    expected = makes + (makes + MASK_CHANNELS if flavour.image_channels else 0)
    if config["in_channels"] != expected:
        fitting = [
            other
            for other in FLAVOURS.values()
            if published_config(other, other.transformer)["in_channels"] == config["in_channels"]
        ]
        exact = [other for other in fitting if not _differences(published_config(other, other.transformer), config)]
        raise _misfit(flavour, model, "in_channels", expected, exact or fitting)


def _check_experts(flavour: Flavour, model: ModelConfigs) -> None:
    """The 14B models of 2.1 and 2.2 have the same dimensions; the pipeline's index tells one network from two."""
    index = model.index
    if not index:
        return
    second = index.get("transformer_2")
    two = isinstance(second, list | tuple) and second[-1] is not None
    name = model.names["index"]
    if flavour.expert is None and two:
        pairs = [other for other in FLAVOURS.values() if other.expert]
        raise UserError(
            f"{name}: transformer_2 is there, so the model is two experts; {flavour.name} is one network",
            key="model_flavour",
            fix=f'set "model_flavour": {_choice(pairs)}',
        )
    if flavour.expert is not None and not two:
        raise UserError(
            f"{name}: transformer_2 is not there, so the model is one network; {flavour.name} is one of two experts",
            key="model_flavour",
            fix='set "model_flavour": "t2v-480p-14b-2.1", or name a model with both experts',
        )
    if flavour.boundary is not None and index.get("boundary_ratio") != flavour.boundary:
        raise UserError(
            f"{name}: found boundary_ratio {index.get('boundary_ratio')}, expected {flavour.boundary:g} for "
            f"{flavour.name}",
            key="pretrained_model_name_or_path",
            fix=f"name a model whose experts change at {flavour.boundary:g}",
        )


def _check_parts(model: ModelConfigs) -> None:
    """VAE and text encoder speak to this transformer."""
    makes, known = model.transformer.get("out_channels"), model.vae.get("z_dim")
    if None not in (makes, known) and known != makes:
        fitting = [other for other in FLAVOURS.values() if published_config(other, "vae")["z_dim"] == known]
        raise UserError(
            f"{model.names['vae']}: found z_dim {known}, expected {makes}, the channels of "
            f"{model.names['transformer']}" + (f"; it is the VAE of {_choice(fitting)}" if fitting else ""),
            key="pretrained_vae_model_name_or_path",
            fix="take the VAE of the model itself",
        )
    width, expected = model.text_encoder.get("d_model"), model.transformer.get("text_dim")
    if width is not None and expected is not None and width != expected:
        raise UserError(
            f"{model.names['text_encoder']}: found d_model {width}, expected {expected}, the text_dim of "
            f"{model.names['transformer']}",
            key="pretrained_t5_model_name_or_path",
            fix="take the text encoder of the model itself",
        )


def _misfit(flavour: Flavour, model: ModelConfigs, key: str, expected: Any, fitting: list[Flavour]) -> UserError:
    found = model.transformer.get(key)
    what = f"; it is {_choice(fitting)}" if fitting else "; this tool does not train such a model"
    return UserError(
        f"{model.names['transformer']}: found {key} {_shown(found)}, expected {_shown(expected)} for "
        f"{flavour.name}{what}",
        key="model_flavour",
        fix=f'set "model_flavour": {_choice(fitting)}, or name another model' if fitting else "name another model",
    )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _choice(flavours: list[Flavour]) -> str:
    return " or ".join(f'"{flavour.name}"' for flavour in flavours)
