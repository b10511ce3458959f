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
FIGURES = ("measures", "critic", "evaluation", "health")
"""Events of a validation that hold figures."""

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
class Run:
    """What the folder says.

    steps: the step rows by number, the latest of a number winning (a resumed run). figures: by event (FIGURES), then by
    step and kind, likewise. events: every other row.
    """

    folder: Path
    steps: dict[int, Row] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)
    figures: dict[str, dict[tuple[int, str], Row]] = field(default_factory=dict)
    clips: dict[Prompt, list[Clip]] = field(default_factory=dict)
    config: dict[str, Row] = field(default_factory=dict)
    distill: Row = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def name(self) -> str:
        return str(self.distill.get("run_name") or self.option("tracker_run_name") or self.folder.resolve().name)

    def measured(self, event: str) -> list[Row]:
        """The rows of one of FIGURES, in the order of their steps."""
        rows = self.figures.get(event, {})
        return [rows[key] for key in sorted(rows)]

    def validation_steps(self) -> list[int]:
        """Steps at which a student was rendered."""
        return sorted({clip.step for clips in self.clips.values() for clip in clips if clip.kind.startswith("student")})

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
        elif event in FIGURES and isinstance(step, int):
            run.figures.setdefault(event, {})[step, str(row.get("kind", ""))] = row
        elif event and event != "video":
            run.events.append(row)
    for key, entry in _read_object(folder / "config.resolved.json").items():
        run.config[str(key)] = entry if isinstance(entry, dict) and "value" in entry else {"value": entry, "origin": ""}
    run.distill = _read_object(folder / "export" / "distill.json")
    return run


def state(run: Run) -> tuple[str, str]:
    """(a word for the style sheet, the state in words)."""
    at = f"at step {run.last_step}"
    for row in reversed(run.events):
        match row["event"]:
            case "start":
                break
            case "error":
                return "failed", f"failed {at}" + (f": {row['message']}" if row.get("message") else "")
            case "stopped":
                return "failed", f"stopped {at}: {row.get('reason', 'a red light')}"
            case "interrupted":
                return "open", f"interrupted {at}"
            case "finish":
                return "finished", f"finished {at}"
    if not run.steps and not run.events:
        return "empty", "nothing logged yet"
    return "open", at


def number(value: Any) -> float | None:
    """A finite number, else None."""
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
                    *(int(number(row.get(key)) or 0) for key in ("width", "height", "frames")))  # fmt: skip
    clips = run.clips.setdefault(prompt, [])
    clip = Clip(kind, int(number(row.get("step")) or 0), row.get("steps"), file, poster)
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
