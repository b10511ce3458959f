"""`simpletuner completion SHELL`: teaches a shell to complete commands, options and keys (through argcomplete)."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simpletuner_dmd.cli.common import module_of

SHELLS = ("bash", "zsh", "fish")
ASKED = "_ARGCOMPLETE"  # set by the shell when it wants an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="for bash and zsh, add the line of the example to your profile")


def run(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["simpletuner"], shell=args.shell))
    return 0


def answer(verbs: dict[str, tuple[str, str]]) -> None:
    """Tells the shell what could come next, and ends the process."""
    import argcomplete

    argcomplete.autocomplete(whole_parser(verbs), always_complete_options="long")


def whole_parser(verbs: dict[str, tuple[str, str]]) -> argparse.ArgumentParser:
    """All verbs with their arguments in one parser, and completers where a word has many values."""
    parser = argparse.ArgumentParser(prog="simpletuner")
    commands = parser.add_subparsers()
    for verb, (summary, _) in verbs.items():
        command = commands.add_parser(verb, help=summary)
        importlib.import_module(module_of(verb)).add_arguments(command)
        if command.get_default("overrides") is not None:
            command.add_argument("overrides", nargs="*").completer = _overrides  # type: ignore[attr-defined]
        for action in command._actions:
            if action.dest in _COMPLETERS and not action.choices:
                action.completer = _COMPLETERS[action.dest]  # type: ignore[attr-defined]
    return parser


def _overrides(prefix: str, **context: Any) -> list[str]:
    """KEY= for every option of config.json; KEY=VALUE where the key is there and takes one of a few values."""
    from simpletuner_dmd.config.explain import sections

    yes_no = ("true", "false")
    allowed = {section.prefix + option.key: option.allowed or (yes_no if option.type == "true or false" else ())
               for section in sections() if section.file == "config.json" for option in section.options}  # fmt: skip
    key, equals, _ = prefix.partition("=")
    return [f"{key}={value}" for value in allowed.get(key, ())] if equals else [f"{key}=" for key in allowed]


def _names(pattern: str) -> Iterator[str]:
    return (path.parent.name for path in sorted(Path("config").glob(pattern)))


def _environments(**_: Any) -> list[str]:
    return list(_names("*/config.json"))


def _examples(**_: Any) -> list[str]:
    from simpletuner_dmd.config.layers import example_names

    return example_names()


def _runs(**_: Any) -> list[str]:
    return [str(path.parent) for path in sorted(Path("output").glob("*/config.resolved.json"))]


def _keys(**_: Any) -> list[str]:
    from simpletuner_dmd.config.explain import known_keys

    return ["schedule", *known_keys()]


_COMPLETERS: dict[str, Callable[..., list[str]]] = {
    "env": _environments, "example": _examples, "run": _runs, "key": _keys
}  # fmt: skip
