"""Killed, interrupted or stopped: the same command goes on and ends with the same bits."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ProjectMaker
from tests.support.runs import Project, assert_same_bits, environment

STEPS = 12
OPTIONS = {
    "max_train_steps": STEPS,
    "checkpoint_step_interval": 3,
    "use_ema": True,
    "ema_decay": 0.9,
    "ema_update_interval": 2,
    "lr_scheduler": "cosine_with_min_lr",
    "lr_warmup_steps": 4,
    "gradient_accumulation_steps": 2,
    "caption_dropout_probability": 0.5,
}
DISTILLATION = {"critic_warmup_steps": 1}


@pytest.fixture
def straight(make_project: ProjectMaker) -> Project:
    """The same run without any interruption."""
    project = make_project("straight", distillation=DISTILLATION, **OPTIONS)
    assert project.train() == 0
    return project


def assert_same_end(project: Project, straight: Project) -> None:
    assert_same_bits(project.exported(), straight.exported())
    for role in ("student", "critic"):
        assert_same_bits(project.trained(role), straight.trained(role))
    losses = [
        [(row["step"], row["fake_score_loss"], row.get("dmd_loss")) for row in run.rows("step")]
        for run in (project, straight)
    ]
    assert losses[0] == losses[1]  # each step once, none lost, none twice


def test_stopped_half_way_by_ctrl_c_in_process(
    make_project: ProjectMaker, straight: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simpletuner_dmd.training.trainer import Trainer

    project = make_project("stopped", distillation=DISTILLATION, **OPTIONS)
    whole_step = Trainer._train_step

    def interrupted_in_step_7(trainer: Trainer) -> dict[str, float]:
        values = whole_step(trainer)
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted_in_step_7)
        assert project.train() == 130
    assert project.checkpoints[-1] == "checkpoint-000007"
    assert "the same command goes on from there" in capsys.readouterr().out
    assert not (project.output / "export").exists()

    assert project.train() == 0
    assert "checkpoint-000007" in capsys.readouterr().out
    assert_same_end(project, straight)


def wait_for(path: Path, process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def start(project: Project) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        project.command(), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_signals_to_a_real_process(number: signal.Signals, make_project: ProjectMaker) -> None:
    # Long enough that the signal lands in the middle of training, wherever the machine is busy.
    options = {**OPTIONS, "max_train_steps": 40}
    straight = make_project("straight", distillation=DISTILLATION, **options)
    assert straight.train() == 0
    project = make_project("killed", distillation=DISTILLATION, **options)
    process = start(project)
    wait_for(project.output / "checkpoints" / "checkpoint-000003" / "manifest.json", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), output
    assert "Traceback" not in output
    reached = project.rows("step")[-1]["step"]
    assert reached < 40, "the signal came too late to prove anything"
    if number != signal.SIGKILL:
        assert project.checkpoints[-1] == f"checkpoint-{reached:06d}"
    assert project.train() == 0
    assert_same_end(project, straight)


def test_a_half_written_checkpoint_is_named_and_passed_over(
    make_project: ProjectMaker, straight: Project, caplog: pytest.LogCaptureFixture
) -> None:
    project = make_project("half", distillation=DISTILLATION, **OPTIONS)
    assert project.train() == 0
    newest = project.output / "checkpoints" / f"checkpoint-{STEPS:06d}"
    weights = newest / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert project.train() == 0
    assert newest.name in caplog.text
    assert_same_end(project, straight)


def test_a_finished_run_started_again_changes_nothing(make_project: ProjectMaker) -> None:
    project = make_project("again", distillation=DISTILLATION, **OPTIONS)
    assert project.train() == 0
    before = project.exported()
    assert project.train() == 0
    assert_same_bits(project.exported(), before)
    assert len(project.rows("step")) == STEPS


def test_resume_from_null_starts_afresh(make_project: ProjectMaker) -> None:
    project = make_project("afresh", distillation=DISTILLATION, **OPTIONS)
    assert project.train() == 0
    before = project.exported()
    assert project.train("resume_from_checkpoint=none") == 0
    assert project.rows("start")[-1]["resumed_at"] == 0
    assert_same_bits(project.exported(), before)


def test_resume_from_a_named_checkpoint(make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project("named", distillation=DISTILLATION, **OPTIONS)
    assert project.train() == 0
    before = project.exported()
    assert project.train("resume_from_checkpoint=checkpoint-000006") == 0
    assert f"step 6 of {STEPS}" in capsys.readouterr().out
    assert_same_bits(project.exported(), before)
    assert project.train("resume_from_checkpoint=checkpoint-000005") == 2
    assert "checkpoint-000006" in capsys.readouterr().err


def test_averaging_switched_on_later_starts_at_the_trained_weights(make_project: ProjectMaker) -> None:
    """The average is made before a checkpoint is loaded; a finished run must not export that untrained student."""
    project = make_project("average", distillation=DISTILLATION, **{**OPTIONS, "use_ema": False, "max_train_steps": 4})
    assert project.train() == 0
    raw = project.exported()
    assert any(tensor.any() for name, tensor in raw.items() if "lora_B" in name)
    assert project.train("use_ema=true") == 0
    assert_same_bits(project.exported(), raw)
