"""A random Wan pipeline of a few hundred kilobytes from the stock classes, and a LoRA on it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from simpletuner_dmd.flow import Schedule, TextEmbedding
from simpletuner_dmd.publish.info import ExportInfo

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
           "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")  # fmt: skip
OUTSIDE = ("condition_embedder.text_embedder.linear_1", "condition_embedder.time_proj", "proj_out")
SHAPE = (1, 16, 3, 4, 4)
RANK, ALPHA = 4, 10.0
SDE3 = Schedule(shift=1.0, ladder=(1.0, 0.757, 0.522))


def build_tokenizer(folder):
    """Words by spaces, saved and opened as a user's tokenizer is."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(c), -3.0) for c in range(97, 123))]
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None, "decoder": None,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The base as a diffusers pipeline folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True])  # fmt: skip
    text = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(folder), text_encoder=text, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def pipeline(base_folder):
    pipeline = WanPipeline.from_pretrained(base_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def lora(base_folder):
    """PEFT names without prefix; every module that a Wan LoRA may train."""
    model = WanTransformer3DModel.from_pretrained(base_folder, subfolder="transformer", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in [f"blocks.{block}.{target}" for block in range(2) for target in TARGETS] + list(OUTSIDE):
        out_features, in_features = model.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, RANK, generator=generator) * 0.1
    return tensors


@pytest.fixture(scope="session")
def prompt_embeds():
    rows = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
    rows[:, 5:] = 0
    return rows


def make_info(schedule=SDE3, renoise="sde", **changes):
    values = dict(
        run_name="my run", method="dmd", schedule=schedule, renoise=renoise, base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        base_hash="abc", trained_sizes=((64, 64, 9),), tokenizer_max_length=16, train_steps=200, weights="ema",
        validation_prompts=("a `red` [circle]",), validation_seed=42, validation_sizes=((64, 64, 9),),
        metrics={"dmd_loss": 0.5}, prompt='a "red" circle', tool_version="0.1.0",
    )  # fmt: skip
    return ExportInfo(**{**values, **changes})


class WanDenoiser:
    """The transformer as the few-step sampler of training sees it."""

    def __init__(self, transformer):
        self.transformer = transformer

    @torch.no_grad()
    def velocity(self, x_t_BCFHW, sigma, text, *, routed=False):
        return self.transformer(x_t_BCFHW, 1000 * sigma, text.rows_BLD, return_dict=False)[0]


def text_of(rows):
    return TextEmbedding(rows)


def merged(base_folder, lora, scale):
    """The base with scale * B A added to its weights by hand: the oracle for what strength 1 must mean."""
    model = WanTransformer3DModel.from_pretrained(base_folder, subfolder="transformer", dtype=torch.float32).eval()
    with torch.no_grad():
        for key in lora:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                model.get_submodule(name).weight += scale * lora[f"{name}.lora_B.weight"] @ lora[key]
    return model
