"""`simpletuner VERB ...`: finds the verb, runs it, and turns a person's mistakes into words and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys

from simpletuner_dmd import __version__
from simpletuner_dmd.cli import completion
from simpletuner_dmd.cli.common import INTERRUPTED, module_of

# verb -> (what it does, an example)
VERBS = {
    "configure": ("write a configuration: ten questions, or --from another tool's", "simpletuner configure"),
    "train": ("distil or fine-tune Wan", "simpletuner train --env my-run learning_rate=1e-5"),
    "check": ("check a configuration and its data before anything is loaded", "simpletuner check --env my-run"),
    "cache": ("fill the caches of text and video, or look into them", "simpletuner cache --env my-run"),
    "synthesise": (
        "make training videos or latents with the teacher",
        "simpletuner synthesise --env my-run --prompts prompts.txt --out data/synthetic",
    ),
    "sample": ("render prompts from a checkpoint", "simpletuner sample output/my-run --prompt 'a cat surfs'"),
    "export": ("write a checkpoint as LoRA or model files, and load them back", "simpletuner export output/my-run"),
    "extract-lora": (
        "make a LoRA of what a full student changed (lossy)",
        "simpletuner extract-lora output/my-run --rank 64",
    ),
    "push": ("upload a finished run to the Hub", "simpletuner push output/my-run"),
    "report": (
        "make the page of a run anew, compare two runs, or watch one train",
        "simpletuner report output/my-run --serve",
    ),
    "examples": ("list or copy the example configurations", "simpletuner examples copy demo config/my-run"),
    "recipes": ("list settings to start from, with their sources", "simpletuner recipes show wan-1.3b-dmd-lora"),
    "explain": ("say what an option is, or draw the noise schedule of a run", "simpletuner explain learning_rate"),
    "doctor": ("say what this machine can do", "simpletuner doctor"),
    "completion": ("teach your shell to complete commands and options", 'eval "$(simpletuner completion bash)"'),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0 done, 2 a mistake in what was written, 3 no memory, 130 interrupted."""
    if completion.ASKED in os.environ:
        completion.answer(VERBS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "-v", "--version"):
        print(f"simpletuner-dmd {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean `simpletuner {close[0]}`?" if close else f"choose one of: {', '.join(VERBS)}"
        print(f"simpletuner: there is no command {verb!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return run_verb(verb, rest)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


def run_verb(verb: str, arguments: list[str]) -> int:
    """Parses the verb's own arguments and runs it. What a verb with a configuration does not know is an override."""
    module = importlib.import_module(module_of(verb))
    summary, example = VERBS[verb]
    parser = argparse.ArgumentParser(
        prog=f"simpletuner {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--con` must be an unknown option, not `--config`
    )
    module.add_arguments(parser)
    try:
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown and not hasattr(parsed, "overrides"):
            parser.error(f"unknown: {' '.join(unknown)}")
    except SystemExit as stop:  # argparse has printed its help or its complaint
        return int(stop.code or 0)
    if hasattr(parsed, "overrides"):
        parsed.overrides = unknown

    from simpletuner_dmd.config.errors import UserError

    try:
        return int(module.run(parsed))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"\n{where}the disk is full while an export, a video or the report was written. Checkpoints are whole.\n"
            "Fix: free some space, or move output_dir; the same command then goes on",
            file=sys.stderr,
        )
        return 2


def overview() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: simpletuner COMMAND [options]",
            "",
            "Distils Wan text-to-video models into students that need a few steps.",
            "",
            "commands:",
            *(f"  {verb:<{width}}  {summary}" for verb, (summary, _) in VERBS.items()),
            "",
            "options:",
            "  --help     this text; `simpletuner COMMAND --help` for one command",
            "  --version  the version",
            "",
            "examples:",
            "  simpletuner train --example demo       distil the tiny Wan that comes with the package",
            *(f"  {example}" for _, example in VERBS.values()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
