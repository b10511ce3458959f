"""The plan's words and its search for the smallest change: plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from simpletuner_dmd.wan.plan import Change, Component, Phase, Plan, fitting, size

GB = 10**9
PLAN = Plan(
    device="cuda",
    components=(Component("base", "weights (bf16)", 3 * GB), Component("run", "Python and its libraries", 0, GB)),
    phases=(Phase("loading", 3 * GB, 4 * GB), Phase("training", 9 * GB, 2 * GB)),
    disk={"caches": 0, "checkpoints (2)": 2 * GB},
    tokens_per_sample=32760,
    shape=(832, 480, 81),
    flops=3e15,
    rate=1e14,
    steps=400,
    key="",
    changes=lambda limit: [Change("lora_rank", 16, 7 * GB)],
)


def test_the_peaks_are_those_of_the_stretches() -> None:
    assert (PLAN.peak_gpu, PLAN.peak_host, PLAN.peak, PLAN.training_peak) == (9 * GB, 4 * GB, 9 * GB, 9 * GB)
    assert (PLAN.seconds_per_step, PLAN.hours) == (30.0, pytest.approx(400 * 30 / 3600))
    assert replace(PLAN, device="cpu").peak == 4 * GB, "on a CPU the host's memory is the limit"


def test_the_verdict_names_both_numbers_and_the_change() -> None:
    assert PLAN.verdict(9 * GB) is None
    assert PLAN.verdict(8 * GB) == (
        "9 GB of GPU memory planned (training), 8 GB there: this will not fit. "
        "Smallest change: lora_rank 16 (then 7 GB)."
    )
    words = PLAN.verdict(5 * GB)
    assert words is not None and "with lora_rank 16 it would still be 7 GB" in words


def test_the_document_has_the_keys_that_programs_read() -> None:
    document = PLAN.as_dict(8 * GB)
    assert set(document) == {"memory", "disk", "time"}
    memory = document["memory"]
    assert (memory["fits"], memory["limit"], memory["peak_gpu"]) == (False, 8 * GB, 9 * GB)
    assert memory["smallest_change"] == [{"key": "lora_rank", "value": 16}]
    assert memory["components"][0] == {"role": "base", "part": "weights (bf16)", "gpu": 3 * GB, "host": 0}
    assert document["time"]["hours"] == PLAN.hours


def test_the_lines_say_that_it_is_an_estimate() -> None:
    text = "\n".join(PLAN.lines())
    assert "an estimate" in text and "32,760 tokens" in text and "30 s per step" in text and "3.3 h" in text


def search(limit: int, peaks: dict[tuple[tuple[str, Any], ...], int]) -> list[tuple[str, Any]]:
    """`fitting` over ranks and frames, with the peak of each combination given."""
    kinds = [lambda: [("rank", 32), ("rank", 16)], lambda: [("frames", 65), ("frames", 49)]]
    found = fitting(kinds, lambda changes: peaks[tuple(sorted(changes.items()))], limit)
    return [(change.key, change.value) for change in found]


def test_the_first_that_is_enough_alone_comes_before_any_two() -> None:
    alone = {(("rank", 32),): 90, (("rank", 16),): 80, (("frames", 65),): 60, (("frames", 49),): 40}
    assert search(60, alone) == [("frames", 65)]
    assert search(85, alone) == [("rank", 16)]


def test_two_together_where_none_is_enough_and_only_those_that_help() -> None:
    alone = {(("rank", 32),): 90, (("rank", 16),): 80, (("frames", 65),): 70, (("frames", 49),): 50}
    both = {(): 100, (("frames", 65), ("rank", 16)): 50, (("frames", 49), ("rank", 16)): 30}
    assert search(45, alone | both) == [("rank", 16), ("frames", 49)]
    useless = {(("rank", 32),): 100, (("rank", 16),): 100, (): 100}
    useless |= {(("frames", 49), ("rank", rank)): 50 for rank in (32, 16)}  # looked at once more, beside the frames
    assert search(45, alone | useless) == [("frames", 49)], "a rank that changes nothing is not said"


def test_sizes_in_words() -> None:
    assert [size(count) for count in (0, 999, 1_500_000, 2.5e12)] == ["-", "999 B", "1.5 MB", "2.5 TB"]
