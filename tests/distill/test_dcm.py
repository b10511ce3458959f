"""DCM: two experts whose jumps compose to the teacher, temporal coherence, who moves when, and the settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpletuner_dmd.config import TrainConfig
from simpletuner_dmd.config.methods.dcm import DcmConfig
from simpletuner_dmd.config.rules import combination_notices, cross_problems
from simpletuner_dmd.distill import builder
from simpletuner_dmd.distill.dcm import DCM, DCMSettings, temporal_coherence
from simpletuner_dmd.distill.feature_adversary import FeatureAdversary, FeatureHeads
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.phases import ConsistencySettings, PhaseGrid, phase_grid
from simpletuner_dmd.flow import Experts, Schedule, sample_few_step
from simpletuner_dmd.randomness import RandomStream

from .consistency_toys import (
    FeatureTeacher,
    TableStudent,
    data_batch,
    gaussian_teacher,
    mean_at_guidance,
    teacher_jumps,
    trained_to_the_end,
)
from .oracles import CPU, FastStream, Spy, text_of

LONG = (1, 6, 2, 2)


def dcm(distillation: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    given = {"distillation_method": "dcm", "distillation_config": distillation or {}, **options}
    return TrainConfig.model_validate(given)


def settings_of(distillation: dict[str, Any] | None = None) -> DcmConfig:
    found = dcm(distillation).distillation
    assert isinstance(found, DcmConfig)
    return found


# --- the experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"multiphase": 2, "student_steps": 2}, {"sigma_split": 0.875}])
def test_the_two_experts_together_are_the_teachers_rollout(given: dict[str, Any]) -> None:
    """Each trained on its own part only, sampled as the tool samples: over the ladder, the expert chosen by sigma."""
    options = settings_of({"real_score_guidance_scale": 3, "teacher_substeps": 1, **given})
    grid = phase_grid(options.euler_timesteps, options.dcm_shift, options.inner_edges)
    split = grid.index_of(options.split)
    settings = ConsistencySettings(grid, guidance=3.0)
    untrained = 7.0  # what an expert says where it was not trained, so that a wrong choice shows
    semantic, detail = (TableStudent(grid.sigmas) for _ in range(2))
    for expert in (semantic, detail):
        expert.offset.data += untrained
    semantic = trained_to_the_end(settings, first=split + 1, student=semantic)
    detail = trained_to_the_end(settings, last=split, student=detail)
    ladder = tuple(step / 1000 for step in options.timesteps(5.0))
    noise = torch.randn(64, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = sample_few_step(
            Experts(semantic, detail, options.boundary), noise, text_of(1.0, 64), Schedule(17.0, ladder), "ode",
            lambda rung, like: pytest.fail("no noise is drawn"),
        )  # fmt: skip
    a, b = teacher_jumps(PhaseGrid(grid.sigmas, (0, grid.points)), mean_at_guidance(3.0))[-1]
    assert torch.allclose(found, a * noise + b, atol=5e-5)


def make(mode: str = "both", adversary: bool = True, fraction: float = 0.5, weight: float = 1.0,
         substeps: int = 1) -> tuple[DCM, FeatureTeacher, Spy, Spy, FeatureHeads]:  # fmt: skip
    grid = phase_grid(50, 17.0, [phase_grid(50, 17.0).sigmas[35]])
    teacher, heads = FeatureTeacher(gaussian_teacher()), FeatureHeads(8, (0, 2), hidden=32)
    semantic, detail = Spy(TableStudent(grid.sigmas)), Spy(TableStudent(grid.sigmas))
    for expert, offset in ((semantic, 0.5), (detail, -0.5)):
        expert.inner.offset.data += offset  # type: ignore[attr-defined]
    consistency = ConsistencySettings(grid, guidance=3.0, teacher_substeps=substeps)
    settings = DCMSettings(consistency, 35, mode, fraction, weight)
    look = FeatureAdversary(teacher, heads, grid, 0.5, 1.0) if adversary else None
    return DCM(teacher, semantic, detail, settings, CPU, look), teacher, semantic, detail, heads


def test_each_expert_is_asked_in_its_own_part_only() -> None:
    method, _, semantic, detail, _ = make()
    batch = data_batch(4000, (1, 1, 1, 1))
    sigmas = method.settings.consistency.grid.sigmas
    list(method.semantic_losses(batch, FastStream(0, 0, batch.positions)))
    assert detail.calls == []
    aimed, asked = semantic.calls
    assert sorted(asked.sigma.unique().tolist()) == pytest.approx(sigmas[36:51])
    assert sorted(aimed.sigma.unique().tolist()) == pytest.approx(sigmas[36:50])
    semantic.calls.clear()
    list(method.detail_losses(batch, FastStream(0, 1, batch.positions)))
    assert semantic.calls == []
    aimed, asked = detail.calls
    assert sorted(asked.sigma.unique().tolist()) == pytest.approx(sigmas[1:36])
    assert sorted(aimed.sigma.unique().tolist()) == pytest.approx(sigmas[1:35])


# --- temporal coherence -----------------------------------------------------------------------------------------------


def test_temporal_coherence() -> None:
    target = torch.randn(3, 2, 7, 2, 2, generator=torch.Generator().manual_seed(0))
    constant = torch.randn(3, 2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    assert float(temporal_coherence(target + constant, target, 3).max()) < 1e-12
    slope = torch.tensor([0.1, 0.5, 2.0])
    ramp = slope[:, None, None, None, None] * torch.arange(7.0)[:, None, None]
    for lag in (1, 3, 6):
        assert torch.allclose(temporal_coherence(target + ramp, target, lag), (lag * slope) ** 2, rtol=1e-4)
    q = 0.3
    noise = q**0.5 * torch.randn(2, 4, 40, 30, 30, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(temporal_coherence(noise, torch.zeros_like(noise), 3), torch.full((2,), 2 * q), rtol=0.02)


@pytest.mark.parametrize("frames", [1, 3])
def test_short_videos_go_without(frames: int) -> None:
    x = torch.randn(2, 1, frames, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert temporal_coherence(x, torch.zeros_like(x), 3).tolist() == [0, 0]


def test_coherence_is_part_of_the_semantic_loss_alone() -> None:
    batch = data_batch(8, LONG)
    stream = RandomStream(0, 0, batch.positions)
    values = {}
    for weight in (0.0, 1.0, 2.5):
        method, _, semantic, _, _ = make(weight=weight, adversary=False)
        semantic.inner.gain.data += 20  # type: ignore[attr-defined]
        (loss,) = method.semantic_losses(batch, stream)
        (other,) = method.detail_losses(batch, stream)
        values[weight] = loss.value.item(), loss.metrics["temporal_coherence"], other.value.item()
    plain, with_it, more = values[0.0], values[1.0], values[2.5]
    assert with_it[1] > 1e-4
    assert with_it[0] - plain[0] == pytest.approx(with_it[1], rel=1e-4)
    assert more[0] - plain[0] == pytest.approx(2.5 * with_it[1], rel=1e-4)
    assert plain[2] == more[2]


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "fraction", "share"),
    [("both", 0.5, 0.5), ("both", 0.3, 0.3), ("semantic", 0.5, 1.0), ("detail", 0.5, 0.0)],
)
def test_who_moves_when(mode: str, fraction: float, share: float) -> None:
    method, _, _, _, _ = make(mode, fraction=fraction)
    steps = 40
    roles = [[turn.role for turn in method.turns(step)] for step in range(steps)]
    assert {tuple(role) for role in roles} <= {("student",), ("detail", "discriminator")}
    for role in ("student", "detail", "discriminator"):
        assert sum(role in turn for turn in roles) == method.updates(role, steps)
    assert method.updates("student", steps) == round(share * steps)
    assert [[turn.role for turn in method.turns(step)] for step in range(steps)] == roles


def test_forwards_and_gradients_of_an_update() -> None:
    """Semantic: 2 of the guided teacher, 2 of the expert. Detail: 4 substeps are 8, 2, 2 looks; heads: 2 looks."""
    method, teacher, semantic, detail, heads = make(substeps=4)
    batch = data_batch(16, LONG)
    stream = RandomStream(0, 0, batch.positions)
    (loss,) = method.semantic_losses(batch, stream)
    assert (teacher.velocity_calls, len(semantic.calls), len(detail.calls), len(teacher.calls)) == (2, 2, 0, 0)
    loss.value.backward()
    assert detail.inner.offset.grad is None  # type: ignore[attr-defined]
    assert float(semantic.inner.offset.grad.abs().max()) > 0  # type: ignore[attr-defined]
    semantic.inner.zero_grad()  # type: ignore[attr-defined]
    (loss,) = method.detail_losses(batch, stream)
    assert (teacher.velocity_calls, len(semantic.calls), len(detail.calls), len(teacher.calls)) == (10, 2, 2, 2)
    loss.value.backward()
    assert semantic.inner.offset.grad is None  # type: ignore[attr-defined]
    assert float(detail.inner.offset.grad.abs().max()) > 0  # type: ignore[attr-defined]
    assert all(parameter.grad is None for parameter in heads.parameters())
    (loss,) = method.discriminator_losses(batch, stream)
    assert (teacher.velocity_calls, len(detail.calls), len(teacher.calls)) == (10, 2, 4)
    loss.value.backward()
    assert any(parameter.grad is not None for parameter in heads.parameters())
    fake, _, fake_again, _ = teacher.calls
    assert torch.equal(fake.x_t, fake_again.x_t)
    assert float(fake.sigma.max()) <= method.settings.consistency.grid.sigmas[35] + 1e-6
    assert len(fake.sigma.unique()) > 4, "not one constant level"
    method.end_step()
    with pytest.raises(KeyError):
        list(method.discriminator_losses(batch, stream))
    with pytest.raises(AssertionError):
        method.load_state_dict({"x": 1})


# --- its settings -----------------------------------------------------------------------------------------------------


def mistakes(config: TrainConfig) -> set[str]:
    return {problem.key.removeprefix("distillation_config.") for problem in cross_problems(config)}


def test_defaults() -> None:
    settings = settings_of()
    assert settings.timesteps(5.0) == pytest.approx((1000, 993.51, 985.51, 975.41, 937.01, 838.03), abs=0.01)
    assert settings.split == pytest.approx(0.97541, abs=5e-6)
    assert settings.next_point == pytest.approx(0.97764, abs=5e-6)
    assert settings.split < settings.boundary < settings.next_point
    assert (settings.transition, settings.has_detail_expert, settings.has_discriminator) == ("ode", True, True)
    assert not settings_of({"mode": "semantic"}).has_discriminator
    assert not settings_of({"adv_weight": 0}).has_discriminator
    assert not mistakes(dcm())
    assert combination_notices(dcm()) == []


@pytest.mark.parametrize("steps", range(2, 13))
@pytest.mark.parametrize("given", [{}, {"sigma_split": 0.9}, {"split_index": 20}, {"euler_timesteps": 100}])
def test_every_step_lies_in_the_range_of_its_expert(given: dict[str, Any], steps: int) -> None:
    settings = settings_of({**given, "student_steps": steps})
    assert not mistakes(dcm({**given, "student_steps": steps}))
    ladder = [step / 1000 for step in settings.timesteps(5.0)]
    grid = phase_grid(settings.euler_timesteps, settings.dcm_shift, settings.inner_edges)
    split = grid.index_of(settings.split)
    assert len(ladder) == steps
    high = [sigma for sigma in ladder if sigma >= settings.boundary]
    low = [sigma for sigma in ladder if sigma < settings.boundary]
    assert (len(high), len(low)) == (-(-steps // 2), steps // 2)
    assert min(high) >= grid.sigmas[split + 1] - 1e-9
    assert max(low) <= grid.sigmas[split] + 1e-9
    assert grid.sigmas[split] < settings.boundary < grid.sigmas[split + 1]
    assert settings.next_point == pytest.approx(grid.sigmas[split + 1], abs=1e-12)
    assert sorted([*(round(s, 9) for s in ladder), 0.0]) == [round(grid.sigmas[edge], 9) for edge in grid.edges]


def test_phases_may_be_the_papers() -> None:
    settings = settings_of({"multiphase": 2})
    assert settings.inner_edges == (settings.split,)
    four = settings_of({"multiphase": 4}).inner_edges
    assert four == pytest.approx((17 * 0.85 / (1 + 16 * 0.85), settings.split, 17 * 0.35 / (1 + 16 * 0.35)))


@pytest.mark.parametrize(
    ("given", "key"),
    [({"denoising_steps": "1000,976.5,500"}, "denoising_steps"), ({"denoising_steps": "1000,990"}, "denoising_steps"),
     ({"denoising_steps": "995,970,980"}, "denoising_steps"),
     ({"denoising_steps": "1000,949", "student_steps": 2}, "student_steps"),
     ({"split_index": 20, "sigma_split": 0.9}, "split_index"), ({"split_index": 50}, "split_index"),
     ({"multiphase": 3}, "multiphase"), ({"multiphase": 40}, "euler_timesteps"),
     ({"sigma_split": 0.9999, "student_steps": 2}, "euler_timesteps")],
)  # fmt: skip
def test_settings_that_cannot_work(given: dict[str, Any], key: str) -> None:
    assert mistakes(dcm(given)) == {key}


def test_the_papers_steps_are_accepted() -> None:
    given = {"denoising_steps": "1000,992,982,949,905,810,0"}
    assert not mistakes(dcm(given))
    assert dcm(given).student_timesteps() == (1000, 992, 982, 949, 905, 810)


def test_notices() -> None:
    def said(**options: Any) -> str:
        return "\n".join(combination_notices(dcm(options.pop("given", None), **options)))

    assert "dcm_shift 17" in said(flow_schedule_shift=8)
    assert "solver step" in said(given={"teacher_substeps": 1})
    assert "mode detail" in said(given={"mode": "semantic"})
    assert "temporal_coherence_weight" in said(given={"num_training_frames": 3})


def test_it_is_built_from_its_settings() -> None:
    config = dcm({"mode": "detail", "semantic_fraction": 0.25, "temporal_coherence_weight": 2,
                  "temporal_coherence_lag": 2, "teacher_substeps": 3, "adv_weight": 0.2})  # fmt: skip
    options = config.distillation
    assert isinstance(options, DcmConfig)
    grid = phase_grid(50, 17.0, options.inner_edges)
    teacher, semantic, detail = FeatureTeacher(gaussian_teacher()), TableStudent(grid.sigmas), TableStudent(grid.sigmas)
    heads = FeatureHeads(8, (0, 2), hidden=32)
    parts = Ingredients(teacher, semantic, Schedule(5.0), options, CPU, detail=detail, discriminator=heads)
    method = builder("dcm")(parts)
    assert isinstance(method, DCM)
    assert (method.semantic, method.detail) == (semantic, detail)
    consistency = ConsistencySettings(grid, 6.0, teacher_substeps=3)
    assert method.settings == DCMSettings(consistency, 35, "detail", 0.25, 2.0, 2)
    assert method.adversary is not None
    assert (method.adversary.hinge_weight, method.adversary.feature_weight) == (pytest.approx(1.0), pytest.approx(2.0))
