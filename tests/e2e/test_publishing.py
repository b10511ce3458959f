"""What leaves a run, and the verbs that make it again: the load-back in a fresh process, merged and extracted files."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from simpletuner_dmd.cli import run as run_module
from tests.e2e.conftest import ProjectMaker


@pytest.mark.fresh_process
def test_the_export_is_loaded_back_by_a_process_of_its_own_after_the_training_is_freed(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports nothing of this package; by then the networks of the training are gone."""
    networks: list[weakref.ref[Any]] = []
    alive: list[int] = []
    put_together, load_back = run_module.TrainingRun._put_together, run_module.load_back

    def remembering(self: Any) -> Any:
        parts = put_together(self)
        networks.extend(weakref.ref(p) for _, p in parts.roles.student.transformer.named_parameters())
        return parts

    def watched(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in networks))
        return load_back(*arguments)

    monkeypatch.setattr(run_module.TrainingRun, "_put_together", remembering)
    monkeypatch.setattr(run_module, "load_back", watched)
    project = make_project(max_train_steps=2)
    assert project.train() == 0
    gc.collect()
    assert networks and alive == [0]
    (row,) = project.rows("export")
    assert row["checked"] and row["passed"] and row["relative_error"] < 1e-4
