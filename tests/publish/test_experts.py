"""Two experts as two LoRAs, two LyCORIS networks, and a full network with a LoRA: files, sampler.py, snippet, card."""

from __future__ import annotations

import ast
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel

from simpletuner_dmd.config.methods.dcm import DcmConfig
from simpletuner_dmd.flow import Experts, Schedule, sample_few_step
from simpletuner_dmd.publish.experts import experts_sampler_file
from simpletuner_dmd.publish.export import LowNoiseLora, export_full, export_lora
from simpletuner_dmd.publish.fresh_process import _load_sampler, check_export
from simpletuner_dmd.publish.info import TeacherLora
from simpletuner_dmd.publish.load_back import compare_dialects
from simpletuner_dmd.publish.lycoris import export_lycoris
from simpletuner_dmd.validation.sampling import BlockSampling, reference_noise

from .conftest import ALPHA, RANK, SHAPE, WanDenoiser, make_info, merged, text_of
from .test_load_back import run_user_code

SEED = 3
LADDER = Schedule(1.0, (1.0, 0.9, 0.757, 0.522))
BOUNDARY = 0.8
KINDS = ["lora", "lokr", "lycoris full", "full"]
LAYERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.attn1.to_v")


def lycoris_network(kind, seed):
    """Tensors as lycoris names them, and the change of each weight and bias by hand."""
    generator = torch.Generator().manual_seed(seed)
    tensors, changes = {}, {}
    for layer in LAYERS:
        name = "lycoris_" + layer.replace(".", "_")
        if kind == "lokr":
            small, large = (0.3 * torch.randn(size, size, generator=generator) for size in (4, 12))
            tensors |= {f"{name}.lokr_w1": small, f"{name}.lokr_w2": large}
            changes[layer] = (torch.kron(small, large), torch.zeros(48))
        else:
            weight, bias = (0.1 * torch.randn(shape, generator=generator) for shape in ((48, 48), (48,)))
            tensors |= {f"{name}.diff": weight, f"{name}.diff_b": bias}
            changes[layer] = (weight, bias)
    return tensors, changes


def alphas_of(tensors):
    return {key.partition(".")[0]: 1.0 for key in tensors if ".lokr" in key}


@torch.no_grad()
def changed(base_folder, changes):
    model = WanTransformer3DModel.from_pretrained(base_folder, subfolder="transformer", dtype=torch.float32).eval()
    for layer, (weight, bias) in changes.items():
        model.get_submodule(layer).weight += weight
        model.get_submodule(layer).bias += bias
    return model


def ship(folder, base_folder, lora, kind, **changes):
    """Writes the export; returns both networks, made by hand."""
    other = {key: tensor.flip(0) for key, tensor in lora.items()}
    info = make_info(LADDER, "ode", method="dcm", boundary=BOUNDARY, model_type="full" if kind == "full" else "lora",
                     adapter="lycoris" if kind in ("lokr", "lycoris full") else "standard", **changes)  # fmt: skip
    low = merged(base_folder, other, ALPHA / RANK)
    if kind == "lora":
        export_lora(folder, lora, rank=RANK, alpha=ALPHA, info=info, low_noise=other)
        return merged(base_folder, lora, ALPHA / RANK), low
    if kind == "full":
        high = merged(base_folder, lora, 1.0)
        export_full(folder, high, info, low_noise=LowNoiseLora(other, RANK, ALPHA))
        return high, low
    algo = kind.removeprefix("lycoris ")
    networks = [lycoris_network(algo, seed) for seed in (1, 2)]
    alphas = alphas_of(networks[0][0])
    export_lycoris(folder, networks[0][0], alphas=alphas, multiplier=1.0, rank=4, description={"algo": algo}, info=info,
                   low_noise=(networks[1][0], alphas))  # fmt: skip
    high, low = (changed(base_folder, change) for _, change in networks)
    return high, low


