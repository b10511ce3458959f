"""Recipes: tried or published settings that come with the package, each number with its source.

A file of `config/recipes` may have these fields, and no others:

about     what it is, in a line
extends   recipes it is built from, in order, or "example:demo" for the example of that name; what it says itself wins
card      the memory of the card it is meant for, in GB
options   the options of config.json; `configure` trains at the size and length that they validate at
sources   [{"source", "date", "keys"}]: where the numbers of this file are from; "*" is every number without a source

Only `options` are read when a run starts, as the lowest layer of its configuration; the rest is for
`simpletuner recipes` and `configure`.
A file below `parts` is no recipe of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.read import is_file, read_json

FOLDER = Path(__file__).parent / "recipes"
EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE = "example:"
OF_THE_EXAMPLE = frozenset({"output_dir", "validation_prompt_library", "resume_from_checkpoint"})
"""What an example says for itself alone."""
NESTED = "distillation_config"
FIELDS = frozenset({"about", "extends", "card", "options", "sources"})
KIND = ("model_flavour", "distillation_method", "model_type")
"""What a recipe is for: its numbers fit nothing else."""
KIND_DEFAULTS = ("t2v-480p-1.3b-2.1", None, "lora")


@dataclass(frozen=True)
class Source:
    """Where a number is from, and when it was read or measured ("2026-11")."""

    text: str
    date: str


@dataclass
class Recipe:
    """A recipe with all it is built from. options: dotted key -> value."""

    name: str
    about: str = ""
    card: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, str | None, str]:
        """(flavour, method, lora or full)."""
        flavour, method, kind = KIND
        return (
            str(self.options.get(flavour, KIND_DEFAULTS[0])),
            self.options.get(method, KIND_DEFAULTS[1]),
            str(self.options.get(kind, KIND_DEFAULTS[2])),
        )

    @property
    def is_demo(self) -> bool:
        return self.options.get("pretrained_model_name_or_path") == "demo"

    def take(self, key: str, value: Any) -> None:
        """Sets a value, or takes it out where it is null. What said where the former value was from goes with it."""
        self.sources.pop(key, None)
        if value is None:
            self.options.pop(key, None)
        else:
            self.options[key] = value


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError if there is none."""
    if name not in recipe_names():
        close = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"did you mean {close[0]}?" if close else "`simpletuner recipes` lists them"
        raise UserError(f"there is no recipe {name!r}", key="recipe", fix=hint)
    return _read(name, ())


def _read(name: str, below: tuple[str, ...]) -> Recipe:
    path = FOLDER / f"{name}.json"
    assert name not in below, f"recipes extend each other: {' > '.join((*below, name))}"
    assert is_file(path), f"{below[-1] if below else ''} extends {name}, which is no file"
    content = read_json(path, f"recipe {name}")
    assert set(content) <= FIELDS, f"{path}: unknown fields {set(content) - FIELDS}"
    found = Recipe(name)
    for parent in content.get("extends", []):
        inherited = _of_example(parent) if parent.startswith(EXAMPLE) else _read(parent, (*below, name))
        found.card = inherited.card or found.card
        for key, value in inherited.options.items():
            found.take(key, value)
        found.sources.update(inherited.sources)
    found.about = content.get("about", "")
    found.card = content.get("card", found.card)
    for key, value in _dotted(content).items():
        found.take(key, value)
    for entry in content.get("sources", []):
        keys = [key for key in found.options if key not in found.sources] if entry["keys"] == ["*"] else entry["keys"]
        found.sources.update(dict.fromkeys(keys, Source(entry["source"], entry["date"])))
    return found


def _of_example(name: str) -> Recipe:
    """The settings of an example, without what is its own: where it writes, and the prompts beside it."""
    folder, found = EXAMPLES / name.removeprefix(EXAMPLE), Recipe(name)
    for key, value in _dotted({"options": read_json(folder / "config.json")}).items():
        if key not in OF_THE_EXAMPLE:
            found.take(key, value)
    return found


def _dotted(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.get("options", {}).items():
        if key == NESTED:
            found.update({f"{NESTED}.{inner}": item for inner, item in value.items()})
        else:
            found[key] = value
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a list or text of numbers: what must have a source."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(is_number, value))
    if isinstance(value, str):
        return bool(value) and all(
            part.strip().replace(".", "", 1).isdigit() for part in value.replace("x", ",").split(",")
        )
    return isinstance(value, int | float) and not isinstance(value, bool)


def recipes_for(flavour: str, method: str | None, kind: str, demo: bool = False) -> list[Recipe]:
    """Those of a kind, for the smallest card first."""
    found = [recipe(name) for name in recipe_names()]
    fitting = [one for one in found if one.is_demo == demo and one.kind == (flavour, method, kind)]
    return sorted(fitting, key=lambda one: (one.card or 0, -len(one.name), one.name))


def choose(flavour: str, method: str | None, kind: str, card: float | None, demo: bool = False) -> Recipe | None:
    """The recipe of a kind for the largest card of at most `card` GB; the one for the smallest, where all are larger.

    None if there is no recipe of that kind. A `card` of None means that nothing is known: the one for 24 GB or next.
    """
    fitting = recipes_for(flavour, method, kind, demo)
    if not fitting:
        return None
    room = 24 if card is None else card
    return next((one for one in reversed(fitting) if (one.card or 0) <= room), fitting[0])


def recipe_problems(name: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> list[Problem]:
    """What a person wrote, in `values`, that makes the run another one than the recipe's numbers are for."""
    chosen = recipe(name)
    written = tuple(values.get(key, usual) for key, usual in zip(KIND, KIND_DEFAULTS, strict=True))
    if written == chosen.kind:
        return []
    key, theirs, ours = next(
        (key, theirs, ours) for key, theirs, ours in zip(KIND, written, chosen.kind, strict=True) if theirs != ours
    )
    other = next((one.name for one in map(recipe, recipe_names()) if one.kind == written and not one.is_demo), None)
    instead = f'"recipe": "{other}", or leave recipe out' if other else "leave recipe out: there is none for this"
    return [
        Problem(origins.get(key, origins.get("recipe", "")), key,
                f"found {theirs or 'none'}, but recipe {name} is for {ours or 'none'}: its numbers do not fit", instead)
    ]  # fmt: skip
