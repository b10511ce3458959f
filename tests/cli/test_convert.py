"""`configure --from`: configurations of three other tools, their guidance and ladders in this one's meaning."""

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.cli import check
from simpletuner_dmd.cli.convert import convert
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.cli.wizard import gpu
from simpletuner_dmd.config import UserError

SCRIPT = """#!/bin/bash
NUM_GPUS=6
MODEL_PATH="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
# --real_score_guidance_scale 9
training_args=(
  --max_train_steps 4000
  --train_batch_size 1
  --num_latent_t 21
  --num_height 480
  --num_width 832
  --num_frames 81
)
torchrun --nproc_per_node="$NUM_GPUS" \\
  training/distillation_pipeline.py --num_gpus $NUM_GPUS --model_path "$MODEL_PATH" \\
  --data_path data/latents --learning_rate 2e-6 --flow_shift 8 --log_validation \\
  --dmd_denoising_steps '1000,757,522' --generator_update_interval 5 \\
  --real_score_guidance_scale 3.5 --use_ema True --ema_decay 0.99 --VSA_sparsity 0.8 \\
  "${training_args[@]}"
"""
SECTIONS = """
engine: {num_gpus: 64, parallelism: {sp_size: 4}}
pipeline: {flow_shift: 5.0, dmd_denoising_steps: [1000, 757, 522]}
training:
  data: {num_height: 704, num_width: 1280, num_frames: 121, num_latent_t: 31, train_batch_size: 1}
  optimizer: {learning_rate: 4.0e-06, betas: "0.0,0.999"}
  loop: {max_train_steps: 3000, gradient_accumulation_steps: 1}
  distillation: {generator_update_interval: 5, real_score_guidance_scale: 3.0, fake_score_learning_rate: 2.0e-06}
model_path: Wan-AI/Wan2.2-TI2V-5B-Diffusers
"""
MODULAR = """
models:
  student: {init_from: Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
  teacher: {init_from: Wan-AI/Wan2.1-T2V-14B-Diffusers}
method:
  _target_: train.methods.distribution_matching.self_forcing.SelfForcingMethod
  real_score_guidance_scale: 4.0
  dmd_denoising_steps: [1000, 750, 500, 250]
  warp_denoising_step: true
  chunk_size: 3
pipeline: {flow_shift: 5}
"""
SELF_FORCING = """
generator_ckpt: checkpoints/ode_init.pt
real_name: Wan2.1-T2V-14B
denoising_step_list: [1000, 750, 500, 250, 0]
warp_denoising_step: true
timestep_shift: 5.0
guidance_scale: 3.0
wandb_key: SECRET
lr: 2.0e-06
lr_critic: 4.0e-07
beta1: 0.0
beta2: 0.999
beta1_critic: 0.0
beta2_critic: 0.999
data_path: prompts.txt
batch_size: 1
total_batch_size: 64
ema_weight: 0.99
ema_start_step: 200
dfake_gen_update_ratio: 5
image_or_video_shape: [1, 21, 16, 60, 104]
trainer: score_distillation
num_frame_per_block: 3
same_step_across_blocks: true
"""
SIMPLETUNER = {
    "--model_type": "lora",
    "model_family": "wan",
    "distillation_method": "dmd",
    "distillation_config": {"dmd_denoising_steps": "1000,757,522", "real_score_guidance_scale": 3.0, "shift": 5.0},
    "checkpointing_steps": "100",
    "ignore_final_epochs": "true",
    "optimizer": "deepspeed-adamw",
    "snr_gamma": 5,
    "data_backend_config": "config/data.json",
    "whatever": 1,
}
ENV = """
export MODEL_TYPE='lora'
export MODEL_FAMILY="wan"
export RUN=mine  # a comment
export OUTPUT_DIR="output/$RUN"
export MAX_NUM_STEPS=300
#export NUM_EPOCHS=7
export FLUX=false
export TRAINER_EXTRA_ARGS="--lora_rank=8 --use_ema"
"""
D = "distillation_config."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "find", lambda: None)
    monkeypatch.setattr(check, "_print_plan", lambda *_: [])
    (tmp_path / "prompts.txt").write_text("a cat runs\n")
    return tmp_path


def converted(name: str, text: str) -> Any:
    Path(name).write_text(text)
    found = convert(Path(name))
    assert max(map(len, found.table())) <= 80
    return found


def flat(found: Any) -> dict[str, Any]:
    options = found.options()
    return {**options, **{D + key: value for key, value in options.pop("distillation_config", {}).items()}}


def test_a_script_of_fastvideo() -> None:
    found = converted("distill.sh", SCRIPT)
    options = flat(found)
    expected = {
        "distillation_method": "dmd", "model_type": "full", "model_flavour": "t2v-480p-1.3b-2.1",
        D + "real_score_guidance_scale": 4.5, D + "dmd_denoising_steps": "1000,757,522",
        "flow_schedule_shift": 8.0, D + "timestep_shift": 8.0, D + "fake_score_lr": 2e-6,
        D + "num_training_frames": 21, "gradient_accumulation_steps": 6, "max_train_steps": 4000,
        "validation_resolution": "832x480", "ema_decay": round(0.99**5, 6), D + "rollout": "simulate",
    }  # fmt: skip
    assert {key: options[key] for key in expected} == expected
    table = "\n".join(found.table())
    assert "real_score_guidance_scale 3.5\n    ->  distillation_config.real_score_guidance_scale 4.5" in table
    assert "VSA_sparsity 0.8\n      video-sparse attention is not available" in table


