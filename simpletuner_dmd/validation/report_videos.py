"""The videos of a report: one line per prompt, one column per model, the step chosen by a slider."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from simpletuner_dmd.validation.report_data import KIND_TITLES, KINDS, Clip, Prompt, Run
from simpletuner_dmd.validation.report_words import empty, letters, url

SMALL_PIXELS = 200
"""Videos narrower than this are enlarged with hard pixels: smoothing would hide what the model drew."""


@dataclass(frozen=True)
class Column:
    """One model. run: number of the run whose videos it shows; of teacher and undistilled, the first that has one."""

    kind: str
    run: int
    title: str

    @property
    def key(self) -> str:
        return f"{self.kind}{self.run or ''}"

    @property
    def moves(self) -> bool:
        """Whether the slider changes it."""
        return self.kind.startswith("student")


@dataclass
class Videos:
    """All that is shown: lines[prompt][column] are that model's clips with the number of their run, by step."""

    columns: list[Column]
    steps: list[int]
    lines: dict[Prompt, dict[Column, list[tuple[int, Clip]]]]


def videos(runs: Sequence[Run]) -> Videos:
    """Lines of one prompt, seed, size and length; in a comparison only those of both runs, where there are any."""
    prompts = [set(run.clips) for run in runs]
    shared = set.intersection(*prompts) or set.union(*prompts)
    order = [prompt for prompt in dict.fromkeys(prompt for run in runs for prompt in run.clips) if prompt in shared]
    present = [{clip.kind for prompt in order for clip in run.clips.get(prompt, [])} for run in runs]
    columns = []
    for kind in KINDS:
        having = [number for number, kinds in enumerate(present) if kind in kinds]
        if not kind.startswith("student"):
            having = having[:1]
        for number in having:
            letter = letters(runs)[number] if kind.startswith("student") else ""
            columns.append(Column(kind, number, f"{KIND_TITLES[kind]} {letter}".strip()))
    lines = {prompt: {column: _clips(runs, prompt, column) for column in columns} for prompt in order}
    return Videos(columns, sorted({step for run in runs for step in run.validation_steps()}), lines)


def _clips(runs: Sequence[Run], prompt: Prompt, column: Column) -> list[tuple[int, Clip]]:
    chosen = [column.run] if column.moves else [column.run, *range(len(runs))]
    for number in chosen:
        found = [(number, clip) for clip in runs[number].clips.get(prompt, []) if clip.kind == column.kind]
        if found:
            found.sort(key=lambda entry: entry[1].step)
            return found if column.moves else found[-1:]
    return []


def run_step(run: Run, step: int) -> int | None:
    """The run's last validation up to `step`: runs that are compared need not validate at the same steps."""
    steps = run.validation_steps()
    place = bisect.bisect_right(steps, step)
    return steps[place - 1] if place else None


def section(runs: Sequence[Run], page: Path) -> str:
    """HTML: the bar of controls and the lines, showing the last step."""
    shown = videos(runs)
    if not shown.lines:
        return empty("No videos yet: they appear with the first validation.")
    latest = shown.steps[-1] if shown.steps else 0
    rows = "".join(_line(index, prompt, clips, runs, latest, page)
                   for index, (prompt, clips) in enumerate(shown.lines.items()))  # fmt: skip
    note = ""
    if len(runs) > 1 and set(runs[0].clips).isdisjoint(runs[1].clips):
        note = empty("The runs have no prompt, seed and size in common.")
    return f'{_bar(shown.steps)}{note}<div class="prompts columns-{len(shown.columns)}">{rows}</div>'


def _bar(steps: list[int]) -> str:
    last = max(len(steps) - 1, 0)
    latest = steps[-1] if steps else 0
    off = "" if last else " disabled"
    slider = (
        f'<div class="slider"><label for="step">Step <output id="step-value" for="step">{latest}</output></label>'
        f'<button type="button" id="earlier" aria-label="Earlier validation"{off}>‹</button>'
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" step="1" '
        f'aria-valuetext="step {latest}"{off}>'
        f'<button type="button" id="later" aria-label="Later validation"{off}>›</button></div>'
    )
    return (
        '<div class="bar" role="group" aria-label="Video controls" hidden>'
        '<button type="button" id="play">Pause</button>'
        '<div class="slider"><label for="seek">Time <output id="seek-value" for="seek">0.0 s</output></label>'
        '<input type="range" id="seek" min="0" max="1000" value="0" step="10" aria-valuetext="0.0 seconds"></div>'
        f"{slider if steps else ''}"
        '<label>Speed <select id="speed"><option value="1">1×</option><option value="0.5">½×</option>'
        '<option value="0.25">¼×</option></select></label></div>'
    )


