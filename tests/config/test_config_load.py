"""Finding, merging and checking configurations: what is written is what runs, and every mistake is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner_dmd.config import DmdConfig, LoadedConfig, TrainConfig, UserError, load

DATASET = {"id": "clips", "type": "local", "dataset_type": "video", "instance_data_dir": "videos"}
DMD = {"distillation_method": "dmd"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory with a data file."""
    (tmp_path / "config").mkdir()
    write(tmp_path / "config" / "multidatabackend.json", [DATASET])
    return tmp_path


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def loaded(home: Path, content: object, argv: list[str] | None = None, **environ: str) -> LoadedConfig:
    write(home / "config" / "config.json", content)
    return load(argv, environ=environ, cwd=home)


def problems(home: Path, content: object, argv: list[str] | None = None, **environ: str) -> dict[str, str]:
    """key -> "message | fix" of every problem."""
    with pytest.raises(UserError) as caught:
        loaded(home, content, argv, **environ)
    return {problem.key: f"{problem.message} | {problem.fix}" for problem in caught.value.problems}


# --- layers -----------------------------------------------------------------------------------------------------------


def test_later_layers_win_and_say_where_a_value_is_from(home: Path) -> None:
    content = {"learning_rate": 1e-4, "lora_rank": 8, "seed": 1, "output_dir": "output/here"}
    run = loaded(home, content, ["seed=3"], SIMPLETUNER_LORA_RANK="16", SIMPLETUNER_SEED="2")
    assert (run.config.learning_rate, run.config.lora_rank, run.config.seed) == (1e-4, 16, 3)
    assert run.origins["learning_rate"] == str(Path("config/config.json"))
    assert run.origins["lora_rank"] == "environment SIMPLETUNER_LORA_RANK"
    assert run.origins["seed"] == "command line"
    options = run.resolved_json()["options"]
    assert options["seed"] == {"value": 3, "origin": "command line"}
    assert options["validation_seed"] == {"value": 42, "origin": "default"}
    assert set(run.options()) == set(options)
    differences = run.differences_from_defaults()
    assert "seed = 3 (default 42), command line" in differences
    assert not [line for line in differences if line.startswith("validation_seed")]


def test_every_spelling_of_the_command_line(home: Path) -> None:
    argv = [
        "--lora_rank", "4", "--seed=5", "lora_alpha=2.5", "--use_ema", "train_batch_size=2",
        "--gradient-checkpointing", "false", "--distillation_config.fake_score_lr", "4e-7",
        "distillation_config.fake_score_betas=0,0.99", "--push_to_hub", "--lora_rank", "6",
    ]  # fmt: skip
    config = loaded(home, DMD, argv).config
    assert (config.lora_rank, config.seed, config.lora_alpha, config.train_batch_size) == (6, 5, 2.5, 2)
    assert (config.use_ema, config.push_to_hub, config.gradient_checkpointing) == (True, True, False)
    assert config.distillation.fake_score_lr == 4e-7
    assert config.distillation.fake_score_betas == (0.0, 0.99)


def test_quoted_values_and_dashes_are_read_as_what_they_mean(home: Path) -> None:
    content = {
        "--push_to_hub": "true",
        "--max_train_steps": "100",
        "learning_rate": "1e-5",
        "validation_prompt": "none",
        "ema_validation": "none",
        "lora_alpha": None,
        "lora_rank": 32,
        "resume_from_checkpoint": None,
        "report_to": "none",
        "validation_resolution": "832x480, 1280x704",
        "peft_lora_target_modules": "to_q,to_k",
    }
    config = loaded(home, content).config
    assert config.push_to_hub is True
    assert config.max_train_steps == 100
    assert config.learning_rate == 1e-5
    assert config.validation_prompt is None
    assert config.ema_validation == "none"
    assert config.lora_alpha == 32
    assert config.resume_from_checkpoint is None
    assert config.report_to == []
    assert config.validation_resolution == [(832, 480), (1280, 704)]
    assert config.peft_lora_target_modules == ["to_q", "to_k"]


