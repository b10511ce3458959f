"""rCM from the command line, on the demo's Wan: every way in which the derivative can be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import ProjectMaker
from tests.support.runs import videos_dataset
from tests.support.videos import write_small_set

RCM = {"student_steps": 3, "tangent_warmup_steps": 2, "generator_update_interval": 2, "tangent_step": 1e-4}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("finite_difference", {"gradient_checkpointing": True}),
        ("finite_difference", {"base_model_precision": "int8-quanto"}),
        ("jvp", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
        ("jvp", {"model_type": "full", "learning_rate": 1e-4, "mixed_precision": "bf16"}),
        ("jvp", {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4}}),
    ],
    ids=["difference", "difference-int8", "jvp-bf16", "jvp-full-bf16", "jvp-lokr"],
)
def test_rcm_trains_and_exports(
    make_project: ProjectMaker, tmp_path: Path, method: str, options: dict[str, object]
) -> None:
    videos = write_small_set(tmp_path / "videos", 2)
    project = make_project(
        "rcm",
        videos_dataset(videos),
        distillation_method="rcm",
        distillation={**RCM, "tangent_method": method},
        **options,
    )
    assert project.train() == 0
    rows = project.rows("step")
    assert [("scm_loss" in row, "dmd_loss" in row, "fake_score_loss" in row) for row in rows] == [
        (True, False, False),  # the student alone
        (True, False, False),
        (True, True, True),
        (False, False, True),
        (True, True, True),
        (False, False, True),
    ]
    assert [row["tangent_share"] for row in rows if "scm_loss" in row] == [0.0, 0.5, 1.0, 1.0]
    tangents = [row["tangent_rms"] for row in rows if "scm_loss" in row]
    assert all(tangent > 0.01 for tangent in tangents[1:])
    if options.get("model_type") != "full":
        assert tangents[0] == 0.0, "without the derivative a fresh LoRA has nothing to correct: it is the teacher"
    assert project.rows("export")[0]["passed"]
