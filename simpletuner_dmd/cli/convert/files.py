"""Reading configuration files of several languages into one flat or nested dict, without running any of them."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import yaml

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.read import read_json

ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
SHELL = (".sh", ".slurm", ".bash", ".salloc")


def read_any(path: Path) -> dict[str, Any]:
    """The content of a file by its ending. Raises UserError if it cannot be read or is no set of options."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        content = read_json(path)
    else:
        text = _text(path)
        if suffix == ".toml":
            content = _parsed(path, tomllib.loads, text)
        elif suffix in (".yaml", ".yml"):
            content = _parsed(path, yaml.safe_load, text)
        elif suffix == ".env":
            content = environment(text)
        elif suffix in SHELL:
            content = arguments(text)
        else:
            raise UserError(f"ends in {suffix or 'nothing'}", file=str(path),
                            fix="a .json, .toml, .env, .yaml, .sh or .slurm file can be converted")  # fmt: skip
    if not isinstance(content, dict):
        raise UserError("holds no options", file=str(path), fix="name the training configuration itself")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise UserError(f"cannot be read: {reason}", file=str(path), fix="check the path") from error


def _parsed(path: Path, parse: Any, text: str) -> Any:
    try:
        return parse(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot be parsed: {' '.join(str(error).split())}", file=str(path), fix="correct it"
        ) from error


def _resolved(word: str, variables: dict[str, str]) -> str:
    return VARIABLE.sub(lambda match: variables.get(match[1], match[0]), word)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that spans lines, or shell that is more than words
        return line.split()


def environment(text: str) -> dict[str, Any]:
    """The variables of a file of `export NAME=value` lines, those in values filled in."""
    variables: dict[str, str] = {}
    for line in text.splitlines():
        match = ASSIGNMENT.match(line)
        if match and not line.lstrip().startswith("#"):
            words = _words(match[2])
            variables[match[1]] = _resolved(words[0] if words else "", variables)
    return dict(variables)


def arguments(text: str) -> dict[str, Any]:
    """What a script gives as `--key value`, anywhere in it: variables filled in, arrays and continued lines joined.

    A flag without a value is True; of two values of one key the last counts. "script" is the Python file it starts.
    """
    variables = environment(text)
    joined = text.replace("\\\n", " ").replace("(\n", "( ")
    found: dict[str, Any] = {}
    for line in joined.splitlines():
        words = [_resolved(word, variables) for word in _words(line)]
        words = [word for word in words if word not in ("(", ")")]
        for position, word in enumerate(words):
            if word.endswith(".py"):
                found["script"] = word
            if not word.startswith("--") or len(word) == 2:
                continue
            key, separator, value = word[2:].partition("=")
            following = words[position + 1 : position + 2]
            if separator:
                found[_key(key)] = value
            elif following and not following[0].startswith("--"):
                found[_key(key)] = following[0]
            else:
                found[_key(key)] = True
    return found


def _key(written: str) -> str:
    return written.replace("-", "_")


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
