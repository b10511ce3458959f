"""A run that runs out of memory says what it needed and what to change, keeps its steps, and ends with code 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from simpletuner_dmd.distill.dmd import DMD
from simpletuner_dmd.training.out_of_memory import EXIT_CODE, is_out_of_memory
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import assert_same_bits


def failing_at(step: int, turn: str, error: BaseException) -> Any:
    """DMD's losses of a turn, with memory running out in one step: of the run, not of its plan."""
    losses = getattr(DMD, turn)

    def wrapped(self: DMD, batch: Any, stream: Any) -> Iterable[Any]:
        if stream.step == step and not batch.text.rows_BLD.is_meta:
            raise error
        yield from losses(self, batch, stream)

    return wrapped


CUDA_STYLE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_the_steps_before_are_saved_and_the_run_goes_on(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, broken = make_project("whole"), make_project("broken")
    assert whole.train() == 0
    (kept,) = whole.rows("plan")
    assert kept["step"] == 1 and kept["measured_bytes"] > 0 and kept["planned_bytes"] > 0
    assert (whole.output / "plan.json").is_file()
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(DMD, "student_losses", failing_at(4, "student_losses", CUDA_STYLE))
        assert broken.train() == EXIT_CODE == 3
    shown = capfd.readouterr()
    assert "Peak memory of training: " in shown.out
    assert "Out of memory: CUDA out of memory" in shown.err and "Plan (an estimate" in shown.err
    assert "Try: " in shown.err and "checkpoint-000004" in shown.err
    assert broken.checkpoints == ["checkpoint-000004"]
    assert broken.train() == 0, "the same command goes on"
    assert "measured by the last run of these settings" in capfd.readouterr().out
    assert_same_bits(whole.exported(), broken.exported())


def test_a_step_in_which_a_role_has_moved_is_not_saved(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project = make_project(checkpoint_step_interval=2)
    monkeypatch.setattr(DMD, "critic_losses", failing_at(4, "critic_losses", MemoryError()))
    assert project.train() == EXIT_CODE
    assert "could not be saved" in capfd.readouterr().err
    assert project.checkpoints[-1] == "checkpoint-000004"  # by its interval


def test_what_running_out_looks_like() -> None:
    assert is_out_of_memory(CUDA_STYLE) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
