"""Defaults, what follows from what, and the student's ladder."""

import pytest

from simpletuner_dmd.config import METHODS, DatasetEntry, DmdConfig, TrainConfig, VideoOptions, frames_4n1
from simpletuner_dmd.config.rules import combination_notices, cross_problems
from simpletuner_dmd.config.simpletuner_keys import ABSENT_KEYS, DATASET_ABSENT_KEYS, METHOD_ABSENT_KEYS
from simpletuner_dmd.flow import uniform_ladder


def dmd(**options: object) -> TrainConfig:
    return TrainConfig.model_validate({"distillation_method": "dmd", **options})


def test_defaults_follow_the_kind_of_run() -> None:
    fine_tune, distil, full = TrainConfig(), dmd(), dmd(model_type="full")
    assert fine_tune.flow_schedule_shift is None
    assert distil.flow_schedule_shift == 5.0
    assert (fine_tune.validation_guidance, distil.validation_guidance) == (5.0, 1.0)
    assert (fine_tune.caption_dropout_probability, distil.caption_dropout_probability) == (0.1, 0.0)
    assert (distil.learning_rate, full.learning_rate) == (2e-5, 2e-6)
    assert (fine_tune.max_train_steps, TrainConfig(num_train_epochs=3).max_train_steps) == (4000, 0)
    assert TrainConfig(learning_rate=1e-6).lr_end == pytest.approx(1e-7)
    assert TrainConfig(output_dir="output/mine").tracker_run_name == "mine"


def test_the_critic_follows_the_student() -> None:
    assert dmd().distillation.fake_score_type == "lora"
    assert dmd(model_type="full").distillation.fake_score_type == "full"
    assert dmd(model_type="full", base_model_precision="int8-quanto").distillation.fake_score_type == "lora"
    assert dmd(lora_rank=128).distillation.fake_score_lora_rank == 128
    assert dmd(lora_rank=128, distillation_config={"fake_score_lora_rank": 64}).distillation.fake_score_lora_alpha == 64
    assert dmd(validation_negative_prompt="blurry").distillation.negative_prompt == "blurry"
    assert (
        dmd(validation_negative_prompt="x", distillation_config={"negative_prompt": "y"}).distillation.negative_prompt
        == "y"
    )
    assert dmd(distillation_config=DmdConfig(renoise="ode"), lora_rank=4).distillation.fake_score_lora_rank == 4


def test_the_teacher_is_shown_at_the_guidance_that_is_distilled() -> None:
    assert dmd(distillation_config={"real_score_guidance_scale": 4.5}).benchmark_guidance == 4.5
    assert TrainConfig(validation_guidance=6).benchmark_guidance == 6
    assert dmd(distillation_config={"student_steps": 2}).validation_num_inference_steps == 2


def test_ladders() -> None:
    assert DmdConfig().timesteps(5.0) == (1000.0, 757.0, 522.0)
    assert DmdConfig(dmd_denoising_steps="1000,757,522,0").timesteps(5.0) == (1000.0, 757.0, 522.0)
    assert dmd(distillation_config={"student_steps": 4}).student_timesteps() == pytest.approx(
        (1000, 937.5, 2500 / 3, 625)
    )
    for steps, shift in [(1, 1.0), (3, 5.0), (8, 12.0)]:
        ours = DmdConfig(student_steps=steps).timesteps(shift)
        assert ours == pytest.approx([1000 * sigma for sigma in uniform_ladder(steps, shift)], rel=1e-12)
    warped = DmdConfig(dmd_denoising_steps=[1000, 750, 500, 250], warp_denoising_steps=True)
    assert warped.timesteps(5.0) == pytest.approx(DmdConfig(student_steps=4).timesteps(5.0))
    with pytest.raises(ValueError, match="decrease"):
        DmdConfig(dmd_denoising_steps=[1000, 1000]).timesteps(1.0)


