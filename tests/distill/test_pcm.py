"""PCM: its sampler repeats the teacher, its adversary looks at the teacher's features, its settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.config import TrainConfig
from simpletuner_dmd.config.methods.pcm import PcmConfig
from simpletuner_dmd.config.rules import combination_notices, cross_problems
from simpletuner_dmd.distill import builder
from simpletuner_dmd.distill.feature_adversary import (
    FeatureAdversary,
    FeatureHeads,
    feature_distance,
    heads_hinge,
    renoised,
    student_hinge,
)
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.pcm import PCM
from simpletuner_dmd.distill.phases import Consistency, ConsistencyPair, ConsistencySettings, phase_grid
from simpletuner_dmd.flow import Schedule, sample_few_step, uniform_ladder
from simpletuner_dmd.randomness import RandomStream

from .consistency_toys import (
    MEAN,
    FeatureTeacher,
    TableStudent,
    data_batch,
    gaussian_teacher,
    mean_at_guidance,
    teacher_step,
    trained_to_the_end,
)
from .oracles import CPU, FastStream, Spy, text_of

SHAPE = (1, 2, 2, 2)
LADDER = uniform_ladder(4, 5.0)
GRID = phase_grid(50, 5.0, LADDER[1:])


def test_sampling_at_the_edges_repeats_the_teachers_rollout() -> None:
    student = trained_to_the_end(ConsistencySettings(GRID, guidance=4.0))
    noise = torch.randn(64, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = sample_few_step(student, noise, text_of(1.0, 64), Schedule(5.0, LADDER), "ode",
                                lambda rung, like: pytest.fail("no noise is drawn"))  # fmt: skip
    expected = noise.double()
    for start, end in zip(GRID.sigmas[:0:-1], GRID.sigmas[-2::-1], strict=True):
        a, b = teacher_step(start, end, mean_at_guidance(4.0), "euler", 1)
        expected = a * expected + b
    assert torch.allclose(found.double(), expected, atol=5e-5)


# --- the adversary ----------------------------------------------------------------------------------------------------


def test_renoising_lands_on_the_level_exactly() -> None:
    """Data of variance .3 at level .5, brought to .75: signal (1 - .75), noise .75. The linear rule leaves .559."""
    seeded = torch.Generator().manual_seed(0)
    clean, first, second = (torch.randn(400_000, 1, 1, 1, 1, generator=seeded) for _ in range(3))
    start, end = torch.full((400_000,), 0.5, dtype=torch.float64), torch.full((400_000,), 0.75, dtype=torch.float64)
    found = renoised(0.5 * 0.3**0.5 * clean + 0.5 * first, second, start, end)
    assert float(found.var()) == pytest.approx(0.25**2 * 0.3 + 0.75**2, rel=0.01)
    assert float((found * clean).mean()) == pytest.approx(0.25 * 0.3**0.5, abs=0.005)
    noise_only = renoised(0.5 * first, second, start, end)
    assert float(noise_only.std()) == pytest.approx(0.75, rel=0.005)
    linear = ((1 - 0.75) * 0.5 * first + (0.75 - 0.5) * second) / (1 - 0.5)
    assert float(linear.std()) == pytest.approx(0.559, rel=0.005)
    same = renoised(clean[:2], second[:2], start[:2], start[:2])
    assert torch.equal(same, clean[:2])
    zero = torch.zeros(2, dtype=torch.float64)
    s = end[:2].float()[:, None, None, None, None]
    assert torch.allclose(renoised(clean[:2], second[:2], zero, end[:2]), (1 - s) * clean[:2] + s * second[:2])


def test_hinge_losses_by_hand() -> None:
    fake = [torch.tensor([[-2.0, 0.5]]), torch.tensor([[3.0, 0.0]])]
    real = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0, 1.0]])]
    assert float(student_hinge(fake)) == pytest.approx(((3 + 0.5) / 2 + (0 + 1) / 2) / 2)
    assert float(heads_hinge(fake, real)) == pytest.approx(
        ((0 + 1.5) / 2 + (4 + 1) / 2) / 2 + ((0 + 0.5) / 2 + (2 + 0) / 2) / 2
    )


def test_feature_distance_forgets_scale_and_offset_of_a_token() -> None:
    a = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    b = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    expected = [nn.functional.layer_norm(x.double(), (16,)) for x in (a, b)]
    by_hand = (expected[0] - expected[1]).pow(2).mean()
    assert float(feature_distance([a], [b])) == pytest.approx(float(by_hand), rel=1e-4)
    assert float(feature_distance([a, a], [b, a])) == pytest.approx(float(by_hand) / 2, rel=1e-4)
    assert float(feature_distance([100 * a + 7], [a])) < 1e-6


def test_heads_judge_each_token_of_each_block() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    heads = FeatureHeads(8, (1, 3), hidden=64)
    assert torch.equal(torch.get_rng_state(), before)
    again, other = FeatureHeads(8, (1, 3), hidden=64), FeatureHeads(8, (1, 3), hidden=64, seed=1)
    same, changed = (
        [torch.equal(a, b) for a, b in zip(heads.parameters(), module.parameters(), strict=True)]
        for module in (again, other)
    )
    assert all(same)
    assert not all(changed)
    features = [torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    logits = heads(features)
    assert [tuple(block.shape) for block in logits] == [(2, 10), (2, 10)]
    assert not torch.allclose(logits[0], logits[1]), "each block has a head of its own"
    alone = heads([block[:1, 3:4] for block in features])
    assert torch.allclose(alone[0], logits[0][:1, 3:4], atol=1e-5), "a verdict depends on its own token only"


def make_method(adversary: bool = True, guidance: float = 1.0) -> tuple[PCM, FeatureTeacher, Spy, FeatureHeads]:
    teacher, heads = FeatureTeacher(gaussian_teacher()), FeatureHeads(8, (0, 2), hidden=32)
    student = Spy(TableStudent(GRID.sigmas))
    with torch.no_grad():
        student.inner.gain += 0.3  # type: ignore[attr-defined]
    look = FeatureAdversary(teacher, heads, GRID, 0.5, 1.0) if adversary else None
    settings = ConsistencySettings(GRID, guidance=guidance)
    return PCM(teacher, student, student, settings, CPU, look), teacher, student, heads


def both_turns(method: PCM, step: int = 0, count: int = 8) -> list[Any]:
    batch = data_batch(count, SHAPE)
    return [loss for turn in method.turns(step) for loss in turn.losses(batch, RandomStream(0, step, batch.positions))]


def test_student_and_heads_look_at_the_same_place_through_the_teacher() -> None:
    """Four looks of a step: one level within the phase, one noise; fake and real apart; only one with a graph."""
    method, teacher, student, _ = make_method(guidance=3.0)
    student_loss, heads_loss = both_turns(method)
    (kept,) = method._shared.values()
    assert not kept.prediction.requires_grad, "the student's graph must not live on until the heads' turn"
    fake, real, fake_again, real_again = teacher.calls
    assert [call.with_grad for call in teacher.calls] == [True, False, False, False]
    assert all(call.blocks == (0, 2) for call in teacher.calls)
    assert all(call.said.tolist() == [1.0] * 8 for call in teacher.calls)
    for call in (real, fake_again, real_again):
        assert torch.equal(call.sigma, fake.sigma)
    assert torch.equal(fake.x_t, fake_again.x_t), "the heads see the same fakes, with the same noise"
    assert torch.equal(real.x_t, real_again.x_t)
    assert not torch.equal(fake.x_t, real.x_t)
    assert (teacher.velocity_calls, len(student.calls)) == (2, 2)
    assert {"adversarial_hinge", "feature_distance", "target_std"} <= set(student_loss.metrics)
    assert {"logit_fake", "logit_real"} == set(heads_loss.metrics)
    # by hand: both, at the drawn level, by the exact rule
    batch = data_batch(8, SHAPE)
    stream = RandomStream(0, 0, batch.positions)
    pair = method.consistency.pair(student, student, batch, stream)
    noise, s = stream.normal(SHAPE, "adversary/noise"), fake.sigma.double()
    for call, x in ((fake, pair.prediction), (real, pair.target)):
        for sample in range(8):
            a, e = float(s[sample]), float(pair.jumps.end_B[sample])
            kept = (1 - a) / (1 - e)
            expected = kept * x[sample] + math.sqrt(a**2 - (kept * e) ** 2) * noise[sample]
            assert torch.allclose(call.x_t[sample], expected.detach(), atol=1e-5)


def test_levels_are_drawn_from_the_whole_phase() -> None:
    """Never one constant index; never at or below the phase's end."""
    method, _, _, _ = make_method()
    batch = data_batch(6000, (1, 1, 1, 1))
    stream = FastStream(0, 0, batch.positions)
    jumps = GRID.jumps(stream.uniform("consistency/level"))
    levels = GRID.level_within(jumps, stream.uniform("adversary/level"))
    assert bool((levels > jumps.end_B).all())
    for phase, (lower, upper) in enumerate(zip(GRID.edges, GRID.edges[1:], strict=False)):
        mine = levels[jumps.end_B == GRID.sigmas[lower]]
        counts = [int((mine == GRID.sigmas[index]).sum()) for index in range(lower + 1, upper + 1)]
        assert sum(counts) == len(mine), phase
        expected = len(mine) / len(counts)
        assert sum((count - expected) ** 2 / expected for count in counts) < 40