def _line(index: int, prompt: Prompt, clips: dict[Column, list[tuple[int, Clip]]], runs: Sequence[Run], step: int,
          page: Path) -> str:  # fmt: skip
    size = f"{prompt.width}×{prompt.height}" if prompt.width else ""
    frames = f"{prompt.frames} frames" if prompt.frames else ""
    seed = "" if prompt.seed is None else f"seed {prompt.seed}"
    name = "" if _words(prompt.name) == _words(prompt.text) else prompt.name
    about = " · ".join(escape(part) for part in (name, seed, size, frames) if part)
    figures = []
    for column, entries in clips.items():
        wanted = run_step(runs[column.run], step)
        at = [entry for entry in entries if not column.moves or entry[1].step == wanted]
        figures.append(_figure(prompt, column, at[-1] if at else None, runs, page))
    return (f'<article class="prompt" data-prompt="{index}"><h3>{escape(prompt.text)}</h3>'
            f'<p class="about">{about}</p><div class="clips">{"".join(figures)}</div></article>')  # fmt: skip


def _figure(prompt: Prompt, column: Column, entry: tuple[int, Clip] | None, runs: Sequence[Run], page: Path) -> str:
    """Without the script each video has its own controls."""
    pixelated = ' class="pixelated"' if 0 < prompt.width < SMALL_PIXELS else ""
    size = f' width="{prompt.width}" height="{prompt.height}"' if prompt.width and prompt.height else ""
    ratio = f' style="aspect-ratio:{prompt.width}/{prompt.height}"' if size else ""
    source, about = " hidden", ""
    if entry is not None:
        run, clip = runs[entry[0]], entry[1]
        source = f' src="{url(clip.file, run, page)}"'
        source += f' poster="{url(clip.poster, run, page)}"' if clip.poster else ""
        about = _about(column, clip)
    label = escape(f"{column.title}{f', {about}' if about else ''}: {prompt.text}", quote=True)
    return (
        f'<figure data-column="{column.key}" data-kind="{column.kind}"><div class="screen"{ratio}>'
        f'<video{source}{size}{pixelated} aria-label="{label}" muted playsinline controls preload="none"></video>'
        f'<p class="missing"{"" if entry is None else " hidden"}>not rendered at this step</p></div>'
        f'<figcaption><b>{column.title}</b> <span class="about">{about}</span></figcaption></figure>'
    )


def _about(column: Column, clip: Clip) -> str:
    """Which step of the training, and in how many steps it was sampled."""
    many = clip.sampling_steps
    sampled = "" if not isinstance(many, int) else f"{many} step" if many == 1 else f"{many} steps"
    return " · ".join(part for part in (f"at {clip.step}" if column.moves else "", sampled) if part)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))


def data(runs: Sequence[Run], page: Path) -> dict[str, Any]:
    """For the script: the steps of the slider; per column the validation it shows at each of them (null: none yet) and
    its title; per prompt and column the clips by step."""
    shown = videos(runs)
    columns = {
        column.key: {"title": column.title, "moves": column.moves,
                     "at": [run_step(runs[column.run], step) for step in shown.steps]}
        for column in shown.columns
    }  # fmt: skip
    prompts = [
        {
            column.key: {
                str(clip.step) if column.moves else "any": {
                    "src": url(clip.file, runs[number], page),
                    "poster": url(clip.poster, runs[number], page) if clip.poster else "",
                    "about": _about(column, clip),
                }
                for number, clip in entries
            }
            for column, entries in line.items()
        }
        for line in shown.lines.values()
    ]
    return {"steps": shown.steps, "columns": columns, "texts": [prompt.text for prompt in shown.lines],
            "prompts": prompts}  # fmt: skip
