"""Keys, numbers and tables as the report writes them. What returns HTML has escaped it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from simpletuner_dmd.validation.report_data import Run

LETTERS = "AB"
_SPECIAL = {
    "lr": "Learning rate", "grad_norm": "Gradient norm", "dmd_loss": "DMD loss", "peak_bytes": "Peak memory",
    "step_seconds": "Seconds per step", "latent_std": "Latent spread", "prompt_diversity": "Diversity",
}  # fmt: skip


def title(key: str) -> str:
    if key in _SPECIAL:
        return _SPECIAL[key]
    words = key.replace("/", " ").replace("_", " ")
    words = words.replace(" lr", " learning rate").replace("grad norm", "gradient norm")
    return words[:1].upper() + words[1:]


def short(value: Any, unit: str = "") -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value / 2**30:.2f} GiB" if unit == "bytes" else f"{value:.4g}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def letters(runs: Sequence[Run]) -> list[str]:
    """What tells two runs apart on the page; nothing where there is one."""
    return list(LETTERS[: len(runs)]) if len(runs) > 1 else [""]


def names(runs: Sequence[Run]) -> list[str]:
    """What the runs are called; by their folders where that is the same."""
    found = [run.name for run in runs]
    return found if len(set(found)) == len(runs) else [run.folder.resolve().name for run in runs]


def url(file: str, run: Run, page: Path) -> str:
    """From the folder of the page to a file of the run."""
    return quote(os.path.relpath(run.folder.resolve() / file, page).replace(os.sep, "/"))


def empty(sentence: str) -> str:
    return f'<p class="empty">{escape(sentence)}</p>'


def table(head: Sequence[str], rows: Iterable[Iterable[Any]], label: str) -> str:
    body = "".join(f"<tr>{''.join(_cell(index, cell) for index, cell in enumerate(row))}</tr>" for row in rows)
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    return (f'<div class="table" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
            f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def _cell(index: int, value: Any) -> str:
    text = escape(plain(value))
    return f"<td>{text}</td>" if index else f"<th scope=row>{text}</th>"
