"""A configuration that is being written: the person's own keys as they stand, over a recipe, until it is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.layers import ALIASES, INVERTED, NESTED, Layer, bare, options_layer
from simpletuner_dmd.config.load import DATA_FILE, Merged, flat_options, merge_options, resolve_path
from simpletuner_dmd.config.read import is_file, read_json
from simpletuner_dmd.config.recipes import KIND, choose
from simpletuner_dmd.config.run_options import DEMO
from simpletuner_dmd.config.schema import TrainConfig

PROMPTS_FILE = "validation_prompts.json"
NOTES_FILE = "converted.txt"
INSIDE = NESTED + "."


class Draft:
    """raw: the content of config.json, in its order and its own spelling; datasets: that of the data file.

    A key that the person did not have is written only where it changes something: the file is the difference from the
    recipe, or from the defaults. library: prompts for a new file of validation prompts; None leaves what there is.
    notes: what a conversion said, for a file beside the others.
    """

    def __init__(self, path: Path, cwd: Path | None = None):
        """Raises UserError if there is a file that cannot be read."""
        self.path = path
        self.cwd = Path.cwd() if cwd is None else cwd
        self.is_new = not is_file(path)
        self.raw: dict[str, Any] = {} if self.is_new else _object(path)
        self.library: dict[str, str] | None = None
        self.notes: list[str] = []
        self.datasets: list[dict[str, Any]] = _list(self.data_path) if is_file(self.data_path) else []
        self.former = copy.deepcopy((self.raw, self.datasets))

    # --- places -----------------------------------------------------------------------------------------------------

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.cwd, self.path.parent

    @property
    def data_path(self) -> Path:
        """The data file: what the configuration names, or the one beside it."""
        place = self._place("data_backend_config")
        written = place[0][place[1]] if place else None
        return (
            resolve_path(written, self.folders)
            if isinstance(written, str) and written
            else self.path.parent / DATA_FILE
        )

    @property
    def notes_path(self) -> Path:
        return self.path.parent / NOTES_FILE

    @property
    def prompts_path(self) -> Path:
        return self.path.parent / PROMPTS_FILE

    # --- reading ----------------------------------------------------------------------------------------------------

    def merged(self) -> Merged:
        """All options as the run would have them. Raises UserError if the recipe is none."""
        return merge_options([self._layer()], self.path.name, self.folders)

    def _layer(self) -> Layer:
        return options_layer(self.raw, self.path.name, self.folders)

    @property
    def options(self) -> TrainConfig:
        return self.merged().options

    def flat(self) -> dict[str, Any]:
        return flat_options(self.options)

    @property
    def recipe(self) -> str | None:
        return self.options.recipe

    @property
    def is_demo(self) -> bool:
        return self.options.pretrained_model_name_or_path == DEMO

    def has(self, key: str) -> bool:
        """Whether the file itself says something of this key."""
        return self._place(key) is not None

    def _place(self, key: str) -> tuple[dict[str, Any], str] | None:
        """The object in `raw` and the spelling under which a key stands in it."""
        if not key.startswith(INSIDE):
            return _spelling(self.raw, key)
        place = _spelling(self.raw, NESTED)
        inner = place[0][place[1]] if place else None
        while isinstance(inner, dict) and len(inner) == 1 and isinstance(next(iter(inner.values())), dict):
            inner = next(iter(inner.values()))  # under the method's name, as SimpleTuner takes it too
        return _spelling(inner, key.removeprefix(INSIDE)) if isinstance(inner, dict) else None

    # --- writing ----------------------------------------------------------------------------------------------------

    def set(self, key: str, value: Any) -> None:
        """Replaces a key where it stands; adds it where it changes something. None takes it out."""
        place = self._place(key)
        if value is None:
            if place:
                del place[0][place[1]]
        elif place and bare(place[1]) not in INVERTED:
            place[0][place[1]] = value
        else:
            if place:
                del place[0][place[1]]
            before = self.options.model_dump(mode="json")
            container, inner = self._container(key)
            container[inner] = value
            if self.options.model_dump(mode="json") == before and not self._problems(key):
                del container[inner]
                if container is not self.raw and not container:
                    del self.raw[NESTED]

    def _container(self, key: str) -> tuple[dict[str, Any], str]:
        if not key.startswith(INSIDE):
            return self.raw, key
        place = _spelling(self.raw, NESTED)
        written = place[0][place[1]] if place else None
        if isinstance(written, str):  # the path of a file: its content moves here
            layer = self._layer()
            written = {one.removeprefix(INSIDE): item for one, item in layer.values.items() if one.startswith(INSIDE)}
        if not isinstance(written, dict):
            written = {}
        self.raw[place[1] if place else NESTED] = written
        while len(written) == 1 and isinstance(next(iter(written.values())), dict):
            written = next(iter(written.values()))
        return written, key.removeprefix(INSIDE)

    def problem(self, key: str, value: Any) -> str:
        """What the schema says against a value, in a line; "" where it takes it."""
        trial = copy.copy(self)
        trial.raw = copy.deepcopy(self.raw)
        known = {str(problem) for problem in self.merged().problems}
        place = trial._place(key)
        container, inner = place or trial._container(key)
        container[inner] = value
        try:
            found = trial.merged().problems
        except UserError as error:
            found = error.problems
        new = [problem for problem in found if str(problem) not in known]
        mine = [problem for problem in new if problem.key == key] or new
        return "" if not mine else mine[0].message + (f"; {mine[0].fix}" if mine[0].fix else "")

    def _problems(self, key: str) -> list[Any]:
        return [problem for problem in self.merged().problems if problem.key == key]

    def take_kind(self, flavour: str, method: str | None, kind: str, demo: bool, card: float | None) -> str | None:
        """Makes this a run of that kind: with the recipe for it, where there is one. Returns the recipe's name.

        A configuration that was written without a recipe stays without: its numbers are its own.
        """
        chosen = choose(flavour, method, kind, card, demo) if self.is_new or self.has("recipe") else None
        if chosen is not None:
            for key in (*KIND, "pretrained_model_name_or_path" if demo != self.is_demo else ""):
                self._drop(key)
            self.raw = {
                "recipe": chosen.name,
                **{key: value for key, value in self.raw.items() if bare(key) != "recipe"},
            }
            return chosen.name
        self._drop("recipe")
        was = (self.options.model_flavour, self.options.distillation_method, self.options.model_type)
        for key, old, new in zip(KIND, was, (flavour, method, kind), strict=True):
            if old != new:
                self.set(key, new)
        if method != was[1]:
            self._drop(NESTED)  # settings of another method
        if demo != self.is_demo:
            self.set("pretrained_model_name_or_path", DEMO if demo else None)
        return None

    def _drop(self, key: str) -> None:
        if place := self._place(key):
            del place[0][place[1]]

    @property
    def is_changed(self) -> bool:
        return self.former != (self.raw, self.datasets) or self.library is not None or self.is_new


def _spelling(container: dict[str, Any], key: str) -> tuple[dict[str, Any], str] | None:
    """The key under any of its names, with or without dashes."""
    return next(((container, one) for one in container if ALIASES.get(bare(one), bare(one)) == key), None)


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("must hold one JSON object {...} of options", file=str(path), fix="name another file")
    return content


def _list(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError("must hold a JSON list of datasets", file=str(path), fix='start with [ { "id": ... } ]')
    return entries


def typed(text: str) -> Any:
    """What a person typed, as JSON where it is JSON: 5, true, [1, 2], {"a": 1}; else the words themselves."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()
