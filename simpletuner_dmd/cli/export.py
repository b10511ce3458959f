"""`simpletuner export`: writes a checkpoint's student as LoRA or model files and loads them back."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMS = ("diffusers", "comfyui", "merged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from simpletuner_dmd.cli.common import add_run_arguments

    add_run_arguments(parser)
    parser.add_argument(
        "--to", action="append", choices=FORMS, default=[],
        help="diffusers, comfyui: an adapter under these names (default: as the run's lora_format says); merged: the "
        "whole transformer with the adapter in its weights, in OUT/merged; may be given again",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for the files; default: RUN/export")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if stock diffusers reproduces the training sampler from the files, else 1."""
    from dataclasses import replace

    from simpletuner_dmd.cli.saved import OpenRun
    from simpletuner_dmd.publish.load_back import load_back

    out = args.out or Path(args.run) / "export"
    dialects, merged = [form for form in args.to if form != "merged"], "merged" in args.to
    as_adapter = bool(dialects) or not merged
    opened = OpenRun(Path(args.run), args.checkpoint, raw=args.raw)
    shipper, roles, updates = opened.shipper, opened.student.roles, opened.updates
    with opened.student.best() as averaged:
        if as_adapter:
            shipper.export(
                out, roles, opened.data, steps=updates, averaged=averaged, formats=dialects, raw_beside=averaged
            )
        if merged:
            exact = shipper.export_merged(out / "merged", roles, opened.data, steps=updates, averaged=averaged)
        reference = opened.reference()
    if averaged and as_adapter:
        shipper.export_raw(out, roles, opened.data, steps=updates)
    del roles
    opened.close()
    verdicts = {out: load_back(out, reference)} if as_adapter else {}
    if merged:
        verdicts[out / "merged"] = load_back(out / "merged", replace(reference, base=None), judged=exact)
    for folder, verdict in verdicts.items():
        print(f"{folder}: {verdict.message}")
    return 0 if all(verdict.passed or not verdict.checked for verdict in verdicts.values()) else 1
