"""Loads the parts of a Wan model from the Hub or from a folder, each in an explicit precision.

Always `from_pretrained(dtype=...)`, never `.to(bfloat16)`: only the former keeps the modules that Wan needs in fp32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Names that users know -> names of diffusers' attention dispatcher. None: PyTorch's own, the default.
ATTENTION_BACKENDS = {
    "diffusers": None,
    "native": None,
    "flash-attn-2": "flash",
    "flash-attn-3": "_flash_3",
    "flex": "flex",
    "xformers": "xformers",
}


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model are: Hub ids or folders, and the revision and variant of the base."""

    base: str
    transformer: str
    vae: str
    text_encoder: str
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> ModelSource:
        base = config.pretrained_model_name_or_path
        return cls(
            base=base,
            transformer=config.pretrained_transformer_model_name_or_path or base,
            vae=config.pretrained_vae_model_name_or_path or base,
            text_encoder=config.pretrained_t5_model_name_or_path or base,
            revision=config.revision,
            variant=config.variant,
        )

    def arguments(self, part: str, subfolder: str) -> dict[str, Any]:
        """Arguments of from_pretrained. Revision and variant belong to the base model alone."""
        path = getattr(self, part)
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": path}
        folder = Path(path)
        if not (folder.is_dir() and not (folder / subfolder).is_dir() and (folder / "config.json").is_file()):
            arguments["subfolder"] = subfolder  # a folder that is the part itself has none
        if path == self.base:
            arguments |= {"revision": self.revision, "variant": self.variant}
        return {key: value for key, value in arguments.items() if value is not None}

    def fingerprint(self, part: str, subfolder: str) -> str:
        """Names the weights that make a cache entry: path and revision, and for a folder its files' sizes and heads."""
        path = getattr(self, part)
        digest = hashlib.blake2b(f"{path if not Path(path).is_dir() else ''}@{self.revision}".encode(), digest_size=16)
        folder = Path(path) / subfolder if (Path(path) / subfolder).is_dir() else Path(path)
        if folder.is_dir():
            for file in sorted(folder.iterdir()):
                if file.suffix in {".json", ".safetensors", ".model"}:
                    digest.update(f"{file.name}:{file.stat().st_size}".encode())
                    with file.open("rb") as opened:
                        digest.update(opened.read(1 << 20))
                        opened.seek(max(0, file.stat().st_size - (1 << 20)))
                        digest.update(opened.read())
        return digest.hexdigest()


def _from_pretrained(loader: Any, source: ModelSource, part: str, subfolder: str, **more: Any) -> Any:
    arguments = source.arguments(part, subfolder)
    try:
        return loader.from_pretrained(**arguments, **more)
    except OSError as error:
        raise _not_loaded(source, part, subfolder, error) from error


def _not_loaded(source: ModelSource, part: str, subfolder: str, error: OSError) -> UserError:
    path = getattr(source, part)
    key = f"pretrained_{'t5' if part == 'text_encoder' else part}_model_name_or_path"
    return UserError(
        f"the {subfolder} could not be loaded from {path!r}: {str(error).splitlines()[0]}",
        key="pretrained_model_name_or_path" if path == source.base else key,
        fix="give a diffusers model folder or a Hub id that holds this part; without network it must be in the "
        "local Hub cache already",
    )


def load_transformer(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """The stock WanTransformer3DModel, frozen, on the CPU."""
    from diffusers import WanTransformer3DModel

    transformer = _from_pretrained(WanTransformer3DModel, source, "transformer", "transformer", dtype=dtype)
    return transformer.requires_grad_(False)


def load_vae(source: ModelSource) -> nn.Module:
    """The stock AutoencoderKLWan in fp32 (Wan's VAE bands in bf16), frozen."""
    from diffusers import AutoencoderKLWan

    return _from_pretrained(AutoencoderKLWan, source, "vae", "vae", dtype=torch.float32).requires_grad_(False).eval()


def load_text_encoder(source: ModelSource, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """(tokenizer, UMT5EncoderModel), frozen. Raises UserError if its embedding table came out empty."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = _from_pretrained(AutoTokenizer, source, "text_encoder", "tokenizer")
    encoder = _from_pretrained(UMT5EncoderModel, source, "text_encoder", "text_encoder", dtype=dtype)
    table = encoder.get_input_embeddings().weight
    if not bool(table.any()):
        # Seen with early transformers 5: every prompt then embeds alike, without any error.
        raise UserError(
            f"the text encoder of {source.text_encoder!r} was loaded with an all-zero embedding table",
            fix="update transformers, or convert the checkpoint so that it holds `shared.weight`",
        )
    return tokenizer, encoder.requires_grad_(False).eval()


def transformer_config(source: ModelSource) -> dict[str, Any]:
    """The transformer's config.json, without its weights."""
    from diffusers import WanTransformer3DModel

    return _config(WanTransformer3DModel, source, "transformer")


def vae_config(source: ModelSource) -> dict[str, Any]:
    """The VAE's config.json, with the library's defaults for what an old file leaves out, without its weights."""
    import inspect

    from diffusers import AutoencoderKLWan

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(AutoencoderKLWan.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | _config(AutoencoderKLWan, source, "vae")


def _config(loader: Any, source: ModelSource, part: str) -> dict[str, Any]:
    arguments = source.arguments(part, part)
    arguments.pop("variant", None)  # variants differ in weights, not in the config
    path = arguments.pop("pretrained_model_name_or_path")
    try:
        return dict(loader.load_config(path, **arguments))
    except OSError as error:
        raise _not_loaded(source, part, part, error) from error


def choose_attention(transformer: nn.Module, mechanism: str) -> str | None:
    """Sets the attention kernel; where it cannot run here, keeps PyTorch's own and returns a line that says so."""
    if mechanism.startswith("sage"):
        return (
            f"attention_mechanism {mechanism}: SageAttention has no backward pass and teacher, student and critic "
            "share their layers here, so PyTorch's attention is used"
        )
    backend = ATTENTION_BACKENDS[mechanism]
    if backend is None:
        return None
    network: Any = transformer  # a stock WanTransformer3DModel
    try:
        network.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        return (
            f"attention_mechanism {mechanism} cannot run here ({str(error).splitlines()[0]}); "
            "PyTorch's attention is used"
        )
    return None
