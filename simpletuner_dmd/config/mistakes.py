"""Turns what pydantic refuses, and keys nobody knows, into problems a person can act on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from simpletuner_dmd.config.coerce import allowed_words
from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.methods import METHODS, DistillationOptions
from simpletuner_dmd.config.simpletuner_keys import LATER_VALUES, NOT_YET, Absent

_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text in quotes",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object {...}",
    "model": "an object {...}",
}


def shown(value: Any) -> str:
    """A value as it stands in JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def unknown_key(file: str, key: str, value: Any, known: Iterable[str], absent: Mapping[str, Absent],
                prefix: str = "") -> tuple[Problem | None, str | None]:  # fmt: skip
    """What to say about a key that is no option: a problem, or a notice where it is harmless."""
    if key in absent:
        entry = absent[key]
        if entry.is_off(value):
            return (
                None,
                f"{prefix}{key} ({file}) is a SimpleTuner key this tool does not have; off, as here, is harmless.",
            )
        if entry.harmless:
            return None, f"{prefix}{key} ({file}) has no effect: {entry.use}."
        message = f"found {shown(value)}; this tool does not have this key"
        return Problem(file, prefix + key, message, entry.use), None
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    fix = f"did you mean {prefix}{close[0]}?" if close else "remove it, or check its spelling"
    return Problem(file, prefix + key, "is not a known option", fix), None


def refusals(error: ValidationError, model: type[BaseModel]) -> list[tuple[tuple[str | int, ...], str, str]]:
    """(path to the key, what is wrong, fix) for each key that pydantic refused, one per key."""
    found: dict[tuple[str | int, ...], tuple[str, str]] = {}
    for detail in error.errors():
        if detail["type"] == "default_factory_not_called":
            continue  # follows from another mistake that is reported
        path, field_info = _field_path(detail["loc"], model)
        if path in found:
            continue
        annotation = None if field_info is None else field_info.annotation
        found[path] = (_message(detail, path, annotation), _fix(detail, path, field_info))
    return [(path, message, fix) for path, (message, fix) in found.items()]


def _field_path(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[tuple[str | int, ...], Any]:
    """Cuts an error's location down to the option: list indices and union branches are pydantic's own business."""
    path: tuple[str | int, ...] = ()
    field_info = None
    inside: type[BaseModel] | None = model
    for part in location:
        if inside is None or part not in (fields := _fields(inside)):
            break
        field_info = fields[str(part)]
        path += (part,)
        inside = next((kind for kind in _kinds(field_info.annotation) if issubclass(kind, BaseModel)), None)
    return path or location, field_info


def _kinds(annotation: Any) -> Iterator[type]:
    """The classes in an annotation, however it is wrapped."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """The options of a group; of `distillation_config`, whose group depends on the method, those of all methods.

    An option that several methods have is described as by the first of them.
    """
    if model is not DistillationOptions:
        return dict(model.model_fields)
    return {name: field for method in reversed(METHODS.values()) for name, field in method.model_fields.items()}


def _message(detail: ErrorDetails, path: tuple[str | int, ...], annotation: Any) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    found = f"found {shown(value)}"
    allowed = allowed_words(annotation)
    if kind == "literal_error" and allowed:
        choices = ", ".join(allowed)
        if str(value).strip().lower() in LATER_VALUES.get(str(path[-1]), ()):
            return f"{found}, which is {NOT_YET}; available: {choices}"
        return f"{found}, must be one of: {choices}"
    limits = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
    }
    if kind in limits:
        words, name = limits[kind]
        return f"{found}, must be {words} {context.get(name):g}"
    if kind == "value_error":
        return f"{found}, {context.get('error', detail['msg'])}"
    stem = kind.split("_")[0]
    if stem in _KINDS:
        return f"{found}, must be {_KINDS[stem]}"
    if kind in ("too_short", "too_long", "missing"):
        return f"{found}, has the wrong number of values"
    return f"{found}: {detail['msg']}"


def _fix(detail: ErrorDetails, path: tuple[str | int, ...], field_info: Any) -> str:
    if field_info is None:
        return "correct it, or leave it out"
    close = difflib.get_close_matches(str(detail["input"]), allowed_words(field_info.annotation), n=1, cutoff=0.7)
    if close:
        return f'did you mean "{close[0]}"?'
    default = field_info.default
    if default is PydanticUndefined or default is None or default == "":
        return "correct it, or leave it out for the default"
    if isinstance(default, tuple):
        default = list(default)
    return f'correct it, or leave it out for the default, "{path[-1]}": {shown(default)}'
