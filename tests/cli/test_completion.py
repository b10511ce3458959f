"""Completion as bash asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner_dmd.cli.main import main


def completed(line: str, folder: Path) -> list[str]:
    """What a real bash would offer at the end of the line."""
    script = f"""
        simpletuner() {{ {sys.executable} -m simpletuner_dmd "$@"; }}
        eval "$({sys.executable} -m simpletuner_dmd completion bash)"
        COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
        _python_argcomplete simpletuner 2>/dev/null
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("simpletuner tr", ["train"]),
        ("simpletuner train --env my", ["my-run"]),
        ("simpletuner train --example demo-l", ["demo-lcm", "demo-long"]),
        ("simpletuner train learning_r", ["learning_rate="]),
        ("simpletuner sample output/fi", ["output/first"]),
    ],
)
def test_bash_is_told_what_could_come_next(tmp_path: Path, line: str, expected: list[str]) -> None:
    (tmp_path / "config" / "my-run").mkdir(parents=True)
    (tmp_path / "config" / "my-run" / "config.json").write_text("{}")
    (tmp_path / "output" / "first").mkdir(parents=True)
    (tmp_path / "output" / "first" / "config.resolved.json").write_text("{}")
    assert completed(line, tmp_path) == expected


def test_values_of_a_key_are_offered(tmp_path: Path) -> None:
    found = completed("simpletuner train distillation_method=d", tmp_path)
    assert [word.partition("=")[2] or word for word in found] == ["dmd", "dcm", "diffusion_forcing"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_lines(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "simpletuner" in capsys.readouterr().out
