"""Which curves a report draws, and their points: from the step rows and from the events of the validations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner_dmd.validation.report_data import KIND_TITLES, Row, Run, number

MAX_POINTS = 1500
"""Points of a curve in the page; a longer run is averaged in even buckets."""
QUOTIENTS = ("saturation", "contrast", "detail", "motion", "latent_std", "prompt_diversity")
QUARTERS = ("q1", "q2", "q3", "q4")
DULL = {"step", "event", "time", "timestamp", "epoch", "elapsed", "samples"}
"""Keys of a step row that are the axis, or count, or tell the time: a straight line."""


@dataclass
class Curve:
    """One line: the key it is logged under, the number of its run, one y per point of the chart (None: no value)."""

    name: str
    run: int
    values: list[float | None]


@dataclass
class Chart:
    """title: a key or words. unit: "" | "bytes" | "s". main: shown at once, the others on demand.

    noisy: a value of every step, whose trend shows only when it is averaged.
    """

    title: str
    unit: str
    x: list[float]
    curves: list[Curve]
    main: bool = True
    noisy: bool = False


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Every number that the runs logged, kindred ones on one chart, losses first."""
    merged: dict[str, Chart] = {}
    for position, run in enumerate(runs):
        for chart in filter(lambda chart: chart.curves, _of_run(run, position)):
            merged[chart.title] = _overlaid(merged[chart.title], chart) if chart.title in merged else chart
    titles = list(merged)
    return sorted(merged.values(), key=lambda chart: (_rank(chart.title), titles.index(chart.title)))


def _of_run(run: Run, position: int) -> Iterable[Chart]:
    rows = [run.steps[step] for step in sorted(run.steps)]
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in DULL]
    groups: dict[str, list[str]] = {}
    for name in names:
        if any(number(row.get(name)) is not None for row in rows):
            groups.setdefault(_group(name), []).append(name)
    for title, keys in groups.items():
        yield _chart(title, rows, {_label(title, key): key for key in keys}, position, noisy=_noisy(title))
    yield from _of_validations(run, position)


def _of_validations(run: Run, position: int) -> Iterable[Chart]:
    for kind in ("student", "student-ema"):
        rows = [{**row.get("of_teacher", {}), "step": row["step"]} for row in run.measured("measures")
                if row.get("kind") == kind and isinstance(row.get("of_teacher"), dict)]  # fmt: skip
        if rows:
            yield _chart(f"{KIND_TITLES[kind]} over teacher", rows, {key: key for key in QUOTIENTS}, position)
    critic, evaluation = run.measured("critic"), run.measured("evaluation")
    by_quarter = {
        "critic loss by noise, q1 the cleanest": (critic, "critic_loss_"),
        "critic loss over the teacher's, by noise": (critic, "critic_ratio_"),
        "evaluation loss by noise, q1 the cleanest": (evaluation, "eval_loss_"),
    }
    for title, (rows, prefix) in by_quarter.items():
        if rows:
            yield _chart(title, rows, {quarter: prefix + quarter for quarter in QUARTERS}, position)
    single = {
        "evaluation loss": (evaluation, "eval_loss"),
        "way of the critic to the student": (critic, "critic_reach"),
        "distance from the teacher (score)": (run.measured("health"), "score"),
    }
    for title, (rows, key) in single.items():
        if any(number(row.get(key)) is not None for row in rows):
            yield _chart(title, rows, {key: key}, position)


def _chart(title: str, rows: Sequence[Row], keys: Mapping[str, str], position: int, *, noisy: bool = False) -> Chart:
    """keys: label of the curve → key in the rows."""
    used = [row for row in rows if any(number(row.get(key)) is not None for key in keys.values())]
    columns: list[Any] = [[float(row["step"]) for row in used]]
    columns += [[number(row.get(key)) for row in used] for key in keys.values()]
    x, *values = _thinned(columns)
    unit = "bytes" if "bytes" in title else "s" if title.endswith("seconds") else ""
    curves = [Curve(label, position, column) for label, column in zip(keys, values, strict=True)
              if any(value is not None for value in column)]  # fmt: skip
    return Chart(title, unit, [value or 0.0 for value in x], curves, _rank(title) < _REST, noisy)


def _overlaid(one: Chart, other: Chart) -> Chart:
    """Both on the axis that has the points of either."""
    x = sorted({*one.x, *other.x})
    curves = []
    for chart in (one, other):
        for curve in chart.curves:
            at = dict(zip(chart.x, curve.values, strict=True))
            curves.append(Curve(curve.name, curve.run, [at.get(step) for step in x]))
    return Chart(one.title, one.unit, x, curves, one.main, one.noisy)


def _group(name: str) -> str:
    if name == "lr" or name.endswith(("_lr", "/lr")) or name.startswith("lr_"):
        return "learning rate"
    role, found, module = name.partition("_grad_norm")
    if found and module:
        return f"{role} gradient norm by module"
    return "gradient norm" if "grad_norm" in name else name


def _label(title: str, key: str) -> str:
    return key.partition("_grad_norm_")[2] if title.endswith("by module") else key


def _noisy(title: str) -> bool:
    return title not in ("learning rate", "peak_bytes")


_ORDER = ("gradient norm", "gradient norm by module", "over teacher", "score", "critic", "evaluation", "learning rate",
          "step_seconds", "peak_bytes")  # fmt: skip
_REST = len(_ORDER) + 1


def _rank(title: str) -> int:
    """Losses of the training first, then as in _ORDER, then the rest."""
    if title.endswith("loss") and not title.startswith("evaluation"):
        return 0
    exact = {title: place for place, title in enumerate(_ORDER, start=1)}
    if title in exact:
        return exact[title]
    starts = (" by noise", "way of the critic")
    if any(start in title for start in starts):
        return exact["evaluation" if title.startswith("evaluation") else "critic"]
    return next((place for part, place in exact.items() if part in title and " " in title), _REST)


def _thinned(columns: list[Any]) -> list[list[float | None]]:
    """At most MAX_POINTS rows, each the mean of its bucket."""
    count = len(columns[0])
    size = math.ceil(count / MAX_POINTS)
    if size <= 1:
        return columns
    return [[_mean(column[start : start + size]) for start in range(0, count, size)] for column in columns]


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
