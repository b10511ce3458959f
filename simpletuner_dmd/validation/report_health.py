"""The lights of a report: the last validation's, worst first, each with its sentence and its past."""

from __future__ import annotations

from html import escape
from typing import Any

from simpletuner_dmd.validation.health import COLOURS, GREEN
from simpletuner_dmd.validation.report_data import Row, Run, number
from simpletuner_dmd.validation.report_words import empty, title

PAST = 40
"""Validations that a light's past goes back."""


def overall(run: Run) -> str | None:
    """The colour of the last validation that was judged; None before."""
    rows = _judged(run)
    return str(rows[-1].get("colour")) if rows and rows[-1].get("colour") in COLOURS else None


def lights(run: Run) -> str:
    """HTML of all lights."""
    rows = _judged(run)
    if not rows:
        what = "Nothing judged yet: lights need a distillation, a teacher's video and the first validations."
        return empty(what if not run.measured("health") else "Not judged yet: the run is still in its first steps.")
    last = rows[-1]
    found = sorted(_lights(last), key=lambda light: -COLOURS.index(light["colour"]))
    score = number(last.get("score"))
    about = f"Step {last['step']}"
    about += "" if score is None else f", distance from the teacher {score:.3f}"
    best = [row["step"] for row in rows if row.get("best")]
    about += f". Best checkpoint: step {best[-1]}." if best else "."
    items = "".join(_item(light, rows) for light in found)
    return f'<p class="about">{escape(about)}</p><ul class="lights">{items}</ul>'


def _judged(run: Run) -> list[Row]:
    return [row for row in run.measured("health") if _lights(row)]


def _lights(row: Row) -> list[dict[str, Any]]:
    found = row.get("lights")
    return [light for light in found if isinstance(light, dict) and light.get("colour") in COLOURS
            and isinstance(light.get("name"), str)] if isinstance(found, list) else []  # fmt: skip


def _item(light: dict[str, Any], rows: list[Row]) -> str:
    name, colour = light["name"], light["colour"]
    past = [(row["step"], other["colour"]) for row in rows[-PAST:] for other in _lights(row) if other["name"] == name]
    words = "; ".join(f"step {step} {shade}" for step, shade in past)
    cells = "".join(f'<i class="{shade}" title="step {step}: {shade}"></i>' for step, shade in past)
    trail = f'<span class="past" role="img" aria-label="{escape(words, quote=True)}">{cells}</span>'
    sentence = str(light.get("sentence", ""))
    return (
        f'<li class="light {colour}"><p class="lamp"><span class="dot" aria-hidden="true"></span>'
        f'<b>{escape(title(name))}</b> <span class="colour">{colour}</span>{trail if len(past) > 1 else ""}</p>'
        f"<p>{escape(sentence[:1].upper() + sentence[1:])}</p>{_band(light) if colour != GREEN else ''}</li>"
    )


def _band(light: dict[str, Any]) -> str:
    value, band = number(light.get("value")), light.get("band")
    if value is None or not isinstance(band, list) or len(band) != 4:
        return ""
    low, high = number(band[1]), number(band[2])
    if low is None and high is None:
        return ""
    limits = f"{low:g} to {high:g}" if low is not None and high is not None else (
        f"{low:g} or more" if high is None else f"up to {high:g}"
    )  # fmt: skip
    return f'<p class="about">Value {value:.3g}; green is {limits}.</p>'
