"""A student that is one of a base's own two networks, with the other's student kept beside: files, sampler.py, card."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from simpletuner_dmd.flow import Experts, Schedule, sample_few_step
from simpletuner_dmd.publish.export import export_full, export_lora
from simpletuner_dmd.publish.fresh_process import check_export
from simpletuner_dmd.publish.info import NativeExpert
from simpletuner_dmd.publish.lycoris import export_lycoris
from simpletuner_dmd.validation.sampling import reference_noise

from .conftest import ALPHA, RANK, SHAPE, WanDenoiser, make_info, merged, text_of
from .test_experts import alphas_of, changed, lycoris_network

LADDER = Schedule(5.0, (1.0, 0.9375, 0.8333, 0.625))
FLAVOUR = {"high": "t2v-14b-2.2-high", "low": "t2v-14b-2.2-low"}
SEED = 3


def ship(folder, base_folder, lora, kind, expert, other=None):
    """Writes one expert's export; returns its network, made by hand."""
    info = make_info(
        LADDER, "sde", flavour=FLAVOUR[expert], native=NativeExpert(expert, 0.875, other), base=str(base_folder),
        model_type="full" if kind == "full" else "lora", adapter="lycoris" if kind == "lokr" else "standard",
        trained_sizes=((32, 32, 9),), run_name=f"my {kind}",
    )  # fmt: skip
    if kind == "lora":
        export_lora(folder, lora, rank=RANK, alpha=ALPHA, info=info)
        return merged(base_folder, lora, ALPHA / RANK)
    if kind == "full":
        network = merged(base_folder, lora, 1.0)
        export_full(folder, network, info)
        return network
    tensors, changes = lycoris_network("lokr", 1)
    export_lycoris(folder, tensors, alphas=alphas_of(tensors), multiplier=1.0, rank=4, description={"algo": "lokr"},
                   info=info)  # fmt: skip
    return changed(base_folder, changes)


@pytest.fixture
def both(base_folder):
    """The base as a pipeline of two networks, both the same."""
    second = WanTransformer3DModel.from_pretrained(base_folder, subfolder="transformer", dtype=torch.float32)
    pipeline = WanPipeline.from_pretrained(base_folder, dtype=torch.float32, transformer_2=second, boundary_ratio=0.875)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("own", "other"), [("lora", "full"), ("lokr", "lora"), ("full", "lokr")])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_pair_loads_back(tmp_path, both, base_folder, lora, prompt_embeds, own, other, expert):
    second = {key: tensor.flip(0) for key, tensor in lora.items()}
    partner = "low" if expert == "high" else "high"
    theirs = ship(tmp_path / "other", base_folder, second, other, partner)
    mine = ship(tmp_path / "own", base_folder, lora, own, expert, tmp_path / "other")
    networks = {expert: WanDenoiser(mine), partner: WanDenoiser(theirs)}
    noise, fresh = reference_noise(SEED, SHAPE)

    def sampled(boundary):
        experts = Experts(networks["high"], networks["low"], boundary)
        return sample_few_step(experts, noise, text_of(prompt_embeds), LADDER, "sde", fresh)

    result = check_export(
        both, tmp_path / "own", prompt_embeds=prompt_embeds, shape=SHAPE, seed=SEED,
        reference_latents=sampled(0.875), sigmas=LADDER.ladder, shift=LADDER.shift, renoise="sde",
        max_sequence_length=16,
    )  # fmt: skip
    assert result.passed and result.relative_error < 1e-4, result.message


def test_the_card_and_the_graph_say_which_expert(tmp_path, base_folder, lora):
    ship(tmp_path / "low", base_folder, lora, "lora", "low")
    ship(tmp_path / "high", base_folder, lora, "lora", "high", tmp_path / "low")
    document = json.loads((tmp_path / "high" / "distill.json").read_text())
    assert document["experts"] == {"expert": "high", "transformer": "transformer", "boundary": 0.875,
                                   "high_noise_steps": 2, "other": "other_expert"}  # fmt: skip
    card = (tmp_path / "high" / "README.md").read_text()
    assert "high-noise expert (`transformer`), sigma 0.875 and above: it makes 1000, 937.5" in card
    assert 'load_experts(pipe, source, "path/to/the/other' in (tmp_path / "low" / "README.md").read_text()
    graph = json.loads((tmp_path / "high" / "comfyui" / "workflow.json").read_text())
    names = [graph[node]["inputs"]["lora_name"] for node in ("2", "20")]
    assert names == ["my-lora-high-noise.safetensors", "my-lora-low-noise.safetensors"]
    assert [graph[node]["inputs"]["unet_name"].split("_")[2] for node in ("1", "25")] == ["high", "low"]
    alone = json.loads((tmp_path / "low" / "comfyui" / "workflow.json").read_text())
    assert alone["2"]["inputs"]["lora_name"] == "your-high-noise-lora.safetensors"
    for folder in ("high", "low"):
        functions = runpy.run_path(str(tmp_path / folder / "sampler.py"))
        assert {"few_step_scheduler", "load_own", "load_experts"} <= set(functions)
