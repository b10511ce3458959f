"""Reads adapter files that others wrote: LoRAs under diffusers', PEFT's or ComfyUI's names, and LyCORIS networks.

What comes out is right at strength 1: alphas are folded into the factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.publish import lycoris
from simpletuner_dmd.publish.dialects import (
    COMFYUI_PREFIX,
    DIFFUSERS_PREFIX,
    MAGNITUDE,
    comfyui_module,
    diffusers_module,
    module_names,
)
from simpletuner_dmd.publish.experts import is_low_noise
from simpletuner_dmd.publish.snippets import LORA_FILE

# In a folder: an export, the output folder of a run, or a folder that holds the file itself.
_PLACES = (f"diffusers/{LORA_FILE}", "lycoris/*.safetensors", LORA_FILE, "comfyui/*.safetensors", "*.safetensors")
_PREFIXES = ("base_model.model.", DIFFUSERS_PREFIX, COMFYUI_PREFIX)
_KOHYA = "lora_unet_"
_SUFFIXES = {
    ".lora_A.weight": ".lora_A.weight", ".lora_B.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_A.weight", ".lora_B.default.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight",
    f"{MAGNITUDE}.weight": f"{MAGNITUDE}.weight", MAGNITUDE: f"{MAGNITUDE}.weight",
    ".alpha": ".alpha",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterFile:
    """An adapter at strength 1. kind "lora": "blocks.0.attn1.to_q.lora_A.weight" [rank, in] and lora_B [out, rank];
    kind "lycoris": "lycoris_blocks_0_attn1_to_q.lokr_w1", … and alpha = rank. All fp32."""

    path: Path
    kind: str
    tensors: dict[str, Tensor]


def find_adapter(path: Path, key: str) -> Path:
    """The adapter's file: the path itself, or what an export folder or a run's output folder holds; of two experts, the
    high-noise one's.

    Raises UserError, about the option `key`, where there is none.
    """
    if path.is_file():
        return path
    if path.is_dir():
        for folder in (path / "export", path):
            for place in _PLACES:
                if found := sorted(folder.glob(place), key=lambda file: (is_low_noise(file), file.name)):
                    return found[0]
    raise UserError(
        f"found no adapter at {path}",
        key=key,
        fix="name a .safetensors file, an export folder, or the output folder of a run that has finished",
    )


def read_adapter(path: Path, key: str) -> AdapterFile:
    """Reads the file, under whichever names it has. Raises UserError, about the option `key`."""
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", key=key, fix="name a .safetensors file") from error
    try:
        if any(name.startswith(lycoris.PREFIX) for name in tensors):
            return AdapterFile(path, "lycoris", _lycoris_at_strength_1(tensors))
        return AdapterFile(path, "lora", _lora_at_strength_1(tensors))
    except ValueError as error:
        raise UserError(
            f"{path} is no adapter this tool can start from: {error}",
            key=key,
            fix="name a LoRA for Wan in diffusers', PEFT's or ComfyUI's names, or a file that lycoris wrote",
        ) from error


def _lycoris_at_strength_1(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    alphas = {name.partition(".")[0]: float(t) for name, t in tensors.items() if name.endswith(f".{lycoris.ALPHA}")}
    trained = {name: t for name, t in tensors.items() if not name.endswith(f".{lycoris.ALPHA}")}
    return lycoris.folded(trained, alphas, 1.0)


def _lora_at_strength_1(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(f"{name!r} is not a LoRA factor")
        plain[_module(name.removesuffix(suffix)) + _SUFFIXES[suffix]] = tensor
    result = {name: tensor for name, tensor in plain.items() if not name.endswith(".alpha")}
    modules = {name.rsplit(".lora_", 1)[0] for name in result}
    for module in modules:
        for factor in ("A", "B"):
            if f"{module}.lora_{factor}.weight" not in result:
                raise ValueError(f"{module} has only one of its two factors")
        if (alpha := plain.get(f"{module}.alpha")) is not None:
            rank = len(result[f"{module}.lora_A.weight"])
            result[f"{module}.lora_B.weight"] = result[f"{module}.lora_B.weight"] * (float(alpha) / rank)
    if not result:
        raise ValueError("it has no LoRA factors")
    return result


def _module(name: str) -> str:
    """A layer under any of the names as diffusers calls it."""
    if name.startswith(_KOHYA):
        return _kohya_module(name.removeprefix(_KOHYA))
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return diffusers_module(name)


def _kohya_module(name: str) -> str:
    """ "blocks_0_self_attn_q" -> "blocks.0.attn1.to_q": the dots are lost in these names."""
    inside, outside = module_names()
    block = re.fullmatch(r"_?blocks_(\d+)_(.+)", name)
    candidates = [f"blocks.{block[1]}.{inner}" for inner in inside] if block else list(outside)
    for candidate in candidates:
        if name.lstrip("_") in (comfyui_module(candidate).replace(".", "_"), candidate.replace(".", "_")):
            return candidate
    raise ValueError(f"{name!r} is no layer of a Wan transformer")


class LayerChanges:
    """What an adapter adds to each layer at strength 1, in fp32, computed when it is asked for.

    transformer: where the layers are found by name; without weights (on the meta device) is enough. Iterates over the
    layers' names. Raises UserError for a DoRA, and for layers that the transformer has not.
    """

    def __init__(self, adapter: AdapterFile, transformer: torch.nn.Module) -> None:
        if any(MAGNITUDE in name for name in adapter.tensors):
            raise UserError(f"{adapter.path} is a DoRA, which is not merged here", fix="merge it with diffusers first")
        self._lycoris, self._transformer = adapter.kind == "lycoris", transformer
        linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        own = {self._in_file(name): name for name in linear}
        found = _by_layer(adapter)
        if unknown := sorted(found.keys() - own.keys()):
            raise UserError(
                f"{adapter.path} does not fit this model: it changes {unknown[0]}, which is no layer of it",
                fix="name the base that the adapter was trained on",
            )
        self._tensors = {own[name]: tensors for name, tensors in found.items()}

    def _in_file(self, layer: str) -> str:
        return lycoris.PREFIX + layer.replace(".", "_") if self._lycoris else layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, layer: str) -> bool:
        return layer in self._tensors

    @torch.no_grad()
    def of(self, layer: str, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(change of the weight, change of the bias or None). weight: the layer's own, where the transformer has none:
        a rotation's change depends on it."""
        tensors = self._tensors[layer]
        if not self._lycoris:
            return tensors["lora_B.weight"] @ tensors["lora_A.weight"], None
        import lycoris as library

        held: Any = self._transformer.get_submodule(layer)
        before = held.weight
        # lycoris names a module after its place in the model: here one layer stands alone under that name, so that
        # nothing keeps the layers of the whole model.
        inside = self._in_file(layer)
        alone = torch.nn.ModuleDict({inside.removeprefix(lycoris.PREFIX): held})
        own = {f"{inside}.{inner}": tensor for inner, tensor in tensors.items()}
        try:
            if weight is not None:
                held.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            network, _ = library.create_lycoris_from_weights(1.0, "", alone, weights_sd=own)
            change, bias = network.loras[0].get_diff_weight(1.0)
        finally:
            held.weight = before
        return change, bias


def _by_layer(adapter: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """The adapter's tensors by the layer, as the file names it."""
    if adapter.kind == "lycoris":
        return {name: dict(tensors) for name, tensors in lycoris.by_module(adapter.tensors).items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        layer, _, factor = name.rpartition(".lora_")
        layers.setdefault(layer, {})[f"lora_{factor}"] = tensor
    return layers
