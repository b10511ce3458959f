"""What a step costs: every forward of the transformers is counted on a real run."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.e2e.conftest import ProjectMaker

RUNGS = 3


def count_forwards(project: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Per training step, one entry for each forward: whether it carried a graph."""
    from simpletuner_dmd.training.trainer import Trainer

    steps: list[list[bool]] = []
    forward, step = WanTransformer3DModel.forward, Trainer._train_step

    def counted(model: WanTransformer3DModel, *args: Any, **kwargs: Any) -> Any:
        if steps:
            steps[-1].append(torch.is_grad_enabled())
        return forward(model, *args, **kwargs)

    def opened(trainer: Trainer) -> dict[str, float]:
        steps.append([])
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(WanTransformer3DModel, "forward", counted)
        patch.setattr(Trainer, "_train_step", opened)
        assert project.train() == 0
    steps[-1] = steps[-1][: len(steps[0]) + 10]  # what follows the last step is the export's check
    return steps


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_full_cycle(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, guidance: float, checkpointing: bool
) -> None:
    cycle, steps = 5, 11
    project = make_project(
        max_train_steps=steps, gradient_checkpointing=checkpointing,
        distillation={"generator_update_interval": cycle, "real_score_guidance_scale": guidance},
    )  # fmt: skip
    counted = count_forwards(project, monkeypatch)
    rows = project.rows("step")
    teacher = 1 if guidance == 1.0 else 2
    for number, forwards in enumerate(counted[:-1]):  # the last is followed by the export
        if number % cycle == 0:
            rung = int(rows[number]["exit_rung"])
            # Rungs up to the exit (only the last with a graph), the two scores, and the critic's own forward: the
            # rollout is reused for it.
            assert forwards == [False] * rung + [True] + [False] * (teacher + 1) + [True]
        else:
            assert 2 <= len(forwards) <= RUNGS + 1
            assert forwards == [False] * (len(forwards) - 1) + [True]
    # Rungs after the exit are not run: over the steps every length occurs.
    assert {len(forwards) for number, forwards in enumerate(counted[:-1]) if number % cycle} == {2, 3, 4}


def test_peak_memory_is_reported_and_modest(make_project: ProjectMaker) -> None:
    project = make_project()
    assert project.train() == 0
    peaks = [row["peak_bytes"] for row in project.rows("step")]
    assert peaks == sorted(peaks)
    assert 50e6 < peaks[-1] < 4e9
