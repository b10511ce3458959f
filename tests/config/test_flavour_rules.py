"""What the flavour rules out, and what is said about the steps of an expert."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner_dmd.config import TrainConfig
from simpletuner_dmd.config.flavour_rules import flavour_notices, flavour_problems

HIGH, LOW, HOST = "t2v-14b-2.2-high", "t2v-14b-2.2-low", "i2v-14b-2.1"


def config_of(flavour: str, settings: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    more = {} if settings is None else {"distillation_method": "dmd", "distillation_config": settings}
    return TrainConfig(model_flavour=flavour, **more, **options)  # type: ignore[arg-type]


def keys(config: TrainConfig) -> list[str]:
    return [problem.key for problem in flavour_problems(config)]


@pytest.mark.parametrize("flavour", [HIGH, LOW])
def test_the_steps_of_both_experts_are_said(flavour: str) -> None:
    config = config_of(flavour, {"student_steps": 4})
    assert not flavour_problems(config)
    (line,) = flavour_notices(config)
    assert "1000, 937.5" in line and "833.333, 625" in line and "hands over to the other at 833.333" in line
    assert config.distillation.needs_latents == (flavour == LOW)


def test_a_step_at_the_boundary_is_the_high_noise_experts() -> None:
    (line,) = flavour_notices(config_of(HIGH, {"dmd_denoising_steps": "1000,875,500"}))
    assert "makes the steps 1000, 875 " in line and "expert makes 500." in line


def test_an_expert_without_steps() -> None:
    assert keys(config_of(LOW, {"student_steps": 1})) == ["distillation_config.student_steps"]
    config = config_of(HIGH, {"student_steps": 1})
    assert not flavour_problems(config)
    assert "the student never uses it" in flavour_notices(config)[0]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (config_of(LOW, {"student_steps": 4, "rollout": "simulate"}), "distillation_config.rollout"),
        (config_of(HIGH, {"student_steps": 4, "rollout": "handover"}), "distillation_config.rollout"),
        (config_of("ti2v-5b-2.2", {"rollout": "handover"}), "distillation_config.rollout"),
        (config_of(HIGH, {"student_steps": 4, "regression_steps": 5}), "distillation_config.regression_steps"),
        (config_of(HIGH, distillation_method="lcm"), "distillation_method"),
        (config_of(HOST, distillation_method="self_forcing"), "distillation_method"),
        (config_of(HOST, model_type="full"), "model_type"),
        (config_of("ti2v-5b-2.2", other_expert_run="x"), "other_expert_run"),
    ],
)
def test_what_a_flavour_rules_out(config: TrainConfig, key: str) -> None:
    assert keys(config) == [key]
    assert all(problem.fix for problem in flavour_problems(config))


def test_what_goes_on_with_other_noise_is_said() -> None:
    assert "fresh noise" in flavour_notices(config_of(LOW, {"student_steps": 4, "renoise": "ode"}))[1]
    assert "picture channels get zeros" in flavour_notices(config_of(HOST))[0]
    assert "noise levels below 875" in flavour_notices(config_of(LOW))[0]


def test_the_rate_follows_the_flavour() -> None:
    assert TrainConfig(model_flavour="ti2v-5b-2.2").framerate == 24 and TrainConfig().framerate == 16
