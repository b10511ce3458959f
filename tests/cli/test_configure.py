"""`simpletuner configure` without questions: what it writes, what it keeps, and what it refuses."""

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.cli import check
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.cli.wizard import data, gpu, save
from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.config import load
from simpletuner_dmd.config.recipes import recipe_names
from tests.support.videos import write_moving_square


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three prompts and a clip, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "find", lambda: None)
    monkeypatch.setattr(check, "_print_plan", lambda *_: [])  # tests/cli/test_wizard.py plans
    (tmp_path / "prompts.txt").write_text("a cat runs\na dog sleeps\nrain on a roof\n")
    write_moving_square(tmp_path / "videos" / "clip.mp4", (64, 64))
    (tmp_path / "videos" / "clip.txt").write_text("a square moves\n")
    return tmp_path


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_three_files_as_the_difference_from_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["gpu=12", "prompts=prompts.txt", "learning_rate=3e-5", "lora_rank=32", "output_dir=output/mine"]
    assert main(["configure", "--non-interactive", *given]) == 0
    assert read("config/config.json") == {
        "recipe": "wan-1.3b-dmd-lora-12gb",
        "learning_rate": 3e-5,
        "output_dir": "output/mine",
        "validation_prompt_library": "validation_prompts.json",
    }  # lora_rank 32 is the recipe's own
    assert read("config/multidatabackend.json") == [
        {"id": "training", "dataset_type": "prompts", "instance_data_dir": "prompts.txt", "video": {"num_frames": 49},
         "resolution": "832x480"}
    ]  # fmt: skip
    prompts = read("config/validation_prompts.json")
    assert [prompts[f"own-{number}"] for number in (1, 2, 3)] == ["a cat runs", "a dog sleeps", "rain on a roof"]
    shown = capsys.readouterr().out
    assert "Ready to train." in shown and shown.rstrip().endswith("Train: simpletuner train")
    run = load(environ={})
    assert run.validation_prompts == prompts and run.config.base_model_precision == "int8-quanto"


def test_longer_clips_than_the_recipes_lengthen_the_rollout() -> None:
    assert main(["configure", "--non-interactive", "gpu=12", "prompts=prompts.txt", "size=832x480x61"]) == 0
    assert read("config/config.json")["distillation_config"] == {"num_training_frames": 16}
    assert read("config/multidatabackend.json")[0]["video"] == {"num_frames": 61}


