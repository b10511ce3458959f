"""The model that comes with the package: small, opened by stock diffusers, and truly trained."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from simpletuner_dmd.demo import measures, shapes
from simpletuner_dmd.demo.path import VIDEOS_PER_COMBINATION, data_path, model_path, prompts_path
from simpletuner_dmd.demo.skeleton import SHIFT, TEXT_ROWS
from simpletuner_dmd.demo.train_vae import clips_to_pixels
from simpletuner_dmd.flow import TextEmbedding, euler_sigmas, sample_euler
from simpletuner_dmd.randomness import generator
from simpletuner_dmd.validation.render import to_frames
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.encoders import TextEncoder, VideoCodec
from simpletuner_dmd.wan.loading import Storage, load_transformer
from simpletuner_dmd.wan.sources import ModelSource

CPU = torch.device("cpu")
SOURCE = ModelSource(*[str(model_path())] * 4)


def test_it_is_at_most_twelve_megabytes() -> None:
    assert sum(file.stat().st_size for file in model_path().rglob("*") if file.is_file()) < 12e6


def test_the_stock_pipeline_opens_it_and_renders() -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(model_path())
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle moves left",
        height=64, width=64, num_frames=9, num_inference_steps=2, max_sequence_length=TEXT_ROWS,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames  # fmt: skip
    assert frames.shape == (1, 9, 64, 64, 3)


def test_the_vae_reconstructs_unseen_clips_at_28_db() -> None:
    codec = VideoCodec(SOURCE, device=CPU)
    pixels = clips_to_pixels(shapes.draw_many(32, seed=991, held_out=True)[0])
    latents = codec.encode(pixels)
    error = float((codec.decode(latents) - pixels).pow(2).mean())
    assert 10 * math.log10(4 / error) >= 28
    # Normalised by its own statistics: what the transformer sees is near N(0, 1) in every channel.
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.3
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.3


def test_the_captions_have_different_embeddings() -> None:
    captions = prompts_path().read_text(encoding="utf-8").splitlines()
    assert captions == [combination.caption for combination in shapes.ALL_COMBINATIONS]
    encoder = TextEncoder(SOURCE, dtype=torch.float32, storage=Storage(), max_length=TEXT_ROWS, device=CPU)
    rows = torch.stack([row.flatten() for row in encoder(captions)])
    distances = torch.cdist(rows, rows) + torch.eye(len(rows)) * 1e9
    assert distances.min() > 1.0


def test_the_videos_are_made_once_and_hold_no_kept_out_combination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = data_path()
    made = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len([name for name in made if name.endswith(".mp4")]) == VIDEOS_PER_COMBINATION * len(
        shapes.TRAINING_COMBINATIONS
    )
    captions = {file.read_text(encoding="utf-8").strip() for file in folder.glob("*.txt")}
    assert captions == {combination.caption for combination in shapes.TRAINING_COMBINATIONS}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    assert data_path() == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == made


@pytest.mark.slow
def test_the_teacher_draws_what_the_caption_says() -> None:
    count = 96
    combinations = [shapes.ALL_COMBINATIONS[index % 32] for index in range(count)]
    encoder = TextEncoder(SOURCE, dtype=torch.float32, storage=Storage(), max_length=TEXT_ROWS, device=CPU)
    text = torch.zeros(count, TEXT_ROWS, 64)
    for index, row in enumerate(encoder([combination.caption for combination in combinations])):
        text[index, : len(row)] = row
    teacher = WanDenoiser(load_transformer(SOURCE, torch.float32).eval(), None, None)
    embedding = TextEmbedding(text)
    noise = torch.randn((count, 16, 3, 8, 8), generator=generator(5, "teacher"))
    with torch.no_grad():
        latents = sample_euler(teacher, noise, embedding, embedding, euler_sigmas(40, SHIFT), 1.0)
    codec = VideoCodec(SOURCE, device=CPU)
    frames = np.stack([to_frames(clip) for clip in codec.decode(latents)])
    # 90% is the promise on 512 samples (benchmarks/quality.py).
    assert measures.obedience(frames, combinations)["all"]["both"] >= 0.9
