"""Two processes on the CPU (gloo) are one process with the same global batch."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ProjectMaker
from tests.support.runs import Project, environment, largest_difference, videos_dataset

TOLERANCE = 1e-5
OPTIONS = {"max_train_steps": 6, "optimizer": "torch-adamw", "checkpoint_step_interval": 3, "use_ema": True,
           "validation_disable": False, "validation_step_interval": 3, "caption_dropout_probability": 0.3}  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one(make_project: ProjectMaker) -> None:
    one = make_project("one", train_batch_size=4, **OPTIONS)
    assert one.train() == 0
    two = make_project("two", train_batch_size=2, num_processes=2, **OPTIONS)
    finished = subprocess.run(
        two.command(), env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for role in ("student", "critic"):
        assert largest_difference(two.trained(role), one.trained(role)) < TOLERANCE
    assert largest_difference(two.exported(), one.exported()) < TOLERANCE
    left, right = one.rows("step"), two.rows("step")
    assert [row["step"] for row in right] == [row["step"] for row in left] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        # The mean over ranks of private samples, the exit rung shared by both.
        assert b["fake_score_loss"] == pytest.approx(a["fake_score_loss"], rel=1e-4)
        assert b.get("dmd_loss", 0) == pytest.approx(a.get("dmd_loss", 0), rel=1e-3, abs=1e-7)
        assert b.get("exit_rung") == a.get("exit_rung")
    assert two.rows("start")[0]["environment"]["processes"] == 2
    assert len(two.rows("finish")) == 1
    assert finished.stdout.count("Finished in") == 1


def test_two_micro_batches_equal_one_of_twice_the_size(make_project: ProjectMaker) -> None:
    options = {"optimizer": "torch-adamw", "caption_dropout_probability": 0.3}
    whole = make_project("whole", train_batch_size=4, **options)
    halves = make_project("halves", train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert whole.train() == 0 and halves.train() == 0
    for role in ("student", "critic"):
        assert largest_difference(halves.trained(role), whole.trained(role)) < TOLERANCE


def start(project: Project) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        project.command(), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(make_project: ProjectMaker) -> None:
    """Ctrl-C reaches the command that was typed; both processes finish the step, and one checkpoint is saved."""
    project = make_project(train_batch_size=2, num_processes=2, max_train_steps=200, checkpoint_step_interval=5)
    process = start(project)
    deadline = time.monotonic() + 120
    while not (project.output / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    print(output)
    assert "Traceback" not in output
    reached = project.rows("step")[-1]["step"]
    assert reached < 200
    assert project.checkpoints[-1] == f"checkpoint-{reached:06d}"
    assert output.count("the same command goes on from there") == 1


@pytest.mark.slow
def test_a_mistake_found_by_two_processes_is_still_a_sentence(make_project: ProjectMaker, tmp_path: Path) -> None:
    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "notes.mp4").write_text("this is no video")
    project = make_project(datasets=videos_dataset(tmp_path / "useless"), num_processes=2)
    process = start(project)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "has no usable sample" in output and "notes.mp4" in output
    print(output)
    assert "Traceback" not in output
