"""What goes wrong, how to see that it does, and what to change: for `simpletuner explain error` and for
documentation/TROUBLESHOOTING.md, which is `python -m simpletuner_dmd.config.troubles`."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

EXIT_CODES = {
    0: "done",
    2: "a mistake in what was written, or something that stands in the way: the message names the key and the fix",
    3: "out of memory: the plan and the next thing to change were printed",
    130: "interrupted; the same command goes on",
}


@dataclass(frozen=True)
class Trouble:
    """One symptom. words: patterns by which it is found in a message; keys: options to look at."""

    topic: str
    symptom: str
    words: tuple[str, ...]
    check: str
    do: str
    keys: tuple[str, ...]

    def matches(self, text: str) -> int:
        """How many of the patterns the text holds."""
        return sum(re.search(word, text, re.IGNORECASE) is not None for word in self.words)


@cache
def troubles() -> tuple[Trouble, ...]:
    entries = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(
        Trouble(**{**entry, "words": tuple(entry["words"]), "keys": tuple(entry["keys"])}) for entry in entries
    )


def find(text: str) -> list[Trouble]:
    """The entries that the text speaks of, the best first; none where it speaks of none."""
    ranked = sorted(troubles(), key=lambda trouble: -trouble.matches(text))
    return [trouble for trouble in ranked if trouble.matches(text)][:3]


def markdown() -> str:
    lines = [
        "# Troubleshooting",
        "",
        "`simpletuner explain error \"what it said\"` finds the entry for a message. "
        "This page is made by `python -m simpletuner_dmd.config.troubles`.",
        "",
    ]  # fmt: skip
    for topic in dict.fromkeys(trouble.topic for trouble in troubles()):
        lines += [f"## {topic}", ""]
        for trouble in troubles():
            if trouble.topic == topic:
                keys = f" Keys: {', '.join(f'`{key}`' for key in trouble.keys)}." if trouble.keys else ""
                lines += [
                    f"### {trouble.symptom}",
                    "",
                    f"{trouble.check}",
                    "",
                    f"**What to do.** {trouble.do}{keys}",
                    "",
                ]
    lines += ["## Exit codes", "", "| code | meaning |", "|---:|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
