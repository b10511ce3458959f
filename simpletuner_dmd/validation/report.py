"""report/index.html: a run on one page that opens from disk, offline.

Made from the files of the run alone, so it can be built at any moment: while training, after a crash, years later.
The page asks the network for nothing; its script and styles lie beside it, videos are named relative to it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from simpletuner_dmd.durable import write_text
from simpletuner_dmd.validation import report_health, report_videos
from simpletuner_dmd.validation.report_charts import Chart, charts
from simpletuner_dmd.validation.report_data import Run, read_run, state
from simpletuner_dmd.validation.report_words import duration, empty, letters, names, plain, short, table, title

FOLDER = "report"
ASSETS = ("report.css", "report.js", "curves.js", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE.txt")


def build_report(output_dir: Path, compare: Path | None = None) -> Path:
    """Writes the page and its assets into `output_dir`/report; returns the path of the page.

    compare: the folder of a second run; the page is then report/compare-NAME.html, beside that of the run alone. It
    names the videos of the other run where they lie.
    """
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        text = asset(name)
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            write_text(folder / name, text)
    return write_text(folder / page_name(compare), page(output_dir, compare))


def page_name(compare: Path | None = None) -> str:
    if compare is None:
        return "index.html"
    return f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', compare.resolve().name)}.html"


def asset(name: str) -> str:
    return (resources.files("simpletuner_dmd.validation") / "assets" / name).read_text(encoding="utf-8")


def page(output_dir: Path, compare: Path | None = None) -> str:
    """The HTML of the report, as it is to lie in `output_dir`/report."""
    runs = [read_run(output_dir)] if compare is None else [read_run(output_dir), read_run(compare)]
    place = output_dir.resolve() / FOLDER
    drawn = charts(runs)
    parts = {
        "title": escape(" against ".join(names(runs))),
        "name": _heading(runs),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "ladder": _ladder(runs[0]) if len(runs) == 1 else "",
        "facts": _facts(runs),
        "health": _health(runs),
        "videos": report_videos.section(runs, place),
        "curves": _curves(runs, drawn),
        "settings": _settings(runs[0]) if len(runs) == 1 else _difference(runs),
        "settings_title": "Settings that were chosen" if len(runs) == 1 else "Settings that differ",
        "export": "".join(_each(runs, _export)),
        "environment": _environment(runs),
        "events": "".join(_each(runs, _events)),
        "data": _embedded({"letters": letters(runs), "videos": report_videos.data(runs, place),
                           "charts": [_chart_data(chart, runs) for chart in drawn]}),
    }  # fmt: skip
    return Template(asset("report.html")).substitute(parts)


def _each(runs: Sequence[Run], section: Any) -> list[str]:
    """The section of every run, under its letter where there are two."""
    heads = [f'<h3 class="run">{letter}: {escape(name)}</h3>' if letter else ""
             for letter, name in zip(letters(runs), names(runs), strict=True)]  # fmt: skip
    return [f'<div class="of-run">{head}{section(run)}</div>' for head, run in zip(heads, runs, strict=True)]


# --- header ---------------------------------------------------------------------------------------------------------


def _heading(runs: Sequence[Run]) -> str:
    lines = []
    for letter, name, run in zip(letters(runs), names(runs), runs, strict=True):
        word, sentence = state(run)
        colour = report_health.overall(run)
        lamp = "" if colour is None else (
            f'<a class="lamp {colour}" href="#health"><span class="dot" aria-hidden="true"></span>health {colour}</a>'
        )  # fmt: skip
        who = f"<b>{letter}: {escape(name)}</b>" if letter else ""
        lines.append(
            f'<div class="name">{who}<p class="state {word}">{escape(sentence)}</p>{lamp}'
            f'<p class="subtitle">{_subtitle(run)}</p></div>'
        )
    heading = escape(runs[0].name) if len(runs) == 1 else "Two runs compared"
    return f"<h1>{heading}</h1>{''.join(lines)}"


def _subtitle(run: Run) -> str:
    method = str(run.distill.get("method") or run.option("distillation_method") or "")
    base = str(run.distill.get("base") or run.option("pretrained_model_name_or_path"))
    base = Path(base).name if Path(base).is_absolute() else base
    if not method and run.config:
        method = "supervised"
    parts = [method.upper() if method != "supervised" else "Supervised training", f"from {base}" if base else ""]
    return escape(" ".join(part for part in parts if part))


def _ladder_timesteps(run: Run) -> list[float]:
    """From the export, else from the start of the run."""
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


def _fact_values(run: Run) -> dict[str, str]:
    """The last row's numbers that a person asks for first."""
    last: dict[str, float] = {}  # not every step moves every role
    for step in sorted(run.steps):
        last |= {key: value for key, value in run.steps[step].items() if isinstance(value, int | float)}
    seconds = [row["step_seconds"] for row in run.steps.values() if isinstance(row.get("step_seconds"), int | float)]
    facts = {"Steps": f"{run.last_step:,}" if run.steps else "–"}
    facts |= {title(key): short(last[key]) for key in last if "loss" in key}
    if seconds:
        facts |= {
            "Seconds per step": short(sorted(seconds)[len(seconds) // 2]),
            "Time in steps": duration(sum(seconds)),
        }
    peaks = [row["peak_bytes"] for row in run.steps.values() if isinstance(row.get("peak_bytes"), int | float)]
    if peaks:
        facts["Peak memory"] = short(max(peaks), "bytes")
    return facts | {"Validations": str(len(run.validation_steps()))}


def _facts(runs: Sequence[Run]) -> str:
    found = [_fact_values(run) for run in runs]
    if len(runs) == 1:
        items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
                        for name, value in found[0].items())  # fmt: skip
        return f'<dl class="facts">{items}</dl>'
    known = dict.fromkeys(name for facts in found for name in facts)
    rows = [(name, *(facts.get(name, "–") for facts in found)) for name in known]
    return table(("", *letters(runs)), rows, "Figures of both runs")


# --- health, curves -------------------------------------------------------------------------------------------------


def _health(runs: Sequence[Run]) -> str:
    return f'<div class="side-by-side">{"".join(_each(runs, report_health.lights))}</div>'


def _curves(runs: Sequence[Run], drawn: Sequence[Chart]) -> str:
    if not drawn:
        return empty("No steps logged yet.")
    blocks: dict[bool, list[str]] = {True: [], False: []}
    for index, chart in enumerate(drawn):
        lasts = [next((value for value in reversed(curve.values) if value is not None), None) for curve in chart.curves]
        labels = _labels(chart, runs)
        words = ", ".join(f"{name} {short(value, chart.unit)}" for name, value in zip(labels, lasts, strict=True))
        label = f"{title(chart.title)} over {len(chart.x)} points up to step {chart.x[-1]:g}; last: {words}"
        blocks[chart.main].append(
            f'<figure class="chart"><figcaption>{escape(title(chart.title))}</figcaption>'
            f'<div class="plot" data-chart="{index}" role="img" aria-label="{escape(label, quote=True)}"></div>'
            "</figure>"
        )
    text = f'<div class="charts">{"".join(blocks[True])}</div>'
    if blocks[False]:
        text += (f'<details id="more-curves"><summary>{len(blocks[False])} more</summary>'
                 f'<div class="charts">{"".join(blocks[False])}</div></details>')  # fmt: skip
    return text


def _labels(chart: Chart, runs: Sequence[Run]) -> list[str]:
    tags = letters(runs)
    return [f"{title(curve.name)} {tags[curve.run]}".strip() for curve in chart.curves]


def _chart_data(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "title": title(chart.title),
        "unit": chart.unit,
        "noisy": chart.noisy,
        "x": chart.x,
        "labels": _labels(chart, runs),
        "names": [curve.name for curve in chart.curves],
        "runs": [curve.run for curve in chart.curves],
        "series": [curve.values for curve in chart.curves],
    }


# --- tables ---------------------------------------------------------------------------------------------------------


def _settings(run: Run) -> str:
    """The difference from the defaults, and the defaults on demand."""
    if not run.config:
        return empty("config.resolved.json is not there.")
    rows = [(key, _public(key, entry.get("value")), str(entry.get("origin", ""))) for key, entry in run.config.items()]
    chosen = [row for row in rows if row[2] != "default"]
    others = [row for row in rows if row[2] == "default"]
    text = table(("option", "value", "from"), chosen, "Options that were chosen") if chosen else empty(
        "All options are defaults.")  # fmt: skip
    if others:
        text += (
            f'<details id="defaults"><summary>{len(others)} options at their defaults</summary>'
            f"{table(('option', 'value'), [row[:2] for row in others], 'Options at their defaults')}</details>"
        )
    return text


def _difference(runs: Sequence[Run]) -> str:
    """What was set otherwise in the other run, option by option, those of a method one by one."""
    if not all(run.config for run in runs):
        return empty("config.resolved.json is not there for both runs.")
    values = [_flat({key: entry.get("value") for key, entry in run.config.items()}) for run in runs]
    known = dict.fromkeys(name for found in values for name in found)
    rows = [(name, *(_public(name, found.get(name, "–")) for found in values)) for name in known
            if values[0].get(name, "–") != values[1].get(name, "–")]  # fmt: skip
    same = f"{len(known) - len(rows)} options are the same."
    return (table(("option", *letters(runs)), rows, "Options that differ") if rows else "") + empty(same)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _public(key: str, value: Any) -> Any:
    """Reports are passed around: what may hold a password is not in them. The path of a webhook's file is harmless."""
    secret = any(word in key.lower() for word in ("token", "secret", "password", "api_key"))
    secret = secret and isinstance(value, str) and value != ""
    inline_webhook = "webhook" in key.lower() and (not isinstance(value, (str, type(None))) or "://" in (value or ""))
    return "(hidden)" if secret or inline_webhook else value


def _export(run: Run) -> str:
    if not run.distill:
        return empty("Nothing exported yet.")
    keys = ("method", "model_type", "steps", "sampler", "renoise", "shift", "guidance", "scheduler", "base", "weights",
            "weights_dtype", "train_steps", "metrics")  # fmt: skip
    rows = [(key, run.distill[key]) for key in keys if run.distill.get(key) not in (None, {}, [])]
    text = table(("fact", "value"), rows, "What the export says of itself")
    snippet = run.distill.get("snippet")
    if isinstance(snippet, str):
        text = ("<p>The files are in <code>export/</code>. With stock diffusers:</p>"
                f'<div class="snippet"><button type="button" data-copy>Copy</button>'
                f'<pre tabindex="0"><code>{escape(snippet)}</code></pre></div>{text}')  # fmt: skip
    return text


def _environment(runs: Sequence[Run]) -> str:
    found = [_environment_of(run) for run in runs]
    if not any(found):
        return empty("The start of the run was not logged.")
    known = dict.fromkeys(name for facts in found for name in facts)
    rows = [(name, *(facts.get(name, "–") for facts in found)) for name in known]
    head = ("what", "value") if len(runs) == 1 else ("what", *letters(runs))
    return table(head, rows, "Environment")


def _environment_of(run: Run) -> dict[str, Any]:
    starts = [row for row in run.events if row["event"] == "start"]
    if not starts:
        return {}
    start = {key: value for key, value in starts[-1].items() if key != "event"}
    nested = start.pop("environment", {})
    return start | (nested if isinstance(nested, dict) else {})


def _events(run: Run) -> str:
    rows = []
    for row in run.events:
        rest = {key: value for key, value in row.items() if key not in ("event", "step", "environment")}
        rows.append((row["event"], row.get("step", ""), ", ".join(f"{key} {plain(v)}" for key, v in rest.items())))
    return table(("event", "step", "about"), rows[-200:], "Events") if rows else empty("No events.")


# --- data for the script --------------------------------------------------------------------------------------------


def _embedded(document: Any) -> str:
    """JSON for a script element: a prompt that says </script> must not end it."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")
