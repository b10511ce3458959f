"""The parts of the tiny Wan pipeline that are built rather than trained: tokenizer, UMT5, scheduler, transformer shape.

UMT5 stays random and frozen: at this size its embeddings only have to differ between prompts, and they do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from simpletuner_dmd.demo import shapes

TEXT_WIDTH = 64
TEXT_ROWS = 16  # tokenizer_max_length of the demo: padding to Wan's 512 rows would cost ten times the video itself
SHIFT = 3.0


def build_tokenizer() -> T5Tokenizer:
    """Whole words of the demo's captions, then letters, so that any text has tokens."""
    words = ["a", "moves", *shapes.SHAPES, *shapes.COLOURS, *shapes.DIRECTIONS]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    vocabulary += [(f"\u2581{word}", -1.0 - 0.01 * index) for index, word in enumerate(words)]
    vocabulary += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def build_text_encoder(vocabulary_size: int, seed: int) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
        )
    )
    return encoder.requires_grad_(False).eval()


def build_transformer(seed: int) -> WanTransformer3DModel:
    """The stock Wan transformer: 4 blocks of width 128, 48 tokens for a clip of 9 frames at 64 x 64."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def save_text_parts(out: Path, seed: int) -> None:
    """Writes tokenizer/, text_encoder/ and scheduler/ of the pipeline folder."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    build_text_encoder(len(tokenizer), seed).save_pretrained(out / "text_encoder")
    build_scheduler().save_pretrained(out / "scheduler")
