"""`simpletuner configure`: ten questions, or another tool's file, become config.json, the data file and its prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner_dmd.cli.wizard.draft import Draft
    from simpletuner_dmd.cli.wizard.short import Session

DEFAULT = "config/config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", metavar="PATH", help=f"the file to write or to edit; default: {DEFAULT}")
    parser.add_argument("--output", metavar="PATH", help="the same")
    parser.add_argument("--from", dest="source", metavar="FILE",
                        help="start from a configuration of SimpleTuner, FastVideo or Self-Forcing")  # fmt: skip
    parser.add_argument("--non-interactive", action="store_true", help="ask nothing; the rest of the line says it all")
    parser.set_defaults(overrides=[])
    parser.epilog = """\
with --non-interactive, key=value of any option, and
  instance_data_dir=FOLDER  videos          prompts=FILE  prompts, or builtin
  size=832x480x81           their shape     gpu=24        memory, chooses the recipe

examples:
  simpletuner configure
  simpletuner configure config/my-run/config.json
  simpletuner configure --non-interactive gpu=24 prompts=prompts.txt
  simpletuner configure --from ../SimpleTuner/config/config.json"""
    parser.usage = f"{parser.prog} [PATH] [--from FILE] [--non-interactive KEY=VALUE ...]"


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if the files are written and the run could start; 2 if not, or if there is no terminal to ask on."""
    from simpletuner_dmd.cli.wizard.draft import Draft
    from simpletuner_dmd.cli.wizard.short import Session
    from simpletuner_dmd.config.errors import UserError

    path, overrides = _target(args)
    if not args.non_interactive and not is_terminal():
        raise UserError("this is no terminal, so nothing can be asked",
                        fix="simpletuner configure --non-interactive key=value ...")  # fmt: skip
    if overrides and not args.non_interactive:
        raise UserError(f"{' '.join(overrides)} would be asked", fix="add --non-interactive, or leave it out")
    draft, session = Draft(path), Session()
    if args.source:
        _take_over(draft, Path(args.source))
    try:
        if args.non_interactive:
            from simpletuner_dmd.cli.wizard import given

            given.take(draft, overrides, session, converted=bool(args.source))
        elif not _ask(draft, session, converted=bool(args.source)):
            print("\nNothing was written.")
            return 0
    except KeyboardInterrupt:
        print("\nNothing was written.", file=sys.stderr)
        raise
    return _write(draft, session)


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _target(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The file to write, and the overrides: a bare `key=value` may have been taken for the path."""
    written, overrides = args.path, list(args.overrides)
    if written and "=" in written and not Path(written).exists():
        written, overrides = None, [written, *overrides]
    path = Path(args.output or written or DEFAULT).expanduser()
    return (path / "config.json" if path.is_dir() or not path.suffix else path), overrides


def _take_over(draft: Draft, source: Path) -> None:
    from simpletuner_dmd.cli.convert import convert
    from simpletuner_dmd.cli.wizard.data import set_converted

    converted = convert(source)
    print("\n".join(converted.table()))
    draft.notes = converted.table()
    draft.raw = converted.options()
    draft.is_new = True
    set_converted(draft, converted.datasets, converted.prompts)


def _ask(draft: Draft, session: Session, converted: bool) -> bool:
    """Whether the draft is to be written."""
    from simpletuner_dmd.cli.wizard import ask
    from simpletuner_dmd.cli.wizard.data import entry_of
    from simpletuner_dmd.cli.wizard.review import review
    from simpletuner_dmd.cli.wizard.short import QUESTIONS

    if converted:
        if entry_of(draft) is None:
            QUESTIONS["data"](draft, session)
    elif draft.is_new:
        ask.say(f"Ten questions, then {draft.path} is written. Enter takes what is offered.")
        ask.say("Ctrl-C leaves and writes nothing.")
        for question in QUESTIONS.values():
            question(draft, session)
    else:
        ask.say(f"{draft.path} is there: its values are offered, and keys that are not asked for stay as they are.")
    return review(draft, session)


def _write(draft: Draft, session: Session) -> int:
    from simpletuner_dmd.cli.check import report
    from simpletuner_dmd.cli.common import with_demo_paths
    from simpletuner_dmd.cli.wizard.data import library
    from simpletuner_dmd.cli.wizard.save import save
    from simpletuner_dmd.config import load

    if draft.is_new and session.found is not None and not draft.has("validation_prompt_library"):
        draft.library = library(session.found, draft.is_demo)
    lines = save(draft)
    print("\nWritten:")
    for line in lines:
        print(f"  {line}")
    print()
    card = f"{session.card:g}" if session.card else None
    report(with_demo_paths(load(config=str(draft.path))), card, differences=False)
    print(f"\nTrain: simpletuner train{_chosen_by(draft.path)}")
    return 0


def _chosen_by(path: Path) -> str:
    """The argument that finds the file again."""
    if path == Path(DEFAULT):
        return ""
    if path.name == "config.json" and path.parent.parent == Path("config"):
        return f" --env {path.parent.name}"
    return f" --config {path}"
