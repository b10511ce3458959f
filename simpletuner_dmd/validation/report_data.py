"""Reads a run's folder for the report. Whatever is missing, half-written or odd is left out, never an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

METRICS = "metrics.jsonl"
KINDS = ("teacher", "undistilled", "student", "student-ema")
KIND_TITLES = {"teacher": "Teacher", "undistilled": "Undistilled", "student": "Student", "student-ema": "Student (EMA)"}
MAX_POINTS = 1500
"""Points of a curve in the page; a longer run is averaged in even buckets."""

Row = dict[str, Any]


class Prompt(NamedTuple):
    """What makes videos comparable: they belong on one line."""

    name: str
    text: str
    seed: int | None
    width: int
    height: int
    frames: int


class Clip(NamedTuple):
    """One rendered video; `file` and `poster` relative to the run's folder, poster "" where there is none."""

    kind: str
    step: int
    sampling_steps: int | None
    file: str
    poster: str


@dataclass
class Chart:
    """title, unit ("" | "bytes" | "s"), one x per point and one list of y (None: no value) per series."""

    title: str
    unit: str
    x: list[float]
    series: dict[str, list[float | None]]


@dataclass
class Run:
    """What the folder says. steps: the step rows by number, the latest of a number winning (a resumed run)."""

    folder: Path
    steps: dict[int, Row] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)
    clips: dict[Prompt, list[Clip]] = field(default_factory=dict)
    config: dict[str, Row] = field(default_factory=dict)
    distill: Row = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    def option(self, key: str, otherwise: Any = "") -> Any:
        """The value of a config key, with or without leading dashes."""
        for name in (key, f"--{key}"):
            if name in self.config:
                return self.config[name].get("value", otherwise)
        return otherwise


def read_run(folder: Path) -> Run:
    """Reads metrics.jsonl, config.resolved.json and export/distill.json of a run."""
    run = Run(folder)
    for row in _read_lines(folder / METRICS):
        event = row.get("event", "step" if "step" in row else "")
        step = row.get("step")
        if event == "step" and isinstance(step, int):
            run.steps[step] = row
        elif event == "validation":
            _add_clip(run, row)
        elif event:
            run.events.append(row)
    for key, entry in _read_object(folder / "config.resolved.json").items():
        run.config[str(key)] = entry if isinstance(entry, dict) and "value" in entry else {"value": entry, "origin": ""}
    run.distill = _read_object(folder / "export" / "distill.json")
    return run


def state(run: Run) -> tuple[str, str]:
    """(a word for the style sheet, the state in words)."""
    named = {"finish": "finished", "finished": "finished", "end": "finished", "done": "finished",
             "error": "failed", "failed": "failed", "crash": "failed"}  # fmt: skip
    for row in reversed(run.events):
        if row["event"] == "start":
            break
        word = named.get(row["event"])
        if word == "failed":
            reason = row.get("message") or row.get("reason") or ""
            return "failed", f"failed at step {run.last_step}" + (f": {reason}" if reason else "")
        if word == "finished":
            return "finished", f"finished at step {run.last_step}"
    if not run.steps and not run.events:
        return "empty", "nothing logged yet"
    return "open", f"at step {run.last_step}"


def charts(run: Run) -> list[Chart]:
    """Every number of the step rows, kindred ones on one chart, losses first."""
    rows = [run.steps[step] for step in sorted(run.steps)]
    # "step" is the axis; the others count or tell the time and draw a straight line
    dull = {"step", "event", "time", "timestamp", "epoch", "elapsed", "samples"}
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in dull]
    names = [name for name in names if any(_number(row.get(name)) is not None for row in rows)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    order = sorted(groups, key=lambda title: (_rank(title), list(groups).index(title)))
    result = []
    for title in order:
        unit = "bytes" if "bytes" in title else "s" if title.endswith("seconds") else ""
        used = [row for row in rows if any(_number(row.get(name)) is not None for name in groups[title])]
        columns = [[float(row["step"]) for row in used],
                   *([_number(row.get(name)) for row in used] for name in groups[title])]  # fmt: skip
        x, *series = _thinned(columns)
        result.append(Chart(title, unit, [value or 0.0 for value in x], dict(zip(groups[title], series, strict=True))))
    return result


def _group(name: str) -> str:
    if name == "lr" or name.endswith(("_lr", "/lr")) or name.startswith("lr_"):
        return "learning rate"
    if "grad_norm" in name:
        return "gradient norm"
    return name


def _rank(title: str) -> int:
    if "loss" in title:
        return 0
    return {"gradient norm": 1, "learning rate": 2, "step_seconds": 3, "peak_bytes": 4}.get(title, 5)


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


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _add_clip(run: Run, row: Row) -> None:
    """A validation row; one without a file inside the run's folder is left out."""
    file, kind = row.get("file"), row.get("kind", "student")
    if not isinstance(file, str) or kind not in KINDS or not _inside(run.folder, file):
        return
    poster = row.get("poster")
    poster = poster if isinstance(poster, str) and _inside(run.folder, poster) else ""
    seed = row.get("seed")
    text = str(row.get("prompt", row.get("name", "")))
    prompt = Prompt(str(row.get("name", text)), text, seed if isinstance(seed, int) else None,
                    *(int(_number(row.get(key)) or 0) for key in ("width", "height", "frames")))  # fmt: skip
    clips = run.clips.setdefault(prompt, [])
    clip = Clip(kind, int(_number(row.get("step")) or 0), row.get("steps"), file, poster)
    # A resumed run renders a step again: the later file is the one on disk.
    clips[:] = [other for other in clips if (other.kind, other.step) != (clip.kind, clip.step)] + [clip]


def _inside(folder: Path, name: str) -> bool:
    """Whether the file is there, below the folder, and not named by an absolute path or a way out."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and (folder / path).is_file()


def recorded(folder: Path, event: str) -> Iterator[Row]:
    """The rows of one kind in a run's metrics.jsonl, in order; none where there is no file."""
    return (row for row in _read_lines(folder / METRICS) if row.get("event") == event)


def _read_lines(path: Path) -> Iterable[Row]:
    """The JSON objects of a .jsonl file; a line cut off by a crash is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _read_object(path: Path) -> Row:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
