"""The plan of a run: what it will hold on the device and on the host, on disk, and how long it will take.

Plain numbers and words, free of torch; `cli.planning.make_plan` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

GB = 1e9


@dataclass(frozen=True)
class Component:
    """Bytes of one thing. role: "base", "student", "critic", …, "run" for what belongs to none."""

    role: str
    part: str
    gpu: int = 0
    host: int = 0


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, and the most it holds: everything that is there then."""

    name: str
    gpu: int
    host: int


@dataclass(frozen=True)
class Change:
    """One setting that would make the run smaller, and the peak it leads to on the side that is limited."""

    key: str
    value: Any
    peak: int

    def __str__(self) -> str:
        written = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key} {written}"


@dataclass(frozen=True)
class Plan:
    """device: "cuda", "mps" or "cpu"; on a CPU everything is host memory.

    components: what the training step holds, by role. phases: the stretches of the run in their order.
    disk: what is written -> bytes. flops: of a training step, the mean over a cycle of turns. rate: floating-point
    operations per second that the time is reckoned with. steps: trainer steps of the run, or None where epochs decide
    and the data has not been looked at. assumptions: what the numbers rest on, one sentence each. missing: parts that
    are not on this machine yet -> bytes to download.
    """

    device: str
    components: tuple[Component, ...]
    phases: tuple[Phase, ...]
    disk: dict[str, int]
    tokens_per_sample: int
    shape: tuple[int, int, int]
    flops: float
    rate: float
    steps: int | None
    key: str
    assumptions: tuple[str, ...] = ()
    missing: dict[str, int] = field(default_factory=dict)
    changes: Callable[[int], list[Change]] | None = None

    @property
    def peak_gpu(self) -> int:
        return max((phase.gpu for phase in self.phases), default=0)

    @property
    def peak_host(self) -> int:
        return max((phase.host for phase in self.phases), default=0)

    @property
    def peak(self) -> int:
        """On the side that is limited: the device's own memory, or the host's where that is the device."""
        return self.peak_host if self.device == "cpu" else self.peak_gpu

    @property
    def training_peak(self) -> int:
        """The most of the training steps alone, on that side."""
        (phase,) = [phase for phase in self.phases if phase.name == "training"]
        return phase.host if self.device == "cpu" else phase.gpu

    @property
    def seconds_per_step(self) -> float:
        return self.flops / self.rate

    @property
    def hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds_per_step / 3600

    def fits(self, limit: int) -> bool:
        return self.peak <= limit

    def smallest_change(self, limit: int) -> list[Change]:
        """The settings, as few and as mild as they come, with which the run stays below `limit` bytes; [] if it does as
        it is. The last may still be above where nothing is small enough."""
        if self.fits(limit) or self.changes is None:
            return []
        return self.changes(limit)

    # --- words --------------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The plan as a table and sentences."""
        gpu = self.device != "cpu"
        rows = [["", *(["GPU"] if gpu else []), "host"]]
        for component in self.components:
            cells = [size(component.gpu), size(component.host)] if gpu else [size(component.host)]
            rows.append([f"{component.role}: {component.part}", *cells])
        found = ["Plan (an estimate, before anything is loaded):", *_table(rows)]
        found.append("Most memory, by stretch of the run:")
        stretches = [["", *(["GPU"] if gpu else []), "host"]]
        stretches += [[phase.name, *([size(phase.gpu)] if gpu else []), size(phase.host)] for phase in self.phases]
        found += _table(stretches)
        width, height, frames = self.shape
        found.append(f"A sample of {width}x{height}, {frames} frames: {self.tokens_per_sample:,} tokens")
        found.append(self._time())
        found.append("Disk: " + ", ".join(f"{name} {size(count)}" for name, count in self.disk.items()))
        found += [f"Not on this machine yet: {name}, {size(count)}" for name, count in self.missing.items()]
        return found + [f"- {sentence}" for sentence in self.assumptions]

    def _time(self) -> str:
        words = f"Time: about {_seconds(self.seconds_per_step)} per step ({self.flops / 1e12:.3g} TFLOP"
        words += f" at {self.rate / 1e12:.3g} TFLOP/s)"
        if self.hours is None or self.steps is None:
            return words
        hours = f"{self.hours:.1f} h" if self.hours >= 1 else f"{60 * self.hours:.0f} min"
        return f"{words}, {hours} for {self.steps} steps without validation"

    def verdict(self, limit: int) -> str | None:
        """Why it does not fit and what to change, or None."""
        if self.fits(limit):
            return None
        where = "host memory" if self.device == "cpu" else "GPU memory"
        largest = max(self.phases, key=lambda phase: phase.host if self.device == "cpu" else phase.gpu)
        words = f"{size(self.peak)} of {where} planned ({largest.name}), {size(limit)} there: this will not fit."
        found = self.smallest_change(limit)
        if not found:
            return words
        named = ", ".join(str(change) for change in found)
        if found[-1].peak > limit:
            return f"{words} No single setting is enough; with {named} it would still be {size(found[-1].peak)}."
        return f"{words} Smallest change: {named} (then {size(found[-1].peak)})."

    def as_dict(self, limit: int | None = None) -> dict[str, Any]:
        """`memory`, `disk` and `time` of `simpletuner check --json`."""
        memory = {
            "device": self.device,
            "components": [vars(component) for component in self.components],
            "phases": [vars(phase) for phase in self.phases],
            "peak_gpu": self.peak_gpu,
            "peak_host": self.peak_host,
            "limit": limit,
            "fits": None if limit is None else self.fits(limit),
            "smallest_change": []
            if limit is None
            else [{"key": change.key, "value": change.value} for change in self.smallest_change(limit)],
            "tokens_per_sample": self.tokens_per_sample,
            "missing_weights": self.missing,
            "assumptions": list(self.assumptions),
        }
        time = {
            "flops_per_step": self.flops,
            "flops_per_second": self.rate,
            "seconds_per_step": self.seconds_per_step,
            "steps": self.steps,
            "hours": self.hours,
        }
        return {"memory": memory, "disk": self.disk, "time": time}


def fitting(
    candidates: Iterable[Callable[[], Iterable[tuple[str, Any]]]],
    peak_with: Callable[[dict[str, Any]], int],
    limit: int,
) -> list[Change]:
    """The first setting that is enough alone; else the mildest of every kind together, until it is.

    candidates: kinds of change from mild to harsh, each giving its (key, value)s from mild to harsh.
    peak_with: the peak of the run with these settings changed.
    """
    kinds = [list(candidate()) for candidate in candidates]
    for kind in kinds:
        for key, value in kind:
            peak = peak_with({key: value})
            if peak <= limit:
                return [Change(key, value, peak)]
    together: dict[str, Any] = {}
    found: list[Change] = []
    lowest = peak_with({})
    while True:
        before = lowest
        for kind in kinds:
            for key, value in kind if kind and kind[-1][0] not in together else []:
                peak = peak_with({**together, key: value})
                if peak <= limit:
                    return [*found, Change(key, value, peak)]
            if (
                kind and kind[-1][0] not in together and peak < lowest
            ):  # the harshest of its kind, where it helps at all
                (key, value), lowest = kind[-1], peak
                together[key] = value
                found.append(Change(key, value, peak))
        if lowest == before:  # what helps nothing now may help once another stretch of the run is the largest
            return found


def size(count: float) -> str:
    """Bytes in words, in units of 1000."""
    if count == 0:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:],
                                                                                               strict=True))])
        for row in rows
    ]  # fmt: skip
