"""One step of DMD under a magnifying glass: its gradient, its draws, its turns and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.losses import matching_direction, matching_loss, velocity_loss
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.flow import Routing, Schedule, TextEmbedding, add_noise, guided_velocity, unshifted
from simpletuner_dmd.randomness import RandomStream

from .oracles import (
    CPU,
    AffineStudent,
    FastStream,
    GaussianTeacher,
    OracleCritic,
    Spy,
    gaussian_velocity,
    make_batch,
    text_of,
)

SHAPE = (2, 3, 2, 4)
LADDER = (1.0, 0.9375, 0.8333, 0.625)
MEAN, NEGATIVE = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.1])
COVARIANCE = torch.diag(torch.tensor([0.5, 0.25]))


class LearnedVelocity(nn.Module):
    """v = a x + b + c * (what the text says): a network with parameters that need gradients."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)))

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        said = text.rows_BLD[:, 0, 0].reshape(-1, 1, 1, 1, 1)
        return self.weights[0] * x_t_BCFHW + self.weights[1] + self.weights[2] * said


def make_settings(**changes: object) -> DMDSettings:
    standard = DMDSettings(RolloutSettings(Schedule(ladder=LADDER)), real_score_guidance_scale=3.0, timestep_shift=5.0)
    return replace(standard, **changes)  # type: ignore[arg-type]


def learned(settings: DMDSettings) -> tuple[DMD, Spy, Spy, Spy, list[LearnedVelocity]]:
    networks = [LearnedVelocity(seed) for seed in range(3)]
    teacher, student, critic = (Spy(network) for network in networks)
    return DMD(teacher, student, critic, settings, CPU), teacher, student, critic, networks


