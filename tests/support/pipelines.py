"""A Wan pipeline folder with random weights, made of the stock classes: small enough for a whole run in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from simpletuner_dmd.demo.build import save_index
from simpletuner_dmd.demo.skeleton import TEXT_WIDTH, save_text_parts
from simpletuner_dmd.demo.train_vae import build_vae


def build_small_transformer(seed: int = 0, layers: int = 2) -> WanTransformer3DModel:
    """Width 32, 18 thousand parameters a block."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def save_small_pipeline(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """A folder that `WanPipeline.from_pretrained` opens: 8x in space, 4x in time, 16 latent channels."""
    save_text_parts(folder, seed)
    build_small_transformer(seed, layers).save_pretrained(folder / "transformer")
    torch.manual_seed(seed)
    build_vae().save_pretrained(folder / "vae")
    save_index(folder)
    return folder