def test_the_terms_gradient_is_that_of_the_formula() -> None:
    """Taken up to the prediction ahead of time, it is what plain autograd gives for the sum."""
    method, teacher, student, heads = make_method()
    batch = data_batch(8, SHAPE)
    stream = RandomStream(0, 0, batch.positions)
    (loss,) = method.student_losses(batch, stream)
    table = student.inner.gain  # type: ignore[attr-defined]
    (found,) = torch.autograd.grad(loss.value, table)

    pair = method.consistency.pair(student, student, batch, stream)
    level_B = GRID.level_within(pair.jumps, stream.uniform("adversary/level"))
    noise = stream.normal(SHAPE, "adversary/noise")
    fake, real = (
        teacher.features(renoised(x, noise, pair.jumps.end_B, level_B), level_B.float(), pair.text, (0, 2))
        for x in (pair.prediction, pair.target)
    )
    plain = method.consistency.loss(pair)
    total = plain + 0.5 * student_hinge(heads(fake)) + 1.0 * feature_distance(fake, real)
    (expected,) = torch.autograd.grad(total, table)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert loss.value.item() == pytest.approx(total.item(), rel=1e-5)
    assert loss.reported == pytest.approx(plain.item(), rel=1e-6)
    assert loss.metrics["adversarial_hinge"] == pytest.approx(student_hinge(heads(fake)).item(), rel=1e-5)


