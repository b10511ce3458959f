"""How long `simpletuner --help` takes as a whole process, from fork to exit.

    python benchmarks/cli_start.py

Prints the median of several runs, after one that warms the disk and writes the bytecode and is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


def find_command() -> list[str]:
    """`simpletuner` beside this Python, else on the PATH, else its module."""
    beside = Path(sys.executable).with_name("simpletuner")
    command = str(beside) if beside.exists() else shutil.which("simpletuner")
    return [command] if command else [sys.executable, "-m", "simpletuner_dmd.cli.main"]


def one_run(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="runs that are counted (7)")
    parser.add_argument("--limit", type=float, help="exit with 1 if the median is above so many seconds")
    options = parser.parse_args()
    command = [*find_command(), "--help"]
    try:
        one_run(command)
        seconds = [one_run(command) for _ in range(max(1, options.runs))]
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{' '.join(command)} does not run: {error}", file=sys.stderr)
        return 2
    median = statistics.median(seconds)
    print(f"{' '.join(command)}: median {median:.3f} s of {len(seconds)} runs "
          f"({min(seconds):.3f} to {max(seconds):.3f})")  # fmt: skip
    return 1 if options.limit is not None and median > options.limit else 0


if __name__ == "__main__":
    sys.exit(main())
