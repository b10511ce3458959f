"""Self-forcing on frames whose joint distribution is known: DMD's losses over a block-wise rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simpletuner_dmd.config.methods.blockwise import SelfForcingConfig
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.self_forcing import block_settings, build
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.randomness import RandomStream

from .causal_toys import AffineCausalStudent, CausalOracleCritic, FrameSum, JointGaussian, autoregressive
from .oracles import CPU, FastStream, make_batch

MEMORY, MEAN = 0.8, torch.tensor([0.5, -0.2, 0.3, 0.0])
FRAMES = len(MEAN)


def options(**changes: object) -> SelfForcingConfig:
    """For a student of one-frame blocks, without guidance."""
    return SelfForcingConfig(**{"num_frame_per_block": 1, "real_score_guidance_scale": 1.0, **changes})


def parts(student: object, ladder: tuple[float, ...] = (1.0,), **changes: object) -> Ingredients:
    teacher = JointGaussian(MEAN, autoregressive(FRAMES, MEMORY))
    critic = CausalOracleCritic(student) if isinstance(student, AffineCausalStudent) else teacher
    return Ingredients(teacher, student, Schedule(1.0, ladder), options(**changes), CPU, critic=critic)


def train(student: AffineCausalStudent, steps: int = 1200, **changes: object) -> None:
    method = build(parts(student, ladder=tuple(student.ladder.tolist()), **changes))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch = make_batch(64, (1, FRAMES, 1, 2))
    for step in range(steps):
        for turn in method.turns(step):
            if turn.role == "student":
                optimizer.zero_grad()
                for loss in turn.losses(batch, FastStream(0, step, batch.positions)):
                    loss.value.backward()
                optimizer.step()
                decay.step()
        method.end_step()


def test_a_causal_student_learns_the_joint_distribution_of_the_frames() -> None:
    """x_f - m_f = 0.8 (x_(f-1) - m_(f-1)) + 0.6 e: the student has to find the 0.8 in its own earlier frames."""
    student = AffineCausalStudent(FRAMES)
    train(student)
    mean, covariance = student.distribution()
    assert float((mean - MEAN).abs().max()) < 2e-5
    assert float((covariance - autoregressive(FRAMES, MEMORY)).abs().max()) < 1e-4
    assert float((student.memory.detach()[0].diagonal(-1) - MEMORY).abs().max()) < 3e-4
    assert float((student.scale.detach()[0, 1:] - (1 - MEMORY**2) ** 0.5).abs().max()) < 5e-5


def test_both_exits_of_a_two_step_student_give_that_distribution() -> None:
    """Early exits train the first step, late ones the second on what the first left, re-noised and remembered.

    The critic sees clips of both exits and cannot tell them apart: what they share converges, what is opposite in the
    two moves only as fast as the critic can see two modes in it. So their average is held tight, each alone less.
    """
    student = AffineCausalStudent(FRAMES, (1.0, 0.5))
    train(student, steps=1500, same_step_across_blocks=True)
    first, second = student.distribution(0), student.distribution(1)
    truth = (MEAN, autoregressive(FRAMES, MEMORY))
    for early, late, exact, together in zip(first, second, truth, (6e-4, 5e-3), strict=True):
        assert float(((early + late) / 2 - exact).abs().max()) < together
        assert float((early - exact).abs().max()) < 0.1
        assert float((late - exact).abs().max()) < 0.1


def test_frames_before_the_gradient_window_do_not_train() -> None:
    student = AffineCausalStudent(FRAMES)
    train(student, steps=20, start_gradient_frame=-2)
    assert torch.equal(student.scale.detach()[0, :2], torch.full((2,), 0.5))
    assert not bool(student.memory.detach()[0, :2].any())
    assert not bool((student.scale.detach()[0, 2:] == 0.5).any())


def test_the_critic_learns_from_the_students_rollout_of_the_same_step() -> None:
    student = FrameSum()
    method = build(parts(student, ladder=(1.0, 0.5)))
    batch, stream = make_batch(2, (1, FRAMES, 1, 2)), RandomStream(0, 3, (0, 1))
    turns = list(method.turns(3))
    assert [turn.role for turn in turns] == ["student", "critic"]
    (loss,) = turns[0].losses(batch, stream)
    after_student = len(student.calls)
    assert loss.value.requires_grad
    list(turns[1].losses(batch, stream))
    assert len(student.calls) == after_student  # reused, not rolled out again
    method.end_step()
    list(turns[1].losses(batch, stream))
    assert len(student.calls) == 2 * after_student
    assert not any(call.with_grad for call in student.calls[after_student:])


def test_one_noise_window_holds_the_windows_of_all_blocks() -> None:
    """Lower end from the latest exit, upper end from the earliest; the levels drawn in training stay inside."""
    ladder = (1.0, 0.8, 0.6)
    method = build(parts(FrameSum(), ladder=ladder, ts_schedule=True, ts_schedule_max=True))
    window = method.score_window(2, 1)
    assert (window.low, window.high) == (0.02, 0.8)
    window = method.score_window(1, 0)
    assert (window.low, window.high) == (0.6, 0.98)
    assert method.score_window(1, 1) == method.score_window(1)

    seen: list[float] = []
    inner = method.teacher

    class Watching:
        def velocity(self, x_t_BCFHW, sigma, text, *, routed=None):
            seen.extend(sigma.tolist())
            return inner.velocity(x_t_BCFHW, sigma, text)

    method.teacher = Watching()
    batch = make_batch(16, (1, FRAMES, 1, 2))
    above_the_latest_exit = 0
    for step in range(40):
        seen.clear()
        stream = RandomStream(0, step, batch.positions)
        (loss,) = method.student_losses(batch, stream)
        assert loss.value.requires_grad
        rollout = method._roll_out(batch, stream, with_grad=False)
        first, last = min(rollout.exit_rungs), max(rollout.exit_rungs)
        low = max(0.02, (*ladder, 0.0)[last + 1])
        high = min(0.98, ladder[first])
        assert all(low <= level <= high for level in seen)
        assert len(seen) == 16
        above_the_latest_exit += sum(level > ladder[last] for level in seen)
    assert above_the_latest_exit > 100


def test_every_key_reaches_the_rollout() -> None:
    settings = block_settings(parts(FrameSum(), ladder=(1.0, 0.5), renoise="ode", num_frame_per_block=2,
                                    independent_first_frame=True, context_noise=30.0, same_step_across_blocks=True,
                                    last_step_only=True, start_gradient_frame=-3))  # fmt: skip
    assert settings.schedule.ladder == (1.0, 0.5)
    assert (settings.renoise, settings.num_frame_per_block, settings.independent_first_frame) == ("ode", 2, True)
    assert (settings.context_noise, settings.same_step_across_blocks) == (30.0, True)
    assert (settings.last_step_only, settings.start_gradient_frame) == (True, -3)


def test_every_key_of_the_comparison_reaches_dmd() -> None:
    changes = {"generator_update_interval": 5, "critic_warmup_steps": 7, "real_score_guidance_scale": 2.5,
               "fake_score_guidance_scale": 1.5, "min_timestep_ratio": 0.1, "max_timestep_ratio": 0.9,
               "timestep_shift": 3.0, "min_score_timestep": 50.0, "ts_schedule": False, "ts_schedule_max": True,
               "critic_noise_repeats": 2}  # fmt: skip
    ingredients = replace(parts(FrameSum(), ladder=(1.0, 0.5), **changes), caption_dropout_probability=0.2)
    settings = build(ingredients).settings
    assert {key: getattr(settings, key) for key in changes} == changes
    assert settings.caption_dropout_probability == 0.2
    assert (settings.rollout.schedule, settings.rollout.source) == (ingredients.schedule, "simulate")


def test_a_student_that_is_not_causal_is_refused() -> None:
    with pytest.raises(AssertionError, match="works block by block"):
        build(parts(JointGaussian(MEAN, autoregressive(FRAMES, MEMORY))))
