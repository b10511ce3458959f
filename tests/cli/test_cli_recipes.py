"""`simpletuner recipes`: a line each, where each number is from, and how two differ."""

import json
from pathlib import Path

import pytest

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.config.recipes import recipe_names


def test_list_has_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(recipe_names())]] == recipe_names()
    assert max(map(len, lines)) <= 80
    assert main(["recipes", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(recipe_names())


def test_show_says_where_numbers_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "wan-1.3b-dmd-lora-12gb"]) == 0
    shown = capsys.readouterr().out
    assert "real_score_guidance_scale = 4.5\n    from: CausVid and FastVideo" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["recipes", "--json", "show", "demo-dmd"]) == 0
    setting = json.loads(capsys.readouterr().out)["settings"]["learning_rate"]
    assert setting["value"] == 1e-4 and "measured" in setting["source"] and setting["date"]
    assert main(["recipes", "show", "demo-dm"]) == 2
    assert "did you mean demo-dmd" in capsys.readouterr().err


def test_diff_of_recipes_and_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "diff", "wan-1.3b-dmd-lora", "wan-1.3b-dmd-lora-16gb"]) == 0
    shown = capsys.readouterr().out
    assert "base_model_precision      -  ->  int8-quanto" in shown and "learning_rate" not in shown
    assert main(["recipes", "diff", "demo-dmd", "demo-dmd"]) == 0
    assert "the same" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "demo-dmd", "learning_rate": 1}))
    assert main(["recipes", "--json", "diff", "demo-dmd", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"learning_rate": [1e-4, 1]}
