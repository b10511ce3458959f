"""Questions on a terminal, each with a line of why, at 80 columns. Ctrl-C is a KeyboardInterrupt."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import questionary

WIDEST = 80
LONG = 12
"""More choices than this can be searched by typing."""
STYLE = questionary.Style([("qmark", "bold"), ("question", "bold"), ("highlighted", "bold"), ("pointer", "bold"),
                           ("instruction", ""), ("answer", ""), ("selected", "noreverse")])  # fmt: skip
QMARK = ">"

Check = Callable[[str], str]
"""What is wrong with an answer, "" if nothing is."""


def width() -> int:
    return min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)


def say(text: str = "", indent: str = "") -> None:
    """Words, wrapped; an empty line for none."""
    for line in text.splitlines() or [""]:
        print(textwrap.fill(line, width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False,
                            break_long_words=False) if line.strip() else "")  # fmt: skip


def select(question: str, why: str, choices: Sequence[tuple[str, Any]], default: Any = None) -> Any:
    """One of `choices` (what is shown, what it means), `default` being one of the meanings."""
    _why(why)
    most = width() - len(question) - 4
    options = [questionary.Choice(title=_cut(title, most), value=place) for place, (title, _) in enumerate(choices)]
    start = next((number for number, (_, value) in enumerate(choices) if value == default), 0)
    searched = len(choices) > LONG
    answer = questionary.select(
        question, choices=options, default=options[start], qmark=QMARK, style=STYLE,
        instruction="(arrows, or type to search)" if searched else "(arrows, Enter)",
        use_search_filter=searched, use_jk_keys=False,
    ).unsafe_ask()  # fmt: skip
    return choices[answer][1]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def text(question: str, why: str, default: str = "", check: Check | None = None) -> str:
    """A line of text, filled with `default`; asked again until `check` takes it."""
    _why(why)
    return str(_line(questionary.text, question, default, check))


def path(question: str, why: str, default: str = "", check: Check | None = None) -> str:
    """As `text`, with names of files completed by Tab."""
    _why(why)
    return str(_line(questionary.path, question, default, check))


def _line(ask: Callable[..., Any], question: str, default: str, check: Check | None) -> Any:
    def accepts(written: str) -> bool | str:
        mistake = check(written.strip()) if check else ""
        return textwrap.shorten(mistake, width() - 2, placeholder="...") if mistake else True

    return ask(question, default=default, validate=accepts, qmark=QMARK, style=STYLE).unsafe_ask().strip()


def checkbox(question: str, why: str, choices: Sequence[str], chosen: Sequence[str]) -> list[str]:
    _why(why)
    options = [questionary.Choice(title=title, value=title, checked=title in chosen) for title in choices]
    answer = questionary.checkbox(question, choices=options, qmark=QMARK, style=STYLE,
                                  instruction="(Space, Enter)", use_jk_keys=False).unsafe_ask()  # fmt: skip
    return list(answer)


def _why(why: str) -> None:
    print()
    say(why, "  ")
