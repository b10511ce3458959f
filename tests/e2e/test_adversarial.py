"""Runs with the adversarial term and with weak-to-strong matching: trained, checkpointed, resumed, refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel

from tests.e2e.conftest import ProjectMaker
from tests.support.runs import Project, assert_same_bits, videos_dataset
from tests.support.videos import write_small_set

GAN = {
    "gan_weight": 0.2, "gan_weight_mode": "ratio", "gan_start_step": 4, "gan_discriminator_warmup": 2,
    "gan_r1_weight": 20, "generator_update_interval": 1, "real_score_guidance_scale": 3.0,
}  # fmt: skip
STEPS = 8


@pytest.fixture
def videos(tmp_path: Path) -> list[dict[str, Any]]:
    return videos_dataset(write_small_set(tmp_path / "videos"))


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True, "mixed_precision": "bf16"}, {"base_model_precision": "int8-quanto"},
     {"model_type": "full"}],
    ids=["lora", "checkpointing", "quantised", "full"],
)  # fmt: skip
def test_the_head_learns_first_and_then_the_student_hears_it(
    make_project: ProjectMaker, videos: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    project = make_project("gan", videos, distillation=GAN, max_train_steps=STEPS, **options)
    assert project.train() == 0
    rows = project.rows("step")
    assert ["gan_critic_loss" in row for row in rows] == [False] * 2 + [True] * 6
    assert ["gan_generator_loss" in row for row in rows] == [False] * 4 + [True] * 4
    assert rows[2]["gan_critic_loss"] == pytest.approx(2 * 0.6931472, rel=1e-5)  # a head that says nothing: 2 log 2
    assert {row["gan_gradient_ratio"] for row in rows[4:]} != {0.0}
    assert all(row["gan_gradient_ratio"] == pytest.approx(0.2, rel=0.05) for row in rows[4:])
    assert all(0 < row["dmd_guidance_share"] <= 1 for row in rows)
    assert rows[0]["dmd_matching_rms"] == 0 or options  # the critic is the teacher, bit for bit, on a shared base
    head = {name: tensor for name, tensor in project.trained("critic").items() if name.startswith("discriminator.")}
    assert head and head["discriminator.logit.weight"].any()
    assert not any("discriminator" in name for name in (*project.trained("student"), *project.exported()))
    assert project.rows("export")[0]["passed"]


def assert_same_end(project: Project, straight: Project) -> None:
    assert_same_bits(project.exported(), straight.exported())
    for role in ("student", "critic"):
        assert_same_bits(project.trained(role), straight.trained(role))


@pytest.mark.parametrize("stop", [2, 3, 6], ids=["before the head learns", "before the student hears", "in full"])
def test_interrupted_and_resumed_it_ends_with_the_same_bits(
    make_project: ProjectMaker, videos: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    from simpletuner_dmd.training.trainer import Trainer

    options = {"max_train_steps": STEPS, "gradient_accumulation_steps": 2, "train_batch_size": 1}
    straight = make_project("straight", videos, distillation=GAN, **options)
    assert straight.train() == 0
    project = make_project("stopped", videos, distillation=GAN, **options)
    whole_step = Trainer._train_step

    def interrupted(trainer: Trainer) -> dict[str, float]:
        values = whole_step(trainer)
        if trainer.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert project.train() == 130
    assert project.checkpoints[-1] == f"checkpoint-{stop:06d}"
    assert project.train() == 0
    assert_same_end(project, straight)


def test_without_the_term_nothing_is_different_before_it_starts(
    make_project: ProjectMaker, videos: list[dict[str, Any]]
) -> None:
    """The same draws, the same updates: the term adds, it does not disturb."""
    plain = make_project("plain", videos, distillation={"generator_update_interval": 1}, max_train_steps=2)
    late = make_project(
        "late", videos, max_train_steps=2,
        distillation={"generator_update_interval": 1, "gan_weight": 0.1, "gan_start_step": 1,
                      "gan_discriminator_warmup": 0},
    )  # fmt: skip
    assert plain.train() == 0 and late.train() == 0
    first, second = ([(row["dmd_loss"], row["fake_score_loss"]) for row in run.rows("step")] for run in (plain, late))
    assert first == second
    assert_same_bits(plain.trained("student"), late.trained("student"))  # the head is fresh: its gradient is exactly 0


@pytest.mark.parametrize("mode", ["linear", "exact-both"])
def test_weak_to_strong(make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Trains, costs no forward, and in the exact form both branches of the teacher see the adapter at its fraction."""
    options = {"max_train_steps": 4, "caption_dropout_probability": 0.2}
    settings = {"generator_update_interval": 1, "real_score_guidance_scale": 3.0}
    counts, losses = [], []
    forward = WanTransformer3DModel.forward
    for name, more in (("plain", {}), ("weak", {"weak_lora_scale": 0.25, "weak_mode": mode})):
        calls: list[None] = []

        def counted(*args: Any, calls: list[None] = calls, **kwargs: Any) -> Any:
            if kwargs["hidden_states"].device.type != "meta":  # where a run is planned
                calls.append(None)
            return forward(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(WanTransformer3DModel, "forward", counted)
            project = make_project(name, distillation={**settings, **more}, **options)
            assert project.train() == 0
        counts.append(len(calls))
        losses.append([row["dmd_loss"] for row in project.rows("step")])
    assert counts[0] == counts[1]
    assert losses[0][0] == losses[1][0], "a fresh critic is the teacher: there is nothing to lean to"
    assert losses[0][-1] != losses[1][-1]
    assert project.rows("step")[0]["dmd_matching_rms"] == 0


def test_a_run_may_begin_with_the_ends_of_the_teachers_trajectories(make_project: ProjectMaker) -> None:
    """The student alone at first; then the critic's warm-up, then both. Stopped in between, it ends the same."""
    distillation = {"regression_steps": 3, "critic_warmup_steps": 1, "ode_steps": 4, "generator_update_interval": 1}
    project = make_project("regression", distillation=distillation, checkpoint_step_interval=2)
    assert project.train() == 0
    rows = project.rows("step")
    assert ["ode_loss" in row for row in rows] == [True] * 3 + [False] * 3
    assert ["fake_score_loss" in row for row in rows] == [False] * 3 + [True] * 3
    assert ["dmd_loss" in row for row in rows] == [False] * 4 + [True] * 2
    before = project.exported()
    assert project.train("resume_from_checkpoint=checkpoint-000002") == 0
    assert_same_bits(project.exported(), before)


def test_ground_truth_trains_and_warns(
    make_project: ProjectMaker, videos: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project("truth", videos, distillation={"ground_truth_weight": 0.05}, max_train_steps=2)
    assert project.train() == 0
    assert "stills motion" in "".join(capsys.readouterr())
    assert project.rows("step")[0]["ground_truth_loss"] > 0


def test_what_cannot_work_is_a_sentence(
    make_project: ProjectMaker, videos: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (None, {"gan_weight": 0.1, "gan_start_step": 0}, ["gan_weight 0.1", "videos"]),
        (None, {"ground_truth_weight": 0.1}, ["ground_truth_weight 0.1", "videos"]),
        (videos, {"gan_weight": 0.1, "gan_start_step": 0, "gan_blocks": "0,2"}, ["gan_blocks", "2 blocks, 0 to 1"]),
        (videos, {"gan_weight": 0.1, "gan_start_step": 6}, ["gan_start_step", "never act"]),
        (None, {"regression_steps": 6}, ["regression_steps", "never begin"]),
    ]
    for number, (datasets, settings, words) in enumerate(cases):
        project = make_project(f"refused-{number}", datasets, distillation=settings)
        for verb in (project.check, project.train):
            assert verb() == 2
            error = capsys.readouterr().err
            assert all(word in error for word in words), error
            assert "Traceback" not in error