def test_each_turn_reaches_its_own_role() -> None:
    method, _, student, heads = make_method()
    student_loss, heads_loss = both_turns(method)
    student_loss.value.backward()
    assert all(parameter.grad is None for parameter in heads.parameters())
    assert float(student.inner.gain.grad.abs().max()) > 0  # type: ignore[attr-defined]
    student.inner.zero_grad()  # type: ignore[attr-defined]
    heads_loss.value.backward()
    assert student.inner.gain.grad is None  # type: ignore[attr-defined]
    assert any(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in heads.parameters())


def test_heads_learn_to_tell_and_their_verdict_pulls_the_student() -> None:
    """Fakes far from the targets; once the heads see it, the hinge's gradient leads there."""
    _, teacher, _, heads = make_method()
    adversary = FeatureAdversary(teacher, heads, GRID, 1.0, 0.0)
    batch = data_batch(64, SHAPE)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-3, betas=(0.0, 0.999))
    stream = RandomStream(0, 0, batch.positions)

    def pair() -> ConsistencyPair:
        jumps = GRID.jumps(torch.rand(64, generator=torch.Generator().manual_seed(0)) * 0.4)
        assert batch.latents_BCFHW is not None
        fake: Tensor = torch.full_like(batch.latents_BCFHW, MEAN + 2).requires_grad_()
        return ConsistencyPair(fake, batch.latents_BCFHW, jumps, batch.text)

    for _ in range(60):
        term = adversary.heads_term(pair(), stream)
        optimizer.zero_grad()
        term.value.backward()
        optimizer.step()
    assert term.value.item() < 1.6, "2 is what heads lose that know nothing"
    assert term.metrics["logit_real"] > term.metrics["logit_fake"] + 0.4
    fakes = pair()
    adversary.student_term(fakes, stream).value.backward()
    assert fakes.prediction.grad is not None
    assert float(fakes.prediction.grad.mean()) > 0, "downhill, towards the targets' mean"