def draw(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


# --- the direction and the loss ---------------------------------------------------------------------------------------


def test_direction_is_the_difference_of_clean_predictions_over_the_samples_own_distance() -> None:
    x0, x_t, v_teacher, v_critic = (draw(seed).double() for seed in range(4))
    x0[0] *= 50  # one sample far from the teacher must not shrink the steps of the others
    sigma_B = torch.tensor([0.1, 0.4, 0.7, 0.98])
    s = sigma_B.double().reshape(-1, 1, 1, 1, 1)
    teacher_x0, critic_x0 = x_t - s * v_teacher, x_t - s * v_critic
    result = matching_direction(x0, x_t, sigma_B, v_teacher, v_critic)
    for sample in range(4):
        normaliser = (x0[sample] - teacher_x0[sample]).abs().mean()
        assert float(result.normaliser_B[sample]) == pytest.approx(float(normaliser), rel=1e-9)
        expected = (critic_x0[sample] - teacher_x0[sample]) / normaliser
        assert torch.allclose(result.direction[sample], expected, rtol=1e-9, atol=1e-12)


def test_direction_is_computed_in_fp32_whatever_comes_in() -> None:
    x0, x_t, v_teacher = (draw(seed).bfloat16() for seed in range(3))
    v_critic = v_teacher.float() + 1e-3
    result = matching_direction(x0, x_t, torch.full((4,), 0.5), v_teacher, v_critic)
    assert result.direction.dtype == torch.float32
    unscaled = result.direction * result.normaliser_B.reshape(-1, 1, 1, 1, 1)
    assert torch.allclose(unscaled, torch.full_like(unscaled, -0.5e-3), rtol=1e-3)


def test_a_sample_that_is_already_the_teachers_gives_no_infinity() -> None:
    x_t = draw(0)
    result = matching_direction(x_t, x_t, torch.full((4,), 0.5), torch.zeros_like(x_t), torch.zeros_like(x_t))
    assert torch.equal(result.direction, torch.zeros_like(x_t))


def test_gradient_of_the_loss_is_the_direction_over_the_number_of_elements() -> None:
    x0, direction = draw(0).double().requires_grad_(), draw(1).double()
    loss = matching_loss(x0, direction)
    (gradient,) = torch.autograd.grad(loss, x0)
    assert loss.item() == pytest.approx(0.5 * float(direction.pow(2).mean()), rel=1e-12)
    assert torch.allclose(gradient, direction / x0.numel(), rtol=1e-9, atol=1e-15)


def test_velocity_loss_is_a_mean_per_sample_against_noise_minus_clean() -> None:
    predicted, x0, noise = draw(0), draw(1), draw(2)
    expected = [(predicted[b] - noise[b] + x0[b]).pow(2).mean() for b in range(4)]
    assert torch.allclose(velocity_loss(predicted, x0, noise), torch.stack(expected), rtol=1e-6)
    assert torch.equal(velocity_loss(noise - x0, x0, noise), torch.zeros(4))
    assert velocity_loss(predicted.bfloat16(), x0, noise).dtype == torch.float32


# --- the student's turn -----------------------------------------------------------------------------------------------


def student_gradient(guidance: float) -> tuple[Tensor, AffineStudent, DMD]:
    """The gradient of the offset of a student that already equals the unguided teacher, with its critic."""
    teacher = GaussianTeacher(MEAN, COVARIANCE, NEGATIVE)
    student = AffineStudent((1.0,), channels=2)
    with torch.no_grad():
        student.matrix[0].copy_(COVARIANCE.sqrt())
        student.offset[0].copy_(MEAN)
    rollout = RolloutSettings(Schedule(ladder=(1.0,)))
    settings = make_settings(rollout=rollout, real_score_guidance_scale=guidance)
    method = DMD(teacher, student, OracleCritic(student), settings, CPU)
    batch = make_batch(4, SHAPE)
    (loss,) = method.student_losses(batch, RandomStream(0, 0, batch.positions))
    loss.value.backward()
    assert student.offset.grad is not None
    return student.offset.grad[0], student, method


def test_a_finished_student_is_left_alone() -> None:
    gradient, _, _ = student_gradient(guidance=1.0)
    assert float(gradient.abs().max()) < 1e-7


def test_with_guidance_what_is_left_is_the_guidance_part_alone() -> None:
    """F = T gives x0_F - x0_T,g = -(g - 1)(x0_T,c - x0_T,u), which for equal covariances is known per noise level."""
    gradient, student, method = student_gradient(guidance=3.0)
    stream = RandomStream(0, 0, (0, 1, 2, 3))
    sigma_B = method.score_window(0).sigma(stream.uniform("score/sigma"))
    with torch.no_grad():
        initial = stream.normal(SHAPE, "rollout/initial noise")
        x0 = initial - student.velocity(initial, torch.ones(4), text_of(1.0, 4))
        x_t = add_noise(x0, stream.normal(SHAPE, "score/noise"), sigma_B)
        s = sigma_B.reshape(-1, 1, 1, 1, 1)
        conditional = x_t - s * gaussian_velocity(x_t, sigma_B, MEAN, COVARIANCE)
        unconditional = x_t - s * gaussian_velocity(x_t, sigma_B, NEGATIVE, COVARIANCE)
        guided = unconditional + 3 * (conditional - unconditional)
        normaliser = (x0 - guided).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
        direction = -2 * (conditional - unconditional) / normaliser
    assert torch.allclose(gradient, direction.sum(dim=(0, 2, 3, 4)) / direction.numel(), rtol=1e-4)
    assert float(gradient.abs().max()) > 0.01


def test_guidance_read_as_the_extra_form_would_be_seen() -> None:
    """v_c + g (v_c - v_u), found elsewhere, is the standard form at g + 1 and ends in another place."""
    x_t, sigma_B = draw(3), torch.tensor([0.1, 0.4, 0.7, 0.98])
    teacher = GaussianTeacher(MEAN, COVARIANCE, NEGATIVE)
    velocity = guided_velocity(teacher, x_t, sigma_B, text_of(1.0, 4), text_of(0.0), 3.0)
    standard = gaussian_velocity(x_t, sigma_B, NEGATIVE + 3 * (MEAN - NEGATIVE), COVARIANCE)
    extra = gaussian_velocity(x_t, sigma_B, NEGATIVE + 4 * (MEAN - NEGATIVE), COVARIANCE)
    assert torch.allclose(velocity, standard, atol=1e-5)
    assert float((velocity - extra).abs().max()) > 0.1


def test_only_the_students_parameters_get_gradients_and_only_one_call_keeps_a_graph() -> None:
    method, teacher, student, critic, networks = learned(make_settings())
    batch = make_batch(4, SHAPE)
    (loss,) = method.student_losses(batch, RandomStream(0, 3, batch.positions))
    loss.value.backward()
    assert [network.weights.grad is None for network in networks] == [True, False, True]
    assert not any(call.with_grad for call in teacher.calls + critic.calls)
    assert [call.with_grad for call in student.calls].count(True) == 1
    assert student.calls[-1].with_grad


def test_roles_are_asked_the_right_things() -> None:
    """Guided teacher: prompt and negative; critic: prompt only; both at the same input and one level per sample."""
    method, teacher, student, critic, _ = learned(make_settings(caption_dropout_probability=1.0))
    batch = make_batch(4, SHAPE)
    list(method.student_losses(batch, RandomStream(0, 3, batch.positions)))
    assert [call.said.tolist() for call in teacher.calls] == [[1.0] * 4, [0.0] * 4]
    assert [call.said.tolist() for call in critic.calls] == [[1.0] * 4]
    assert all(call.said.tolist() == [1.0] * 4 for call in student.calls), "no caption is dropped in the student's turn"
    first, second, scored = teacher.calls[0], teacher.calls[1], critic.calls[0]
    assert torch.equal(first.x_t, second.x_t)
    assert torch.equal(first.x_t, scored.x_t)
    assert torch.equal(first.sigma, scored.sigma)
    assert first.sigma.shape == (4,)
    assert first.sigma.dtype == torch.float32
    assert len(first.sigma.unique()) == 4, "each sample draws its own noise level"
    assert not any(call.routed for spy in (teacher, student, critic) for call in spy.calls)


def test_fake_guidance_is_a_setting_and_off_by_default() -> None:
    method, _, _, critic, _ = learned(make_settings(fake_score_guidance_scale=2.0))
    batch = make_batch(4, SHAPE)
    list(method.student_losses(batch, RandomStream(0, 3, batch.positions)))
    assert [call.said[0].item() for call in critic.calls] == [1.0, 0.0]
    assert DMDSettings(RolloutSettings(Schedule())).fake_score_guidance_scale == 0.0


@pytest.mark.parametrize(
    ("changes", "rung", "low", "high"),
    [
        ({}, 0, 0.9375, 0.98),
        ({}, 3, 0.02, 0.98),
        ({"ts_schedule_max": True}, 1, 0.8333, 0.9375),
        ({"ts_schedule_max": True}, 3, 0.02, 0.625),
        ({"ts_schedule": False}, 1, 0.02, 0.98),
        ({"ts_schedule": False, "min_score_timestep": 300.0}, 1, 0.3, 0.98),
        ({"ts_schedule": False, "max_timestep_ratio": 0.5, "min_timestep_ratio": 0.1}, 1, 0.1, 0.5),
    ],
)
def test_score_window(changes: dict[str, object], rung: int, low: float, high: float) -> None:
    window = learned(make_settings(**changes))[0].score_window(rung)
    assert (window.low, window.high, window.shift) == (pytest.approx(low), pytest.approx(high), 5.0)


def test_a_window_that_holds_nothing_is_reported_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="noise window"):
        learned(make_settings(max_timestep_ratio=0.9))


