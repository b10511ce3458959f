"""The names that a LoRA's tensors carry in diffusers and in ComfyUI.

Inside the tool a LoRA is a dict of PEFT names without a prefix: "blocks.0.attn1.to_q.lora_A.weight" [rank, in] and
"….lora_B.weight" [out, rank], with delta = (alpha / rank) B A. What is written has the factor alpha / rank folded into
B and no alpha tensors: readers then take alpha = rank, so strength 1 is right everywhere. An alpha in the file would
be applied by ComfyUI, ignored by some diffusers versions and doubled by others.

ComfyUI has no rule for diffusers' Wan names: a file with them loads without any effect. It needs Wan's own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

DIFFUSERS_PREFIX = "transformer."
COMFYUI_PREFIX = "diffusion_model."

_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
MAGNITUDE = ".lora_magnitude_vector"
"""DoRA's row norms, under PEFT's name in files: diffusers takes them beside the factors."""

# Inside a block: diffusers' name of a linear layer, Wan's own name of it.
_IN_BLOCK = {
    **{
        f"{ours}.{ours_layer}": f"{theirs}.{theirs_layer}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for ours_layer, theirs_layer in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}

_OUTSIDE_BLOCKS = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def split_key(key: str) -> tuple[str, str]:
    """ "blocks.0.attn1.to_q.lora_A.weight" -> ("blocks.0.attn1.to_q", ".lora_A.weight").

    Raises ValueError for a tensor that is no LoRA factor (a bias, a DoRA magnitude).
    """
    for suffix in _SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    raise ValueError(f"{key!r} is not a LoRA factor: names must end in {' or '.join(_SUFFIXES)}")


def module_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """diffusers' names of the linear layers that Wan's own code has too: inside a block, and outside of the blocks."""
    return tuple(_IN_BLOCK), tuple(_OUTSIDE_BLOCKS)


def diffusers_module(module: str) -> str:
    """The reverse of `comfyui_module`; diffusers' own names pass. Raises ValueError for a layer of neither."""
    block = _BLOCK.fullmatch(module)
    names, name = (_IN_BLOCK, block[2]) if block else (_OUTSIDE_BLOCKS, module)
    if name in names:
        return module
    ours = next((ours for ours, theirs in names.items() if theirs == name), None)
    if ours is None:
        raise ValueError(f"{module!r} is no layer of a Wan transformer")
    return f"blocks.{block[1]}.{ours}" if block else ours


def comfyui_module(module: str) -> str:
    """The module's name in Wan's own code. Raises ValueError where it has none."""
    block = _BLOCK.fullmatch(module)
    name = _IN_BLOCK.get(block[2]) if block else _OUTSIDE_BLOCKS.get(module)
    if name is None:
        raise ValueError(f"{module!r} has no counterpart in Wan's original code, which ComfyUI's names follow")
    return f"blocks.{block[1]}.{name}" if block else name


def fold_alpha(lora: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """alpha / rank multiplied into every B, in fp32; every A needs its B. DoRA's row norms pass as they are."""
    folded = {}
    for key, tensor in lora.items():
        if (magnitude := key.removesuffix(".weight")).endswith(MAGNITUDE):
            if (factor := magnitude.removesuffix(MAGNITUDE) + _SUFFIXES[0]) not in lora:
                raise ValueError(f"{key!r} is there but {factor!r} is missing")
            folded[magnitude] = tensor.detach().to("cpu", torch.float32).clone()
            continue
        module, suffix = split_key(key)
        other = _SUFFIXES[1 - _SUFFIXES.index(suffix)]
        if module + other not in lora:
            raise ValueError(f"{key!r} is there but {module + other!r} is missing")
        tensor = tensor.detach().to("cpu", torch.float32)
        # clone: safetensors refuses tensors that share memory
        folded[key] = tensor.clone() if suffix == ".lora_A.weight" else tensor * (alpha / rank)
    if not folded:
        raise ValueError("the LoRA has no tensors")
    return folded


def to_diffusers(lora: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """The tensors under the names that `WanPipeline.load_lora_weights` takes, right at strength 1."""
    return {DIFFUSERS_PREFIX + key: tensor for key, tensor in fold_alpha(lora, rank=rank, alpha=alpha).items()}


def to_comfyui(lora: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """The tensors under the names that ComfyUI (and diffusers too) takes, right at strength 1."""
    folded = fold_alpha(lora, rank=rank, alpha=alpha)
    return {comfyui_key(key): tensor for key, tensor in folded.items()}


def comfyui_key(key: str) -> str:
    """A PEFT-style name to ComfyUI's."""
    module, suffix = split_key(key)
    return COMFYUI_PREFIX + comfyui_module(module) + suffix