def test_null_in_a_later_layer_takes_an_option_back_to_its_default(home: Path) -> None:
    assert loaded(home, {"lora_rank": 64}, ["lora_rank=none"]).config.lora_rank == 16


def test_aliases(home: Path) -> None:
    content = {
        "checkpointing_steps": 7,
        "validation_steps": 8,
        "save_total_limit": 9,
        "ignore_final_epochs": "true",
        "ema_warmup_steps": 3,
        "lr_scheduler": "cosine_with_warmup",
        "validation_prompt_library": False,
        "user_prompt_library": "prompts.json",
    }
    write(home / "prompts.json", {"cat": "a cat runs", "dog": {"prompt": "a dog sleeps"}})
    run = loaded(home, content)
    assert run.config.checkpoint_step_interval == 7
    assert run.config.validation_step_interval == 8
    assert run.config.checkpoints_total_limit == 9
    assert run.config.strict_epoch_limit is False
    assert run.config.ema_start_step == 3
    assert run.config.lr_scheduler == "cosine"
    assert run.validation_prompts == {"cat": "a cat runs", "dog": "a dog sleeps"}
    assert loaded(home, {"ignore_final_epochs": False, "num_train_epochs": 2}).config.strict_epoch_limit is True


def test_an_alias_beside_its_own_name_must_agree(home: Path) -> None:
    assert loaded(home, {"validation_steps": 8, "validation_step_interval": 8}).config.validation_step_interval == 8
    assert "twice" in problems(home, {"validation_steps": 8, "validation_step_interval": 9})["validation_step_interval"]


def test_settings_of_the_method_can_come_from_a_file_or_under_its_name(home: Path) -> None:
    write(home / "extra.json", {"distillation_config": {"student_steps": 4}})
    assert len(loaded(home, {**DMD, "distillation_config": "extra.json"}).config.student_timesteps()) == 4
    nested = {**DMD, "distillation_config": {"dmd": {"renoise": "ode", "fake_score_lr": 1e-3}}}
    run = loaded(home, nested, ["distillation_config.fake_score_lr=2e-3"])
    assert (run.config.distillation.renoise, run.config.distillation.fake_score_lr) == ("ode", 2e-3)
    assert "no file" in problems(home, {**DMD, "distillation_config": "absent.json"})["distillation_config"]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_search_order(home: Path) -> None:
    write(home / "config.json", {"seed": 1})
    write(home / "multidatabackend.json", [DATASET])
    assert load(environ={}, cwd=home).config.seed == 1
    write(home / "config" / "config.json", {"seed": 2})
    assert load(environ={}, cwd=home).config.seed == 2
    write(home / "config" / "mine" / "config.json", {"seed": 3, "data_backend_config": "multidatabackend.json"})
    assert load(env="mine", environ={}, cwd=home).config.seed == 3
    assert load(["env=mine"], environ={}, cwd=home).config.seed == 3
    assert load(config="config/mine", environ={}, cwd=home).config.seed == 3
    assert load(config=str(home / "config.json"), environ={}, cwd=home / "config").config.seed == 1


