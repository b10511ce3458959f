"""`simpletuner recipes`: settings that come with the package, where each number is from, and how two of them differ."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

WIDTH = 80
ABSENT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    actions = parser.add_subparsers(dest="action", metavar="show|diff")
    show = actions.add_parser("show", help="one recipe: every setting, with the source and date of each number")
    show.add_argument("name", metavar="NAME")
    diff = actions.add_parser("diff", help="the settings in which two recipes, or a recipe and a configuration, differ")
    diff.add_argument("first", metavar="A", help="a recipe, or a config.json")
    diff.add_argument("second", metavar="B")


def run(args: argparse.Namespace) -> int:
    if args.action == "show":
        return show(args.name, args.json)
    if args.action == "diff":
        return diff(args.first, args.second, args.json)
    return list_recipes(args.json)


def list_recipes(as_json: bool) -> int:
    from simpletuner_dmd.config.recipes import recipe, recipe_names

    found = [recipe(name) for name in recipe_names()]
    if as_json:
        print(json.dumps([{"name": one.name, "about": one.about, "card": one.card} for one in found], indent=2))
        return 0
    width = max(len(one.name) for one in found)
    for one in found:
        card = "" if one.card is None else f" [{one.card} GB]"
        print(f"{one.name:<{width}}  {one.about}{card}")
    print(
        '\nuse one: "recipe": "NAME" in config.json, or simpletuner configure\nsee one: simpletuner recipes show NAME'
    )
    return 0


def show(name: str, as_json: bool) -> int:
    from simpletuner_dmd.config.recipes import recipe

    chosen = recipe(name)
    if as_json:
        settings = {
            key: {"value": value, **({"source": source.text, "date": source.date}
                                     if (source := chosen.sources.get(key)) else {})}
            for key, value in chosen.options.items()
        }  # fmt: skip
        document = {"name": name, "about": chosen.about, "card": chosen.card, "settings": settings}
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return 0
    print(f"{name}: {chosen.about}" + (f" (a card of {chosen.card} GB)" if chosen.card else ""))
    groups: dict[Any, list[str]] = {}
    for key, value in chosen.options.items():
        groups.setdefault(chosen.sources.get(key), []).append(f"{key} = {_shown(value)}")
    for source, lines in groups.items():
        print()
        for line in lines:
            print(f"  {line}")
        if source is not None:
            said = f"from: {source.text} ({source.date})"
            print(textwrap.fill(said, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
    return 0


def diff(first: str, second: str, as_json: bool) -> int:
    """One line for every setting that differs; - where one of the two says nothing, which means the default."""
    one, other = _settings(first), _settings(second)
    keys = [key for key in {**one, **other} if not _same(one.get(key), other.get(key))]
    if as_json:
        print(json.dumps({key: [one.get(key), other.get(key)] for key in keys}, indent=2, ensure_ascii=False))
        return 0
    if not keys:
        print("They say the same.")
        return 0
    rows = [("", first, second), *((key, _shown(one.get(key)), _shown(other.get(key))) for key in keys)]
    width = max(len(row[0]) for row in rows)
    for key, left, right in rows:
        line = f"{key:<{width}}  {left}  ->  {right}"
        print(line if len(line) <= WIDTH else f"{key}\n    {left}\n    -> {right}")
    return 0


def _settings(name: str) -> dict[str, Any]:
    """The options that a recipe, or a configuration with its recipe, sets. Raises UserError."""
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.config.layers import file_layer
    from simpletuner_dmd.config.load import merge_options
    from simpletuner_dmd.config.recipes import recipe, recipe_names

    if name in recipe_names():
        return recipe(name).options
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        recipe(name)  # says which name is near
    merged = merge_options([file_layer(path, str(path), (Path.cwd(), path.parent))], str(path))
    if merged.problems:
        raise UserError(merged.problems)
    return {key: value for key, value in merged.values.items() if key != "recipe"}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    return bool(json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str))


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