def test_turns_and_forgetting() -> None:
    method, teacher, _, _ = make_method()
    assert [turn.role for turn in method.turns(3)] == ["student", "discriminator"]
    both_turns(method)
    method.end_step()
    with pytest.raises(KeyError):
        list(method.discriminator_losses(data_batch(8, SHAPE), RandomStream(0, 0, tuple(range(8)))))
    plain, teacher, student, _ = make_method(adversary=False)
    assert [turn.role for turn in plain.turns(3)] == ["student"]
    (loss,) = both_turns(plain)
    assert (teacher.calls, teacher.velocity_calls, len(student.calls)) == ([], 1, 2)
    assert loss.reported is None
    assert plain.updates("student", 5) == 5


# --- its settings -----------------------------------------------------------------------------------------------------


def pcm(distillation: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    given = {"distillation_method": "pcm", "distillation_config": distillation or {}, **options}
    return TrainConfig.model_validate(given)


def mistakes(config: TrainConfig) -> set[str]:
    return {problem.key.removeprefix("distillation_config.") for problem in cross_problems(config)}


def test_defaults() -> None:
    settings = pcm().distillation
    assert isinstance(settings, PcmConfig)
    assert settings.timesteps(5.0) == pytest.approx([1000 * sigma for sigma in LADDER])
    assert (settings.transition, settings.has_discriminator, settings.needs_latents) == ("ode", False, True)
    assert not mistakes(pcm())
    assert combination_notices(pcm()) == []
    assert pcm({"phase_edges": "1000,900,500,0"}).student_timesteps() == (1000, 900, 500)


@pytest.mark.parametrize(
    ("given", "key"),
    [({"phases": 40}, "phases"), ({"phase_edges": "1000,999,500"}, "phase_edges"),
     ({"phase_edges": "995,500"}, "phase_edges"), ({"phase_edges": "1000,500,700"}, "phase_edges"),
     ({"phases": 2, "phase_edges": "1000,500"}, "phases"), ({"target": "ema"}, "target")],
)  # fmt: skip
def test_settings_that_cannot_work(given: dict[str, Any], key: str) -> None:
    assert mistakes(pcm(given)) == {key}


def test_blocks_with_heads() -> None:
    settings = pcm({"adv_weight": 0.1}).distillation
    assert isinstance(settings, PcmConfig)
    assert settings.has_discriminator
    assert settings.feature_blocks(30) == tuple(range(1, 30, 2))
    assert len(settings.feature_blocks(40)) == 20
    assert settings.feature_blocks(1) == (0,)
    assert pcm({"discriminator_head_stride": 3}).distillation.feature_blocks(8) == (1, 4, 7)  # type: ignore[attr-defined]


def test_it_is_built_from_its_settings() -> None:
    config = pcm({"adv_weight": 0.2, "adv_hinge_scale": 4, "adv_feature_scale": 3, "loss_type": "l2"})
    teacher, student = FeatureTeacher(gaussian_teacher()), TableStudent(GRID.sigmas)
    heads = FeatureHeads(8, (0, 2), hidden=32)
    schedule = Schedule(5.0, LADDER)
    method = builder("pcm")(Ingredients(teacher, student, schedule, config.distillation, CPU, discriminator=heads))
    assert isinstance(method, PCM)
    assert method.consistency.settings == ConsistencySettings(GRID, 5.0, loss_type="l2")
    assert method.adversary == FeatureAdversary(teacher, heads, GRID, pytest.approx(0.8), pytest.approx(0.6))
    plain = builder("pcm")(Ingredients(teacher, student, schedule, pcm().distillation, CPU))
    assert isinstance(plain, PCM)
    assert plain.adversary is None
    assert isinstance(plain.consistency, Consistency)