def test_a_failed_search_names_every_place(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(environ={}, cwd=tmp_path)
    assert str(Path("config/config.json")) in str(caught.value)
    assert "config.json" in str(caught.value)
    with pytest.raises(UserError, match=r"config.absent.config\.json"):
        load(env="absent", environ={}, cwd=tmp_path)
    with pytest.raises(UserError, match="choose one of: demo"):
        load(example="dmo", environ={}, cwd=tmp_path)
    with pytest.raises(UserError, match="both choose"):
        load(config="a", env="b", environ={}, cwd=tmp_path)


def test_the_demo_runs_only_where_nothing_is_found_and_nothing_was_asked_for(tmp_path: Path) -> None:
    run = load(environ={}, cwd=tmp_path, demo_if_none=True)
    assert run.config.pretrained_model_name_or_path == "demo"
    assert run.notices[0] == "No configuration found: running the example `demo`."
    with pytest.raises(UserError):
        load(["seed=1"], environ={}, cwd=tmp_path, demo_if_none=True)
    with pytest.raises(UserError):
        load(env="absent", environ={}, cwd=tmp_path, demo_if_none=True)


@pytest.mark.parametrize("name", ["demo", "demo-long"])
def test_examples_load_without_a_notice_they_could_avoid(tmp_path: Path, name: str) -> None:
    run = load(example=name, environ={}, cwd=tmp_path)
    assert run.config.output_dir == f"output/{name}"
    assert run.datasets[0].cache_dir_vae == str(tmp_path / "cache/demo/vae" / run.datasets[0].id)
    assert run.notices == []


def test_relative_paths_are_taken_from_the_working_directory_and_else_from_the_file(home: Path) -> None:
    write(home / "elsewhere" / "config.json", {"data_backend_config": "data.json"})
    beside = write(home / "elsewhere" / "data.json", [{**DATASET, "id": "beside"}])
    run = load(config="elsewhere/config.json", environ={}, cwd=home)
    assert run.datasets[0].id == "beside"
    assert run.resolve_path("data.json") == beside.resolve()
    write(home / "data.json", [{**DATASET, "id": "here"}])
    assert load(config="elsewhere/config.json", environ={}, cwd=home).datasets[0].id == "here"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once(home: Path) -> None:
    write(home / "config" / "multidatabackend.json", [{**DATASET, "resolutoin": 480}])
    content = {"learning_rte": 1, "lora_rank": "many", "max_train_steps": 0, "num_train_epochs": 0, **DMD,
               "distillation_config": {"fake_score_lrr": 1, "dmd_denoising_steps": "1000,500,600"}}  # fmt: skip
    found = problems(home, content, ["--mixed_precision=fp8"])
    assert "did you mean learning_rate?" in found["learning_rte"]
    assert 'found "many", must be a whole number' in found["lora_rank"]
    assert "both 0" in found["max_train_steps"]
    assert "did you mean distillation_config.fake_score_lr" in found["distillation_config.fake_score_lrr"]
    assert "decrease" in found["distillation_config.dmd_denoising_steps"]
    assert "must be one of: no, bf16, fp16" in found["mixed_precision"]
    assert "did you mean" in found['dataset "clips": resolutoin']
    assert len(found) == 7


def test_a_problem_names_its_file_and_the_text_shows_all(home: Path) -> None:
    with pytest.raises(UserError) as caught:
        loaded(home, {"lora_rank": -1}, ["seed=x"], SIMPLETUNER_TRAIN_BATCH_SIZE="0")
    files = {problem.key: problem.file for problem in caught.value.problems}
    assert files == {
        "lora_rank": str(Path("config/config.json")),
        "seed": "command line",
        "train_batch_size": "environment SIMPLETUNER_TRAIN_BATCH_SIZE",
    }
    text = str(caught.value)
    assert text.startswith("3 problems:")
    assert "found -1, must be at least 1" in text
    assert text.count("Fix: ") == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "seed": 1,\n  "lora_rank" 2\n}', "line 3 column 15"),
        ('{"seed": 1,}', "column 12"),
        ("", "empty"),
        ("// mine\n{}", "no comments"),
        ("[1]", "must hold one JSON object"),
        ('{"seed": 1, "seed": 2}', "written twice"),
        ('{"learning_rate": NaN}', "learning_rate"),
    ],
)
def test_malformed_json(home: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(home, text)
    assert expected in str(caught.value)


def test_unreadable_files(home: Path) -> None:
    (home / "config" / "config.json").write_bytes(b'{"output_dir": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        load(environ={}, cwd=home)
    assert "found no file" in problems(home, {"data_backend_config": "absent.json"})["data_backend_config"]


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"train_batch_size": True}, "train_batch_size", "not true or false"),
        ({"use_ema": "maybe"}, "use_ema", "true or false"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"validation_resolution": "big"}, "validation_resolution", "WIDTHxHEIGHT"),
        ({"report_to": "swanlab"}, "report_to", "must be one of: wandb, tensorboard, trackio"),
        ({"lora_init_type": "pissa"}, "lora_init_type", "not available yet in this version"),
        ({"optimizer_config": "d0=1"}, "optimizer_config", "adamw_bf16 has no setting 'd0'"),
        ({"optimizer": "prodigy", "optimizer_config": "d_coeff=1"}, "optimizer_config", "d_coef, growth_rate"),
        ({"optimizer": "torch-muon", "optimizer_config": "nesterov=3"}, "optimizer_config", "true or false"),
        ({"optimizer": "torch-muon", "optimizer_config": "ns_steps=2.5"}, "optimizer_config", "a whole number"),
        ({"optimizer": "torch-muon", "optimizer_config": "lr=1"}, "optimizer_config", "use learning_rate"),
        ({"optimizer": "torch-muon", "optimizer_config": "momentum"}, "optimizer_config", "pairs of name and value"),
        ({"blocks_to_swap": 4, "compile": True}, "blocks_to_swap", "no fixed graph"),
        ({"blocks_to_swap": 4, "gradient_checkpointing": False}, "blocks_to_swap", "stay on the device"),
        ({"distillation_method": "self_forcing", "compile": True}, "compile", "another shape in each"),
        ({"gradient_checkpointing_backend": "torch-ffn"}, "gradient_checkpointing_backend", "torch, offloaded"),
        ({"optimizer": "adamw_bf61"}, "optimizer", 'did you mean "adamw_bf16"?'),
        ({"lora_type": "lycori"}, "lora_type", 'did you mean "lycoris"?'),
        (
            {"distillation_method": "self_forcing", "distillation_config": {"w_min": 1}},
            "distillation_config.w_min",
            "no",
        ),
        ({"distillation_method": "perflow"}, "distillation_method", "must be one of: dmd"),
        ({"distillation_config": {"renoise": "ode"}}, "distillation_config", "distillation_method is not"),
        ({"max_train_steps": 10, "num_train_epochs": 1}, "num_train_epochs", "strict_epoch_limit"),
        ({"model_type": "full", "mixed_precision": "fp16"}, "mixed_precision", "bf16"),
        ({**DMD, "lora_dropout": 0.1}, "lora_dropout", "dropout would make"),
        ({"pretrained_model_name_or_path": "./absent"}, "pretrained_model_name_or_path", "there is no ./absent"),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
            "flow_use_beta_schedule",
            "flow_use_uniform_schedule and flow_use_beta_schedule each say",
        ),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True, "flow_custom_timesteps": "500"},
            "flow_custom_timesteps",
            "keep one of them",
        ),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 3}, "flow_schedule_auto_shift", "remove one"),
        ({**DMD, "flow_schedule_auto_shift": True}, "flow_schedule_auto_shift", "one ladder for every size"),
        ({"flow_custom_timesteps": "1000,0"}, "flow_custom_timesteps", "above 0"),
        ({"flow_custom_timesteps": []}, "flow_custom_timesteps", "at least one"),
        ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 0}, "flow_beta_schedule_alpha", "0.1"),
        ({"gan_config": {"weight": 1}}, "gan_config", "not available yet"),
        ({"validation_guidance_skip_layers": [9.5]}, "validation_guidance_skip_layers", "whole numbers"),
        ({"validation_guidance_skip_layers_start": 0.3}, "validation_guidance_skip_layers_stop", "not after the start"),
        ({"validation_num_video_frames": "49,0"}, "validation_num_video_frames", "from 1 on"),
        ({"validation_noise_scheduler": "few-step"}, "validation_noise_scheduler", "no few-step ladder"),
        ({"validation_noise_scheduler": "ddim"}, "validation_noise_scheduler", "unipc"),
        ({"eval_dataset_id": "elsewhere"}, "eval_dataset_id", "no dataset elsewhere"),
        ({"health_bands": {"motion": [0.5, 0.4, None, None]}}, "health_bands", "must rise"),
        ({"model_family": "flux"}, "model_family", "must be one of: wan"),
    ],
)
def test_one_mistake(home: Path, content: dict[str, object], key: str, expected: str) -> None:
    found = problems(home, content)
    assert list(found) == [key]
    assert expected in found[key]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"gan_weight": -0.1}, "gan_weight"),
        ({"gan_blocks": "middle"}, "gan_blocks"),
        ({"gan_blocks": [-1]}, "gan_blocks"),
        ({"gan_blocks": [1.5]}, "gan_blocks"),
        ({"weak_lora_scale": 1}, "weak_lora_scale"),
        ({"weak_mode": "cond-only"}, "weak_mode"),
        ({"weak_lora_scale": 0.25, "weak_mode": "exact-both"}, "weak_mode"),
        (
            {
                "weak_lora_scale": 0.25,
                "weak_mode": "exact-both",
                "real_score_guidance_scale": 1,
                "fake_score_type": "full",
            },
            "weak_mode",
        ),
        ({"weak_schedule_steps": 0}, "weak_schedule_steps"),
        ({"ground_truth_weight": 1.5}, "ground_truth_weight"),
        ({"dmd_denoising_steps": "900,500"}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": "1000,500,-1"}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": []}, "dmd_denoising_steps"),
        ({"dmd_denoising_steps": "fast"}, "dmd_denoising_steps"),
        ({"student_steps": 4, "dmd_denoising_steps": "1000,500"}, "student_steps"),
        ({"min_timestep_ratio": 0.9, "max_timestep_ratio": 0.5}, "min_timestep_ratio"),
        ({"critic_warmup_steps": 4000}, "critic_warmup_steps"),
        ({"fake_score_betas": [0.9]}, "fake_score_betas"),
        ({"fake_score_betas": [0.9, 1.0]}, "fake_score_betas"),
        ({"timestep_shift": 0}, "timestep_shift"),
    ],
)
def test_one_mistake_in_the_settings_of_dmd(home: Path, settings: dict[str, object], key: str) -> None:
    assert list(problems(home, {**DMD, "distillation_config": settings})) == [f"distillation_config.{key}"]


