"""What each way of quantising a base costs: relative error and cosine of its velocity against the dense base's.

    python benchmarks/parity.py                      # the tiny Wan of the demo, everything that runs here
    python benchmarks/parity.py --model path/to/Wan --only int8-quanto fp8-quanto --guidance 5

One clip, two texts, five noise levels. Texts are random rows, as large as UMT5's; a run prints the same with its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from simpletuner_dmd.cli.common import quiet_libraries
from simpletuner_dmd.demo.path import model_path
from simpletuner_dmd.wan.loading import Storage, load_transformer, transformer_config
from simpletuner_dmd.wan.parity import Probe
from simpletuner_dmd.wan.schemes import SCHEMES, scheme_problem
from simpletuner_dmd.wan.sources import ModelSource


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_path()), help="a diffusers pipeline folder or a Hub id")
    parser.add_argument("--only", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--guidance", type=float, default=5.0)
    arguments = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = ModelSource(*[arguments.model] * 4)
    probe = Probe.of(transformer_config(source), arguments.guidance)
    print(
        f"{arguments.model} in bf16 on {torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine()}"
    )
    print("| scheme | relative error | cosine | with guidance: relative error | cosine |\n|---|---|---|---|---|")
    for precision in arguments.only:
        if problem := scheme_problem(precision, device, "--only"):
            print(f"| {precision} | not here: {problem.message} | | | |")
            continue
        storage = Storage(precision, device, probe=probe)
        load_transformer(source, torch.bfloat16, storage)
        assert storage.parity is not None
        rows = storage.parity.rows
        plain, guided = [row.relative_error for row in rows], [row.guided_relative_error for row in rows]
        print(f"| {precision} | {min(plain):.1%} … {max(plain):.1%} | {min(row.cosine for row in rows):.4f} "
              f"| {min(guided):.1%} … {max(guided):.1%} | {min(row.guided_cosine for row in rows):.4f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
