"""How far right files are from the training sampler where the base computes in bf16, and what the limit still tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, set_peft_model_state_dict

from simpletuner_dmd.demo.path import model_path
from simpletuner_dmd.flow import TextEmbedding, sample_few_step
from simpletuner_dmd.publish.export import export_lora
from simpletuner_dmd.publish.fresh_process import TOLERANCES, check_export, stock_pipeline
from simpletuner_dmd.validation.sampling import reference_noise
from simpletuner_dmd.wan.denoiser import WanDenoiser

from .conftest import SDE3, make_info

SHAPE, SEED, RANK = (1, 16, 3, 8, 8), 0, 4
TARGETS = ("attn1.to_q", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2")


def demo_wan() -> WanTransformer3DModel:
    network = WanTransformer3DModel.from_pretrained(model_path(), subfolder="transformer", dtype=torch.bfloat16)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student():
    """(LoRA, prompt, latents): the trained demo Wan in bf16 with a LoRA in fp32, as training computes it."""
    torch.manual_seed(0)
    network, lora = demo_wan(), {}
    text = torch.randn(1, 16, network.config.text_dim)
    text[:, 6:] = 0
    for block in range(network.config.num_layers):
        for target in TARGETS:
            name = f"blocks.{block}.{target}"
            out, inner = network.get_submodule(name).weight.shape
            lora[f"{name}.lora_A.weight"] = torch.randn(RANK, inner) / inner**0.5
            lora[f"{name}.lora_B.weight"] = torch.randn(out, RANK) * 0.1
    modules = sorted({key.split(".lora_")[0] for key in lora})
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules), "trained")
    set_peft_model_state_dict(network, lora, adapter_name="trained")
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    noise, fresh = reference_noise(SEED, SHAPE)
    with torch.no_grad():
        latents = sample_few_step(WanDenoiser(network, None, None), noise, TextEmbedding(text), SDE3, "sde", fresh)
    return lora, text, latents


@pytest.mark.parametrize(("strength", "low", "high"), [(1.0, 5e-3, 2.5e-2), (1.2, 2e-2, 5e-2), (2.0, 7e-2, 1.0)])
def test_right_files_are_well_within_the_limit_and_wrong_ones_beyond(
    tmp_path: Path, student, strength: float, low: float, high: float
) -> None:
    """Rounding alone is 1% here; a fifth too strong is 3% of the latents and passes; twice as strong does not."""
    lora, text, latents = student
    export_lora(tmp_path, lora, rank=RANK, alpha=RANK * strength, info=make_info())
    result = check_export(
        stock_pipeline(demo_wan(), None, (8, 4), "cpu"), tmp_path, prompt_embeds=text, shape=SHAPE, seed=SEED,
        reference_latents=latents, sigmas=SDE3.ladder, shift=SDE3.shift, renoise="sde", max_sequence_length=16,
    )  # fmt: skip
    assert low < result.relative_error < high, result.message
    assert result.passed is (result.relative_error <= TOLERANCES["bfloat16"])
