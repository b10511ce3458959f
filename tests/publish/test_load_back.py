"""An export, opened by stock diffusers alone, samples what training's sampler does; it fails when it should."""

import json

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from simpletuner_dmd.flow import Schedule, sample_few_step, uniform_ladder
from simpletuner_dmd.publish.export import export_full, export_lora
from simpletuner_dmd.publish.fresh_process import check_export
from simpletuner_dmd.publish.load_back import compare_dialects
from simpletuner_dmd.validation.sampling import reference_noise

from .conftest import ALPHA, RANK, SDE3, SHAPE, WanDenoiser, make_info, merged, text_of

SEED = 11
UNIFORM4 = Schedule(5.0, uniform_ladder(4, 5.0))
LITERAL4 = Schedule(1.0, (1.0, 0.757, 0.522, 0.25))


def reference(model, prompt_embeds, schedule, renoise):
    noise, fresh = reference_noise(SEED, SHAPE)
    return sample_few_step(WanDenoiser(model), noise, text_of(prompt_embeds), schedule, renoise, fresh)


def check(pipeline, folder, prompt_embeds, latents, schedule, renoise, **options):
    return check_export(pipeline, folder, prompt_embeds=prompt_embeds, shape=SHAPE, seed=SEED,
                        reference_latents=latents, sigmas=schedule.ladder, shift=schedule.shift, renoise=renoise,
                        max_sequence_length=16,
                        **options)  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "renoise"),
    [(SDE3, "sde"), (SDE3, "ode"), (UNIFORM4, "sde"), (UNIFORM4, "ode"), (LITERAL4, "sde"), (LITERAL4, "ode"),
     (Schedule(5.0, (1.0,)), "sde")],
)  # fmt: skip
def test_lora_loads_back(tmp_path, pipeline, base_folder, lora, prompt_embeds, schedule, renoise):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(schedule, renoise))
    latents = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, schedule, renoise)
    before = (pipeline.scheduler, pipeline.transformer, torch.random.get_rng_state())
    result = check(pipeline, tmp_path, prompt_embeds, latents, schedule, renoise)
    assert result.passed, result.message
    assert result.relative_error < 1e-4
    # handed back as it came, the global generator too
    assert pipeline.scheduler is before[0]
    assert pipeline.transformer is before[1]
    assert not any("lora" in name for name in pipeline.transformer.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_the_adapter_matters_in_this_check(pipeline, base_folder, lora, prompt_embeds):
    with_lora = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, SDE3, "sde")
    without = reference(pipeline.transformer, prompt_embeds, SDE3, "sde")
    assert (with_lora - without).abs().max() > 0.1


@pytest.mark.parametrize("dialects", [("diffusers",), ("comfyui",)])
def test_each_dialect_alone_loads_back(tmp_path, pipeline, base_folder, lora, prompt_embeds, dialects):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(), formats=dialects)
    latents = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, SDE3, "sde")
    result = check(pipeline, tmp_path, prompt_embeds, latents, SDE3, "sde")
    assert result.passed, result.message


def test_half_precision_is_judged_by_its_own_tolerance(tmp_path, pipeline, base_folder, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(), dtype=torch.bfloat16)
    latents = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, SDE3, "sde")
    result = check(pipeline, tmp_path, prompt_embeds, latents, SDE3, "sde")
    assert result.passed, result.message
    assert result.relative_error > 1e-4


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_half_precision_base_still_tells_a_wrong_strength(tmp_path, base_folder, lora, prompt_embeds, scale):
    export_lora(tmp_path, lora, rank=RANK, alpha=scale * ALPHA, info=make_info())
    latents = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, SDE3, "sde")
    pipeline = WanPipeline.from_pretrained(base_folder, dtype=torch.bfloat16)
    result = check(pipeline, tmp_path, prompt_embeds, latents, SDE3, "sde")
    assert result.passed is (scale == 1.0), result.message
    assert result.relative_error > 1e-3


def rewrite(path, change):
    save_file({key: change(key, tensor) for key, tensor in load_file(path).items()}, path)


def test_a_wrong_strength_fails(tmp_path, pipeline, base_folder, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info())
    latents = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, SDE3, "sde")
    for file in tmp_path.glob("*/*.safetensors"):
        rewrite(file, lambda key, tensor: tensor * 1.05 if "lora_B" in key else tensor)
    result = check(pipeline, tmp_path, prompt_embeds, latents, SDE3, "sde")
    assert not result.passed
    assert "DIFFER" in result.message


def test_a_comfyui_file_that_differs_fails(tmp_path, lora):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info())
    assert compare_dialects(tmp_path) is None
    rewrite(tmp_path / "comfyui" / "my-run.safetensors", lambda key, tensor: tensor * 2 if "lora_B" in key else tensor)
    assert "comfyui/my-run.safetensors differs" in compare_dialects(tmp_path)


def test_names_that_diffusers_drops_without_an_error_fail(tmp_path, pipeline, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(), formats=("diffusers",))
    file = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    save_file({key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}, file)
    result = check(pipeline, tmp_path, prompt_embeds, torch.zeros(SHAPE), SDE3, "sde")
    assert not result.passed
    assert "no adapter" in result.message