def test_fastvideo_in_sections() -> None:
    options = flat(converted("distill.yaml", SECTIONS))
    assert options["model_flavour"] == "ti2v-5b-2.2"
    assert (options[D + "real_score_guidance_scale"], options["flow_schedule_shift"]) == (4.0, 5.0)
    assert (options["learning_rate"], options[D + "fake_score_lr"], options["adam_beta1"]) == (4e-6, 2e-6, 0.0)
    assert (options["gradient_accumulation_steps"], options["validation_resolution"]) == (16, "1280x704")


def test_fastvideo_of_roles_has_the_ordinary_guidance() -> None:
    found = converted("sf.yaml", MODULAR)
    options = flat(found)
    assert (options["distillation_method"], options[D + "real_score_guidance_scale"]) == ("self_forcing", 4.0)
    assert (options[D + "warp_denoising_steps"], options[D + "num_frame_per_block"]) == (True, 3)
    assert any("teacher.init_from" in theirs for theirs, _ in found.left_out)


def test_self_forcing() -> None:
    found = converted("self_forcing_dmd.yaml", SELF_FORCING)
    options = flat(found)
    expected = {
        "distillation_method": "self_forcing", "model_type": "full", D + "real_score_guidance_scale": 4.0,
        D + "dmd_denoising_steps": "1000,750,500,250", D + "warp_denoising_steps": True,
        "flow_schedule_shift": 5.0, D + "timestep_shift": 5.0, D + "generator_update_interval": 5,
        "learning_rate": 2e-6, D + "fake_score_lr": 4e-7, D + "fake_score_betas": [0.0, 0.999],
        "ema_decay": 0.99, "ema_start_step": 40, "gradient_accumulation_steps": 64, "max_train_steps": 600,
        "validation_num_video_frames": 81, "validation_resolution": "832x480",
    }  # fmt: skip
    assert {key: options[key] for key in expected} == expected
    assert found.prompts == "prompts.txt" and "SECRET" not in "\n".join(found.table())
    from simpletuner_dmd.config.layers import options_layer
    from simpletuner_dmd.config.load import merge_options

    merged = merge_options([options_layer(found.options(), "x")], "x")
    assert [round(step, 1) for step in merged.options.student_timesteps()] == [1000, 937.5, 833.3, 625]


def test_self_forcing_of_a_whole_clip_is_dmd() -> None:
    found = converted("plus.yaml", SELF_FORCING + "causal: false\n")
    assert found.values["distillation_method"] == "dmd" and D + "num_frame_per_block" not in found.values
    assert any(theirs.startswith("num_frame_per_block") for theirs, _ in found.left_out)


def test_simpletuner_json_and_what_it_has_alone() -> None:
    Path("config").mkdir()
    Path("config/data.json").write_text('[{"id": "a", "instance_data_dir": "videos"}]')
    found = converted("config/config.json", json.dumps(SIMPLETUNER))
    options = flat(found)
    assert options[D + "real_score_guidance_scale"] == 3.0 and options["flow_schedule_shift"] == 5.0
    assert (options["checkpoint_step_interval"], options["strict_epoch_limit"]) == (100, False)
    assert found.datasets == [{"id": "a", "instance_data_dir": "videos"}]
    left = {theirs.split()[0] for theirs, _ in found.left_out}
    assert left == {"optimizer", "snr_gamma", "whatever"} and "optimizer" not in found.kept


def test_simpletuners_dcm_counts_guidance_from_zero() -> None:
    content = {"model_type": "lora", "distillation_method": "dcm",
               "distillation_config": {"dcm": {"distill_cfg": 5.0, "mode": "fine", "euler_steps": 40}}}  # fmt: skip
    options = flat(converted("config.json", json.dumps(content)))
    assert (options[D + "real_score_guidance_scale"], options[D + "mode"]) == (6.0, "detail")
    assert options[D + "euler_timesteps"] == 40


def test_simpletuner_env_and_toml() -> None:
    options = flat(converted("config.env", ENV))
    assert options == {
        "model_type": "lora", "model_family": "wan", "output_dir": "output/mine", "max_train_steps": 300,
        "lora_rank": 8, "use_ema": True,
    }  # fmt: skip
    assert flat(converted("config.toml", 'model_type = "full"\nseed = 3\n')) == {"model_type": "full", "seed": 3}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", '{"model_family": "flux"}', "model_family flux cannot be converted"),
        ("distill.sh", SCRIPT.replace("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-I2V-14B"), "its model is"),
        ("train.yaml", "a: 1", "is no configuration of"),
        ("train.yaml", "a: [", "cannot be parsed"),
        ("train.ini", "", "can be converted"),
    ],
)
def test_what_cannot_be_converted(name: str, text: str, said: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(UserError, match=said):
        convert(Path(name))


def test_the_verb_writes_what_was_converted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.yaml").write_text(SELF_FORCING)
    assert main(["configure", "--from", "theirs.yaml", "--non-interactive", "max_train_steps=50"]) == 0
    shown = capsys.readouterr().out
    assert "Changed:" in shown and "Left out:" in shown and "Ready to train." in shown
    assert "Left out:" in Path("config/converted.txt").read_text()
    config = json.loads(Path("config/config.json").read_text())
    assert config["max_train_steps"] == 50 and "recipe" not in config
    assert json.loads(Path("config/multidatabackend.json").read_text())[0]["instance_data_dir"] == "prompts.txt"


def test_the_verb_asks_for_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("distill.sh").write_text(SCRIPT)
    assert main(["configure", "--from", "distill.sh", "--non-interactive", "prompts=prompts.txt"]) == 0
    (entry,) = json.loads(Path("config/multidatabackend.json").read_text())
    assert (entry["resolution"], entry["video"]["num_frames"]) == ("832x480", 81)
