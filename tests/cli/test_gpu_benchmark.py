"""`benchmarks/gpu.py` has to run on the card that is there for an hour: every line of it runs here, on a CPU."""

from __future__ import annotations

import pytest

from benchmarks import gpu


def test_the_same_code_on_a_tiny_wan(capsys: pytest.CaptureFixture[str]) -> None:
    (facts,) = gpu.main(["--tiny", "--rank", "4", "--cycles", "1", "--precision", "int8-quanto"])
    assert facts["seconds_per_step"] > 0 and facts["tokens_per_sample"] == 2 * 4 * 4
    assert facts["share_of_matmul"] > 0 and facts["model_tflop_per_step"] > 0
    assert "% of matmul" in capsys.readouterr().out
