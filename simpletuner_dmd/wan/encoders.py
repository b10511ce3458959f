"""VAE and UMT5 as the data room and the validation want them: loaded at first use, dropped when told.

Latents are normalised by the VAE's own statistics, (z - mean) / std per channel, so that they are near N(0, 1).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.wan.loading import Storage, load_text_encoder, load_vae, vae_config
from simpletuner_dmd.wan.offload import offload_in_groups
from simpletuner_dmd.wan.sources import ModelSource


def _nothing() -> None:
    """No room has to be made."""


class TextEncoder:
    """UMT5 as a callable: prompts -> real rows of their embeddings.

    make_room: called before it is loaded. group_offload: its layers visit the device one after the other.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        dtype: torch.dtype,
        storage: Storage,
        max_length: int,
        device: torch.device,
        make_room: Callable[[], None] = _nothing,
        group_offload: bool = False,
    ) -> None:
        self.source, self.dtype, self.storage = source, dtype, storage
        self.max_length, self.device = max_length, device
        self.make_room, self.group_offload = make_room, group_offload
        self._loaded: tuple[Any, nn.Module] | None = None

    @property
    def fingerprint(self) -> str:
        weights = self.source.fingerprint("text_encoder")
        return f"umt5:{weights}:{self.dtype}:{self.storage.precision}:{self.max_length}"

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[Tensor]:
        """Per prompt [L_i, D] in the encoder's dtype on the CPU: its real rows, without padding.

        Prompts are cleaned as WanPipeline cleans them, so training and sampling see the same text.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokenizer, encoder = self._load()
        tokens = tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.device)
        rows = encoder(tokens.input_ids.to(self.device), mask).last_hidden_state
        return [row[:length].cpu().clone() for row, length in zip(rows, mask.sum(dim=1).tolist(), strict=True)]

    def _load(self) -> tuple[Any, nn.Module]:
        if self._loaded is None:
            self.make_room()
            tokenizer, encoder = load_text_encoder(self.source, self.dtype, self.storage)
            if self.group_offload:
                offload_in_groups(encoder, self.device)
            else:
                encoder.to(self.device)
            self._loaded = tokenizer, encoder
        return self._loaded

    def unload(self) -> None:
        self._loaded = None
        _free(self.device)


class VideoCodec:
    """Wan's VAE between pixels in [-1, 1] and normalised latents.

    tiling: works on overlapping tiles of a frame. slicing: on one video of a batch at a time. make_room,
    group_offload: as of TextEncoder.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        device: torch.device,
        tiling: bool = False,
        slicing: bool = False,
        make_room: Callable[[], None] = _nothing,
        group_offload: bool = False,
    ) -> None:
        self.source, self.device, self.tiling, self.slicing = source, device, tiling, slicing
        self.make_room, self.group_offload = make_room, group_offload
        self._vae: Any = None

    @property
    def fingerprint(self) -> str:
        tiled = ":tiled" if self.tiling else ""  # the seams are blended, so the latents differ
        return f"wan-vae:{self.source.fingerprint('vae')}{tiled}"

    @property
    def config(self) -> dict[str, Any]:
        """The VAE's config.json, without its weights."""
        return vae_config(self.source)

    @property
    def vae(self) -> Any:
        if self._vae is None:
            self.make_room()
            vae: Any = load_vae(self.source)
            if self.tiling:
                vae.enable_tiling()
            if self.slicing:
                vae.enable_slicing()
            if self.group_offload:
                offload_in_groups(vae, self.device)
            else:
                vae.to(self.device)
            self._vae = vae
        return self._vae

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        shape = (1, -1, 1, 1, 1)
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return mean.view(shape).to(self.device), std.view(shape).to(self.device)

    @torch.no_grad()
    def encode(self, pixels_B3THW: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] to normalised latents [B, C, F, h, w], fp32 on the CPU; T must be 4n+1.

        The mode of the posterior: a cached sample would freeze one random draw for the whole run.
        """
        frames = pixels_B3THW.shape[2]
        assert (frames - 1) % 4 == 0, f"the VAE would silently drop frames of {frames}; it takes 4n+1"
        mean, std = self._statistics()
        latents = self.vae.encode(pixels_B3THW.to(self.device, torch.float32)).latent_dist.mode()
        return ((latents - mean) / std).cpu()

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Normalised latents to pixels [B, 3, T, H, W] in [-1, 1], fp32 on the CPU."""
        mean, std = self._statistics()
        return self.vae.decode(latents_BCFHW.to(self.device, torch.float32) * std + mean).sample.clamp(-1, 1).cpu()

    def unload(self) -> None:
        self._vae = None
        _free(self.device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
