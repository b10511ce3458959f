"""The door to every option: sections, their options, and one option with what it does. Read from the schema."""

from __future__ import annotations

import textwrap
from typing import Any

from simpletuner_dmd.cli.wizard import ask, data
from simpletuner_dmd.cli.wizard.draft import Draft, typed
from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.datasets import read_entries
from simpletuner_dmd.config.explain import Option, Section, sections, values
from simpletuner_dmd.config.mistakes import shown

BACK = "(back)"
DEFAULT = "(the default)"
METHOD = "distillation_config "
WHOLE = ("tread_config ", "lycoris_config", "tread_config")
"""They are objects: each is one option here, written as JSON."""


def browse(draft: Draft) -> None:
    """Sections and options until the person goes back."""
    last: Any = None
    while True:
        offered = [one for one in sections() if _concerns(one, draft)]
        choices = [(BACK, None), *((f"{one.name:<24} {one.about}", one) for one in offered)]
        last = ask.select("Which section?", "Every option there is; nothing here needs to be touched.", choices, last)
        if last is None:
            return
        _section(draft, last)


def _concerns(section: Section, draft: Draft) -> bool:
    if section.name.startswith(METHOD):
        return section.name == f"{METHOD}{draft.options.distillation_method}"
    if section.name.startswith("dataset"):
        return data.entry_of(draft) is not None
    return not section.name.startswith(WHOLE)


def _section(draft: Draft, section: Section) -> None:
    last: Any = None
    while True:
        width = max(len(option.key) for option in section.options)
        choices: list[tuple[str, Any]] = [(BACK, None)]
        for option in section.options:
            mark = "*" if _is_written(draft, section, option) else " "
            choices.append((f"{mark} {option.key:<{width}}  {shown(_now(draft, section, option))}", option))
        last = ask.select(f"{section.name}: which option?", "* is written in the file.", choices, last)
        if last is None:
            return
        _change(draft, section, last)


def _change(draft: Draft, section: Section, option: Option) -> None:
    """Shows an option and takes a value that the schema takes."""
    rows = [option.description, f"{values(option)}. Default: {option.default}."]
    about = "\n".join(textwrap.fill(row, ask.width() - 2, break_on_hyphens=False) for row in rows)
    now = _now(draft, section, option)
    words = option.allowed or (("true", "false") if option.type == "true or false" else ())
    if words and option.type.split(" or ")[0] in ("word", "true or false"):
        current = shown(now).strip('"')
        choices = [(f"{DEFAULT[:-1]}, {option.default})", None), *((word, word) for word in words)]
        chosen = ask.select(f"{option.key}?", about, choices, current if current in words else None)
        _write(draft, section, option, None if chosen is None else typed(chosen) if option.type != "word" else chosen)
        return
    is_plain = isinstance(now, str)
    current = "" if now is None else now if is_plain else shown_whole(now)
    written = ask.text(
        f"{option.key}? (empty: the default)", about, str(current),
        lambda text: _mistake(draft, section, option, text),
    )  # fmt: skip
    if written != str(current):
        _write(draft, section, option, typed(written) if written else None)


def shown_whole(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _mistake(draft: Draft, section: Section, option: Option, text: str) -> str:
    if not text:
        return ""
    if not section.name.startswith("dataset"):
        return draft.problem(section.prefix + option.key, typed(text))
    entry: dict[str, Any] = {**(data.entry_of(draft) or {})}
    _place(entry, section, option.key, typed(text))
    found = read_entries([entry], "")
    return found.problems[0].message if found.problems else ""


def _now(draft: Draft, section: Section, option: Option) -> Any:
    if section.name.startswith("dataset"):
        entry: dict[str, Any] = data.entry_of(draft) or {}
        inner = entry.get(section.prefix.rstrip("."), {}) if section.prefix else entry
        default = DatasetEntry.model_fields[option.key].default if not section.prefix else None
        return inner.get(option.key, default) if isinstance(inner, dict) else default
    return draft.flat().get(section.prefix + option.key)


def _is_written(draft: Draft, section: Section, option: Option) -> bool:
    if section.name.startswith("dataset"):
        entry: dict[str, Any] = data.entry_of(draft) or {}
        inner = entry.get(section.prefix.rstrip("."), {}) if section.prefix else entry
        return isinstance(inner, dict) and option.key in inner
    return draft.has(section.prefix + option.key)


def _write(draft: Draft, section: Section, option: Option, value: Any) -> None:
    if section.name.startswith("dataset"):
        entry = data.entry_of(draft)
        assert entry is not None, "the section is offered only where there is one"
        _place(entry, section, option.key, value)
    elif value is None or not (mistake := draft.problem(section.prefix + option.key, value)):
        draft.set(section.prefix + option.key, value)
    else:
        ask.say(f"Not taken: {mistake}.", "  ")


def _place(entry: dict[str, Any], section: Section, key: str, value: Any) -> None:
    name = section.prefix.rstrip(".")
    target = dict(entry.get(name) or {}) if name else entry
    if value is None:
        target.pop(key, None)
    else:
        target[key] = value
    if name:
        entry[name] = target