def test_videos_are_looked_into_and_get_their_shape(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["distillation_method=lcm", "instance_data_dir=videos", "size=64x64x9"]
    assert main(["configure", "--non-interactive", *given, "--output", "config/mine/config.json"]) == 0
    assert "Train: simpletuner train --env mine" in capsys.readouterr().out
    (entry,) = read("config/mine/multidatabackend.json")
    assert (entry["dataset_type"], entry["resolution"], entry["video"]) == ("video", 64, {"num_frames": 9})
    config = read("config/mine/config.json")
    assert config["recipe"] == "wan-1.3b-lcm-lora" and config["validation_resolution"] == "64x64"
    assert "distillation_config" not in config, "the rollout's limit is no shorter than the clips"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["learning_rat=1"], "did you mean learning_rate"),
        (["lora_rank=x", "ema_decay=7"], "2 problems"),
        (["recipe=wan"], "there is no recipe"),
        (["distillation_method=lcm"], "instance_data_dir=path/to/the/folder"),
        (["distillation_method=lcm", "prompts=prompts.txt"], "learns from videos"),
        (["prompts=nowhere.txt"], "there is no nowhere.txt"),
        (["size=830x480x81"], "multiples of 16: 832x480x81"),
        (["size=832x480x80"], "4n+1 frames: 832x480x77"),
        (["gpu=much"], "must be memory in GB"),
        (["max_train_steps=7"], "distillation_config.critic_warmup_steps: found 100, but the run has 7 steps"),
    ],
)
def test_mistakes_write_nothing(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configure", "--non-interactive", *given]) == 2
    assert said in capsys.readouterr().err
    assert not Path("config").exists()


def test_without_a_terminal_nothing_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configure"]) == 2
    assert "--non-interactive" in capsys.readouterr().err


OWN = {
    "--model_type": "lora",
    "my_own_key": {"deep": [1, None]},
    "checkpointing_steps": 77,
    "distillation_method": "dmd",
    "distillation_config": {"dmd": {"dmd_denoising_steps": "1000,757,522", "fake_score_lr": 2e-5}},
    "learning_rate": 2e-5,
    "ignore_final_epochs": True,
}


def test_editing_keeps_order_spelling_and_keys_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config").mkdir()
    entries = [{"id": "mine", "my_note": "x", "dataset_type": "prompts", "instance_data_dir": "prompts.txt"}]
    Path("config/config.json").write_text(json.dumps(OWN))
    Path("config/multidatabackend.json").write_text(json.dumps(entries))
    given = ["checkpoint_step_interval=50", "distillation_config.fake_score_lr=1e-5", "learning_rate=2e-5"]
    assert main(["configure", "--non-interactive", *given]) == 2  # `check` does not know my_own_key
    assert "my_own_key: is not a known option" in capsys.readouterr().err
    edited = read("config/config.json")
    assert list(edited) == list(OWN)
    assert edited == {
        **OWN, "checkpointing_steps": 50,
        "distillation_config": {"dmd": {"dmd_denoising_steps": "1000,757,522", "fake_score_lr": 1e-5}},
    }  # fmt: skip
    assert read("config/config.json.bak") == OWN
    assert read("config/multidatabackend.json") == entries
    assert not Path("config/multidatabackend.json.bak").exists()


def test_settings_in_a_file_of_their_own_move_in_when_one_of_them_changes() -> None:
    Path("extra.json").write_text('{"student_steps": 4, "fake_score_lr": 1e-4}')
    Path("config.json").write_text('{"distillation_method": "dmd", "distillation_config": "extra.json"}')
    draft = Draft(Path("config.json"))
    draft.set("learning_rate", 1e-4)
    assert draft.raw["distillation_config"] == "extra.json"
    draft.set("distillation_config.student_steps", 2)
    assert draft.raw["distillation_config"] == {"student_steps": 2, "fake_score_lr": 1e-4}
    assert "must be at least 1" in draft.problem("distillation_config.student_steps", 0)
    assert draft.problem("distillation_config.student_steps", 8) == ""


def test_a_file_that_cannot_be_read_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.json").write_text('{"seed": 1,}')
    assert main(["configure", "--non-interactive", "seed=2", "--output", "config.json"]) == 2
    assert "not valid JSON" in capsys.readouterr().err
    assert Path("config.json").read_text() == '{"seed": 1,}'


def test_an_interrupt_while_writing_waits_for_whole_files(monkeypatch: pytest.MonkeyPatch) -> None:
    write = save.write_text

    def interrupted(path: Path, text: str) -> Path:
        signal.raise_signal(signal.SIGINT)
        return write(path, text)

    monkeypatch.setattr(save, "write_text", interrupted)
    draft = Draft(Path("config/config.json"))
    draft.take_kind("t2v-480p-1.3b-2.1", "dmd", "lora", False, 24)
    data.set_data(draft, "prompts.txt")
    with pytest.raises(KeyboardInterrupt):
        save.save(draft)
    assert read("config/config.json") == {"recipe": "wan-1.3b-dmd-lora"}
    assert read("config/multidatabackend.json")[0]["instance_data_dir"] == "prompts.txt"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("wan")])
def test_every_recipe_becomes_a_configuration_that_loads(name: str) -> None:
    from simpletuner_dmd.config.recipes import recipe

    draft = Draft(Path("config/config.json"))
    flavour, method, kind = recipe(name).kind
    assert draft.take_kind(flavour, method, kind, False, recipe(name).card) == name
    size, frames = data.shape(draft)
    draft.datasets = [{"id": "x", "dataset_type": "video", "instance_data_dir": "videos"}]
    data.set_shape(draft, size, frames)
    assert draft.raw == {"recipe": name}, "the recipe and its own shape agree"
    save.save(draft)
    assert not [note for note in load(environ={}).notices if "renders" in note]


def documented() -> list[str]:
    """Commands of the two documents that ask nothing."""
    folder = Path(__file__).parents[2] / "documentation"
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("CONFIGURE.md", "MIGRATING.md"))
    lines = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    return [line for line in lines if "--non-interactive" in line or " recipes" in line]


@pytest.mark.parametrize("line", documented())
def test_commands_of_the_documents(line: str, home: Path) -> None:
    from tests.cli.test_convert import SCRIPT, SELF_FORCING

    (home / "distill_dmd_t2v_1.3B.sh").write_text(SCRIPT)
    (home / "configs").mkdir()
    (home / "configs" / "self_forcing_dmd.yaml").write_text(SELF_FORCING)
    write_moving_square(home / "my-videos" / "clip.mp4", (64, 64), frames=60)
    (home / "my-videos" / "clip.txt").write_text("a square moves")
    if "config/config.json" in line:
        (home / "config").mkdir()
        (home / "config" / "config.json").write_text("{}")
    assert main(shlex.split(line)[1:]) == 0