def test_a_full_critic_beside_a_quantised_base_is_refused(home: Path) -> None:
    content = {**DMD, "base_model_precision": "int8-quanto", "distillation_config": {"fake_score_type": "full"}}
    assert "quantisation error" in problems(home, content)["distillation_config.fake_score_type"]


def test_simpletuner_keys_that_are_off_or_cannot_change_the_training_are_only_mentioned(home: Path) -> None:
    content = {"masked_loss_probability": 1, "ramtorch": True, "snr_gamma": 0}
    notices = loaded(home, content).notices
    assert [notice.split()[0] for notice in notices][:3] == list(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"flow_use_uniform_schedule": True, "flow_sigmoid_scale": 2}, "flow_sigmoid_scale has no effect"),
        ({"flow_beta_schedule_alpha": 3}, "flow_beta_schedule_alpha: no effect without flow_use_beta_schedule"),
        ({"flow_custom_timesteps": "1000, 500", "flow_schedule_shift": 3}, "acts on validation only"),
        ({"flow_custom_timesteps": "500", "flow_schedule_auto_shift": True}, "taken as they are"),
        ({**DMD, "flow_use_uniform_schedule": True}, "flow_use_uniform_schedule: no effect here"),
    ],
)
def test_noise_options_that_another_one_overrules_are_mentioned(
    home: Path, content: dict[str, object], expected: str
) -> None:
    assert len([notice for notice in loaded(home, content).notices if expected in notice]) == 1


