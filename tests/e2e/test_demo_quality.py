"""The proof on the real thing, shortened: a part of the demo's run brings the student most of the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.demo import shapes
from simpletuner_dmd.demo.path import model_path
from simpletuner_dmd.demo.skeleton import SHIFT, TEXT_ROWS
from simpletuner_dmd.flow import (
    Denoiser,
    Schedule,
    TextEmbedding,
    euler_sigmas,
    sample_euler,
    sample_few_step,
    uniform_ladder,
)
from simpletuner_dmd.randomness import generator
from simpletuner_dmd.validation.measures import energy_distance
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.encoders import TextEncoder
from simpletuner_dmd.wan.loading import Storage, load_transformer
from simpletuner_dmd.wan.sources import ModelSource

CPU = torch.device("cpu")
COUNT = 192
SHAPE = (COUNT, 16, 3, 8, 8)


@pytest.mark.slow
def test_two_hundred_steps_close_half_of_the_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["max_train_steps=240", "ema_decay=0.9", "validation_disable=true", "checkpoint_step_interval=240"]
    assert main(["train", "--example", "demo", *options]) == 0

    source = ModelSource(*[str(model_path())] * 4)
    encoder = TextEncoder(source, dtype=torch.float32, storage=Storage(), max_length=TEXT_ROWS, device=CPU)
    captions = [shapes.ALL_COMBINATIONS[index % 32].caption for index in range(COUNT)]
    rows = torch.zeros(COUNT, TEXT_ROWS, 64)
    for index, row in enumerate(encoder(captions)):
        rows[index, : len(row)] = row
    text = TextEmbedding(rows)
    network = load_transformer(source, torch.float32).eval()
    model = WanDenoiser(network, None, None)
    schedule = Schedule(SHIFT, uniform_ladder(3, SHIFT))

    def few_steps(denoiser: Denoiser) -> torch.Tensor:
        fresh = generator("few steps, renoise")
        noise = torch.randn(SHAPE, generator=generator("few steps"))
        return sample_few_step(
            denoiser, noise, text, schedule, "sde", lambda at, like: torch.randn(like.shape, generator=fresh)
        )

    with torch.no_grad():
        noise = torch.randn(SHAPE, generator=generator("teacher"))
        teacher = sample_euler(model, noise, text, text, euler_sigmas(24, SHIFT), 1.0)
        undistilled = energy_distance(few_steps(model), teacher)
        exported = load_file(tmp_path / "output" / "demo" / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
        network.load_lora_adapter(exported, prefix="transformer")
        student = energy_distance(few_steps(model), teacher)
    assert student < 0.5 * undistilled
