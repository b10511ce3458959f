"""A Wan pipeline folder with random weights, made of the stock classes: small enough for a whole run in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from simpletuner_dmd.demo.build import save_index
from simpletuner_dmd.demo.skeleton import TEXT_WIDTH, save_text_parts
from simpletuner_dmd.demo.train_vae import build_vae


def build_small_transformer(seed: int = 0, layers: int = 2, **changes: Any) -> WanTransformer3DModel:
    """Width 32, 18 thousand parameters a block."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**shape, **changes})


def save_small_pipeline(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """A folder that `WanPipeline.from_pretrained` opens: 8x in space, 4x in time, 16 latent channels."""
    save_text_parts(folder, seed)
    build_small_transformer(seed, layers).save_pretrained(folder / "transformer")
    torch.manual_seed(seed)
    build_vae().save_pretrained(folder / "vae")
    save_index(folder)
    return folder


def _index(folder: Path, **changes: Any) -> Path:
    """model_index.json with these entries; "out" takes one away."""
    file = folder / "model_index.json"
    index = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in index.items() if value != "out"}), encoding="utf-8")
    return folder


def save_small_pair(folder: Path) -> Path:
    """As Wan 2.2 A14B: two networks, which change at 0.875."""
    save_small_pipeline(folder)
    build_small_transformer(seed=1).save_pretrained(folder / "transformer_2")
    return _index(folder, transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)


def save_small_ti2v(folder: Path) -> Path:
    """As Wan 2.2 TI2V-5B: a VAE of 16x in space with other channels, and one timestep per token."""
    channels = 8
    save_text_parts(folder, 0)
    build_small_transformer(in_channels=channels, out_channels=channels).save_pretrained(folder / "transformer")
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2, is_residual=True,
        scale_factor_spatial=16, scale_factor_temporal=4, latents_mean=[0.1] * channels, latents_std=[1.5] * channels,
    ).save_pretrained(folder / "vae")  # fmt: skip
    save_index(folder)
    return _index(folder, expand_timesteps=True)


def save_small_host(folder: Path) -> Path:
    """As Wan 2.1 I2V: 20 more input channels, and layers that read the embedding of a picture."""
    save_small_pipeline(folder)
    host = build_small_transformer(in_channels=36, image_dim=24, added_kv_proj_dim=32)
    host.save_pretrained(folder / "transformer")
    encoder = ["transformers", "CLIPVisionModel"]
    return _index(folder, _class_name="WanImageToVideoPipeline", image_encoder=encoder,
                  image_processor=["transformers", "CLIPImageProcessor"], expand_timesteps="out")  # fmt: skip