def test_scores_are_drawn_below_the_exit_of_their_own_step() -> None:
    method, teacher, student, _, _ = learned(make_settings(ts_schedule_max=True))
    batch = make_batch(4, SHAPE)
    for step in range(12):
        list(method.student_losses(batch, RandomStream(0, step, batch.positions)))
        exit_at = LADDER.index(round(float(student.calls[-1].sigma[0]), 4))
        sigma = teacher.calls[-1].sigma
        assert float(sigma.min()) >= max(0.02, (*LADDER, 0.0)[exit_at + 1]) - 1e-6
        assert float(sigma.max()) <= min(0.98, LADDER[exit_at]) + 1e-6


def test_what_is_logged_tells_matching_from_guidance() -> None:
    """Against the formula, from the velocities the roles were seen to give: no forward is added for it."""
    method, teacher, _, critic, networks = learned(make_settings(real_score_guidance_scale=4.0))
    batch = make_batch(4, SHAPE)
    (loss,) = method.student_losses(batch, RandomStream(0, 3, batch.positions))
    assert (len(teacher.calls), len(critic.calls)) == (2, 1)
    call = teacher.calls[0]
    s = call.sigma.reshape(-1, 1, 1, 1, 1)
    with torch.no_grad():
        x0_c, x0_u, x0_f = (
            call.x_t - s * network.velocity(call.x_t, call.sigma, text_of(said, 4))
            for network, said in ((networks[0], 1.0), (networks[0], 0.0), (networks[2], 1.0))
        )
        x0 = method._roll_out(batch, RandomStream(0, 3, batch.positions), with_grad=False).x0
        normaliser = (x0 - x0_u - 4 * (x0_c - x0_u)).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
        parts = [(x0_f - x0_c) / normaliser, -3 * (x0_c - x0_u) / normaliser]
        matching, guidance = (float(part.pow(2).mean().sqrt()) for part in parts)
        whole = float(sum(parts).pow(2).mean().sqrt())
    assert loss.metrics["dmd_matching_rms"] == pytest.approx(matching, rel=1e-4)
    assert loss.metrics["dmd_guidance_rms"] == pytest.approx(guidance, rel=1e-4)
    assert loss.metrics["dmd_guidance_share"] == pytest.approx(guidance / (guidance + matching), rel=1e-4)
    assert loss.metrics["dmd_direction_rms"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(("guidance", "share"), [(1.0, 0.0), (3.0, 1.0)])
def test_a_critic_at_the_teacher_leaves_guidance_alone(guidance: float, share: float) -> None:
    network, student = LearnedVelocity(0), LearnedVelocity(1)
    method = DMD(network, student, network, make_settings(real_score_guidance_scale=guidance), CPU)
    batch = make_batch(4, SHAPE)
    (loss,) = method.student_losses(batch, RandomStream(0, 3, batch.positions))
    assert loss.metrics["dmd_matching_rms"] == 0.0
    assert loss.metrics["dmd_guidance_share"] == share


# --- the critic's turn ------------------------------------------------------------------------------------------------


def test_the_critic_never_reaches_the_student() -> None:
    for after_student in (False, True):
        method, _, student, critic, networks = learned(make_settings())
        batch = make_batch(4, SHAPE)
        stream = RandomStream(0, 3, batch.positions)
        if after_student:
            list(method.student_losses(batch, stream))
        student.calls.clear()
        critic.calls.clear()
        (loss,) = method.critic_losses(batch, stream)
        loss.value.backward()
        assert [network.weights.grad is None for network in networks] == [True, True, False]
        assert not any(call.with_grad for call in student.calls)
        assert bool(student.calls) != after_student, "the rollout of the student's turn is used again"
        assert [(call.routed, call.with_grad) for call in critic.calls] == [(True, True)]


def test_the_rollout_is_forgotten_when_the_step_ends() -> None:
    method, _, student, _, _ = learned(make_settings())
    batch = make_batch(4, SHAPE)
    list(method.student_losses(batch, RandomStream(0, 0, batch.positions)))
    method.end_step()
    student.calls.clear()
    list(method.critic_losses(batch, RandomStream(0, 1, batch.positions)))
    assert student.calls


def test_micro_batches_do_not_take_each_others_rollouts() -> None:
    method, _, student, critic, _ = learned(make_settings())
    first, second = make_batch(2, SHAPE), replace(make_batch(2, SHAPE), positions=(2, 3))
    for batch in (first, second):
        list(method.student_losses(batch, RandomStream(0, 0, batch.positions)))
    critic.calls.clear()
    for batch in (first, second):
        list(method.critic_losses(batch, RandomStream(0, 0, batch.positions)))
    assert not torch.equal(critic.calls[0].x_t, critic.calls[1].x_t)
    assert len({value for call in critic.calls for value in call.sigma.tolist()}) == 4


def test_the_critic_sees_all_noise_levels_and_dropped_captions() -> None:
    method, _, _, critic, _ = learned(make_settings(caption_dropout_probability=0.25))
    batch = make_batch(4000, (1, 1, 1, 1))
    list(method.critic_losses(batch, FastStream(0, 0, batch.positions)))
    call = critic.calls[0]
    u = call.sigma.double() / (5 - 4 * call.sigma.double())
    bottom, top = unshifted(0.001, 5.0), unshifted(0.999, 5.0)
    expected = (u.sort().values - bottom) / (top - bottom)
    empirical = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert float((expected - empirical).abs().max()) < 1.95 / 4000**0.5
    assert float((call.said == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "rung", "low", "high"),
    [
        ({}, 0, LADDER[1], 0.999),
        ({}, 1, LADDER[2], 0.999),
        ({}, 3, 0.001, 0.999),
        ({"ts_schedule_max": True}, 1, LADDER[2], LADDER[1]),
        ({"ts_schedule": False}, 0, 0.001, 0.999),
    ],
)
def test_the_critic_may_see_an_exit_only_where_it_is_compared(
    changes: dict[str, object], rung: int, low: float, high: float
) -> None:
    """The critic's draws fill the window of the rollout's own exit."""
    method, _, student, critic, _ = learned(make_settings(fake_score_ts_schedule=True, **changes))
    assert (method.critic_window(rung).low, method.critic_window(rung).high) == pytest.approx((low, high))
    batch = make_batch(2000, (1, 1, 1, 1))
    for seed in range(30):
        list(method.critic_losses(batch, FastStream(seed, 0, batch.positions)))
        left_at = len(student.calls) - 1  # one call for each rung, as far as the exit
        seen = critic.calls[-1].sigma
        method.end_step()
        student.calls.clear()
        if left_at == rung:
            assert low <= float(seen.min()) < low + 0.01 and high - 0.01 < float(seen.max()) <= high
            return
    raise AssertionError("no rollout left at this rung")


def test_repeats_of_the_critic_are_a_mean_over_fresh_noise() -> None:
    method, _, student, critic, _ = learned(make_settings(critic_noise_repeats=3))
    batch = make_batch(4, SHAPE)
    losses = list(method.critic_losses(batch, RandomStream(0, 0, batch.positions)))
    assert len({tuple(call.sigma.tolist()) for call in critic.calls}) == 3
    exits = len([call for call in student.calls if not call.with_grad])
    assert exits <= 4, "one rollout serves all repeats"
    assert len(losses) == 3
    stream = RandomStream(0, 0, batch.positions)
    for repeat, (loss, call) in enumerate(zip(losses, critic.calls, strict=True)):
        noise = stream.normal(SHAPE, f"critic/noise {repeat}")
        s = call.sigma.reshape(-1, 1, 1, 1, 1)
        x0 = (call.x_t - s * noise) / (1 - s)
        predicted = critic.inner.velocity(call.x_t, call.sigma, batch.text)
        expected = (predicted - noise + x0).pow(2).mean() / 3
        assert loss.value.item() == pytest.approx(expected.item(), rel=1e-2)


# --- the plan and its cost --------------------------------------------------------------------------------------------


def test_the_plan_counts_steps_and_is_a_pure_function_of_them() -> None:
    method = learned(make_settings(generator_update_interval=5, critic_warmup_steps=7))[0]
    plan = [[turn.role for turn in method.turns(step)] for step in range(30)]
    assert [step for step in range(30) if "student" in plan[step]] == [7, 12, 17, 22, 27]
    assert all(roles[-1] == "critic" and len(roles) <= 2 for roles in plan)
    assert [turn.role for turn in method.turns(12)] == plan[12]
    for steps in range(31):
        assert method.updates("student", steps) == sum("student" in roles for roles in plan[:steps])
        assert method.updates("critic", steps) == steps


def test_cost_of_a_student_update() -> None:
    """Four rungs, five critic updates: at most 20.5 forwards and 6 backwards per student update, over all exits."""
    method, teacher, student, critic, networks = learned(make_settings(generator_update_interval=5))
    optimizer = torch.optim.SGD([p for network in networks for p in network.parameters()], lr=0.0)
    batch = make_batch(1, (1, 1, 1, 2))
    cycles, backwards, exits = 600, 0, []
    for step in range(5 * cycles):
        stream = RandomStream(0, step, batch.positions)
        exits.append(stream.shared_index(4, "rollout/exit") + 1)
        for turn in method.turns(step):
            for loss in turn.losses(batch, stream):
                loss.value.backward()
                backwards += 1
                optimizer.zero_grad()
        method.end_step()
    forwards = len(teacher.calls) + len(student.calls) + len(critic.calls)
    assert len(teacher.calls) == 2 * cycles
    assert len(critic.calls) == 6 * cycles
    assert len(student.calls) == sum(exits), "rungs up to the exit, once per step, shared by both turns"
    assert forwards / cycles == pytest.approx(20.5, rel=0.02)
    assert backwards == 6 * cycles


def test_the_method_has_nothing_to_save() -> None:
    method = learned(make_settings())[0]
    assert method.state_dict() == {}
    method.load_state_dict({})
    with pytest.raises(AssertionError):
        method.load_state_dict({"step": 3})
