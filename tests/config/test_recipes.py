"""Recipes: each one loads, each number says where it is from, and what a person writes wins over them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.config import LoadedConfig, UserError, load
from simpletuner_dmd.config.recipes import FOLDER, choose, is_number, recipe, recipe_names

VIDEOS = {"dataset_type": "video", "instance_data_dir": "videos"}
EXPLAINED = ("has no effect on DCM's noise levels", "expert alone is trained", "this run trains the")


def loaded(home: Path, argv: list[str] | None = None, **content: Any) -> LoadedConfig:
    (home / "config.json").write_text(json.dumps(content))
    (home / "multidatabackend.json").write_text(json.dumps([VIDEOS]))
    return load(argv, environ={}, cwd=home)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_every_number_has_a_source(name: str, tmp_path: Path) -> None:
    chosen = recipe(name)
    assert chosen.about and [key for key, value in chosen.options.items() if is_number(value)]
    assert not [key for key, value in chosen.options.items() if is_number(value) and key not in chosen.sources]
    assert not set(chosen.sources) - set(chosen.options), "a source of a number that is not there"
    for source in chosen.sources.values():
        assert len(source.text) > 8 and re.fullmatch(r"20\d\d-\d\d", source.date)
    run = loaded(tmp_path, recipe=name)
    assert not [note for note in run.notices if not any(text in note for text in (*EXPLAINED, "validation renders"))]
    assert run.config.recipe == name
    for key, value in chosen.options.items():
        assert run.origins[key] == f"recipe {name}", key
        assert not is_number(value) or isinstance(value, str) or run.options()[key] in (value, [value])
    assert choose(*chosen.kind, chosen.card, chosen.is_demo) is not None


def test_every_part_is_used() -> None:
    used = {parent for path in FOLDER.rglob("*.json") for parent in json.loads(path.read_text()).get("extends", [])}
    assert {f"parts/{path.stem}" for path in (FOLDER / "parts").glob("*.json")} <= used


def test_the_recipe_of_the_demo_is_the_example_that_was_measured(tmp_path: Path) -> None:
    example = load(example="demo", environ={}).options()
    differing = {key for key, value in loaded(tmp_path, recipe="demo-dmd").options().items() if value != example[key]}
    assert differing == {"recipe", "output_dir", "validation_prompt_library", "tracker_run_name"}


def test_what_is_written_wins_and_null_goes_back_to_the_default(tmp_path: Path) -> None:
    run = loaded(tmp_path, ["learning_rate=3e-5"], recipe="wan-1.3b-dmd-lora", lora_rank=8, ema_decay=None)
    assert (run.config.learning_rate, run.config.lora_rank, run.config.ema_decay) == (3e-5, 8, 0.995)
    assert run.config.distillation.real_score_guidance_scale == 4.5
    assert run.origins["learning_rate"] == "command line"
    assert loaded(tmp_path, ["recipe=wan-1.3b-dmd-lora"]).config.lora_rank == 64


def test_another_way_of_saying_the_same_takes_the_recipes_place(tmp_path: Path) -> None:
    written = {"dmd_denoising_steps": "1000,757,522"}
    run = loaded(tmp_path, recipe="wan-1.3b-dmd-lora", distillation_config=written)
    assert run.config.student_timesteps() == (1000.0, 757.0, 522.0)
    epochs = loaded(tmp_path, recipe="wan-1.3b-dmd-lora", num_train_epochs=3).config
    assert (epochs.num_train_epochs, epochs.max_train_steps) == (3, 0)
    assert loaded(tmp_path, recipe="wan-1.3b-dmd-lora", num_train_epochs=0).config.max_train_steps == 1000
    with pytest.raises(UserError, match="both describe the ladder"):
        loaded(tmp_path, recipe="wan-1.3b-dmd-lora", distillation_config={**written, "student_steps": 2})


@pytest.mark.parametrize(
    ("written", "key", "fix"),
    [
        ({"model_type": "full"}, "model_type", "wan-1.3b-dmd-full"),
        ({"distillation_method": "lcm"}, "distillation_method", "wan-1.3b-lcm-lora"),
        ({"model_flavour": "ti2v-5b-2.2"}, "model_flavour", "wan-5b-dmd-lora"),
        ({"recipe": "wan-1.3b-dmd-lor"}, "recipe", "did you mean wan-1.3b-dmd-lora"),
    ],
)
def test_a_recipe_for_something_else_is_a_mistake(tmp_path: Path, written: dict[str, str], key: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, **{"recipe": "wan-1.3b-dmd-lora", **written})
    assert [problem.key for problem in caught.value.problems] == [key]
    assert fix in caught.value.problems[0].fix


def test_the_card_chooses() -> None:
    kind = ("t2v-480p-1.3b-2.1", "dmd", "lora")
    found = [chosen.name for card in (8, 12, 20, 24, 48, 139) if (chosen := choose(*kind, card))]
    assert found == [f"wan-1.3b-dmd-lora{end}" for end in ("-12gb", "-12gb", "-16gb", "", "", "-80gb")]
    assert choose("ti2v-5b-2.2", "rcm", "lora", 80) is None
    demo = choose(*kind, None, demo=True)
    assert demo is not None and demo.name == "demo-dmd"
