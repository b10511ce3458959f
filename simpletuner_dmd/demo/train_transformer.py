"""Trains the demo's transformer with this tool's own supervised method, from nothing, on the cached demo latents."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner_dmd.demo import shapes
from simpletuner_dmd.demo.muon import FlatMuon
from simpletuner_dmd.demo.skeleton import SHIFT, TEXT_ROWS, build_transformer
from simpletuner_dmd.demo.train_vae import clips_to_pixels
from simpletuner_dmd.distill.noise_levels import NoiseLevels
from simpletuner_dmd.distill.supervised import Supervised, SupervisedSettings
from simpletuner_dmd.flow import Batch, TextEmbedding
from simpletuner_dmd.randomness import RandomStream, generator
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.encoders import TextEncoder, VideoCodec
from simpletuner_dmd.wan.loading import Storage
from simpletuner_dmd.wan.sources import ModelSource


@dataclass(frozen=True)
class LatentSet:
    """latents: [N, C, F, H, W] normalised; captions_N: row of `text` per clip; text: [33, L, D], the last row empty."""

    latents: Tensor
    captions_N: Tensor
    text: Tensor


def encode_clips(pipeline: Path, clips: int, seed: int) -> LatentSet:
    """Draws clips of the training combinations and encodes them and all captions with the pipeline's own parts."""
    source = ModelSource(*[str(pipeline)] * 4)
    device = torch.device("cpu")
    encoder = TextEncoder(source, dtype=torch.float32, storage=Storage(), max_length=TEXT_ROWS, device=device)
    rows = encoder([*(c.caption for c in shapes.ALL_COMBINATIONS), ""])
    text = torch.zeros(len(rows), TEXT_ROWS, rows[0].shape[1])
    for index, row in enumerate(rows):
        text[index, : len(row)] = row
    codec = VideoCodec(source, device=device)
    pixels, chosen = shapes.draw_many(clips, seed=seed)
    latents = torch.cat([codec.encode(clips_to_pixels(pixels[i : i + 16])) for i in range(0, clips, 16)])
    return LatentSet(latents, torch.tensor([shapes.ALL_COMBINATIONS.index(c) for c in chosen]), text)


def train_transformer(
    pipeline: Path, data: LatentSet, *, seed: int = 0, steps: int = 4000, batch: int = 40, log_every: int = 100
) -> float:
    """Trains and saves `pipeline`/transformer; returns the mean loss of the last hundred steps."""
    transformer = build_transformer(seed).train()
    method = Supervised(
        WanDenoiser(transformer, None, None),
        SupervisedSettings(NoiseLevels(shift=SHIFT), caption_dropout_probability=0.1),
        torch.device("cpu"),
    )
    optimizer = FlatMuon(
        transformer.named_parameters(),
        matrix_lr=0.02,
        vector_lr=2e-3,
        to_adamw=("patch_embedding", "condition_embedder", "proj_out", "scale_shift_table"),
    )
    optimizer.schedule(lambda step: min(1.0, (step + 1) / 50) * max(0.0, 1 - step / steps))
    negative = TextEmbedding(data.text[-1:])
    channels, frames, height, width = data.latents.shape[1:]
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(data.latents), (batch,), generator=generator(seed, "order", step))
        micro_batch = Batch(
            positions=tuple(range(batch)),
            text=TextEmbedding(data.text[data.captions_N[chosen]]),
            negative_text=negative,
            latent_shape=(channels, frames, height, width),
            latents_BCFHW=data.latents[chosen],
        )
        for turn in method.turns(step):
            for loss in turn.losses(micro_batch, RandomStream(seed, step, micro_batch.positions)):
                loss.value.backward()
                losses.append(float(loss.value.detach()))
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every == 0:
            recent = sum(losses[-log_every:]) / log_every
            print(
                f"transformer step {step + 1}/{steps} loss {recent:.4f} {time.perf_counter() - began:.0f}s", flush=True
            )
    transformer.save_pretrained(pipeline / "transformer")
    return sum(losses[-100:]) / len(losses[-100:])
