"""The base with adapters merged in, one file of its weights at a time: what a student is without any adapter.

The base is the unquantised one, from its files, whatever training had in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.run_options import is_weight_file
from simpletuner_dmd.publish.read_adapter import AdapterFile, LayerChanges
from simpletuner_dmd.wan.loading import transformer_config
from simpletuner_dmd.wan.sources import ModelSource

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Strengths = Sequence[tuple[AdapterFile, float]]


class MergedBase:
    """The base's tensors with adapters added: W + strength dW, summed in fp32 and given in the precision of the files.

    adapters: each with its strength, in the order they are added. Raises UserError where the base is not a folder (or
    Hub repository) of safetensors in diffusers' layout, or an adapter changes layers that it has not.
    """

    def __init__(self, source: ModelSource, adapters: Strengths) -> None:
        self.folder = _folder_of(source)
        self._skeleton = _skeleton(source)
        self._changes = [(LayerChanges(adapter, self._skeleton), strength) for adapter, strength in adapters]
        self.files = _weight_files(self.folder, source)
        names = {name for file in self.files for name in _names(file)}
        for (adapter, _), (changes, _) in zip(adapters, self._changes, strict=True):
            if unknown := [layer for layer in changes if f"{layer}.weight" not in names]:
                raise UserError(
                    f"{adapter.path} does not fit this model: it changes {unknown[0]}",
                    fix="name the base that the adapter was trained on",
                )

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's largest tensors."""
        with safe_open(self.files[0], "pt") as opened:
            name = next(name for name in opened.keys() if name.endswith("to_q.weight"))  # noqa: SIM118 - no mapping
            dtype: torch.dtype = opened.get_tensor(name).dtype
        return dtype

    @torch.no_grad()
    def tensors(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of one of `files`, as merged."""
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                yield name, self._merged(name, opened.get_tensor(name))

    def write(self, folder: Path) -> None:
        """A transformer folder as diffusers reads it: the base's config and index, and its files with new values."""
        shutil.copyfile(self.folder / "config.json", folder / "config.json")
        several = len(self.files) > 1
        weight_map: dict[str, str] = {}
        size = 0
        for number, file in enumerate(self.files, 1):
            name = f"{Path(WEIGHTS).stem}-{number:05d}-of-{len(self.files):05d}.safetensors" if several else WEIGHTS
            shard = dict(self.tensors(file))
            save_file(shard, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
            size += sum(tensor.nbytes for tensor in shard.values())
        if several:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        layer, _, part = name.rpartition(".")
        result = tensor
        for changes, strength in self._changes:
            if layer not in changes or part not in ("weight", "bias"):
                continue
            weight_change, bias_change = changes.of(layer, tensor if part == "weight" else None)
            change = weight_change if part == "weight" else bias_change
            if change is not None:
                result = result.float() + strength * change.reshape(tensor.shape)
        return result.to(tensor.dtype)


def _skeleton(source: ModelSource) -> nn.Module:
    """The network without weights: lycoris finds the shapes of its layers there."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(transformer_config(source))
    # Real, for lycoris' `full` modules copy into what they are made like; memory that nothing writes to costs nothing.
    return network.to_empty(device="cpu")


def _folder_of(source: ModelSource) -> Path:
    """Where the transformer's files are on this machine."""
    if is_weight_file(source.transformer):
        raise UserError(f"{source.transformer} is one file: merging reads a transformer folder of diffusers' layout",
                        fix="save it with diffusers' save_pretrained, and name that folder")  # fmt: skip
    arguments = source.arguments("transformer")
    path, subfolder = Path(arguments["pretrained_model_name_or_path"]), arguments.get("subfolder", "")
    if not path.exists():
        from huggingface_hub import snapshot_download

        wanted = f"{subfolder}/*" if subfolder else None
        path = Path(snapshot_download(str(path), revision=arguments.get("revision"), allow_patterns=wanted))
    folder = path / subfolder if subfolder else path
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no transformer folder in diffusers' layout, so nothing can be merged into it",
            fix="name a diffusers model folder or Hub id as the base",
        )
    return folder


def _weight_files(folder: Path, source: ModelSource) -> list[Path]:
    variant = source.arguments("transformer").get("variant")
    suffix = f".{variant}" if variant else ""
    index = folder / f"{Path(WEIGHTS).stem}.safetensors.index{suffix}.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / f"{Path(WEIGHTS).stem}{suffix}.safetensors"
    if not single.is_file():
        raise UserError(f"{folder} holds no {single.name}", fix="name a base whose weights are stored as safetensors")
    return [single]


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