def reference(high, low, prompt_embeds, boundary=BOUNDARY):
    noise, fresh = reference_noise(SEED, SHAPE)
    experts = Experts(WanDenoiser(high), WanDenoiser(low), boundary)
    return sample_few_step(experts, noise, text_of(prompt_embeds), LADDER, "ode", fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_both_experts_load_back(tmp_path, pipeline, base_folder, lora, prompt_embeds, kind):
    high, low = ship(tmp_path, base_folder, lora, kind)
    before, transformer = {k: v.clone() for k, v in pipeline.transformer.state_dict().items()}, pipeline.transformer

    def check(latents):
        return check_export(
            pipeline, tmp_path, prompt_embeds=prompt_embeds, shape=SHAPE, seed=SEED, reference_latents=latents,
            sigmas=LADDER.ladder, shift=1.0, renoise="ode", max_sequence_length=16,
        )  # fmt: skip

    result = check(reference(high, low, prompt_embeds))
    assert result.passed and result.relative_error < 1e-4, result.message
    for wrong in (reference(low, high, prompt_embeds), reference(high, high, prompt_embeds),
                  reference(high, low, prompt_embeds, boundary=0.7)):  # fmt: skip
        assert check(wrong).relative_error > 1e-2
    assert pipeline.transformer is transformer and pipeline.transformer_2 is None
    assert pipeline.config.boundary_ratio is None
    after = transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_second_file_fails(tmp_path, base_folder, lora, kind):
    ship(tmp_path, base_folder, lora, kind)
    adapter = json.loads((tmp_path / "distill.json").read_text())["adapter"]
    assert len(adapter["low_noise_files"]) == (1 if kind == "full" else 2)
    assert compare_dialects(tmp_path) is None
    (tmp_path / adapter["low_noise_files"][-1]).unlink()
    assert "is missing" in compare_dialects(tmp_path)


def snippet_of(folder, base_folder):
    snippet = json.loads((folder / "distill.json").read_text())["snippet"]
    return snippet.replace("path/to/export", str(folder)).replace('base = "', f'base = "{base_folder.parent}/')


@pytest.fixture
def fresh_sampler(monkeypatch):
    """`from sampler import …` finds the file of this test."""
    monkeypatch.delitem(sys.modules, "sampler", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("sampler", None)


@pytest.mark.usefixtures("fresh_sampler")
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_a_user_copies_runs_and_agrees(tmp_path, monkeypatch, base_folder, lora, kind):
    ship(tmp_path, base_folder, lora, kind, trained_sizes=((32, 32, 9),), base=str(base_folder))
    sampler = tmp_path / "sampler.py"
    ours, _ = run_user_code(monkeypatch, sampler.read_text(),
                            (str(sampler), 'a "red" circle', "out.mp4", str(base_folder)))  # fmt: skip
    card, _ = run_user_code(monkeypatch, snippet_of(tmp_path, base_folder))
    assert ours.shape == (9, 32, 32, 3)
    assert abs(ours - card).max() < 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"split_index": 20}, {"sigma_split": 0.9}, {"dcm_shift": 3, "euler_timesteps": 20},
                {"denoising_steps": (1000.0, 992.0, 982.0, 975.409836, 937.0, 838.0)}],
)  # fmt: skip
def test_the_pipeline_switches_where_training_does(tmp_path, options):
    """A step exactly at the split is the detail expert's, in the fp32 timesteps that the pipeline compares too."""
    settings = DcmConfig(**options)
    schedule = Schedule(1.0, tuple(timestep / 1000 for timestep in settings.timesteps(1.0)))
    info = make_info(schedule, "ode", boundary=settings.boundary, model_type="full")
    (tmp_path / "sampler.py").write_text(experts_sampler_file(info))
    sampler = _load_sampler(tmp_path / "sampler.py")
    scheduler = sampler.few_step_scheduler()
    scheduler.set_timesteps(schedule.ladder)
    threshold = sampler.BOUNDARY * scheduler.config.num_train_timesteps  # as pipeline_wan.py computes it
    found = [bool(t >= threshold) for t in scheduler.timesteps]
    assert found == [sigma > settings.split + 1e-9 for sigma in schedule.ladder]
    assert True in found and False in found


