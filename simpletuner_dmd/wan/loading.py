"""Loads the parts of a Wan model, each in an explicit precision.

Transformer and text encoder are built without storage and filled tensor by tensor (`streaming`), with the tensors and
precisions that `from_pretrained(dtype=...)` gives: some modules of Wan stay in fp32, which `.to(bfloat16)` would undo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.wan.checkpoints import Checkpoint
from simpletuner_dmd.wan.fit import ModelConfigs
from simpletuner_dmd.wan.model_cache import Entry
from simpletuner_dmd.wan.parity import Parity, Probe
from simpletuner_dmd.wan.schemes import SCHEMES, scheme_problem
from simpletuner_dmd.wan.sources import KEYS, ModelSource
from simpletuner_dmd.wan.streaming import Merge, Precision, restore, stream, tensor_shapes

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


PRECISION_KEYS = {"transformer": "base_model_precision", "text_encoder": "text_encoder_1_precision"}


@dataclass
class Storage:
    """How the weights of one part are held, and what there is to say about it.

    precision: a name of SCHEMES, or "no_change". via: the device on which they are put together, and stay. cache: the
    folder in which they are kept quantised. probe: compares them with the dense ones. lines, parity: filled by loading.
    """

    precision: str = "no_change"
    via: torch.device | None = None
    cache: Path | None = None
    probe: Probe | None = None
    lines: list[str] = field(default_factory=list)
    parity: Parity | None = None


def load_transformer(
    source: ModelSource, dtype: torch.dtype, storage: Storage | None = None, merge: Merge | None = None
) -> nn.Module:
    """The stock WanTransformer3DModel, frozen, in eval mode, on the CPU or where the storage says.

    merge: a fine-tune that becomes part of the weights before they are quantised.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = _empty(dtype, lambda: WanTransformer3DModel.from_config(transformer_config(source)))
    checkpoint = Checkpoint.of(source.weight_files("transformer"), KEYS["transformer"])
    fitted = checkpoint.fitted(tensor_shapes(model), convert=convert_wan_transformer_to_diffusers)
    precision = Precision(dtype, frozenset(WanTransformer3DModel._keep_in_fp32_modules))
    _fill("transformer", model, fitted, precision, storage or Storage(), merge)
    return model.requires_grad_(False).eval()


def load_vae(source: ModelSource) -> nn.Module:
    """The stock AutoencoderKLWan in fp32 (Wan's VAE bands in bf16), frozen."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    model = _empty(torch.float32, lambda: AutoencoderKLWan.from_config(_config(AutoencoderKLWan, source, "vae")))
    checkpoint = Checkpoint.of(source.weight_files("vae"), KEYS["vae"])
    fitted = checkpoint.fitted(tensor_shapes(model), convert=convert_wan_vae_to_diffusers)
    _fill("vae", model, fitted, Precision(torch.float32), Storage(), None)
    return model.requires_grad_(False).eval()


def load_text_encoder(source: ModelSource, dtype: torch.dtype, storage: Storage | None = None) -> tuple[Any, nn.Module]:
    """(tokenizer, UMT5EncoderModel), frozen, in eval mode. Raises UserError if its embedding table came out empty."""
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    tokenizer = _from_pretrained(AutoTokenizer, source, "tokenizer")
    config = _from_pretrained(UMT5Config, source, "text_encoder")
    model = _empty(dtype, lambda: UMT5EncoderModel(config))
    model.tie_weights()
    checkpoint = Checkpoint.of(source.weight_files("text_encoder"), KEYS["text_encoder"])
    # The table is in two places of the model, and files have it under either name.
    fitted = checkpoint.fitted(tensor_shapes(model), aliases={"shared.weight": "encoder.embed_tokens.weight"})
    # As transformers reads it: what would overflow in fp16 stays in fp32, bf16 needs no such care.
    kept = UMT5EncoderModel._keep_in_fp32_modules if dtype == torch.float16 else ()
    _fill("text_encoder", model, fitted, Precision(dtype, frozenset(kept)), storage or Storage(), None)
    if not bool(model.get_input_embeddings().weight.any()):
        # Seen in converted checkpoints: every prompt then embeds alike, without any error.
        raise UserError(
            f"the text encoder of {source.text_encoder!r} was loaded with an all-zero embedding table",
            fix="convert the checkpoint so that it holds `shared.weight`",
        )
    return tokenizer, model.requires_grad_(False).eval()


def _empty(dtype: torch.dtype, build: Callable[[], Any]) -> Any:
    """A model whose parameters have shapes and no storage; its buffers are real, made as `from_pretrained` does."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            return build()
    finally:
        torch.set_default_dtype(before)


