"""Reading JSON files so that a mistake is named with its line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.errors import UserError


class _WrittenTwiceError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _WrittenTwiceError(key)
    return dict(pairs)


def is_file(path: Path) -> bool:
    """Whether a file is there; a path that cannot exist (too long, a NUL in it) is simply not there."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """Whether anything is there; as `is_file` for paths that cannot exist."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def parse_json(text: str, name: str, key: str = "") -> Any:
    """The value of a JSON text. Raises UserError with line and column, `name` being the file it came from."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        shown = f": {line.strip()[:80]}" if line.strip() else ""
        fix = "check this line and the one before it for a missing comma, quote or bracket"
        if line.lstrip().startswith(("//", "#")):
            fix = "JSON has no comments: remove this line"
        elif not text.strip():
            fix = "the file is empty; `simpletuner examples copy` writes one to start from"
        elif "property name" in error.msg and "'" not in line:
            fix = "remove the comma after the last value, or put the key in double quotes"
        raise UserError(
            f"is not valid JSON, line {error.lineno} column {error.colno}: {error.msg}{shown}",
            file=name,
            key=key,
            fix=fix,
        ) from error
    except _WrittenTwiceError as error:
        raise UserError("is written twice in the same object", file=name, key=str(error), fix="keep one") from error
    except RecursionError as error:
        raise UserError("is nested too deeply to be a configuration", file=name, key=key) from error


def read_json(path: Path, name: str | None = None) -> Any:
    """The value in a JSON file. Raises UserError if it cannot be read or parsed."""
    shown = name or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError("does not exist", file=shown, fix="check the path") from error
    except IsADirectoryError as error:
        raise UserError("is a folder, not a JSON file", file=shown, fix="name the file in it") from error
    except UnicodeDecodeError as error:
        raise UserError("is not a text file in UTF-8", file=shown, fix="save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=shown, fix="check the permissions") from error
    return parse_json(text, shown)
