"""What a conversion gives: options, datasets, and one line for everything that was changed or left out."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from typing import Any

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.layers import options_layer
from simpletuner_dmd.config.load import merge_options

WIDTH = 80
NESTED = "distillation_config."
ESSENTIAL = ("model_family", "model_flavour", "model_type", "distillation_method")
STANDARD = "here 1 is off, v_u + g (v_c - v_u); there 0 is off, v_c + w (v_c - v_u), so g = w + 1"


@dataclass
class Converted:
    """An answer to `convert`. values: dotted options; datasets: entries of its data file; prompts: a file of them."""

    tool: str
    values: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] | None = None
    prompts: str | None = None
    kept: list[str] = field(default_factory=list)
    changed: list[tuple[str, str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def keep(self, key: str, value: Any) -> None:
        """The same key with the same meaning."""
        self.values[key] = value
        self.kept.append(key)

    def change(self, theirs: str, value: Any, ours: str, new: Any, why: str = "") -> None:
        """Another key, or another value."""
        self.values[ours] = new
        self.changed.append((f"{theirs} {shown(value)}", f"{ours} {shown(new)}", why))

    def add(self, ours: str, value: Any, why: str) -> None:
        """What their tool takes for granted and this one does not."""
        self.values[ours] = value
        self.changed.append(("(not written)", f"{ours} {shown(value)}", why))

    def leave(self, theirs: str, value: Any, why: str) -> None:
        self.left_out.append((f"{theirs} {shown(value)}", why))

    def settle(self) -> None:
        """Takes out, with the reason, what the schema refuses: what is left is a configuration that loads.

        Raises UserError where that would make it a configuration of something else.
        """
        for key in ESSENTIAL:
            refused = [one for one in merge_options([options_layer(self.values, "converted")], "converted").problems
                       if one.key == key]  # fmt: skip
            if refused:
                raise UserError(f"{key} {shown(self.values.get(key))} cannot be converted: {refused[0].message}",
                                fix="this tool distils and fine-tunes Wan text-to-video models")  # fmt: skip
        while problems := merge_options([options_layer(self.values, "converted")], "converted").problems:
            known = [problem for problem in problems if self._holds(problem.key)]
            if not known:
                return  # what is missing is not theirs to give; `check` says it
            for problem in known:
                for key in [key for key in self.values if self._is(key, problem.key)]:
                    self.leave(key, self.values.pop(key), f"{problem.message}; {problem.fix}" if problem.fix
                               else problem.message)  # fmt: skip
                    self.kept = [one for one in self.kept if one != key]

    def _holds(self, key: str) -> bool:
        return any(self._is(one, key) for one in self.values)

    @staticmethod
    def _is(key: str, asked: str) -> bool:
        return bool(asked) and (key == asked or key.startswith(asked + ".") or asked.startswith(key + "."))

    def options(self) -> dict[str, Any]:
        """The content of config.json."""
        nested: dict[str, Any] = {}
        for key, value in self.values.items():
            if key.startswith(NESTED):
                nested.setdefault(NESTED[:-1], {})[key.removeprefix(NESTED)] = plain(value)
            else:
                nested[key] = plain(value)
        return nested

    def table(self) -> list[str]:
        """The report: what was taken as it was, what changed and why, what was left out and why."""
        lines = [f"From {self.tool}:"]
        if self.kept:
            lines += ["", "Taken as it is:", *_wrapped(", ".join(self.kept), "  ")]
        if self.changed:
            lines += ["", "Changed:"]
            for theirs, ours, why in self.changed:
                row = f"  {theirs}  ->  {ours}"
                lines += [row] if len(row) <= WIDTH else [f"  {theirs}", f"    ->  {ours}"]
                lines += _wrapped(why, "      ")
        if self.left_out:
            lines += ["", "Left out:"]
            for theirs, why in self.left_out:
                lines += [f"  {theirs}", *_wrapped(why, "      ")]
        return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 44 else text[:41] + "..."


def plain(value: Any) -> Any:
    """A number or a truth value in quotes as itself, as JSON has it."""
    amount = number(value) if isinstance(value, str) else None
    if amount is not None:
        return whole(amount) if value.strip().lstrip("-").isdigit() else amount
    return truth(value) if isinstance(value, str) and value.strip().lower() in ("true", "false") else value


def number(value: Any) -> float | None:
    """A number, however it was written; None if it is none."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def truth(value: Any) -> bool:
    """A flag, however it was written."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")
