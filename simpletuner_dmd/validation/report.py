"""report/index.html: a run on one page that opens from disk, offline.

Made from the files of the run alone, so it can be built at any moment: while training, after a crash, years later.
The page asks the network for nothing; its script and styles lie beside it, videos are named relative to it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from simpletuner_dmd.validation.report_data import (
    KIND_TITLES,
    KINDS,
    Clip,
    Prompt,
    Run,
    charts,
    read_run,
    state,
)

ASSETS = ("report.css", "report.js", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE.txt")
SMALL_PIXELS = 200
"""Videos narrower than this are enlarged with hard pixels: smoothing would hide what the model drew."""


def build_report(output_dir: Path) -> Path:
    """Writes `output_dir`/report/index.html and its assets; returns the path of the page."""
    run = read_run(output_dir)
    folder = output_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    assets = resources.files("simpletuner_dmd.validation") / "assets"
    for name in ASSETS:
        _write(folder / name, (assets / name).read_text(encoding="utf-8"))
    template = Template((assets / "report.html").read_text(encoding="utf-8"))
    page = folder / "index.html"
    _write(page, template.substitute(_parts(run)))
    return page


def _parts(run: Run) -> dict[str, str]:
    """What goes into the template. Every value is HTML already."""
    word, sentence = state(run)
    name = str(run.distill.get("run_name") or run.option("tracker_run_name") or run.folder.resolve().name)
    return {
        "title": escape(name),
        "state_word": word,
        "state": escape(sentence),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "subtitle": _subtitle(run),
        "ladder": _ladder(run),
        "facts": _facts(run),
        "videos": _videos(run),
        "curves": _curves(run),
        "settings": _settings(run),
        "export": _export(run),
        "environment": _environment(run),
        "events": _events(run),
        "data": _embedded(_page_data(run)),
    }


# --- header ---------------------------------------------------------------------------------------------------------


def _subtitle(run: Run) -> str:
    method = str(run.distill.get("method") or run.option("distillation_method") or "")
    base = str(run.distill.get("base") or run.option("pretrained_model_name_or_path"))
    base = Path(base).name if Path(base).is_absolute() else base
    if not method and run.config:
        method = "supervised"
    parts = [method.upper() if method != "supervised" else "Supervised training", f"from {base}" if base else ""]
    return escape(" ".join(part for part in parts if part))


def _ladder_timesteps(run: Run) -> list[float]:
    """From the export, else from the option as written (literal lists only)."""
    ladder = run.distill.get("ladder")
    found = ladder.get("timesteps") if isinstance(ladder, dict) else None
    if found is None:
        start = next((row for row in run.events if isinstance(row.get("ladder"), list)), {})
        found = start.get("ladder")
    return [float(value) for value in found or [] if isinstance(value, int | float)]


def _ladder(run: Run) -> str:
    """The student's steps on the line from noise to video."""
    timesteps = _ladder_timesteps(run)
    if not timesteps:
        return ""
    stops = [*timesteps, 0.0]
    rungs = "".join(
        f'<li style="--at:{100 - stop / 10:.2f}%" {"class=end" if stop == 0 else ""}><span>'
        f"{'video' if stop == 0 else f'{stop:.4g}'}</span></li>"
        for stop in stops
    )
    steps = f"{len(timesteps)} step{'s' if len(timesteps) > 1 else ''}"
    return f'<div class="ladder"><p>Ladder: {steps}, by timestep</p><ol aria-label="Ladder">{rungs}</ol></div>'


