"""The front door: help, version, exit codes, and where arguments go."""

import argparse
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from simpletuner_dmd import __version__
from simpletuner_dmd.cli import main as cli
from simpletuner_dmd.cli.common import add_config_arguments, load_config
from simpletuner_dmd.config import UserError


def verb(monkeypatch: pytest.MonkeyPatch, run: object, with_config: bool = True) -> None:
    """Puts a stand-in for the verb `train` in place."""
    module = types.ModuleType("simpletuner_dmd.cli.train")
    module.add_arguments = add_config_arguments if with_config else lambda parser: None  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_help_answers_at_once_and_names_every_verb() -> None:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "simpletuner_dmd", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.VERBS)
    assert seconds < 0.5


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from simpletuner_dmd.cli.main import main; main(['--help']); main(['check', '--help']);"
        "print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"simpletuner-dmd {__version__}"
    assert cli.main([]) == 0
    assert cli.main(["help"]) == 0


def test_an_unknown_verb_is_a_mistake_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean `simpletuner train`?" in capsys.readouterr().err


def test_every_argument_a_verb_does_not_know_is_an_override_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    verb(monkeypatch, lambda args: seen.append(args) or 0)
    assert (
        cli.main(["train", "--seed", "4", "--env", "mine", "--use_ema", "lr_end=-1", "--lora_alpha=-2", "--x", "-3"])
        == 0
    )
    assert seen[0].env == "mine"
    assert seen[0].overrides == ["--seed", "4", "--use_ema", "lr_end=-1", "--lora_alpha=-2", "--x", "-3"]


def test_a_verb_without_a_configuration_takes_no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    verb(monkeypatch, lambda args: 0, with_config=False)
    assert cli.main(["train"]) == 0
    assert cli.main(["train", "--seed", "4"]) == 2


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(args: argparse.Namespace) -> int:
        raise UserError("is wrong", file="config.json", key="seed", fix="write 1")

    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    def bug(args: argparse.Namespace) -> int:
        raise RuntimeError("a bug is not hidden")

    verb(monkeypatch, mistake)
    assert cli.main(["train"]) == 2
    assert "config.json: seed: is wrong\nFix: write 1" in capsys.readouterr().err
    verb(monkeypatch, interrupt)
    assert cli.main(["train"]) == 130
    verb(monkeypatch, bug)
    with pytest.raises(RuntimeError):
        cli.main(["train"])


def test_a_mistake_reaches_the_terminal_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner_dmd", "check", "--config", "absent.json"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2
    assert "looked for absent.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_configuration_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--env", "a", "--example", "demo"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_load_config_hands_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args, rest = parser.parse_known_args(["--example", "demo", "seed=9"])
    args.overrides = rest
    assert load_config(args).config.seed == 9
    assert load_config(parser.parse_args(["--demo-if-none"])).config.output_dir == "output/demo"


# --- examples ---------------------------------------------------------------------------------------------------------


def test_examples_can_be_listed_copied_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["examples", "list"]) == 0
    assert "demo-long" in capsys.readouterr().out
    assert cli.main(["examples", "copy", "demo", "config/mine"]) == 0
    assert "--env mine" in capsys.readouterr().out
    copied = json.loads((tmp_path / "config/mine/config.json").read_text())
    assert copied["pretrained_model_name_or_path"] == "demo"
    assert (tmp_path / "config/mine/multidatabackend.json").is_file()
    assert cli.main(["examples", "copy", "demo"]) == 0
    assert (tmp_path / "config/demo/config.json").is_file()


def test_copying_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("mine")
    assert cli.main(["examples", "copy", "demo", "."]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"
    assert not (tmp_path / "multidatabackend.json").exists()
    assert cli.main(["examples", "copy", "demo", "config.json/x"]) == 2
    assert cli.main(["examples", "copy", "dmo", "x"]) == 2
    assert "choose one of" in capsys.readouterr().err
