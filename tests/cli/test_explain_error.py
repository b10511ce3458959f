"""`simpletuner explain error`, and the page that is made of the same entries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.config import troubles
from simpletuner_dmd.config.layers import option_field

PAGE = Path(__file__).parents[2] / "documentation" / "TROUBLESHOOTING.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == troubles.markdown(), \
        "python -m simpletuner_dmd.config.troubles > documentation/TROUBLESHOOTING.md"  # fmt: skip


def test_every_key_it_names_exists() -> None:
    for trouble in troubles.troubles():
        for key in trouble.keys:
            assert option_field(key) is not None, key


@pytest.mark.parametrize(
    ("message", "symptom"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "Out of memory on the GPU"),
        ("colours get hotter and saturation rises", "Colours get hotter"),
        ("OSError: [Errno 28] No space left on device", "No space left"),
        ("was loaded with an all-zero embedding table", "The text encoder"),
        ("cfg 3.5 in FastVideo", "Guidance means"),
        ("dataset too small for one step", "A dataset is too small"),
    ],
)
def test_a_message_finds_its_entry(message: str, symptom: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "error", *message.split()]) == 0
    assert capsys.readouterr().out.startswith(symptom)


def test_without_a_message_all_are_listed_and_an_unknown_one_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "error"]) == 0
    listed = capsys.readouterr().out
    assert all(trouble.symptom in listed for trouble in troubles.troubles()) and "130" in listed
    assert main(["explain", "error", "xyzzy"]) == 2
    assert main(["explain", "error", "--json", "out", "of", "memory"]) == 0
    capsys.readouterr()


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "error", "--json", "oom"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["topic"] == "Memory"


def test_every_symptom_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "error", "oom"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_it_answers_without_torch() -> None:
    code = "import sys; from simpletuner_dmd.cli.main import main; main(['explain', 'error', 'oom']);" \
           "print('torch' in sys.modules, file=sys.stderr)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "False"
