"""Starts the processes of a run on this machine with torch's own launcher; accelerate reads what it sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


def launch(processes: int, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs `simpletuner ARGUMENTS` in `processes` processes and returns the exit code that they agree on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "simpletuner_dmd", *arguments]
    inherited = dict(os.environ)
    inherited.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return subprocess.run(command, env={**inherited, **environment}, check=False).returncode
