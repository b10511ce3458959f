"""Where the parts of a model are: on the Hub, in a folder, or in a single file, and what each of these lacks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.run_options import is_weight_file
from simpletuner_dmd.config.schema import TrainConfig

BASE_KEY = "pretrained_model_name_or_path"
KEYS = {
    "transformer": "pretrained_transformer_model_name_or_path",
    "vae": "pretrained_vae_model_name_or_path",
    "text_encoder": "pretrained_t5_model_name_or_path",
}
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Part -> the name of its weights in a folder, as diffusers and transformers write it."""


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model are: Hub ids, folders or single files, and the revision and variant of the base.

    network: the subfolder of the transformer that is meant, of a model that has two; None where the transformer lies in
    its folder itself. A single file says nothing of its config, tokenizer or scheduler: these are the base's.
    """

    base: str
    transformer: str
    vae: str
    text_encoder: str
    revision: str | None = None
    variant: str | None = None
    network: str | None = "transformer"

    @classmethod
    def of(cls, config: TrainConfig) -> ModelSource:
        """What a folder lacks, or a single file cannot hold, comes from the flavour's own Hub repository."""
        flavour = config.flavour.hub_id
        named = config.pretrained_model_name_or_path
        base = flavour if is_weight_file(named) else named
        subfolder = config.pretrained_transformer_subfolder

        def part(override: str | None, *folders: str) -> str:
            return override or (flavour if lacking(base, *folders) else base)

        return cls(
            base=base,
            transformer=config.pretrained_transformer_model_name_or_path or named,
            vae=part(config.pretrained_vae_model_name_or_path, "vae"),
            text_encoder=part(config.pretrained_t5_model_name_or_path, "text_encoder", "tokenizer"),
            revision=config.revision,
            variant=config.variant,
            network=None if subfolder.lower() == "none" else subfolder,
        )

    def other_expert(self, network: str) -> ModelSource:
        """The base's other transformer; a path given for the transformer alone is that of the first."""
        return replace(self, network=network, transformer=self.base)

    def subfolder(self, part: str) -> str | None:
        return {"transformer": self.network, "base": None}.get(part, part)

    def home(self, part: str) -> str:
        """Where the part's config is: with its weights, or with the base where those are a single file."""
        if part == "scheduler":
            return self.base
        path = getattr(self, "text_encoder" if part == "tokenizer" else part)
        return self.base if is_weight_file(path) else path

    def arguments(self, part: str) -> dict[str, Any]:
        """Arguments of `from_pretrained` for whatever reads a config. Revision and variant belong to the base alone."""
        path, subfolder = self.home(part), self.subfolder(part)
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": path}
        folder = Path(path)
        itself = folder.is_dir() and not (folder / (subfolder or "")).is_dir() and (folder / "config.json").is_file()
        if not itself:  # a folder that is the part itself has none
            arguments["subfolder"] = subfolder
        if path == self.base:
            arguments |= {"revision": self.revision, "variant": self.variant}
        return {key: value for key, value in arguments.items() if value is not None}

    def config_file(self, part: str) -> str:
        """Where the part's config.json is, for a message."""
        arguments = self.arguments(part)
        return "/".join(
            [arguments["pretrained_model_name_or_path"], *filter(None, [arguments.get("subfolder")]), "config.json"]
        )

    def stock_arguments(self) -> dict[str, Any]:
        """As `arguments` for the transformer, or those of diffusers' `from_single_file`."""
        arguments = self.arguments("transformer")
        if not is_weight_file(self.transformer):
            return arguments
        config = arguments.pop("pretrained_model_name_or_path")
        arguments.pop("variant", None)
        return {"pretrained_model_link_or_path_or_dict": self.transformer, "config": config, **arguments}

    def folder(self, part: str) -> Path | None:
        """The folder of a part that is on this disk and not in the Hub's cache."""
        arguments = self.arguments(part)
        folder = Path(arguments["pretrained_model_name_or_path"])
        return folder / arguments.get("subfolder", "") if folder.is_dir() else None

    def weight_files(self, part: str) -> list[Path]:
        """The safetensors files of a part, fetched from the Hub if need be. Raises UserError."""
        path = getattr(self, part)
        if is_weight_file(path):
            if not Path(path).is_file():
                raise self.not_loaded(part, f"there is no file {path}")
            return [Path(path)]
        names = _names(STEMS[part], self.variant if path == self.base else None)
        folder = self.folder(part)
        if folder is not None:
            return self._in_folder(part, folder, names)
        return self._on_the_hub(part, names)

    def _in_folder(self, part: str, folder: Path, names: list[str]) -> list[Path]:
        name = next((name for name in names if (folder / name).is_file()), None)
        if name is None:
            alone = sorted(folder.glob("*.safetensors"))
            if len(alone) == 1 and self.variant is None:
                return alone
            raise self.not_loaded(part, f"{folder} has no {' or '.join(names)}")
        files = [folder / shard for shard in _shards(folder / name)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise self.not_loaded(part, f"{folder} lacks {missing[0]}, one of the {len(files)} shards of its index")
        return files

    def _on_the_hub(self, part: str, names: list[str]) -> list[Path]:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        arguments = self.arguments(part)
        path = arguments["pretrained_model_name_or_path"]
        place = {"subfolder": arguments.get("subfolder"), "revision": arguments.get("revision")}
        reason = ""
        for name in names:
            try:
                file = Path(hf_hub_download(path, name, **place))
                return [Path(hf_hub_download(path, shard, **place)) for shard in _shards(file)]
            except (EntryNotFoundError, HFValidationError, OSError) as error:
                reason = str(error)
        raise self.not_loaded(part, reason)

    def not_loaded(self, part: str, reason: str) -> UserError:
        path = self.home(part) if part not in KEYS else getattr(self, part)
        key = KEYS["text_encoder" if part == "tokenizer" else part]
        return UserError(
            f"the {part} could not be loaded from {path!r}: {(reason.splitlines() or ['no reason given'])[0]}",
            key=BASE_KEY if path == self.base else key,
            fix="give a diffusers model folder, a .safetensors file or a Hub id that holds this part; without network "
            "it must be in the local Hub cache already",
        )

    def fingerprint(self, part: str) -> str:
        """Names the weights that make a cache entry: path and revision, and for what is on this disk the files' sizes
        and ends."""
        path = getattr(self, part)
        local = Path(path).exists()
        digest = hashlib.blake2b(f"{'' if local else path}@{self.revision}".encode(), digest_size=16)
        folder = self.folder(part)
        files = [Path(path)] if Path(path).is_file() else sorted(folder.iterdir()) if folder is not None else []
        for file in files:
            if file.suffix in {".json", ".safetensors", ".model"}:
                digest.update(f"{file.name}:{file.stat().st_size}".encode())
                with file.open("rb") as opened:
                    digest.update(opened.read(1 << 20))
                    opened.seek(max(0, file.stat().st_size - (1 << 20)))
                    digest.update(opened.read())
        return digest.hexdigest()


def lacking(base: str, *folders: str) -> bool:
    """Whether `base` is a folder on this disk that has not all of these."""
    return Path(base).is_dir() and not all((Path(base) / folder).is_dir() for folder in folders)


def borrowed(config: TrainConfig) -> list[str]:
    """A sentence for each part that the base model lacks and the flavour's own repository gives."""
    source, flavour, named = ModelSource.of(config), config.flavour.hub_id, config.pretrained_model_name_or_path
    parts = [
        part
        for part in ("vae", "text_encoder")
        if getattr(source, part) == flavour != named and getattr(config, KEYS[part]) is None
    ]
    return [f"{named} has no {part}: it is taken from {flavour} ({KEYS[part]} names another)." for part in parts]


def _names(stem: str, variant: str | None) -> list[str]:
    """Files that may hold the weights or list them, the likeliest first."""
    if variant is None:
        return [f"{stem}.safetensors.index.json", f"{stem}.safetensors"]
    return [f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors"]


def _shards(file: Path) -> list[str]:
    """The file's own name, or the names that an index lists."""
    if file.suffix != ".json":
        return [file.name]
    return sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
