"""rCM: what its turns are made of and cost, and that both terms together arrive."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.config import METHODS, TrainConfig
from simpletuner_dmd.config.datasets import needs_videos, read_entries
from simpletuner_dmd.config.rules import cross_problems
from simpletuner_dmd.distill import builder
from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.noise_levels import LogitNormal
from simpletuner_dmd.distill.rcm import RCM, RCMSettings
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.distill.scm import ConsistencySettings, consistency_loss
from simpletuner_dmd.flow import Schedule, TextEmbedding, sample_few_step
from simpletuner_dmd.randomness import RandomStream

from .oracles import CPU, AffineCritic, FastStream, GaussianTeacher, Spy, make_batch, text_of

SHAPE = (2, 1, 2, 2)
LADDER = (1.0, 0.9338, 0.8529, 0.609)
MEAN, NEGATIVE = torch.tensor([1.0, -0.5]), torch.tensor([0.625, -0.625])
VARIANCE = torch.tensor([0.5, 0.25])


class LearnedVelocity(nn.Module):
    """v = a x + b + c * (what the text says) + d sigma."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(0.3 * torch.randn(4, generator=torch.Generator().manual_seed(seed)))

    def velocity(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: object = None) -> Tensor:
        said = text.rows_BLD[:, 0, 0].reshape(-1, 1, 1, 1, 1)
        a, b, c, d = self.weights
        return a * x_t_BCFHW + b + c * said + d * sigma.reshape(-1, 1, 1, 1, 1)


def latents(count: int) -> Tensor:
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return MEAN[:, None, None, None] + VARIANCE.sqrt()[:, None, None, None] * noise


CONSISTENCY = ConsistencySettings(5.0, "finite_difference", 1e-3, 10, LogitNormal(0.7, 1.6))
MATCHING = DMDSettings(
    RolloutSettings(Schedule(ladder=LADDER)),
    generator_update_interval=5,
    critic_warmup_steps=2,
    real_score_guidance_scale=5.0,
    timestep_shift=5.0,
    ts_schedule=False,
)


def spied(settings: RCMSettings, matching: DMDSettings = MATCHING) -> tuple[RCM, Spy, Spy, Spy, list[LearnedVelocity]]:
    networks = [LearnedVelocity(seed) for seed in range(3)]
    teacher, student, critic = (Spy(network) for network in networks)
    dmd = DMD(teacher, student, critic, matching, CPU)
    return RCM(teacher, student, dmd, settings, CPU), teacher, student, critic, networks


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_student_moves_alone_then_dmds_turns_follow() -> None:
    method, *_ = spied(RCMSettings(replace(CONSISTENCY, tangent_warmup_steps=8)))
    roles = [[turn.role for turn in method.turns(step)] for step in range(21)]
    assert roles[:8] == [["student"]] * 8, "tangent warm-up"
    assert roles[8:10] == [["critic"]] * 2, "critic warm-up"
    assert roles[10:15] == [["student", "critic"], *[["critic"]] * 4]
    assert roles[15:20] == roles[10:15]
    for steps in (0, 4, 8, 9, 10, 11, 15, 16, 21):
        for role in ("student", "critic"):
            expected = sum(turn == role for turns in roles[:steps] for turn in turns)
            assert method.updates(role, steps) == expected, f"{role} in {steps} steps"


def test_it_needs_latents_and_keeps_no_state() -> None:
    method, *_ = spied(RCMSettings(CONSISTENCY))
    assert method.needs_latents
    assert method.state_dict() == {}
    with pytest.raises(AssertionError):
        method.load_state_dict({"x": 1})


# --- one update -------------------------------------------------------------------------------------------------------


def turn_of(method: RCM, role: str, step: int) -> Any:
    return next(turn for turn in method.turns(step) if turn.role == role)