def test_environment_variables_of_other_purposes_are_left_alone(home: Path) -> None:
    run = loaded(home, {}, SIMPLETUNER_LOG_LEVEL="debug", SIMPLETUNER_XYZZY="1", PATH="/bin")
    assert any("SIMPLETUNER_XYZZY" in notice for notice in run.notices)
    assert "did you mean seed" in problems(home, {}, SIMPLETUNER_SEEDS="1")["seeds"]


@pytest.mark.parametrize("argv", [["--lora_rank"], ["--lora_rank", "--use_ema"], ["stray"], ["-x"]])
def test_command_lines_that_make_no_sense(home: Path, argv: list[str]) -> None:
    assert len(problems(home, {}, argv)) == 1


# --- what else is loaded ----------------------------------------------------------------------------------------------


def test_absent_side_files_are_one_notice_each_and_the_run_goes_on(home: Path) -> None:
    run = loaded(home, {"webhook_config": "hook.json", "validation_prompt_library": "prompts.json"})
    assert len([n for n in run.notices if "hook.json" in n]) == 1
    assert len([n for n in run.notices if "prompts.json" in n]) == 1
    assert run.config.webhook_config is None


def test_side_files_that_are_there_are_used(home: Path) -> None:
    hook = write(home / "hook.json", {})
    write(home / "prompts.json", {"cat": ""})
    assert loaded(home, {"webhook_config": "hook.json"}).config.webhook_config == str(hook)
    assert "cat" in problems(home, {"validation_prompt_library": "prompts.json"})
    prompts = loaded(home, {"validation_prompt_library": True, "validation_prompt": "mine"}).validation_prompts
    assert prompts["validation"] == "mine"
    assert len(prompts) > 3


