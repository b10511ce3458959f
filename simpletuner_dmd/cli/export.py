"""`simpletuner export`: writes a checkpoint's student as LoRA or model files and loads them back."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from simpletuner_dmd.cli.common import add_run_arguments

    add_run_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder for the files; default: RUN/export")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if stock diffusers reproduces the training sampler from the files, else 1."""
    from accelerate import Accelerator
    from torch import cuda

    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.cli.common import quiet_libraries
    from simpletuner_dmd.cli.saved import open_checkpoint, open_run, student_of
    from simpletuner_dmd.cli.shipping import Shipper, check_text

    quiet_libraries()
    folder = Path(args.run)
    loaded = open_run(folder)
    loaded.config.push_to_hub = loaded.config.push_checkpoints_to_hub = False
    state = open_checkpoint(folder, args.checkpoint)
    assembly = Assembly(loaded, Accelerator(cpu=not cuda.is_available()).device)
    data = assembly.data([])
    shipper = Shipper(assembly, folder)
    out = args.out or folder / "export"
    with student_of(assembly, state, raw=args.raw) as (roles, averaged):
        updates = int(state.meta["updates"]["student"])
        shipper.export(out, roles, data, steps=updates, averaged=averaged)
        reference = shipper.reference(roles, *check_text(data))
    data.close()
    verdict = shipper.load_back(out, reference)
    print(f"{out}: {verdict.message}")
    return 0 if verdict.passed else 1
