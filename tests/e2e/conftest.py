"""Fixtures of whole runs: one random tiny Wan for the session, and a project folder per test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.publish import fresh_process, load_back
from tests.support.pipelines import save_small_pipeline
from tests.support.runs import SMALL_DMD, Project


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start in an empty folder, and no test reaches the network or the person's own settings."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def load_back_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the export in this process: its own takes seconds to import diffusers. Not where a test is marked
    `fresh_process`, nor in runs that are processes of their own."""
    if request.node.get_closest_marker("fresh_process") is None:
        monkeypatch.setattr(load_back, "in_fresh_process", fresh_process.run)


@pytest.fixture(scope="session")
def small_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_pipeline(tmp_path_factory.mktemp("models") / "small-wan")


ProjectMaker = Callable[..., Project]


@pytest.fixture
def make_project(tmp_path: Path, small_wan: Path) -> ProjectMaker:
    """make_project(name, datasets=None, distillation={…}, **options): a project of SMALL_DMD with these changes."""

    def make(
        name: str = "project",
        datasets: list[dict[str, Any]] | None = None,
        distillation: dict[str, Any] | None = None,
        **options: Any,
    ) -> Project:
        merged = {**SMALL_DMD, "pretrained_model_name_or_path": str(small_wan), **options}
        if merged.get("distillation_method") is None:
            merged.pop("distillation_config", None)
        elif merged["distillation_method"] in ("dmd", "rcm"):
            merged["distillation_config"] = {**SMALL_DMD["distillation_config"], **(distillation or {})}
        else:
            merged["distillation_config"] = distillation or {}
        project = Project(tmp_path / name)
        project.write({key: value for key, value in merged.items() if value is not None}, datasets)
        return project

    return make
