"""What people write and what it means: "true", "None", "1e-4", "832x480", "1000,757,522"."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})
NONE_WORDS = frozenset({"none", "null"})


def scalar_types(annotation: Any) -> set[Any]:
    """The plain types an annotation allows: `int | None` -> {int, NoneType}, `Literal["a"]` -> {"a"}."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    arguments = get_args(annotation)
    if arguments and get_origin(annotation) not in (list, tuple, dict):
        return set().union(*(scalar_types(argument) for argument in arguments))
    return {annotation}


def allowed_words(annotation: Any) -> list[str]:
    """The words of every Literal in an annotation, in the order they were written."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for argument in get_args(annotation) for word in allowed_words(argument)]


def means_none(value: Any, annotation: Any) -> bool:
    """null, or the word "none" where the option has no value of that name."""
    if value is None:
        return True
    return isinstance(value, str) and value.strip().lower() in NONE_WORDS and not _has_word(annotation, value)


def _has_word(annotation: Any, value: str) -> bool:
    return value.strip().lower() in allowed_words(annotation)


def is_boolean(annotation: Any) -> bool:
    return bool in scalar_types(annotation)


def to_meaning(value: Any, annotation: Any) -> Any:
    """A word or number in quotes as the option's type; what does not fit comes back as it is, to be refused."""
    types = scalar_types(annotation)
    numeric = bool({int, float} & types)
    if isinstance(value, bool) and numeric and bool not in types:
        raise ValueError("must be a number, not true or false")
    if not isinstance(value, str):
        return value
    text = value.strip()
    if bool in types and text.lower() in TRUE_WORDS | FALSE_WORDS and not (numeric and text in {"0", "1"}):
        return text.lower() in TRUE_WORDS
    if int in types and float not in types:
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if number.is_integer() else number
    return text


def frame_size(value: Any) -> tuple[int, int]:
    """ "832x480", [832, 480] or 480 (a square) -> (width, height) in pixels."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", value)):
        width, height = int(match[1]), int(match[2])
    elif isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value):
        width, height = value
    elif (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdecimal()):
        width = height = int(value)
    else:
        raise ValueError('must be "WIDTHxHEIGHT" in pixels, for example "832x480"')
    if not (16 <= width <= 16384 and 16 <= height <= 16384):
        raise ValueError("must be between 16x16 and 16384x16384 pixels")
    return width, height


def frame_sizes(value: Any) -> list[tuple[int, int]]:
    """One size, "832x480,1280x704", or a list of sizes."""
    if isinstance(value, str):
        return [frame_size(part) for part in value.split(",")]
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)
    if pair or not isinstance(value, list | tuple):
        return [frame_size(value)]
    if not value:
        raise ValueError("must name at least one size")
    return [frame_size(part) for part in value]


def frame_counts(value: Any) -> list[int]:
    """81, "49,81", or a list of such numbers."""
    found = whole_numbers([value] if isinstance(value, int | float) else value)
    if not found or min(found) < 1:
        raise ValueError("must be a number of frames from 1 on, or a list of them, for example 81")
    return found


def whole_numbers(value: Any) -> list[int]:
    """ "9, 10" or [9, "10"] -> [9, 10]; one number is a list of one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    found = numbers(value)
    if any(not number.is_integer() for number in found):
        raise ValueError("must be whole numbers")
    return [int(number) for number in found]


def words(value: Any) -> Any:
    """ "to_q, to_k" or '["to_q", "to_k"]' -> a list of strings; lists pass."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError("is not a valid JSON list") from error
    return [part.strip() for part in value.split(",") if part.strip()]


def numbers(value: Any) -> Any:
    """ "1000,757,522" -> [1000.0, 757.0, 522.0]; lists of numbers (quoted or not) pass."""
    parts = words(value) if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or any(isinstance(part, bool) for part in parts):
        raise ValueError('must be a list of numbers, for example "1000,757,522"')
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError('must be a list of numbers, for example "1000,757,522"') from error


class Options(BaseModel):
    """A group of options: unknown keys are refused, quoted values are read as what they mean, no NaN, no infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        return value if field is None else to_meaning(value, field.annotation)