def card_of(folder):
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_names_both_experts(tmp_path, base_folder, lora, kind):
    ship(tmp_path, base_folder, lora, kind)
    card = card_of(tmp_path)
    assert "two experts" in card and "the first 2 of 4 steps, from sigma 0.8" in card
    assert ("`boundary_ratio`" in card) == (kind == "full") == ("`switch_expert`" not in card)
    assert ("comfyui/my-run-low-noise.safetensors" in card) == (kind != "full") == ("comfyui" in card)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "load_experts(pipe, source)" in code and ("switch_expert" in code) == (kind != "full")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_distilled_fine_tune_is_under_both_experts(tmp_path, base_folder, lora, kind):
    ship(tmp_path, base_folder, lora, kind, teacher_lora=TeacherLora("style.safetensors", 0.8))
    code = re.search(r"```python\n(.*?)```", card_of(tmp_path), re.DOTALL)[1]
    for text in (code, (tmp_path / "sampler.py").read_text()):
        ast.parse(text)
        assert text.index("fuse_lora(lora_scale=0.8)") < text.rindex("load_experts(pipe")
    if kind == "lora":
        graph = json.loads((tmp_path / "comfyui" / "workflow.json").read_text())
        assert graph["20"]["inputs"]["model"] == graph["2"]["inputs"]["model"] == ["17", 0]


@pytest.mark.usefixtures("fresh_sampler")
@pytest.mark.parametrize("kind", ["lora", "lokr", "full"])
def test_a_causal_export_promises_what_it_does(tmp_path, monkeypatch, base_folder, lora, kind):
    info = make_info(LADDER, "sde", method="self_forcing", blocks=BlockSampling(1), vae_scale=(8, 4),
                     trained_sizes=((32, 32, 9),), base=str(base_folder), model_type="full" if kind == "full" else
                     "lora", adapter="lycoris" if kind == "lokr" else "standard")  # fmt: skip
    if kind == "full":
        export_full(tmp_path, merged(base_folder, lora, 1.0), info)
    elif kind == "lora":
        export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info, formats=("diffusers",))
    else:
        tensors, _ = lycoris_network("lokr", 1)
        alphas = alphas_of(tensors)
        export_lycoris(tmp_path, tensors, alphas=alphas, multiplier=1.0, rank=4, description={}, info=info, formats=())
    card = card_of(tmp_path).lower()
    assert "block by block" in card
    assert not any(word in card for word in ("comfyui", "num_inference_steps", "guidance_scale", "sd-lora", "lcm"))
    sampler = tmp_path / "sampler.py"
    ours, _ = run_user_code(monkeypatch, sampler.read_text(),
                            (str(sampler), 'a "red" circle', "out.mp4", str(base_folder)))  # fmt: skip
    copied, _ = run_user_code(monkeypatch, snippet_of(tmp_path, base_folder))
    assert ours.shape == (9, 32, 32, 3)
    assert abs(ours - copied).max() < 1e-3


def test_a_hub_snippet_downloads_what_it_runs(tmp_path, base_folder, lora):
    ship(tmp_path, base_folder, lora, "lokr", hub_repo="someone/student")
    code = json.loads((tmp_path / "distill.json").read_text())["snippet"]
    ast.parse(code)
    assert code.index('source = snapshot_download("someone/student")') < code.index("sys.path.insert(0, source)")


def test_lycoris_experts_never_act_together(tmp_path, pipeline, base_folder, lora):
    """After each switch a layer's output is that of exactly one network; twice around, as for two videos."""
    high, low = ship(tmp_path, base_folder, lora, "lycoris full")
    sampler, x = _load_sampler(tmp_path / "sampler.py"), torch.randn(1, 5, 48)
    layer = pipeline.transformer.get_submodule(LAYERS[0])
    bare = layer(x).detach()
    sampler.load_experts(pipeline, tmp_path)
    at = SimpleNamespace(high=high.get_submodule(LAYERS[0])(x), low=low.get_submodule(LAYERS[0])(x))
    for _ in range(2):
        for step, expected in enumerate((at.high, at.low, at.low, at.high)):
            sampler.switch_expert(pipeline, step, None, {})
            assert torch.allclose(layer(x), expected, atol=1e-5)
    sampler.put_on(pipeline, None)
    assert torch.equal(pipeline.transformer.get_submodule(LAYERS[0])(x), bare)
