"""Runs with `tread_config`: the files of a published guide as they are, which passes are routed, and the same bits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from simpletuner_dmd.demo.path import model_path
from tests.e2e.conftest import ProjectMaker
from tests.support.pipelines import save_small_pipeline
from tests.support.runs import assert_same_bits, environment, largest_difference, videos_dataset
from tests.support.videos import write_small_set

GUIDE = Path(__file__).parent / "data" / "wan-lora"
TOKENS = 2 * 4 * 4  # 64 x 64 pixels, 5 frames
HALF_AROUND_THE_LAST = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]}


@pytest.fixture(scope="module")
def deep_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 blocks, as Wan 1.3B has, at width 32."""
    return save_small_pipeline(tmp_path_factory.mktemp("models") / "deep-wan", layers=30)


@dataclass
class Seen:
    """Tokens that each block was given: one list per forward, apart for forwards with and without gradients."""

    trained: list[list[int]] = field(default_factory=list)
    other: list[list[int]] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Sees every block of every forward inside; nothing is replaced."""
    seen, first = Seen(), set[int]()

    def note(module: torch.nn.Module, arguments: Any) -> None:
        if not isinstance(module, WanTransformerBlock) or arguments[0].is_meta:  # a run is planned without content
            return
        forwards = seen.trained if torch.is_grad_enabled() else seen.other
        if not forwards or id(module) in first:
            first.clear()
            first.add(id(module))
            forwards.append([])
        forwards[-1].append(arguments[0].shape[1])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def expected_tokens(depth: int, tread: dict[str, Any]) -> list[int]:
    tokens = [TOKENS] * depth
    for route in tread["routes"]:
        for block in range(route["start_layer_idx"], route["end_layer_idx"] % depth + 1):
            tokens[block] = TOKENS - int(TOKENS * route["selection_ratio"])
    return tokens


def supervised(videos: Path, **options: Any) -> dict[str, Any]:
    return {
        "datasets": videos_dataset(videos, resolution=64), "distillation_method": None, "max_train_steps": 2, **options
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "written"),
    [("simple", "deep", "path"), ("progressive", "deep", "object"), ("simple", "demo", "object")],
)
def test_the_guides_files_train(
    make_project: ProjectMaker, deep_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, model: str, written: str,
) -> None:  # fmt: skip
    file = GUIDE / f"tread-{name}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    folder = deep_wan if model == "deep" else model_path()
    project = make_project(
        **supervised(write_small_set(tmp_path / "videos", 2)),
        pretrained_model_name_or_path=str(folder),
        tread_config=str(file) if written == "path" else content["tread_config"],
    )
    with watched() as seen:
        assert project.train() == 0
    depth = 30 if model == "deep" else 4
    routed = expected_tokens(depth, content["tread_config"])
    assert min(routed) < TOKENS
    assert [tokens for tokens in seen.trained if tokens != [TOKENS] * depth] == [routed, routed]  # one per step
    assert all(len(set(tokens)) == 1 for tokens in seen.other), "a pass without gradients was routed"
    assert "tread: in the student's training passes" in capsys.readouterr().out
    assert project.rows("export")[0]["passed"]
    assert [row["step"] for row in project.rows("step")] == [1, 2]


def test_in_dmd_only_the_critics_own_passes_are_routed(make_project: ProjectMaker) -> None:
    project = make_project(
        tread_config=HALF_AROUND_THE_LAST, max_train_steps=2,
        distillation={"generator_update_interval": 1, "critic_noise_repeats": 2},
    )  # fmt: skip
    with watched() as seen:
        assert project.train() == 0
    whole, routed = [8, 8], [8, 4]  # 32 x 32 pixels, 5 frames: 8 tokens
    # Per step the student's pass, then one of the critic for each noise level; before them the self-test's.
    assert seen.trained[-6:] == [whole, routed, routed, whole, routed, routed]
    assert seen.trained[:-6] and all(tokens[0] == tokens[1] for tokens in seen.trained[:-6])
    assert seen.other and all(tokens[0] == tokens[1] for tokens in seen.other)


def test_a_recomputed_run_and_a_resumed_run_end_with_the_same_bits(make_project: ProjectMaker) -> None:
    options = {"tread_config": HALF_AROUND_THE_LAST, "max_train_steps": 4, "checkpoint_step_interval": 2}
    straight = make_project("straight", **options)
    recomputed = make_project("recomputed", **options, gradient_checkpointing=True)
    unrouted = make_project("unrouted", **options | {"tread_config": None})
    for project in (straight, recomputed, unrouted):
        assert project.train() == 0
    resumed = make_project("resumed", **options)
    assert resumed.train("max_train_steps=2") == 0
    assert resumed.train() == 0
    assert "checkpoint-000002" in resumed.checkpoints
    for role in ("student", "critic"):
        assert_same_bits(recomputed.trained(role), straight.trained(role))
        assert_same_bits(resumed.trained(role), straight.trained(role))
    assert largest_difference(unrouted.trained("critic"), straight.trained("critic")) > 1e-4


def test_two_processes_route_as_one(make_project: ProjectMaker) -> None:
    options = {"tread_config": HALF_AROUND_THE_LAST, "max_train_steps": 3, "optimizer": "torch-adamw"}
    one = make_project("one", train_batch_size=4, **options)
    two = make_project("two", train_batch_size=2, num_processes=2, **options)
    assert one.train() == 0
    finished = subprocess.run(
        two.command(), env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert largest_difference(two.trained("critic"), one.trained("critic")) < 1e-4


@pytest.mark.parametrize("verb", ["check", "train"])
def test_routes_that_do_not_fit_the_model_are_said_before_anything_is_loaded(
    make_project: ProjectMaker, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    content = json.loads((GUIDE / "tread-progressive.json").read_text(encoding="utf-8"))
    project = make_project(**content)
    assert (project.check() if verb == "check" else project.train()) == 2
    text = capsys.readouterr().err
    assert "tread_config.routes[1].start_layer_idx: found 9, but this model has 2 blocks, 0 to 1" in text
    assert "Traceback" not in text and not project.output.exists()
