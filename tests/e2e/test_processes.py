"""Two processes on the CPU (gloo) are one process with the same global batch."""

import subprocess

import pytest

from tests.e2e.conftest import ProjectMaker
from tests.support.runs import environment, largest_difference

TOLERANCE = 1e-5
OPTIONS = {"max_train_steps": 6, "optimizer": "torch-adamw", "checkpoint_step_interval": 3, "use_ema": True,
           "validation_disable": False, "validation_step_interval": 3, "caption_dropout_probability": 0.3}  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one(make_project: ProjectMaker) -> None:
    one = make_project("one", train_batch_size=4, **OPTIONS)
    assert one.train() == 0
    two = make_project("two", train_batch_size=2, num_processes=2, **OPTIONS)
    finished = subprocess.run(two.command(), env=environment(), capture_output=True, text=True, timeout=240, check=False)
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
