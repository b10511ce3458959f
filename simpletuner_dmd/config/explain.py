"""What every option is, read from the schema: for `simpletuner explain` and for documentation/OPTIONS.md.

`python -m simpletuner_dmd.config.explain > documentation/OPTIONS.md` writes that file anew.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from simpletuner_dmd.config.coerce import allowed_words
from simpletuner_dmd.config.databackend import DatasetEntry, TableOptions, VideoOptions
from simpletuner_dmd.config.layers import ALIASES, INVERTED, NESTED
from simpletuner_dmd.config.lycoris import _ABSENT as LYCORIS_ABSENT
from simpletuner_dmd.config.lycoris import _SHORT_NAMES as LYCORIS_ALIASES
from simpletuner_dmd.config.lycoris import LycorisModuleOptions, LycorisOptions, LycorisPreset
from simpletuner_dmd.config.methods import METHODS
from simpletuner_dmd.config.mistakes import shown
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.simpletuner_keys import (
    ABSENT_KEYS,
    DATASET_ABSENT_KEYS,
    METHOD_ABSENT_KEYS,
    TABLE_ABSENT_KEYS,
    VIDEO_ABSENT_KEYS,
    Absent,
)
from simpletuner_dmd.config.tread import TreadConfig, TreadRoute

PACKAGE = Path(__file__).parents[1]
# They read options in order to show them, which is not what an option is for.
ONLY_SHOW = frozenset({"config/explain.py", "cli/explain.py", "cli/explain_schedule.py"})
_DEFAULT = re.compile(r"\bDefault: (.*)$", re.DOTALL)

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    SecretStr: "text",
    type(None): "none",
    Any: "anything",
}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Option:
    """One option as a person sees it. methods: those that have it exactly so, for keys of distillation_config."""

    section: str
    key: str
    type: str
    allowed: tuple[str, ...]
    limits: str
    default: str
    description: str
    aliases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A group of options: `name` as it is listed, `prefix` of its dotted keys, and which file it is written in."""

    name: str
    prefix: str
    file: str
    about: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class AbsentKey:
    """A key of SimpleTuner's that this tool does not have, and what is said about it."""

    section: str
    key: str
    use: str
    harmless: bool


@dataclass(frozen=True)
class Answer:
    """All that is known of a key. close: spellings that exist, where nothing else is known."""

    key: str
    options: tuple[Option, ...] = ()
    absent: tuple[AbsentKey, ...] = ()
    close: tuple[str, ...] = ()
    read_by: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- one option -------------------------------------------------------------------------------------------------------


def type_words(annotation: Any) -> str:
    """A type in words: `int | None` -> "whole number or none", `tuple[float, ...]` -> "list of numbers"."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated[T, ...]
        return type_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(argument) for argument in arguments))
    if allowed_words(annotation) and origin not in (list, tuple, dict):
        return "word"
    if origin in (list, tuple):
        if origin is tuple and Ellipsis not in arguments:
            return " and ".join(type_words(argument) for argument in arguments)
        inner = type_words(arguments[0])
        return f"list of {inner if inner in ('text', 'object', 'anything') else inner + 's'}"
    if origin is dict or annotation is dict:
        return "object"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    return getattr(annotation, "__name__", str(annotation))


def limits_of(info: FieldInfo) -> str:
    """ "at least 0, at most 30", or "" where any value of the type is taken."""
    return ", ".join(
        f"{words} {getattr(rule, name):g}"
        for name, words in _LIMITS.items()
        for rule in info.metadata
        if getattr(rule, name, None) is not None
    )


def default_of(info: FieldInfo) -> str:
    """The default as it stands in JSON, or in the description's words where it follows from other options."""
    said = _DEFAULT.search(info.description or "")
    if said and (info.default_factory is not None or info.default in (None, "", PydanticUndefined)):
        return said[1].rstrip(".").replace("\n", " ")
    if info.default_factory is not None:
        if info.default_factory_takes_validated_data:
            return "follows from other options"
        value = info.default_factory()  # type: ignore[call-arg]
        return "the defaults of its keys" if isinstance(value, BaseModel) else shown(value)
    if info.default is PydanticUndefined:
        return "must be given"
    if info.default is None:
        return "not set"
    return shown(_plain(info.default))


