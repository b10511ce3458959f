"""`simpletuner examples`: the configurations that come with the package, to read and to start from."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="list|copy", required=True)
    actions.add_parser("list", help="name the examples")
    copy = actions.add_parser("copy", help="copy an example's files, to change them")
    copy.add_argument("name", metavar="NAME", help="the example")
    copy.add_argument("destination", metavar="DEST", nargs="?", help="folder to make; default: config/NAME")
    copy.add_argument("--dest", dest="dest", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    return list_examples() if args.action == "list" else copy_example(args.name, args.destination or args.dest)


def list_examples() -> int:
    from simpletuner_dmd.config.layers import example_names, examples_folder

    for name in example_names():
        content = json.loads((examples_folder() / name / "config.json").read_text(encoding="utf-8"))
        method = content.get("distillation_method", "fine-tuning")
        steps = content.get("max_train_steps")
        print(f"{name:<16}{method}, {content.get('model_type', 'lora')}" + (f", {steps} steps" if steps else ""))
    print("\nrun one: simpletuner train --example NAME      change one: simpletuner examples copy NAME config/my-run")
    return 0


def copy_example(name: str, destination: str | None) -> int:
    """Copies the files into a folder that has no configuration yet. Raises UserError if it has, or cannot be made."""
    from simpletuner_dmd.config.errors import UserError
    from simpletuner_dmd.config.layers import find_config

    source, _ = find_config(None, None, name, Path.cwd())
    assert source is not None, "an example that exists has a config.json"
    target = Path(destination) if destination else Path("config") / name
    files = sorted(path for path in source.parent.iterdir() if path.is_file())
    taken = [str(target / path.name) for path in files if (target / path.name).exists()]
    if taken:
        raise UserError(f"{', '.join(taken)} is there already", fix="name another folder, or move it away")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in files:
            shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}", fix="name another folder") from error
    print(f"Copied {', '.join(path.name for path in files)} to {target}.")
    shown = f"--env {target.name}" if target.parent == Path("config") else f"--config {target}"
    print(f"Change them, then: simpletuner train {shown}")
    return 0
