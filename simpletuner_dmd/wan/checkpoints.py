"""Where the tensors of a model part are: one safetensors file or several, under diffusers' names or Wan's own.

Nothing is read before it is asked for, and no more of it is kept than was asked for.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpletuner_dmd.config.errors import UserError

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI and others put before every name of a transformer."""
NOT_WEIGHTS = ("spiece_model",)
"""What ComfyUI's text encoders carry beside the weights: the tokenizer, which is read from its own folder."""
SCALED = ("scaled_fp8", "scale_weight", "weight_scale")

EDGE = 2**20


@dataclass(frozen=True)
class Place:
    """One tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model part by name. key: the option that named it, for messages."""

    places: Mapping[str, Place]
    key: str

    @classmethod
    def of(cls, files: Iterable[Path], key: str) -> Checkpoint:
        """All tensors of these files under the names they have there. UserError where one cannot be read."""
        places: dict[str, Place] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - safetensors' own reader, not a dictionary
                        places[name] = Place(file, name, tuple(opened.get_slice(name).get_shape()))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read: {str(error).splitlines()[0]}",
                    key=key,
                    fix="download the file again: it is not a whole safetensors file",
                ) from error
        return cls(places, key)

    def fitted(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        convert: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """Exactly the tensors of a model with these shapes, under its names.

        convert: diffusers' own renaming of a part's original names. aliases: the model's name -> another that files may
        have for it. Raises UserError where a tensor is missing, has another shape, or is not the model's.
        """
        found = {name: place for name, place in self.places.items() if name not in NOT_WEIGHTS}
        if any(name.endswith(SCALED) for name in found):
            raise self._unfit("its weights are fp8 with scales of their own",
                              "name the bf16 or fp16 file of the same model, and quantise it here")  # fmt: skip
        if not shapes.keys() <= found.keys():
            found = {_without_prefix(name): place for name, place in found.items()}
        for name, alias in (aliases or {}).items():
            if alias in found:
                place = found.pop(alias)
                found.setdefault(name, place)
        if convert is not None and not shapes.keys() <= found.keys():
            converted = dict(convert(dict(found)))
            if len(shapes.keys() & converted.keys()) > len(shapes.keys() & found.keys()):
                found = converted
        missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
        if missing:
            raise self._unfit(f"it lacks {len(missing)} of {len(shapes)} tensors, for example {missing[0]}",
                              "name a whole checkpoint of this Wan, not an adapter or another model")  # fmt: skip
        for name, shape in shapes.items():
            if found[name].shape != tuple(shape):
                raise self._unfit(
                    f"{name} is {found[name].shape} in it, but {tuple(shape)} by the model's config",
                    "set the model_flavour of this file, or pretrained_model_name_or_path to a folder with its config",
                )
        if unknown:
            raise self._unfit(f"it holds {len(unknown)} tensors that the model has not, for example {unknown[0]}",
                              "name a checkpoint of a Wan text-to-video transformer")  # fmt: skip
        return Checkpoint({name: found[name] for name in shapes}, self.key)

    def _unfit(self, reason: str, fix: str) -> UserError:
        files = sorted({str(place.file) for place in self.places.values()})
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return UserError(f"{files[0]}{more} does not fit: {reason}", key=self.key, fix=fix)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, as they are stored. Files are opened for this alone, so that what they map is given back."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.places[name].file].append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with safe_open(file, "pt") as opened:
                for name in wanted:
                    tensors[name] = opened.get_tensor(self.places[name].name).clone()
        return tensors

    @property
    def files(self) -> list[Path]:
        return sorted({place.file for place in self.places.values()})

    def fingerprint(self) -> str:
        """Names the content by the files' sizes, times and ends, and by the hash the Hub's cache stores them as."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            real = file.resolve()
            status = real.stat()
            digest.update(f"{real.name}:{status.st_size}:{status.st_mtime_ns}".encode())
            with real.open("rb") as opened:
                digest.update(opened.read(EDGE))
                opened.seek(max(0, status.st_size - EDGE))
                digest.update(opened.read())
        return digest.hexdigest()


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