def _plain(value: Any) -> Any:
    """Whole floats as people write them: 1000, not 1000.0."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def describe(section: str, key: str, info: FieldInfo, aliases: dict[str, str]) -> Option:
    return Option(
        section,
        key,
        type_words(info.annotation),
        tuple(allowed_words(info.annotation)),
        limits_of(info),
        default_of(info),
        info.description or "",
        tuple(
            f"{alias} (with the opposite meaning)" if alias in INVERTED else alias
            for alias, canonical in aliases.items()
            if canonical == key
        ),
    )


# --- the whole schema -------------------------------------------------------------------------------------------------


def _section(name: str, prefix: str, file: str, model: type[BaseModel], aliases: dict[str, str] | None = None,
             keys: Iterable[str] | None = None, about: str = "") -> Section:  # fmt: skip
    keys = model.model_fields if keys is None else keys
    options = tuple(describe(name, key, model.model_fields[key], aliases or {}) for key in keys)
    return Section(name, prefix, file, about or _first_line(model), options)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _train_sections() -> Iterator[Section]:
    """config.json in the groups that `TrainConfig` is made of, in the order in which they are read."""
    groups: dict[type[BaseModel], list[str]] = {}
    for key in TrainConfig.model_fields:
        group = next(model for model in reversed(TrainConfig.__mro__) if key in vars(model).get("__annotations__", {}))
        groups.setdefault(group, []).append(key)
    for group, keys in groups.items():
        if group is TrainConfig:
            name, about = "run", "Options that look at several of the others."
        else:
            name, about = group.__name__.removesuffix("Options").lower(), _first_line(group)
        yield _section(name, "", "config.json", TrainConfig, ALIASES, keys, about)


@cache
def sections() -> tuple[Section, ...]:
    """Every option there is, in the schema's order."""
    datasets = "multidatabackend.json"
    return (
        *_train_sections(),
        *(_section(f"{NESTED} {name}", f"{NESTED}.", "config.json", model) for name, model in METHODS.items()),
        _section("dataset", "", datasets, DatasetEntry),
        _section("dataset video", "video.", datasets, VideoOptions),
        _section("dataset table", "table.", datasets, TableOptions),
        _section("tread_config", "tread_config.", "config.json", TreadConfig),
        _section("tread_config routes", "tread_config.routes.", "config.json", TreadRoute),
        _section("lycoris_config", "lycoris_config.", "config.json", LycorisOptions, LYCORIS_ALIASES),
        _section("lycoris_config preset", "lycoris_config.apply_preset.", "config.json", LycorisPreset),
        _section("lycoris_config layers", "lycoris_config.apply_preset.module_algo_map.", "config.json",
                 LycorisModuleOptions, LYCORIS_ALIASES),
    )  # fmt: skip


ABSENT_TABLES: tuple[tuple[str, str, dict[str, Absent]], ...] = (
    ("config.json", "", ABSENT_KEYS),
    (NESTED, f"{NESTED}.", METHOD_ABSENT_KEYS),
    ("dataset", "", DATASET_ABSENT_KEYS),
    ("dataset video", "video.", VIDEO_ABSENT_KEYS),
    ("dataset table", "table.", TABLE_ABSENT_KEYS),
    ("lycoris_config", "lycoris_config.", LYCORIS_ABSENT),
)


def find(written: str) -> Answer:
    """Everything of that name: `learning_rate`, `--learning-rate`, `distillation_config.gan_weight`, `gan_weight`."""
    key = written.strip().removeprefix("--").replace("-", "_")
    options: list[Option] = []
    for section in sections():
        for option in section.options:
            names = (option.key, *(alias.split(" ")[0] for alias in option.aliases))
            if key in names or key in {section.prefix + name for name in names}:
                options.append(option)
    absent = tuple(
        AbsentKey(section, name, entry.use, entry.harmless)
        for section, prefix, table in ABSENT_TABLES
        for name, entry in table.items()
        if key in (name, prefix + name)
    )
    if not options and not absent:
        return Answer(key, close=tuple(difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.6)))
    return Answer(key, tuple(_merged(options)), absent, (), {o.key: read_by(o.key) for o in options})


def known_keys() -> list[str]:
    """Every spelling that `find` knows as an option."""
    return list(dict.fromkeys(
        prefix + name
        for section in sections()
        for option in section.options
        for name in (option.key, *(alias.split(" ")[0] for alias in option.aliases))
        for prefix in ("", section.prefix)
    ))  # fmt: skip


def _merged(options: Iterable[Option]) -> list[Option]:
    """Methods that have the same key with the same meaning and default become one entry."""
    found: dict[Option, tuple[str, ...]] = {}
    for option in options:
        place, _, method = option.section.partition(" ")
        if place == NESTED:
            option = replace(option, section=NESTED)
            found[option] = (*found.get(option, ()), method)
        else:
            found[option] = ()
    return [replace(option, methods=methods) for option, methods in found.items()]


# --- who reads it -----------------------------------------------------------------------------------------------------


def attributes_read(paths: Iterable[Path]) -> set[str]:
    """Names that appear as `something.name` being read."""
    found: set[str] = set()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    return found


@cache
def read_by(key: str) -> list[str]:
    """Files of the package, relative to it, in which an attribute of that name is read."""
    return sorted(
        name
        for path in PACKAGE.rglob("*.py")
        if (name := path.relative_to(PACKAGE).as_posix()) not in ONLY_SHOW
        and f".{key}" in path.read_text(encoding="utf-8")  # parsing is slow, and few files have the word
        and key in attributes_read([path])
    )


# --- documentation/OPTIONS.md -----------------------------------------------------------------------------------------


def markdown() -> str:
    """The text of documentation/OPTIONS.md."""
    lines = [
        "# Options",
        "",
        "Every key, made from the schema by `python -m simpletuner_dmd.config.explain`: do not edit it here.",
        "`simpletuner explain KEY` says the same in the terminal, and which source files read the key.",
    ]
    for section in sections():
        lines += ["", f"## {section.name}", "", f"{section.about} In `{section.file}`.", ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option) for option in section.options]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    meaning = option.description
    if option.aliases:
        meaning += f" Also written: {', '.join(option.aliases)}."
    return (
        "| " + " | ".join(_cell(part) for part in (f"`{option.key}`", values(option), option.default, meaning)) + " |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def values(option: Option) -> str:
    """Type, words and limits in one phrase."""
    kind = option.type.replace("word", f"one of {', '.join(option.allowed)}") if option.allowed else option.type
    return f"{kind}; {option.limits}" if option.limits else kind


if __name__ == "__main__":
    sys.stdout.write(markdown())
