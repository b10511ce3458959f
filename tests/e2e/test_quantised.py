"""Whole runs on a quantised base: what the start says, training, the export loaded back, the second start."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from simpletuner_dmd.wan.schemes import SCHEMES
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import largest_difference
from tests.wan.test_loading import original_names


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao", "nf4-bnb", "int8-bnb"])
def test_a_student_of_a_quantised_base_is_exported_and_loaded_back(
    precision: str, make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    library = SCHEMES[precision]
    if importlib.util.find_spec(library.module) is None:
        pytest.skip(f"{library.library} is not installed")
    options = {"base_model_precision": precision, "mixed_precision": "bf16", "max_train_steps": 2}
    project = make_project(**options, text_encoder_1_precision=precision, cache_dir_models="quantised")
    assert project.train() == 0
    said = capsys.readouterr().out
    assert f"{precision} against the unquantised base" in said and said.count("with guidance") >= 5
    assert "the quantised transformer is kept in quantised" in said
    assert "the student equals the teacher bit for bit" in said
    (verdict,) = project.rows("export")
    assert verdict["passed"], verdict
    assert largest_difference(project.trained("student"), project.trained("critic")) > 0
    assert project.train("max_train_steps=3") == 0
    again = capsys.readouterr().out
    assert "the transformer is read quantised from quantised" in again
    report = [line for line in said.splitlines() if line.startswith("  sigma")]
    assert report and report == [line for line in again.splitlines() if line.startswith("  sigma")]


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_a_student_of_a_base_in_one_file_is_loaded_back(
    precision: str, make_project: ProjectMaker, small_wan: Path, tmp_path: Path
) -> None:
    """As ComfyUI's users have it: Wan's own names below a prefix. Its config is the base's."""
    tensors = original_names(load_file(small_wan / "transformer" / "diffusion_pytorch_model.safetensors"))
    file = tmp_path / "wan.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, file)
    project = make_project(
        max_train_steps=1, pretrained_transformer_model_name_or_path=str(file), base_model_precision=precision,
        cache_dir_models="none",
    )  # fmt: skip
    assert project.check() == 0
    assert project.train() == 0
    (verdict,) = project.rows("export")
    assert verdict["checked"] and verdict["passed"], verdict