def test_the_students_gradient_is_the_weighted_sum_of_both_terms() -> None:
    step, batch = 12, make_batch(4, SHAPE, latents(4))
    stream = RandomStream(0, step, batch.positions)
    method, *_, networks = spied(RCMSettings(CONSISTENCY, scm_weight=0.3, dmd_weight=2.0))
    losses = []
    for loss in turn_of(method, "student", step).losses(batch, stream):
        loss.value.backward()
        losses.append(loss)
    assert [loss.name for loss in losses] == ["scm_loss", "dmd_loss"]
    assert [network.weights.grad is None for network in networks] == [True, False, True]

    reference = [LearnedVelocity(seed) for seed in range(3)]
    dmd = DMD(*reference, MATCHING, CPU)
    consistency = consistency_loss(reference[0], reference[1], batch, stream, CONSISTENCY, CPU)
    (matching,) = dmd.student_losses(batch, stream)
    (0.3 * consistency.value + 2.0 * matching.value).backward()
    ours, theirs = networks[1].weights.grad, reference[1].weights.grad
    assert ours is not None
    assert theirs is not None
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert losses[0].reported == consistency.reported
    assert losses[1].reported == pytest.approx(matching.value.item()), "logged as it is, not as it is weighted"


@pytest.mark.parametrize(("method_name", "derivative"), [("jvp", 1), ("finite_difference", 2)])
def test_forwards_of_a_whole_update(method_name: str, derivative: int) -> None:
    """Teacher: 2 for each term with guidance. Student: derivative + 1 of consistency, and the rollout to its exit."""
    settings = RCMSettings(replace(CONSISTENCY, tangent_method=method_name))
    last = replace(MATCHING, rollout=replace(MATCHING.rollout, last_step_only=True))
    method, teacher, student, critic, _ = spied(settings, last)
    batch = make_batch(4, SHAPE, latents(4))

    def run(step: int) -> tuple[int, int, int]:
        for spy in (teacher, student, critic):
            spy.calls.clear()
        for turn in method.turns(step):
            for loss in turn.losses(batch, RandomStream(0, step, batch.positions)):
                loss.value.backward()
        method.end_step()
        return len(teacher.calls), len(student.calls), len(critic.calls)

    assert run(0) == (2, derivative + 1, 0), "the student alone"
    assert run(12) == (4, derivative + 1 + 4, 2), "both terms; the critic learns from the same rollout"
    assert sum(call.with_grad for call in student.calls) == 2
    assert run(13) == (0, 4, 1), "the critic alone"
    assert all(call.said.tolist() == [1.0] * 4 for call in student.calls), "no caption is dropped for the student"


def test_the_consistency_term_alone_in_the_warm_up_fades_the_derivative_in() -> None:
    method, *_ = spied(RCMSettings(CONSISTENCY))
    batch = make_batch(4, SHAPE, latents(4))
    shares = []
    for step in (0, 5, 12):
        losses = list(turn_of(method, "student", step).losses(batch, RandomStream(0, step, batch.positions)))
        shares.append(losses[0].metrics["tangent_share"])
        assert len(losses) == (2 if step == 12 else 1)
    assert shares == [0.0, 0.5, 1.0]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_both_terms_arrive_together() -> None:
    """Affine student and critic, a guided Gaussian teacher: the student's own ladder ends in its mean and spread."""
    guidance = 3.0
    teacher = GaussianTeacher(MEAN, torch.diag(VARIANCE), NEGATIVE)
    student, critic = AffineCritic(2, knots=16), AffineCritic(2, knots=16)
    matching = replace(MATCHING, real_score_guidance_scale=guidance, critic_warmup_steps=50,
                       generator_update_interval=3)  # fmt: skip
    consistency = replace(CONSISTENCY, guidance=guidance, tangent_warmup_steps=300, draw=LogitNormal(0.7, 1.6))
    method = RCM(
        teacher, student, DMD(teacher, student, critic, matching, CPU), RCMSettings(consistency, 1.0, 0.2), CPU
    )
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.0, 0.999)),
        "critic": torch.optim.Adam(critic.parameters(), lr=0.02, betas=(0.0, 0.99)),
    }
    batch, steps = make_batch(64, SHAPE, latents(64)), 2800
    for step in range(steps):
        for turn in method.turns(step):
            optimizer = optimizers[turn.role]
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))
            for other in optimizers.values():
                other.zero_grad()
            for loss in turn.losses(batch, FastStream(0, step, batch.positions)):
                loss.value.backward()
            optimizer.step()
        method.end_step()
    seeded = torch.Generator().manual_seed(1)
    noise = torch.randn(4000, *SHAPE, generator=seeded)
    with torch.no_grad():
        made = sample_few_step(student, noise, text_of(1.0, 4000), Schedule(ladder=LADDER), "sde",
                               lambda rung, like: torch.randn(like.shape, generator=seeded))  # fmt: skip
    by_channel = made.transpose(0, 1).flatten(1)
    assert float((by_channel.mean(1) - (NEGATIVE + guidance * (MEAN - NEGATIVE))).abs().max()) < 0.1
    assert float((by_channel.std(1) - VARIANCE.sqrt()).abs().max()) < 0.05


