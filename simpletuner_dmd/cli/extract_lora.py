"""`simpletuner extract-lora`: the LoRA that comes nearest to a full student. Lossy, and says by how much."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from simpletuner_dmd.cli.common import add_run_arguments

    add_run_arguments(parser)
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA (64): higher is nearer, and larger")
    parser.add_argument("--out", type=Path, help="folder for the files; default: RUN/export/lora-rank64")


def run(args: argparse.Namespace) -> int:
    """Writes the LoRA and prints what is missing of the student: in its weights, and in what it samples."""
    from dataclasses import replace

    from simpletuner_dmd.cli.saved import OpenRun, open_run
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.publish.load_back import load_back

    folder = Path(args.run)
    out = args.out or folder / "export" / f"lora-rank{args.rank}"
    if args.rank < 1:
        raise UserError(f"--rank {args.rank} is no rank", fix="give 1 or more, for example 64")
    config = open_run(folder).config
    if config.model_type != "full":
        raise UserError(f"the student of {folder} is a LoRA already", fix=f"simpletuner export {folder}")
    if config.distillation_config is not None and config.distillation_config.has_detail_expert:
        raise UserError(f"the student of {folder} is two experts, of which one is a LoRA on the base",
                        fix=f"simpletuner export {folder}")  # fmt: skip
    opened = OpenRun(folder, args.checkpoint, raw=args.raw)
    with opened.student.best() as averaged:
        found = opened.shipper.export_extracted(
            out, opened.student.roles, opened.data, args.rank, steps=opened.updates, averaged=averaged
        )
        reference = opened.reference()
    opened.close()
    lost, worst = f"{found.relative_error:.1%}", f"{found.worst_error:.1%}"
    print(f"{out}: a LoRA of rank {args.rank}, lossy. {lost} of the change of its layers is missing (in "
          f"{found.worst_layer} {worst}); {found.left_out:.1%} of all changes are in tensors that no LoRA "
          "carries")  # fmt: skip
    verdict = load_back(out, replace(reference, base=opened.shipper.plain_base), judged=False)
    print(verdict.message)
    return 0 if verdict.passed or not verdict.checked else 1
