"""`simpletuner explain`: what an option is, from the schema; the noise schedule of a run, drawn; what an error says."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from simpletuner_dmd.cli.common import add_config_arguments

if TYPE_CHECKING:
    from simpletuner_dmd.config.explain import Answer, Option

WIDTH = 80
SCHEDULE, ERROR = "schedule", "error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "key", nargs="?", metavar="KEY",
        help="an option; `schedule` draws noise levels; `error` explains a message; none: a list",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--markdown", action="store_true", help="print every option as documentation/OPTIONS.md")
    parser.add_argument("--png", metavar="FILE", help="with `schedule`: draw it into this file as well")
    add_config_arguments(parser)
    parser.usage = (
        f"{parser.prog} [KEY | error [TEXT] | schedule [--config PATH | --env NAME | --example NAME] [KEY=VALUE ...]]"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if the key is known, to this tool or as one that it does not have; 2 if nobody knows it."""
    from simpletuner_dmd.config.errors import UserError

    if args.key == SCHEDULE:
        from simpletuner_dmd.cli.explain_schedule import run_schedule

        return run_schedule(args)
    if args.key == ERROR:
        return run_error(" ".join(args.overrides), as_json=args.json)
    if args.overrides or args.png:
        odd = [*args.overrides, *(["--png"] if args.png else [])]
        raise UserError(f"{' '.join(odd)} belongs to `simpletuner explain schedule`", fix="leave it out")

    from simpletuner_dmd.config import explain

    if args.markdown:
        sys.stdout.write(explain.markdown())
        return 0
    if args.key is None:
        print(_listing_json() if args.json else listing())
        return 0
    answer = explain.find(args.key)
    known = bool(answer.options or answer.absent)
    if args.json:
        print(json.dumps(answer.as_dict(), indent=2, ensure_ascii=False))
    elif known:
        print("\n\n".join(_paragraphs(answer)))
    else:
        close = f"did you mean {', '.join(answer.close)}?" if answer.close else "`simpletuner explain` lists them all"
        raise UserError("is not a known option", key=answer.key, fix=close)
    return 0 if known else 2


def run_error(text: str, *, as_json: bool) -> int:
    """What a message may mean; without a text all symptoms and exit codes. Exit code 2 if nothing is known of it."""
    from simpletuner_dmd.config.troubles import EXIT_CODES, find, troubles

    found = find(text)
    if as_json:
        print(json.dumps([asdict(trouble) for trouble in (found if text else troubles())], indent=2))
        return 0 if found or not text else 2
    if not text:
        print('one message: simpletuner explain error "what it said"\n')
        for trouble in troubles():
            print(f"{trouble.topic + ':':<10} {trouble.symptom}")
        print("\nexit codes:", *(f"{code:5d}  {meaning}" for code, meaning in EXIT_CODES.items()), sep="\n")
        return 0
    if not found:
        print("nothing is known of this message; `simpletuner explain error` lists the symptoms", file=sys.stderr)
        return 2
    for trouble in found:
        print("\n".join([trouble.symptom, *_wrapped(trouble.check), *_wrapped(f"What to do: {trouble.do}")]))
        print("\n".join(_wrapped(f"simpletuner explain {key.rpartition('.')[2]}")[0] for key in trouble.keys), "\n")
    return 0


def listing() -> str:
    """Sections and their keys."""
    from simpletuner_dmd.config.explain import sections

    lines = []
    for section in sections():
        keys = textwrap.fill("  ".join(option.key for option in section.options), WIDTH, initial_indent="  ",
                             subsequent_indent="  ", break_long_words=False)  # fmt: skip
        lines += [f"{section.name} ({section.file}): {section.about}", keys, ""]
    return "\n".join([*lines, "one key: simpletuner explain KEY"])


def _listing_json() -> str:
    from simpletuner_dmd.config.explain import sections

    return json.dumps(
        {section.name: [option.key for option in section.options] for section in sections()}, indent=2
    )  # fmt: skip


def _paragraphs(answer: Answer) -> list[str]:
    found = [_option(option, answer.read_by.get(option.key, [])) for option in answer.options]
    for entry in answer.absent:
        effect = "No value of it has an effect" if entry.harmless else "This tool does not have it"
        found.append(
            "\n".join([f"{entry.key}  (SimpleTuner's, {entry.section})", *_wrapped(f"{effect}: {entry.use}.")])
        )
    return found


def _option(option: Option, readers: list[str]) -> str:
    from simpletuner_dmd.config.explain import values

    rows = {
        "methods": ", ".join(option.methods),
        "values": values(option),
        "default": option.default,
        "also written": ", ".join(option.aliases),
        "read in": ", ".join(readers) or "nowhere",
    }
    lines = [f"{option.key}  ({option.section})", *_wrapped(option.description)]
    for name, text in rows.items():
        if text:
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {name + ':':<14}", subsequent_indent=" " * 16,
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