def test_frames_are_rounded_down_to_whole_latent_frames() -> None:
    assert [frames_4n1(frames) for frames in (1, 4, 5, 75, 81, 121)] == [1, 1, 5, 73, 81, 121]
    assert TrainConfig(validation_num_video_frames=80).validation_num_video_frames == [77]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_warmup_steps": 4000}, "as long as the run"),
        ({"caption_dropout_probability": 0.1}, "never drops"),
        ({"distillation_config": {"num_frame_per_block": 3}}, "num_frame_per_block: no effect"),
        ({"validation_num_inference_steps": 30}, "3 steps of its own ladder"),
        ({"validation_guidance": 5}, "doubles"),
        ({"train_batch_size": 15}, "15 samples per step"),
        ({"base_model_precision": "nf4-bnb"}, "below 8 bits"),
        ({"distillation_config": {"min_score_timestep": 20}}, "min_score_timestep has no effect"),
        ({"lora_rank": 64, "distillation_config": {"fake_score_lora_rank": 8}}, "below the student's"),
        ({"strict_epoch_limit": True}, "strict_epoch_limit has no effect"),
        ({"distillation_config": {"gan_blocks": "auto", "gan_r1_weight": 20}}, "gan_blocks, gan_r1_weight: no effect"),
        ({"distillation_config": {"gan_weight": 0.1, "gan_r1_sigma": 0.2}}, "gan_r1_sigma: no effect"),
        ({"distillation_config": {"gan_weight": 0.1, "gan_start_step": 50}}, "longer than gan_start_step 50"),
        ({"distillation_config": {"weak_mode": "linear"}}, "weak_mode: no effect, weak_lora_scale is 0"),
        ({"distillation_config": {"weak_lora_scale": 0.25, "weak_schedule_steps": 9}}, "weak_schedule is constant"),
        ({"distillation_config": {"ground_truth_weight": 0.02}}, "stills motion"),
        ({"distillation_config": {"ode_steps": 20}}, "ode_steps: no effect"),
    ],
)
def test_start_up_notices(options: dict[str, object], expected: str) -> None:
    notices = combination_notices(dmd(**{"train_batch_size": 16, **options}))
    assert len(notices) == 1
    assert expected in notices[0]


def test_a_fading_fraction_is_gone_after_a_third_of_the_run() -> None:
    fading = {"weak_lora_scale": 0.5, "weak_schedule": "linear_to_zero"}
    assert dmd(max_train_steps=1000, distillation_config=fading).distillation.weak_schedule_steps == 300
    chosen = dmd(max_train_steps=1000, distillation_config={**fading, "weak_schedule_steps": 50})
    assert chosen.distillation.weak_schedule_steps == 50


def test_blocks_of_the_discriminator() -> None:
    for written in ("22,15,29", [15, 29, 22, 15], ["15", "22", "29"]):
        assert dmd(distillation_config={"gan_weight": 0.1, "gan_blocks": written}).distillation.gan_blocks == (
            15,
            22,
            29,
        )
    assert dmd(distillation_config={"gan_blocks": "Auto"}).distillation.gan_blocks == "auto"
    chosen = dmd(distillation_config={"gan_weight": 0.1, "gan_blocks": "3"}).distillation
    assert not chosen.depth_problems(4, "here")
    (problem,) = chosen.depth_problems(3, "here")
    assert (problem.file, problem.key) == ("here", "distillation_config.gan_blocks")


def test_the_exact_weak_form_is_offered_where_it_is_right() -> None:
    weak = {"weak_lora_scale": 0.25, "weak_mode": "exact-both"}
    for options in ({"caption_dropout_probability": 0.1}, {"distillation_config": {"real_score_guidance_scale": 1}}):
        config = dmd(**{**options, "distillation_config": {**weak, **options.get("distillation_config", {})}})  # type: ignore[dict-item]
        assert not config.distillation.problems(config)


def test_a_plain_distillation_has_nothing_to_say() -> None:
    assert combination_notices(dmd(train_batch_size=4, gradient_accumulation_steps=2, num_processes=2)) == []


@pytest.mark.parametrize("model", [TrainConfig, *METHODS.values(), DatasetEntry, VideoOptions])
def test_every_option_is_explained(model: type[TrainConfig]) -> None:
    for name, option in model.model_fields.items():
        assert option.description, name
        assert option.description.endswith("."), name


def test_no_key_is_an_option_and_absent_at_once() -> None:
    assert not set(TrainConfig.model_fields) & set(ABSENT_KEYS)
    for options in METHODS.values():
        assert not set(options.model_fields) & set(METHOD_ABSENT_KEYS)
    assert not set(DatasetEntry.model_fields) & set(DATASET_ABSENT_KEYS)


def test_two_experts_may_be_of_any_kind_and_a_full_one_says_what_the_second_is() -> None:
    said = {}
    for kind in ({}, {"lora_type": "lycoris"}, {"model_type": "full", "lora_rank": 8}):
        config = TrainConfig.model_validate({"distillation_method": "dcm", **kind})
        assert not [problem for problem in cross_problems(config) if problem.key in ("model_type", "lora_type")]
        said[config.model_type] = " ".join(combination_notices(config))
    assert "a LoRA of rank 8 on the frozen base" in said["full"] and "rank" not in said["lora"]