def test_local_model_folders_become_absolute_and_hub_ids_stay(home: Path) -> None:
    (home / "models" / "wan").mkdir(parents=True)
    config = loaded(home, {"pretrained_model_name_or_path": "models/wan"}).config
    assert config.pretrained_model_name_or_path == str((home / "models" / "wan").resolve())
    assert loaded(home, {"model_flavour": "ti2v-5b-2.2"}).config.pretrained_model_name_or_path.startswith("Wan-AI/")


def test_the_configuration_is_read_without_torch() -> None:
    code = "import sys, simpletuner_dmd.config; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ODD_VALUES = [
    "", 0, -1, 1.5, True, "x", "1e5", "1e999", "9" * 400, 10**30, "\x00", "{", "[1",
    [], [1, 2], ["a"], [[1]], {}, {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:12])
def test_whatever_is_written_the_answer_is_a_sentence(home: Path, value: object) -> None:
    """No value of any option ends in anything but a configuration or a UserError."""
    keys = [*TrainConfig.model_fields, "ignore_final_epochs", "user_prompt_library"]
    attempts = [{**DMD, key: value} for key in keys]
    attempts += [{**DMD, "distillation_config": {key: value}} for key in DmdConfig.model_fields]
    for content in attempts:
        try:
            json.dumps(loaded(home, content).resolved_json())
        except UserError as error:
            assert str(error)


def test_the_address_of_a_webhook_is_kept_to_itself(home):
    """It is a password: it is neither printed nor written into what is shown, kept and sent to trackers."""
    hooks = [{"webhook_type": "raw", "callback_url": "https://host/hush", "auth_token": "hush", "log_level": "info"}]
    found = loaded(home, {"webhook_config": hooks})
    assert found.config.webhook_config[0]["callback_url"] == "https://host/hush"
    assert "hush" not in json.dumps(found.resolved_json()) + " ".join(found.differences_from_defaults())
    assert found.options()["webhook_config"][0] == {**hooks[0], "callback_url": "***", "auth_token": "***"}
