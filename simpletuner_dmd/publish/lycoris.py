"""LyCORIS adapters as files: what `lycoris.create_lycoris_from_weights` reads, and the same for ComfyUI.

Whatever alpha and multiplier a network was trained with are folded into its factors, and alpha is written as the rank:
lycoris' `merge_to` applies alpha / rank twice to LoHa and LoKr, which is only right where it is 1; and ComfyUI takes a
file without alpha as strength 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner_dmd.durable import write_json
from simpletuner_dmd.publish.dialects import COMFYUI_PREFIX, comfyui_module, module_names
from simpletuner_dmd.publish.experts import LOW_NOISE_METADATA, low_noise_files
from simpletuner_dmd.publish.export import SMALL_BYTES, describe, dtype_name, foreign_metadata, own_metadata, save
from simpletuner_dmd.publish.info import ExportInfo
from simpletuner_dmd.publish.schedulers import scheduler_for
from simpletuner_dmd.publish.workflow import comfyui_workflow, native_workflow, two_expert_workflow

PREFIX = "lycoris_"
ALPHA = "alpha"
NOT_FOR_COMFYUI = ("oft_blocks", "a1.weight")
"""Tensors of config.lycoris.NOT_FOR_COMFYUI."""

# The tensors of a module that carry its strength, and the one whose size tells the rank (name, axis). The first that
# fits is taken; a module without a rank tensor has no alpha / rank, and takes the multiplier only.
_CARRIERS: tuple[tuple[tuple[str, ...], tuple[str, int] | None], ...] = (
    (("lora_up.weight",), ("lora_down.weight", 0)),
    (("hada_w1_a",), ("hada_w1_b", 0)),
    (("lokr_w2_a",), ("lokr_w2_a", 1)),
    (("lokr_w1_a", "lokr_w2"), ("lokr_w1_a", 1)),
    (("lokr_w2",), None),
    (("a1.weight", "b1.weight"), ("a2.weight", 0)),
    (("diff", "diff_b"), None),
)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ "lycoris_blocks_0_attn1_to_q.lokr_w1" -> {"lycoris_blocks_0_attn1_to_q": {"lokr_w1": …}}."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, name = key.partition(".")
        modules.setdefault(module, {})[name] = tensor
    return modules


def strength(module: Mapping[str, Tensor], alpha: float | None) -> float:
    """alpha / rank as lycoris applies it; 1 where the module has no rank. alpha None: 1."""
    carried = _carrier(module)
    if carried is None or carried[1] is None or alpha is None:
        return 1.0
    name, axis = carried[1]
    return alpha / module[name].shape[axis]


def scaled(module: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The module with its change of the weight multiplied by `factor`. Raises ValueError for a rotation."""
    carried = _carrier(module)
    if factor == 1:
        return dict(module)
    if carried is None:
        raise ValueError("the strength of a rotation cannot be folded into its tensors")
    # The first name of a LoKr pair that is there; both halves of GLoRA and of a full difference.
    names = [name for name in carried[0] if name in module]
    if any(name.startswith("lokr") for name in names):
        names = names[:1]
    return {name: tensor * factor if name in names else tensor for name, tensor in module.items()}


def folded(tensors: Mapping[str, Tensor], alphas: Mapping[str, float], multiplier: float) -> dict[str, Tensor]:
    """Trained tensors as a file that is right at strength 1, with alpha = rank. Rotations keep their constraint.

    tensors: names as lycoris writes them, without alpha. alphas: module -> the alpha it was trained with.
    """
    result: dict[str, Tensor] = {}
    for name, module in by_module(tensors).items():
        module = {inner: tensor.detach().to("cpu", torch.float32) for inner, tensor in module.items()}
        whole = scaled(module, strength(module, alphas.get(name)) * multiplier)
        # clone: safetensors refuses tensors that share memory
        result |= {f"{name}.{inner}": tensor.clone() for inner, tensor in whole.items()}
        if name in alphas:
            result[f"{name}.{ALPHA}"] = torch.tensor(_alpha_in_file(module, alphas[name]))
    if not result:
        raise ValueError("the LyCORIS network has no tensors")
    return result