def _facts(run: Run) -> str:
    """The last row's numbers that a person asks for first."""
    last = run.steps[run.last_step] if run.steps else {}
    seconds = [row["step_seconds"] for row in run.steps.values() if isinstance(row.get("step_seconds"), int | float)]
    facts = [("Steps", f"{run.last_step:,}" if run.steps else "–")]
    facts += [(_title(key), _short(last[key])) for key in last if "loss" in key and isinstance(last[key], int | float)]
    if seconds:
        facts += [("Seconds per step", _short(sorted(seconds)[len(seconds) // 2])),
                  ("Time in steps", _duration(sum(seconds)))]  # fmt: skip
    peaks = [row["peak_bytes"] for row in run.steps.values() if isinstance(row.get("peak_bytes"), int | float)]
    if peaks:
        facts.append(("Peak memory", f"{max(peaks) / 2**30:.2f} GiB"))
    facts.append(("Validations", str(len(_validation_steps(run)))))
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)


# --- videos ---------------------------------------------------------------------------------------------------------


def _validation_steps(run: Run) -> list[int]:
    """Steps at which a student was rendered."""
    return sorted({clip.step for clips in run.clips.values() for clip in clips if clip.kind.startswith("student")})


def _kinds(run: Run) -> list[str]:
    present = {clip.kind for clips in run.clips.values() for clip in clips}
    return [kind for kind in KINDS if kind in present]


def clip_at(clips: Iterable[Clip], kind: str, step: int) -> Clip | None:
    """The student's clip of exactly this step; the teacher's and the undistilled model's do not change, so any."""
    of_kind = [clip for clip in clips if clip.kind == kind]
    if kind.startswith("student"):
        return next((clip for clip in of_kind if clip.step == step), None)
    return of_kind[-1] if of_kind else None


def _videos(run: Run) -> str:
    if not run.clips:
        return '<p class="empty">No videos yet: they appear with the first validation.</p>'
    steps, kinds = _validation_steps(run), _kinds(run)
    latest = steps[-1] if steps else 0
    rows = "".join(_prompt_row(index, prompt, clips, kinds, latest)
                   for index, (prompt, clips) in enumerate(run.clips.items()))  # fmt: skip
    last = max(len(steps) - 1, 0)
    slider = (
        f'<label class="slider">Step <output id="step-value">{latest}</output>'
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" step="1" '
        f'aria-valuetext="step {latest}"{"" if last else " disabled"}></label>'
    )
    bar = (
        '<div class="bar" role="group" aria-label="Video controls">'
        '<button type="button" id="play" aria-pressed="true">Pause</button>'
        '<label>Speed <select id="speed"><option value="1">1×</option><option value="0.5">½×</option>'
        f'<option value="0.25">¼×</option></select></label>{slider if steps else ""}</div>'
    )
    return f'{bar}<div class="prompts" style="--columns:{len(kinds)}">{rows}</div>'


def _prompt_row(index: int, prompt: Prompt, clips: list[Clip], kinds: list[str], step: int) -> str:
    size = f"{prompt.width}×{prompt.height}" if prompt.width else ""
    frames = f"{prompt.frames} frames" if prompt.frames else ""
    seed = "" if prompt.seed is None else f"seed {prompt.seed}"
    name = "" if _words(prompt.name) == _words(prompt.text) else prompt.name
    about = " · ".join(escape(part) for part in (name, seed, size, frames) if part)
    figures = "".join(_figure(prompt, kind, clip_at(clips, kind, step)) for kind in kinds)
    return (f'<article class="prompt" data-prompt="{index}"><h3>{escape(prompt.text)}</h3>'
            f'<p class="about">{about}</p><div class="clips">{figures}</div></article>')  # fmt: skip


def _figure(prompt: Prompt, kind: str, clip: Clip | None) -> str:
    title = KIND_TITLES[kind]
    steps = _steps_text(clip.sampling_steps) if clip else ""
    pixelated = ' class="pixelated"' if 0 < prompt.width < SMALL_PIXELS else ""
    size = f' width="{prompt.width}" height="{prompt.height}"' if prompt.width and prompt.height else ""
    ratio = f' style="aspect-ratio:{prompt.width}/{prompt.height}"' if size else ""
    source = f' src="{_url(clip.file)}"' if clip else " hidden"
    poster = f' poster="{_url(clip.poster)}"' if clip and clip.poster else ""
    label = escape(f"{title}: {prompt.text}", quote=True)
    return (
        f'<figure data-kind="{kind}"><div class="screen"{ratio}>'
        f'<video{source}{poster}{size}{pixelated} aria-label="{label}" muted loop autoplay playsinline '
        f'preload="metadata"></video><p class="missing"{" hidden" if clip else ""}>not rendered at this step</p></div>'
        f'<figcaption><b>{title}</b> <span class="steps">{steps}</span></figcaption></figure>'
    )


def _steps_text(steps: int | None) -> str:
    return "" if not isinstance(steps, int) else f"{steps} step" if steps == 1 else f"{steps} steps"


def _url(file: str) -> str:
    """From report/index.html to a file of the run."""
    return "../" + quote(file.replace(os.sep, "/"))


# --- curves, tables -------------------------------------------------------------------------------------------------


def _curves(run: Run) -> str:
    found = charts(run)
    if not found:
        return '<p class="empty">No steps logged yet.</p>'
    blocks = []
    for index, chart in enumerate(found):
        lasts = {name: next((v for v in reversed(values) if v is not None), None)
                 for name, values in chart.series.items()}  # fmt: skip
        words = ", ".join(f"{_title(name)} {_short(value, chart.unit)}" for name, value in lasts.items())
        label = f"{_title(chart.title)} over {len(chart.x)} points up to step {chart.x[-1]:g}; last: {words}"
        blocks.append(
            f'<figure class="chart"><figcaption>{escape(_title(chart.title))}</figcaption>'
            f'<div class="plot" data-chart="{index}" role="img" aria-label="{escape(label, quote=True)}"></div>'
            "</figure>"
        )
    return f'<div class="charts">{"".join(blocks)}</div>'


def _settings(run: Run) -> str:
    if not run.config:
        return '<p class="empty">config.resolved.json is not there.</p>'
    rows = [(key, _public(key, entry.get("value")), str(entry.get("origin", ""))) for key, entry in run.config.items()]
    chosen = [row for row in rows if row[2] != "default"]
    others = [row for row in rows if row[2] == "default"]
    text = _table(("option", "value", "from"), chosen) if chosen else '<p class="empty">All options are defaults.</p>'
    if others:
        text += (f"<details><summary>{len(others)} options at their defaults</summary>"
                 f"{_table(('option', 'value'), [row[:2] for row in others])}</details>")  # fmt: skip
    return text


def _public(key: str, value: Any) -> Any:
    """Reports are passed around: what may hold a password is not in them. The path of a webhook's file is harmless."""
    secret = any(word in key.lower() for word in ("token", "secret", "password", "api_key"))
    secret = secret and isinstance(value, str) and value != ""
    inline_webhook = "webhook" in key.lower() and (not isinstance(value, (str, type(None))) or "://" in (value or ""))
    return "(hidden)" if secret or inline_webhook else value


def _export(run: Run) -> str:
    if not run.distill:
        return '<p class="empty">Nothing exported yet.</p>'
    keys = ("method", "model_type", "steps", "sampler", "renoise", "shift", "guidance", "scheduler", "base", "weights",
            "weights_dtype", "train_steps", "metrics")  # fmt: skip
    rows = [(key, run.distill[key]) for key in keys if run.distill.get(key) not in (None, {}, [])]
    text = _table(("fact", "value"), rows)
    snippet = run.distill.get("snippet")
    if isinstance(snippet, str):
        text = ("<p>The files are in <code>export/</code>. With stock diffusers:</p>"
                f'<div class="snippet"><button type="button" data-copy="snippet">Copy</button>'
                f'<pre id="snippet" tabindex="0"><code>{escape(snippet)}</code></pre></div>{text}')  # fmt: skip
    return text


def _environment(run: Run) -> str:
    starts = [row for row in run.events if row["event"] == "start"]
    if not starts:
        return '<p class="empty">The start of the run was not logged.</p>'
    start = dict(starts[-1])
    nested = start.pop("environment", {})
    rows = [(key, value) for key, value in start.items() if key != "event"]
    rows += list(nested.items()) if isinstance(nested, dict) else []
    return _table(("what", "value"), rows) if rows else '<p class="empty">Nothing noted at the start.</p>'


def _events(run: Run) -> str:
    rows = []
    for row in run.events:
        rest = {key: value for key, value in row.items() if key not in ("event", "step", "environment")}
        rows.append((row["event"], row.get("step", ""), ", ".join(f"{key} {_plain(v)}" for key, v in rest.items())))
    return _table(("event", "step", "about"), rows[-200:]) if rows else '<p class="empty">No events.</p>'


def _table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    body = "".join(f"<tr>{''.join(_cell(index, cell) for index, cell in enumerate(row))}</tr>" for row in rows)
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    return (f'<div class="table" tabindex="0" role="region" aria-label="{escape(head[0])}s"><table>'
            f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def _cell(index: int, value: Any) -> str:
    text = escape(_plain(value))
    return f"<td>{text}</td>" if index else f"<th scope=row>{text}</th>"


# --- data for the script --------------------------------------------------------------------------------------------


def _page_data(run: Run) -> dict[str, Any]:
    steps, kinds = _validation_steps(run), _kinds(run)
    prompts = []
    for clips in run.clips.values():
        at_steps = []
        for step in steps:
            found = {kind: clip_at(clips, kind, step) for kind in kinds}
            at_steps.append({
                kind: {"src": _url(clip.file), "poster": _url(clip.poster) if clip.poster else "",
                       "steps": _steps_text(clip.sampling_steps)}
                for kind, clip in found.items() if clip
            })  # fmt: skip
        prompts.append(at_steps)
    return {
        "steps": steps,
        "prompts": prompts,
        "charts": [
            {"title": _title(chart.title), "unit": chart.unit, "x": chart.x,
             "labels": [_title(name) for name in chart.series], "series": list(chart.series.values())}
            for chart in charts(run)
        ],
    }  # fmt: skip


def _embedded(document: Any) -> str:
    """JSON for a script element: a prompt that says </script> must not end it."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


# --- words ----------------------------------------------------------------------------------------------------------


def _title(key: str) -> str:
    special = {"lr": "Learning rate", "grad_norm": "Gradient norm", "dmd_loss": "DMD loss", "peak_bytes": "Peak memory",
               "step_seconds": "Seconds per step"}  # fmt: skip
    if key in special:
        return special[key]
    words = key.replace("/", " ").replace("_", " ").replace(" lr", " learning rate")
    return words[:1].upper() + words[1:]


def _short(value: Any, unit: str = "") -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value / 2**30:.2f} GiB" if unit == "bytes" else f"{value:.4g}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    """Beside it and renamed, so that a browser that reloads never reads half a page."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
