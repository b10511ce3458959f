"""The plan of a run that is under way: printed at its start, compared with what the run held, and kept for the next.

`plan.json` in the output folder holds the planned and the measured peak of the training steps, under a key of all
settings that decide them; the next plan of the same key starts from the measured ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simpletuner_dmd.cli.blueprint import LatentShape
from simpletuner_dmd.cli.capacity import Machine, this_machine
from simpletuner_dmd.cli.planning import CUDA_CONTEXT, TRAINING, make_plan
from simpletuner_dmd.config import LoadedConfig
from simpletuner_dmd.durable import write_json
from simpletuner_dmd.training.progress import forget_peak, peak_bytes
from simpletuner_dmd.wan.plan import Plan, size

REMEMBERED = "plan.json"


@dataclass
class PlanWatch:
    """Makes the plan of `loaded`, says it, and holds the run against it."""

    loaded: LoadedConfig
    device: torch.device
    output_dir: Path
    say: Callable[[str], None]
    plan: Plan | None = None
    compared: bool = False

    @property
    def machine(self) -> Machine:
        return this_machine(self.loaded.config.mixed_precision)

    def announce(self) -> None:
        """Before anything is loaded."""
        self.plan = remembered(make_plan(self.loaded, self.machine), self.output_dir)
        for line in self.plan.lines():
            self.say(line)
        self._warn()

    def know(self, shapes: Sequence[LatentShape], steps: int) -> None:
        """Once the batches are known: says so where they are of another size than was planned with."""
        before = self.plan
        assert before is not None, "announce comes first"
        self.plan = remembered(make_plan(self.loaded, self.machine, shapes=shapes, steps=steps), self.output_dir)
        if before.shape != self.plan.shape:
            width, height, frames = self.plan.shape
            self.say(f"The largest batch is of {width}x{height}, {frames} frames: {size(self.plan.peak)} planned")
            self._warn()

    def _warn(self) -> None:
        assert self.plan is not None
        if verdict := self.plan.verdict(self.machine.memory):
            self.say(f"Warning: {verdict}")

    def begin(self) -> None:
        """Right before the first step: from here the peak is that of training."""
        forget_peak(self.device)

    def compare(self, seconds: float) -> dict[str, Any] | None:
        """After the first step in which every role has moved: the facts of the comparison, which are also printed and
        kept. None where there is nothing to compare."""
        if self.plan is None or self.compared:
            return None
        self.compared = True
        held = peak_bytes(self.device) + (CUDA_CONTEXT if self.device.type == "cuda" else 0)
        planned = next(phase for phase in self.plan.phases if phase.name == TRAINING)
        expected = planned.host if self.plan.device == "cpu" else planned.gpu
        facts = {"planned_bytes": expected, "measured_bytes": held, "seconds_per_step": seconds}
        self.say(f"Peak memory of training: {size(held)} measured, {size(expected)} planned ({held / expected:.0%})")
        write_json(self.output_dir / REMEMBERED, {"key": self.plan.key, **facts})
        return facts

    def out_of_memory(self, reason: str, step: int | None, saved: Path | None) -> list[str]:
        """What a person reads when memory has run out."""
        lines = [f"Out of memory: {reason}"]
        if self.plan is not None:
            lines += self.plan.lines()
            changes = self.plan.smallest_change(min(self.machine.memory, self.plan.peak - 1))
            if changes:
                lines.append(f"Try: {', '.join(map(str, changes))} ({size(changes[-1].peak)} planned, "
                             f"{size(self.plan.peak)} as it is)")  # fmt: skip
        if saved is not None:
            lines.append(f"Saved {saved} (step {step}). With the change made, the same command goes on from there.")
        elif step is not None:
            lines.append(
                "The step could not be saved; the same command goes on from the last checkpoint, if there is one."
            )
        return lines


def remembered(plan: Plan, output_dir: Path) -> Plan:
    """The plan with what the last run of the same key in this folder measured."""
    path = output_dir / REMEMBERED
    if not path.is_file():
        return plan
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return plan
    if kept.get("key") != plan.key:
        return plan
    held, seconds = int(kept["measured_bytes"]), float(kept["seconds_per_step"])

    def measured(phase: Any) -> Any:
        if phase.name != TRAINING:
            return phase
        return replace(phase, host=held) if plan.device == "cpu" else replace(phase, gpu=held)

    return replace(
        plan,
        phases=tuple(measured(phase) for phase in plan.phases),
        rate=plan.flops / seconds if seconds > 0 else plan.rate,
        assumptions=(*plan.assumptions, f"training: measured by the last run of these settings ({size(held)})"),
    )
