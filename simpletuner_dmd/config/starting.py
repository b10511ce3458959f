"""Paths of adapters that a run starts from: `init_lora` and `teacher_lora`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from simpletuner_dmd.config.errors import Problem
from simpletuner_dmd.config.read import exists
from simpletuner_dmd.config.training_options import LoraOptions


def split_strength(written: str) -> tuple[str, float]:
    """ "path:0.8" -> ("path", 0.8); without a number the strength is 1."""
    path, separator, number = written.rpartition(":")
    try:
        return (path, float(number)) if separator else (written, 1.0)
    except ValueError:  # a colon of the path itself
        return written, 1.0


def resolve_starts(
    config: LoraOptions, origins: dict[str, str], name: str, resolve: Callable[[str], Path], problems: list[Problem]
) -> None:
    """Makes both paths absolute; they are read again when the run is exported from elsewhere."""
    for key in ("init_lora", "teacher_lora"):
        written = getattr(config, key)
        if written is None:
            continue
        path, strength = split_strength(written) if key == "teacher_lora" else (written, 1.0)
        found = resolve(path)
        place = origins.get(key, name)
        if not math.isfinite(strength) or strength == 0:
            problems.append(Problem(place, key, f"found strength {strength:g}", 'write, for example, "path:0.8"'))
        elif not exists(found):
            fix = "name a .safetensors file, an export folder, or the output folder of a run"
            problems.append(Problem(place, key, f"there is no {path}", fix))
        else:
            setattr(config, key, str(found) if key == "init_lora" else f"{found}:{strength!r}")