def _fill(
    part: str, model: nn.Module, checkpoint: Checkpoint, precision: Precision, storage: Storage, merge: Merge | None
) -> None:
    """Puts the weights in the storage wanted: out of the cache where it has them, else from the checkpoint."""
    if storage.precision == "no_change":
        stream(model, checkpoint, precision, merge=merge, via=storage.via)
        _tie(model)
        return
    if problem := scheme_problem(storage.precision, storage.via or torch.device("cpu"), PRECISION_KEYS[part]):
        raise UserError([problem])
    scheme, entry = SCHEMES[storage.precision], None
    if storage.cache is not None:
        facts = {
            "part": part,
            "scheme": storage.precision,
            "dtype": str(precision.dtype),
            "library": scheme.version,
            "weights": checkpoint.fingerprint(),
            "merged": None if merge is None else merge.fingerprint,
        }
        entry = Entry(storage.cache, facts)
        if (document := entry.find()) is not None:
            restore(model, entry.checkpoint(), scheme, precision, document["notes"], storage.via)
            _tie(model)
            storage.lines.append(f"the {part} is read quantised from {entry.file}")
            _tell(storage, Parity.from_document(document["parity"]))
            return
    drive = None if storage.probe is None else storage.probe.velocities
    dense = stream(model, checkpoint, precision, scheme=scheme, merge=merge, via=storage.via, drive=drive)
    _tie(model)
    # Before the first forward, in which some kernels keep things of their own on a layer.
    notes = None if entry is None else entry.write_tensors(model, scheme, storage.lines)
    if storage.probe is not None and dense is not None:
        _tell(storage, storage.probe.compare(storage.precision, dense, storage.probe.velocities(model)))
    if entry is not None and notes is not None:
        parity = None if storage.parity is None else storage.parity.document()
        entry.write_document({"notes": notes, "parity": parity}, storage.lines)


def _tie(model: nn.Module) -> None:
    """A tensor that is in two places of the model is the one that was filled, in both."""
    if (tie := getattr(model, "tie_weights", None)) is not None:
        tie()


def _tell(storage: Storage, parity: Parity | None) -> None:
    storage.parity = parity
    if parity is not None:
        storage.lines += parity.lines()


def _from_pretrained(loader: Any, source: ModelSource, part: str) -> Any:
    arguments = source.arguments(part)
    arguments.pop("variant", None)  # variants differ in weights, not in what stands beside them
    try:
        return loader.from_pretrained(**arguments)
    except OSError as error:
        raise source.not_loaded(part, str(error)) from error


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


def model_index(source: ModelSource) -> dict[str, Any]:
    """model_index.json of the base; empty where the base is no pipeline."""
    from diffusers import DiffusionPipeline

    arguments = source.arguments("base")
    arguments = {key: arguments[key] for key in ("pretrained_model_name_or_path", "revision") if key in arguments}
    try:
        return dict(DiffusionPipeline.load_config(**arguments))
    except OSError:
        return {}


def text_encoder_config(source: ModelSource) -> dict[str, Any]:
    """The text encoder's config.json, without its weights; empty where it cannot be had."""
    from transformers import UMT5Config

    arguments = source.arguments("text_encoder")
    arguments.pop("variant", None)
    try:
        return dict(UMT5Config.get_config_dict(**arguments)[0])
    except OSError:
        return {}  # loading it says what is wrong, where it is needed at all


def model_configs(source: ModelSource) -> ModelConfigs:
    """What the model says about itself, without any weights."""
    parts = ("transformer", "vae", "text_encoder")
    return ModelConfigs(
        transformer=transformer_config(source),
        vae=vae_config(source),
        text_encoder=text_encoder_config(source),
        index=model_index(source),
        names={**{part: source.config_file(part) for part in parts}, "index": f"{source.base}/model_index.json"},
    )


def _config(loader: Any, source: ModelSource, part: str) -> dict[str, Any]:
    arguments = source.arguments(part)
    arguments.pop("variant", None)
    path = arguments.pop("pretrained_model_name_or_path")
    try:
        return dict(loader.load_config(path, **arguments))
    except OSError as error:
        raise source.not_loaded(part, str(error)) from error