# --- options ----------------------------------------------------------------------------------------------------------


def configured(given: dict[str, object] | None = None, **outside: object) -> TrainConfig:
    return TrainConfig.model_validate({"distillation_method": "rcm", "distillation_config": given or {}, **outside})


def test_the_method_is_built_from_its_options() -> None:
    options = configured({"scm_weight": 0.2, "renoise": "ode", "scm_logit_mean": 0.1, "tangent_step": 3e-4,
                          "tangent_method": "finite_difference"}).distillation_config  # fmt: skip
    networks = [LearnedVelocity(seed) for seed in range(3)]
    parts = Ingredients(networks[0], networks[1], Schedule(5.0, LADDER), options, CPU, 0.25, critic=networks[2])
    method = builder("rcm")(parts)
    assert isinstance(method, RCM)
    expected = ConsistencySettings(5.0, "finite_difference", 3e-4, 1000, LogitNormal(0.1, 1.6))
    assert method.settings == RCMSettings(expected, 0.2, 1.0)
    assert method.dmd.settings == DMDSettings(
        RolloutSettings(Schedule(5.0, LADDER), "ode"),
        generator_update_interval=5,
        real_score_guidance_scale=5.0,
        timestep_shift=5.0,
        ts_schedule=False,
        caption_dropout_probability=0.25,
    )


def test_defaults_are_the_papers() -> None:
    options = METHODS["rcm"]()
    angles = torch.tensor([torch.pi / 2, 1.5, 1.4, 1.0], dtype=torch.float64)
    sigmas = torch.sin(angles) / (torch.sin(angles) + torch.cos(angles))
    assert options.timesteps(5.0) == pytest.approx((1000 * sigmas).tolist(), abs=0.06)
    assert options.needs_latents
    assert options.student_interval == 1
    whole = configured().distillation_config
    assert isinstance(whole, METHODS["rcm"])
    facts = SimpleNamespace(**whole.model_dump())
    assert facts.scm_weight == pytest.approx(100 / (16 * 20 * 60 * 104) ** 0.5, rel=0.02)
    assert facts.tangent_method == "jvp"
    assert configured(mixed_precision="no").distillation.model_dump()["tangent_method"] == "finite_difference"


@pytest.mark.parametrize(
    ("given", "outside", "key", "says"),
    [
        ({"tangent_method": "finite_difference"}, {}, "tangent_method", "rounding noise"),
        ({}, {"base_model_precision": "int8-quanto"}, "tangent_method", "no forward derivative"),
        ({}, {"attention_mechanism": "flash-attn-2"}, "tangent_method", "no forward derivative"),
        ({"tangent_warmup_steps": 4000}, {}, "tangent_warmup_steps", "never begin"),
        ({"critic_warmup_steps": 3000}, {}, "tangent_warmup_steps", "critic_warmup_steps 3000"),
        ({"critic_warmup_steps": 4000}, {}, "critic_warmup_steps", "never be updated"),
    ],
)
def test_what_cannot_work_is_one_problem(
    given: dict[str, object], outside: dict[str, object], key: str, says: str
) -> None:
    (problem,) = cross_problems(configured(given, **outside))
    assert problem.key == f"distillation_config.{key}"
    assert says in problem.message
    assert problem.fix


@pytest.mark.parametrize(
    "outside", [{}, {"mixed_precision": "no"}, {"mixed_precision": "no", "base_model_precision": "int8-quanto"}]
)
def test_what_can_work_is_let_through(outside: dict[str, object]) -> None:
    assert cross_problems(configured(**outside)) == []


def test_prompts_alone_are_not_enough() -> None:
    prompts = {"id": "p", "type": "local", "dataset_type": "prompts", "instance_data_dir": "prompts.txt"}
    (problem,) = needs_videos(configured(), read_entries([prompts], "data.json").entries, "data.json")
    assert "rcm learns from videos" in problem.message
