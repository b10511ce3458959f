"""The questions of `simpletuner configure`, answered through a keyboard and, with pexpect, on a terminal of 80 x 24."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from simpletuner_dmd.cli import check, configure
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.cli.wizard import gpu, review
from simpletuner_dmd.cli.wizard.cost import Cost, cost_of
from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.cli.wizard.short import Session
from simpletuner_dmd.wan.plan import Change

ROOT = Path(__file__).parents[2]
ENTER, DOWN, UP, SPACE, CTRL_C, CTRL_U = "\r", "\x1b[B", "\x1b[A", " ", "\x03", "\x15"
SHORT_PATH = ENTER * 11
COLUMNS, LINES = 80, 24


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat runs\na dog sleeps\n")
    return tmp_path


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Types before the questions come; answers are read one after the other. Nothing is planned, which takes time."""
    monkeypatch.setattr(configure, "is_terminal", lambda: True)
    monkeypatch.setattr(review, "cost_of", lambda draft, session: Cost())
    monkeypatch.setattr(check, "_print_plan", lambda *_: [])
    monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu("NVIDIA Test", 24.0))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe.send_text


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_enter_eleven_times_is_a_configuration(keyboard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    keyboard(SHORT_PATH)
    assert main(["configure"]) == 0
    assert read("config/config.json") == {
        "recipe": "wan-1.3b-dmd-lora",
        "output_dir": "output/wan-1.3b-dmd-lora",
        "validation_prompt_library": "validation_prompts.json",
    }
    assert read("config/multidatabackend.json")[0]["instance_data_dir"] == "builtin"
    shown = capsys.readouterr().out
    assert "Recipe wan-1.3b-dmd-lora: " in shown and "306 usable: 306 of 832x480x81" in shown
    assert "Ready to train." in shown and "Train: simpletuner train" in shown


def test_every_question_is_heard(keyboard: Any) -> None:
    answers = [
        DOWN * 2, ENTER,  # Wan 2.2 5B
        ENTER, ENTER,  # dmd, LoRA
        DOWN, ENTER,  # from 24 GB (found), past the list's 12 GB: 12
        CTRL_U, "3", ENTER, CTRL_U, "640x352x49", ENTER,
        CTRL_U, "nowhere", ENTER, CTRL_U, "prompts.txt", ENTER,  # the first is not there
        CTRL_U, "output/five", ENTER, "me/five", ENTER, DOWN, SPACE, ENTER, ENTER,
    ]  # fmt: skip
    keyboard("".join(answers))
    assert main(["configure", "config/five/config.json"]) == 0
    assert read("config/five/config.json") == {
        "recipe": "wan-5b-dmd-lora",
        "distillation_config": {"student_steps": 3},
        "validation_resolution": "640x352",
        "validation_num_video_frames": 49,
        "output_dir": "output/five",
        "push_to_hub": True,
        "hub_model_id": "me/five",
        "report_to": ["tensorboard"],
        "validation_prompt_library": "validation_prompts.json",
    }
    (entry,) = read("config/five/multidatabackend.json")
    assert (entry["resolution"], entry["video"]) == ("640x352", {"num_frames": 49})


def test_the_advanced_door_changes_one_option_by_the_schema(keyboard: Any) -> None:
    wrong, right, back = CTRL_U + "many" + ENTER, CTRL_U + "7" + ENTER, "(back" + ENTER
    advanced = DOWN * 2 + ENTER
    keyboard(ENTER * 10 + advanced + "s adapter" + ENTER + "lora_rank" + ENTER + wrong + right + back + back + ENTER)
    assert main(["configure"]) == 0
    assert read("config/config.json")["lora_rank"] == 7


def test_an_existing_file_is_edited_and_can_be_left(keyboard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"seed": 5, "my_key": 1, "distillation_method": "dmd", "max_train_steps": 9}
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps(own))
    change_output = DOWN + ENTER + DOWN * 7 + ENTER + CTRL_U + "output/other" + ENTER
    keyboard(change_output + DOWN * 3 + ENTER)
    assert main(["configure"]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert read("config/config.json") == own and [path.name for path in Path("config").iterdir()] == ["config.json"]
    keyboard(change_output + ENTER)
    assert main(["configure"]) == 2  # `check` misses the data file and does not know my_key
    assert read("config/config.json") == {**own, "output_dir": "output/other"}


def test_another_kind_takes_another_recipe(keyboard: Any) -> None:
    keyboard(ENTER * 10 + DOWN + ENTER + DOWN * 2 + ENTER + DOWN + ENTER + ENTER + ENTER)  # LoRA or full: full; GPU
    assert main(["configure"]) == 0
    assert read("config/config.json")["recipe"] == "wan-1.3b-dmd-full"


def test_the_smallest_change_that_fits_is_offered(keyboard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offered first until it is taken; then the plan fits and writing is first."""
    changes = (Change("base_model_precision", "int8-quanto", 1), Change("num_frames", 49, 1))

    def cost(draft: Draft, session: Session) -> Cost:
        return Cost() if draft.options.base_model_precision == "int8-quanto" else Cost(("too large",), changes)

    monkeypatch.setattr(review, "cost_of", cost)
    keyboard(ENTER * 12)
    assert main(["configure"]) == 0
    config = read("config/config.json")
    assert (config["base_model_precision"], config["validation_num_video_frames"]) == ("int8-quanto", 49)
    assert read("config/multidatabackend.json")[0]["video"] == {"num_frames": 49}


def test_the_plan_is_of_the_card_that_was_named() -> None:
    from simpletuner_dmd.cli.wizard import data

    draft = Draft(Path("config.json"))
    draft.take_kind("t2v-480p-1.3b-2.1", "lcm", "lora", False, 24)
    draft.datasets = [{"id": "x", "dataset_type": "video", "instance_data_dir": "videos"}]
    data.set_shape(draft, "832x480", 81)
    cost = cost_of(draft, Session(card=80.0))
    assert not cost.changes and any(line.startswith("Memory: ") for line in cost.lines)
    assert any(line.startswith("Time: ") for line in cost.lines)
    draft.set("lora_rank", 0)
    assert cost_of(draft, Session(card=80.0)) == Cost(), "a draft with mistakes has no plan"


class Terminal:
    """`simpletuner configure` on a terminal of 80 x 24, and what is on its screen."""

    def __init__(self, home: Path, **environ: str):
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)
        own = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PATH": "/nonexistent"}
        environment = {**os.environ, **own, **environ}
        self.child = pexpect.spawn(
            sys.executable, ["-m", "simpletuner_dmd", "configure"], cwd=home, env=environment, timeout=120,
            dimensions=(LINES, COLUMNS),
        )  # fmt: skip
        self.raw = b""

    def until(self, text: str) -> str:
        """Waits until the screen has a text."""
        while text not in self.shown:
            try:
                read = self.child.read_nonblocking(4096, timeout=120)
            except pexpect.EOF:
                pytest.fail(f"it ended before {text!r}:\n{self.shown}")
            self.raw += read
            self.stream.feed(read)
        return self.shown

    def finish(self) -> int | None:
        self.child.expect(pexpect.EOF)
        self.raw += self.child.before
        self.child.close()
        return self.child.exitstatus

    @property
    def shown(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)


QUESTIONS = ["Which model?", "Which method?", "LoRA or full?", "Which GPU", "How many steps?", "Which size"]


def test_ctrl_c_at_a_question_writes_nothing(home: Path) -> None:
    """At each question of one run: the first start is interrupted at the first, the second after the last."""
    for answered in (0, len(QUESTIONS) - 1):
        terminal = Terminal(home, NO_COLOR="1")
        for question in QUESTIONS[:answered]:
            screen = terminal.until(question)
            assert max(map(len, screen.splitlines())) <= COLUMNS
            terminal.child.send(ENTER)
        terminal.until(QUESTIONS[answered])
        terminal.child.send(CTRL_C)
        assert terminal.finish() == 130
        assert b"Nothing was written." in terminal.raw
        assert [path.name for path in home.iterdir()] == ["prompts.txt"]
        assert b"\x1b[38;" not in terminal.raw and b"\x1b[31m" not in terminal.raw, "colour under NO_COLOR"
