"""`simpletuner explain`: nothing of the schema is left out, and the picture shows what training draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simpletuner_dmd.cli.explain_schedule import ASCII, COLUMNS, bars, column
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.config import METHODS, DatasetEntry, TableOptions, TrainConfig, VideoOptions
from simpletuner_dmd.config.explain import ABSENT_TABLES, find, markdown, read_by, sections
from simpletuner_dmd.config.lycoris import LycorisOptions
from simpletuner_dmd.config.tread import TreadRoute

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no config/config.json to be found


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_options_md_is_what_the_schema_says() -> None:
    written = (ROOT / "documentation" / "OPTIONS.md").read_text(encoding="utf-8")
    assert written == markdown(), "stale: python -m simpletuner_dmd.config.explain > documentation/OPTIONS.md"


def test_every_option_is_in_a_section() -> None:
    found = {(section.name, option.key) for section in sections() for option in section.options}
    keys = {key for name, key in found if not name.startswith(("distillation_config", "dataset", "tread", "lycoris"))}
    assert keys == set(TrainConfig.model_fields)
    models = {
        **{f"distillation_config {name}": model for name, model in METHODS.items()},
        "dataset": DatasetEntry, "dataset video": VideoOptions, "dataset table": TableOptions,
        "tread_config routes": TreadRoute, "lycoris_config": LycorisOptions,
    }  # fmt: skip
    for name, model in models.items():
        assert {key for section, key in found if section == name} == set(model.model_fields), name


def test_a_key_with_its_limits_and_readers(capsys: pytest.CaptureFixture[str]) -> None:
    (option,) = explained(capsys, "distillation_config.guidance_min")["options"]
    assert option["methods"] == ["lcm"]
    answer = explained(capsys, "--json", "max_grad_norm")
    (option,) = answer["options"]
    assert option["type"] == "number" and option["limits"] == "at least 0" and float(option["default"]) == 1
    readers = answer["read_by"]["max_grad_norm"]
    assert readers and all((ROOT / "simpletuner_dmd" / name).is_file() for name in readers)
    assert not any("explain" in name for name in readers)


def test_methods_with_other_defaults_stand_apart() -> None:
    by_default = {option.methods: option.default for option in find("num_training_frames").options}
    for methods, default in by_default.items():
        for method in methods:
            assert json.loads(default) == METHODS[method].model_fields["num_training_frames"].default
    entries = find("distillation_config.timestep_shift").options
    named = [method for option in entries for method in option.methods]
    assert sorted(named) == sorted(name for name, model in METHODS.items() if "timestep_shift" in model.model_fields)


def test_words_defaults_that_follow_and_aliases() -> None:
    (flavour,) = find("model_flavour").options
    assert "ti2v-5b-2.2" in flavour.allowed
    (model,) = find("--pretrained-model-name-or-path").options
    assert model.default == "the flavour's own Hub repository"
    (steps,) = find("validation_steps").options
    assert steps.key == "validation_step_interval"
    (epochs,) = find("ignore_final_epochs").options
    assert epochs.aliases == ("ignore_final_epochs (with the opposite meaning)",)


def test_every_key_that_is_absent_has_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for section, prefix, table in ABSENT_TABLES:
        for key, entry in table.items():
            assert (section, entry.use) in {(found.section, found.use) for found in find(prefix + key).absent}
    assert main(["explain", "snr_gamma"]) == 0
    assert "Wan\n  predicts a flow" in capsys.readouterr().out


def test_an_unknown_key_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "lerning_rate"]) == 2
    assert "did you mean learning_rate" in capsys.readouterr().err
    assert main(["explain", "distillation_config.fake_score_lrr", "--json"]) == 2
    assert "distillation_config.fake_score_lr" in json.loads(capsys.readouterr().out)["close"]
    assert main(["explain", "learning_rate", "shift=3"]) == 2


def test_readers_are_those_that_read_the_attribute() -> None:
    assert "distill/dmd.py" in read_by("generator_update_interval")
    assert "config/methods/base.py" not in read_by("generator_update_interval")
    assert read_by("no_such_option") == []


def test_a_key_is_explained_without_torch() -> None:
    code = (
        "import sys; from simpletuner_dmd.cli.main import main; "
        "assert main(['explain', 'learning_rate']) == 0 and main(['explain']) == 0; "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_ladder_and_windows_of_dmd(capsys: pytest.CaptureFixture[str]) -> None:
    """sigma = 3u / (1 + 2u) at u = 1, 3/4, 1/2, 1/4; ts_schedule puts each window's floor at the next rung."""
    view = explained(capsys, "schedule", "shift=3", "student_steps=4", "min_timestep_ratio=0.02")
    assert view["ladder"] == pytest.approx([1000, 900, 750, 500])
    assert [window["low"] for window in view["windows"]] == pytest.approx([900, 750, 500, 20])
    assert all(window["high"] == pytest.approx(980) for window in view["windows"])
    for row in [*view["windows"], *view["training"]]:
        assert len(row["shares"]) == COLUMNS and sum(row["shares"]) == pytest.approx(1, abs=1e-5)
    student = view["training"][0]["shares"]
    bins = list(zip(*(window["shares"] for window in view["windows"]), strict=True))
    assert student == pytest.approx([sum(shares) / 4 for shares in bins], abs=1e-6)  # each exit is as likely


def test_the_density_of_a_shifted_grid(capsys: pytest.CaptureFixture[str]) -> None:
    """LCM starts uniformly in u, so the median is at sigma(1/2) = k / (1 + k)."""
    view = explained(capsys, "schedule", "distillation_method=lcm", "shift=5", "num_ddim_timesteps=50")
    assert view["training"][0]["median"] == pytest.approx(1000 * 5 / 6, abs=5)
    assert view["windows"] == []


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_every_method_has_a_drawing(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "schedule", f"distillation_method={method}"]) == 0
    drawn = capsys.readouterr().out
    assert "training noise" in drawn and "\x1b" not in drawn
    assert max(map(len, drawn.splitlines())) <= 80


def test_marks_and_columns() -> None:
    assert (column(1000), column(500), column(0)) == (0, COLUMNS // 2, COLUMNS - 1)
    assert bars((0.0, 1e-6, 0.5, 0.25), ASCII) == " .%="[:2] + ASCII[-1] + ASCII[4]


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "schedule", "shift=3", "student_steps=2", "--png", "schedule.png"]) == 0
    image = Image.open(tmp_path / "schedule.png").convert("RGB")
    assert len({colour for _, colour in image.getcolors(1 << 16)}) > 3
    # The ladder 1000, 750: black lines a quarter of the 600 pixels apart.
    assert image.getpixel((160, 60)) == (0, 0, 0) == image.getpixel((310, 60)) != image.getpixel((240, 60))
    assert main(["explain", "schedule", "--png", "schedule.nonsense"]) == 2
    assert "schedule.nonsense" in capsys.readouterr().err


def test_a_wrong_option_of_the_schedule_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "schedule", "shift=-1"]) == 2
    assert "flow_schedule_shift" in capsys.readouterr().err
