"""Wan's parts without their weights: the stock classes on the meta device, in the precision they are loaded in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.wan.quantisation import quantise
from simpletuner_dmd.wan.shadow import Observation, Shadow, stored_bytes

META = torch.device("meta")

EQUALLY_LARGE = {
    "int8-torchao": "int8-quanto", "fp8-torchao": "fp8-quanto", "int8-bnb": "int8-quanto", "nf4-bnb": "int4-quanto",
}  # fmt: skip
"""Schemes whose library may be absent or needs real weights -> one of as many bytes that is made without them. nf4
keeps 0.516 bytes per weight with its scales, int4-quanto in bf16 0.531."""


def transformer(config: Mapping[str, Any], depth: int, dtype: torch.dtype, precision: str = "no_change") -> nn.Module:
    """A WanTransformer3DModel of `depth` blocks, frozen, with what `from_pretrained(dtype=...)` keeps in fp32."""
    from diffusers import WanTransformer3DModel

    with META:
        network = WanTransformer3DModel.from_config({**config, "num_layers": depth})
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in network.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    quantise(network, EQUALLY_LARGE.get(precision, precision))
    return network.requires_grad_(False)


def vae(config: Mapping[str, Any]) -> nn.Module:
    """An AutoencoderKLWan in fp32."""
    from diffusers import AutoencoderKLWan

    with META:
        return AutoencoderKLWan.from_config(config).requires_grad_(False).eval()


def text_encoder(config: Mapping[str, Any], dtype: torch.dtype, precision: str = "no_change") -> nn.Module:
    """A UMT5EncoderModel."""
    from transformers import UMT5Config, UMT5EncoderModel

    with META, quiet_weights():
        encoder = UMT5EncoderModel(UMT5Config(**config)).to(dtype)
    encoder.tie_weights()  # on the meta device the table of embeddings is made twice
    quantise(encoder, EQUALLY_LARGE.get(precision, precision))
    return encoder.requires_grad_(False).eval()


@contextmanager
def quiet_weights() -> Iterator[None]:
    """A model whose weights are never read need not draw them."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@torch.no_grad()
def work_of(model: nn.Module, run: Callable[[], object]) -> Observation:
    """What one call holds beyond the model's weights, and its operations."""
    shadow = Shadow([], [*model.parameters(), *model.buffers()])
    with shadow.watching():
        run()
    return shadow.seen


def weights_of(model: nn.Module) -> int:
    """Bytes of its parameters."""
    return stored_bytes(model.parameters())


def decode_peak(model: Any, latent_shape: tuple[int, int, int, int]) -> int:
    """Bytes beyond the weights while one video of these latents (C, F, H, W) becomes pixels."""
    return _over_frames(
        latent_shape[1], lambda frames: lambda: model.decode(_empty(1, latent_shape, frames)).sample.clamp(-1, 1), model
    )


def encode_peak(model: Any, latent_shape: tuple[int, int, int, int], batch: int, scale: tuple[int, int]) -> int:
    """Bytes beyond the weights while `batch` videos become latents of this shape. scale: of the VAE, (space, time)."""
    space, time = scale

    def run(frames: int) -> Callable[[], object]:
        shape = (3, time * (frames - 1) + 1, latent_shape[2] * space, latent_shape[3] * space)
        return lambda: model.encode(_empty(batch, shape)).latent_dist.mode()

    return _over_frames(latent_shape[1], run, model)


def _over_frames(frames: int, run: Callable[[int], Callable[[], object]], model: nn.Module) -> int:
    """The VAE goes frame by frame, so what it holds grows by the same for each: two short clips tell."""
    if frames <= 4:
        return work_of(model, run(frames)).peak
    short, longer = (work_of(model, run(count)).peak for count in (3, 4))
    return short + (frames - 3) * (longer - short)


def _empty(batch: int, shape: tuple[int, int, int, int], frames: int | None = None) -> Tensor:
    return torch.empty((batch, shape[0], frames or shape[1], *shape[2:]), device=META)
