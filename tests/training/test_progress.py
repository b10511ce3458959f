import io
from pathlib import Path

import pytest
import torch

from simpletuner_dmd.training.progress import Progress, peak_bytes


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_file_gets_a_line_now_and_then_and_the_last():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream=stream, every_seconds=30, clock=clock) as bar:
        for step in range(1, 101):
            clock.now += 1
            bar.update(step, {"critic_loss": 0.25} | ({"dmd_loss": 0.5} if step == 1 else {}))
    lines = stream.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}/100" for step in (30, 60, 90, 100)]
    assert "dmd 0.5" in lines[-1] and "critic 0.25" in lines[-1] and "1 s/step" in lines[-1] and "peak" in lines[-1]
    assert "\r" not in stream.getvalue()


def test_every_so_many_steps_and_resumed():
    stream = io.StringIO()
    with Progress(10, done=4, stream=stream, every_seconds=1e9, every_steps=3) as bar:
        for step in range(5, 11):
            bar.update(step, {})
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["step 7/10", "step 10/10"]


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(3, stream=stream) as bar:
        for step in (1, 2, 3):
            bar.update(step, {"loss": 0.125, "step_seconds": 2.0})
        bar.write("a word")
        assert "loss 0.125" in bar.summary() and "2 s/step" in bar.summary()
    assert "3/3" in stream.getvalue() and "a word\n" in stream.getvalue()


def test_other_processes_are_silent():
    stream = Terminal()
    with Progress(1, stream=stream, enabled=False) as bar:
        bar.update(1, {"loss": 1.0})
        bar.write("x")
    assert stream.getvalue() == ""


def test_peak_bytes_is_the_high_water_mark_of_the_kernel():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells the mark in a second place")
    peak = peak_bytes(torch.device("cpu"))
    mark = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    assert abs(peak - mark) < 0.02 * mark