def test_a_scheduler_that_leaves_the_ladder_fails(tmp_path, pipeline, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(UNIFORM4, "ode"))
    config = tmp_path / "diffusers" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 3.0}))
    result = check(pipeline, tmp_path, prompt_embeds, torch.zeros(SHAPE), UNIFORM4, "ode")
    assert not result.passed
    assert "sigmas are off" in result.message


def test_the_other_sampler_fails(tmp_path, pipeline, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(SDE3, "ode"))
    result = check(pipeline, tmp_path, prompt_embeds, torch.zeros(SHAPE), SDE3, "sde")
    assert not result.passed
    assert "renoise" in result.message


def test_not_a_number_fails(tmp_path, pipeline, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info())
    assert not check(pipeline, tmp_path, prompt_embeds, torch.full(SHAPE, float("nan")), SDE3, "sde").passed


@pytest.mark.parametrize(("schedule", "renoise"), [(SDE3, "sde"), (LITERAL4, "ode")])
def test_full_student_loads_back(tmp_path, pipeline, base_folder, lora, prompt_embeds, schedule, renoise):
    student = merged(base_folder, lora, 1.0)
    export_full(tmp_path, student, make_info(schedule, renoise, model_type="full"))
    latents = reference(student, prompt_embeds, schedule, renoise)
    result = check(pipeline, tmp_path, prompt_embeds, latents, schedule, renoise)
    assert result.passed, result.message
    other = reference(pipeline.transformer, prompt_embeds, schedule, renoise)
    assert not check(pipeline, tmp_path, prompt_embeds, other, schedule, renoise).passed


def test_supervised_lora_loads_back(tmp_path, pipeline, base_folder, lora, prompt_embeds):
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(Schedule(3.0), "sde", method=""))
    euler = Schedule(3.0, uniform_ladder(4, 3.0))
    latents = reference(merged(base_folder, lora, ALPHA / RANK), prompt_embeds, euler, "ode")
    result = check(pipeline, tmp_path, prompt_embeds, latents, euler, "ode")
    assert result.passed, result.message


def test_reference_noise_is_what_a_prompted_pipeline_draws(pipeline):
    torch.manual_seed(SEED)
    latents = pipeline.prepare_latents(1, 16, 32, 32, 9, torch.float32, torch.device("cpu"), None)
    first, fresh = reference_noise(SEED, SHAPE)
    assert torch.equal(first, latents)
    assert torch.equal(fresh(1, first), torch.randn(SHAPE))


def run_user_code(monkeypatch, code, argv=("sampler.py",)):
    """Runs code a user is given, on the CPU and in fp32; returns the video it would write."""
    videos = []
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda video, path, fps: videos.append((video, fps)))
    monkeypatch.setattr("sys.argv", list(argv))
    code = code.replace("torch.bfloat16", "torch.float32").replace('pipe.to("cuda")', 'pipe.to("cpu")')
    exec(compile(code, argv[0], "exec"), {"__name__": "__main__", "__file__": argv[0]})
    return videos[0]


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_the_code_a_user_copies_runs_and_agrees(tmp_path, monkeypatch, base_folder, lora, model_type):
    info = make_info(model_type=model_type, trained_sizes=((32, 32, 9),), base=str(base_folder))
    if model_type == "lora":
        export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info)
    else:
        export_full(tmp_path, merged(base_folder, lora, ALPHA / RANK), info)
    sampler = str(tmp_path / "sampler.py")
    ours, fps = run_user_code(monkeypatch, (tmp_path / "sampler.py").read_text(),
                              (sampler, info.prompt, "out.mp4", str(base_folder)))  # fmt: skip
    snippet = json.loads((tmp_path / "distill.json").read_text())["snippet"]
    snippet = snippet.replace("path/to/export", str(tmp_path)).replace('base = "', f'base = "{base_folder.parent}/')
    card, _ = run_user_code(monkeypatch, snippet)
    assert fps == 16
    assert ours.shape == (9, 32, 32, 3)
    assert abs(ours - card).max() < 1e-3


def test_lora_on_a_quantised_base_loads_back(tmp_path, pipeline, lora, prompt_embeds):
    """The base stays in the precision of training: int8 by quanto, LoRA beside it, as training computes it."""
    from optimum.quanto import freeze, qint8, quantize
    from peft import LoraConfig, set_peft_model_state_dict

    def quantised(model):
        quantize(model.blocks, weights=qint8)
        freeze(model.blocks)
        return model

    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info())
    quantised(pipeline.transformer)
    modules = sorted({key.split(".lora_")[0] for key in lora})
    pipeline.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules), "trained")
    set_peft_model_state_dict(pipeline.transformer, lora, adapter_name="trained")
    latents = reference(pipeline.transformer, prompt_embeds, SDE3, "sde")
    pipeline.unload_lora_weights()
    without = reference(pipeline.transformer, prompt_embeds, SDE3, "sde")
    assert (latents - without).abs().max() > 0.1
    result = check(pipeline, tmp_path, prompt_embeds, latents, SDE3, "sde")
    assert result.passed, result.message
