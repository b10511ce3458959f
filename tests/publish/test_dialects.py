"""Key names and alpha, against diffusers' own converter and a ComfyUI-style loader written from ComfyUI's rules."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

from simpletuner_dmd.publish.dialects import comfyui_module, to_comfyui, to_diffusers

from .conftest import ALPHA, RANK

# Names of Wan's own state dict, written out by hand from the original model's code.
ORIGINAL = {
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.12.ffn.net.2": "blocks.12.ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


def deltas(lora, scale):
    modules = {key.split(".lora_")[0] for key in lora}
    return {m: scale * lora[f"{m}.lora_B.weight"] @ lora[f"{m}.lora_A.weight"] for m in modules}


def comfyui_load(file, model_keys, strength=1.0):
    """ComfyUI's generic rules: "diffusion_model.<weight>" names a module of the original model; a missing alpha is
    scale 1, one that is there is alpha / rank; any other key is "lora key not loaded"."""
    patches, used = {}, set()
    for weight in model_keys:
        stem = f"diffusion_model.{weight.removesuffix('.weight')}"
        down, up = file.get(f"{stem}.lora_A.weight"), file.get(f"{stem}.lora_B.weight")
        if down is None or up is None:
            continue
        alpha = file.get(f"{stem}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        patches[weight] = strength * scale * up @ down
        used |= {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha"}
    return patches, set(file) - used


def test_names_are_those_of_the_original_model():
    assert {ours: comfyui_module(ours) for ours in ORIGINAL} == ORIGINAL


def test_strength_one_has_the_trained_effect_in_comfyui(lora):
    trained = deltas(lora, ALPHA / RANK)
    model_keys = [f"{comfyui_module(module)}.weight" for module in trained]
    patches, not_loaded = comfyui_load(to_comfyui(lora, rank=RANK, alpha=ALPHA), model_keys)
    assert not not_loaded
    assert len(patches) == len(trained)
    for module, delta in trained.items():
        torch.testing.assert_close(patches[f"{comfyui_module(module)}.weight"], delta, rtol=1e-5, atol=1e-6)


def test_diffusers_own_converter_turns_the_comfyui_file_into_the_diffusers_file(lora):
    converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(to_comfyui(lora, rank=RANK, alpha=ALPHA)))
    ours = to_diffusers(lora, rank=RANK, alpha=ALPHA)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[key], ours[key]) for key in ours)


def test_no_alpha_tensor_is_written(lora):
    for written in (to_comfyui(lora, rank=RANK, alpha=ALPHA), to_diffusers(lora, rank=RANK, alpha=ALPHA)):
        assert all("lora" in key and not key.endswith("alpha") for key in written)


def test_what_no_reader_would_apply_is_refused(lora):
    with pytest.raises(ValueError, match="not a LoRA factor"):
        to_diffusers({**lora, "proj_out.lora_B.bias": torch.ones(1)}, rank=RANK, alpha=ALPHA)
    magnitude = {"proj_out.lora_magnitude_vector.weight": torch.ones(1)}
    assert "transformer.proj_out.lora_magnitude_vector" in to_diffusers({**lora, **magnitude}, rank=RANK, alpha=ALPHA)
    with pytest.raises(ValueError, match="not a LoRA factor"):
        to_comfyui({**lora, **magnitude}, rank=RANK, alpha=ALPHA)
    with pytest.raises(ValueError, match="missing"):
        to_diffusers(magnitude, rank=RANK, alpha=ALPHA)
    with pytest.raises(ValueError, match="missing"):
        to_diffusers({k: v for k, v in lora.items() if k != "proj_out.lora_B.weight"}, rank=RANK, alpha=ALPHA)
    with pytest.raises(ValueError, match="no counterpart"):
        comfyui_module("blocks.0.attn3.to_q")