def to_comfyui(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A folded file under ComfyUI's names; None where ComfyUI may compute something else from it."""
    renamed: dict[str, Tensor] = {}
    for name, module in by_module(tensors).items():
        if any(inner in NOT_FOR_COMFYUI for inner in module):
            return None
        layer = comfyui_module(layer_name(name))
        renamed |= {f"{COMFYUI_PREFIX}{layer}.{inner}": t for inner, t in module.items() if inner != ALPHA}
    return renamed


def layer_name(module: str) -> str:
    """ "lycoris_blocks_0_attn1_to_q" -> "blocks.0.attn1.to_q". Raises ValueError for a layer that Wan does not have."""
    inside, outside = module_names()
    if block := re.fullmatch(PREFIX + r"blocks_(\d+)_(.+)", module):
        for name in inside:
            if name.replace(".", "_") == block[2]:
                return f"blocks.{block[1]}.{name}"
    for name in outside:
        if PREFIX + name.replace(".", "_") == module:
            return name
    raise ValueError(f"{module!r} is no layer of Wan's original code, which ComfyUI's names follow")


def export_lycoris(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    alphas: Mapping[str, float],
    multiplier: float,
    rank: int,
    description: Mapping[str, Any],
    info: ExportInfo,
    formats: Sequence[str] = ("comfyui",),
    dtype: torch.dtype | None = None,
    low_noise: tuple[Mapping[str, Tensor], Mapping[str, float]] | None = None,
) -> list[Path]:
    """Writes lycoris/<run>.safetensors, comfyui/<run>.safetensors where asked for and possible, and what is beside.

    tensors, alphas, multiplier: see `folded`. rank: the network's, for readers of metadata. description: the options
    it was made with. dtype: as in `export_lora`. low_noise: tensors and alphas of the second network of a two-expert
    student, of the same options. Returns what was written.
    """
    whole = folded(tensors, alphas, multiplier)
    dtype = dtype or (torch.float32 if sum(t.numel() * 4 for t in whole.values()) < SMALL_BYTES else torch.bfloat16)
    whole = _stored(whole, dtype)
    comfyui = to_comfyui(whole) if "comfyui" in formats else None
    choice = scheduler_for(info.schedule, info.renoise)
    file_name = f"{info.file_name}.safetensors"
    algo = json.dumps(dict(description), sort_keys=True)
    metadata = {"format": "pt", **own_metadata(info, choice, "lycoris"), "simpletuner_dmd.lycoris_config": algo}
    written = [save(directory / "lycoris" / file_name, whole, metadata)]
    if comfyui is not None:
        foreign = foreign_metadata(info, rank, comfyui) | {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": algo,
        }
        metadata = {"format": "pt", **own_metadata(info, choice, "comfyui"), **foreign}
        written.append(save(directory / "comfyui" / file_name, comfyui, metadata))
        graph = comfyui_workflow(info, file_name, choice.name)
        if low_noise is not None:
            graph = two_expert_workflow(graph, info, low_noise_files(info)["comfyui"].name)
        if info.native is not None:
            graph = native_workflow(graph, info, info.native, file_name)
        written.append(write_json(directory / "comfyui" / "workflow.json", graph))
    adapter = {
        "kind": "lycoris",
        "lycoris_config": dict(description),
        "files": [str(path.relative_to(directory)) for path in written if path.suffix == ".safetensors"],
    }
    comfyui_file = file_name if comfyui is not None else None
    if low_noise is not None:
        low = _save_low_noise(directory, _stored(folded(*low_noise, multiplier), dtype), info, comfyui is not None)
        adapter["low_noise_files"] = [str(path.relative_to(directory)) for path in low]
        written += low
    return written + describe(directory, info, choice, dtype_name(dtype), comfyui_file, adapter)


def _save_low_noise(directory: Path, tensors: dict[str, Tensor], info: ExportInfo, comfyui: bool) -> list[Path]:
    choice, files = scheduler_for(info.schedule, info.renoise), low_noise_files(info)
    metadata = {"format": "pt", **own_metadata(info, choice, "lycoris"), **LOW_NOISE_METADATA}
    written = [save(directory / files["lycoris"], tensors, metadata)]
    if comfyui and (renamed := to_comfyui(tensors)) is not None:
        metadata = {"format": "pt", **own_metadata(info, choice, "comfyui"), **LOW_NOISE_METADATA}
        written.append(save(directory / files["comfyui"], renamed, metadata))
    return written


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In the dtype of the file, but for alphas, which stay exact: bf16 has no 301."""
    return {key: t if key.endswith(f".{ALPHA}") else t.to(dtype).contiguous() for key, t in tensors.items()}


def _carrier(module: Mapping[str, Tensor]) -> tuple[tuple[str, ...], tuple[str, int] | None] | None:
    return next((entry for entry in _CARRIERS if entry[0][0] in module), None)


def _alpha_in_file(module: Mapping[str, Tensor], trained: float) -> float:
    """The rank; 1 for LoKr of whole factors, which has none; a rotation's constraint as it is."""
    carried = _carrier(module)
    if carried is None:
        return trained
    if carried[1] is None:
        return 1.0
    name, axis = carried[1]
    return float(module[name].shape[axis])
