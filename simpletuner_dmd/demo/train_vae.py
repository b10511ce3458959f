"""Trains the demo's VAE: the stock `AutoencoderKLWan` at toy size, on the moving shapes.

First on single frames (cheap, learns the picture), then on whole clips (learns the temporal
compression), then measures the latents' mean and spread per channel and writes them into the config,
where `WanPipeline` and the caches look for them.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from simpletuner_dmd.demo import shapes
from simpletuner_dmd.demo.muon import FlatMuon

KL_WEIGHT = 1e-4  # per latent element, against the mean squared error per pixel


def build_vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    """The toy shape: 8x in space (patch 2, two halvings), 4x in time, 16 channels, 0.7M parameters."""
    statistics = {}
    if latents_mean is not None and latents_std is not None:
        statistics = {"latents_mean": latents_mean, "latents_std": latents_std}
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        **statistics,
    )


def clips_to_pixels(clips: np.ndarray) -> Tensor:
    """[N, T, H, W, 3] uint8 to [N, 3, T, H, W] float in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def psnr(vae: AutoencoderKLWan, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decode(encode(pixels)), pixels [N, 3, T, H, W] in [-1, 1]."""
    errors = []
    with torch.no_grad():
        for part in pixels.split(16):
            decoded = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append((decoded - part).pow(2).mean(dim=(1, 2, 3, 4)))
    return float(10 * torch.log10(4.0 / torch.cat(errors).mean()))


def draw_crops(clips: np.ndarray, rng: np.random.Generator, count: int, frames: int, size: int) -> Tensor:
    """Random windows in space and time: [count, 3, frames, size, size] in [-1, 1].

    The networks are convolutional, so small windows teach the same weights at a quarter of the cost.
    """
    windows = []
    for _ in range(count):
        clip = clips[rng.integers(len(clips))]
        start = rng.integers(clip.shape[0] - frames + 1)
        y, x = rng.integers(clip.shape[1] - size + 1, size=2)
        windows.append(clip[start : start + frames, y : y + size, x : x + size])
    return clips_to_pixels(np.stack(windows))


def train_vae(out: Path, *, seed: int = 0, steps: tuple[int, int, int] = (450, 450, 120), clips: int = 768) -> float:
    """Trains and saves the VAE to `out`; returns its PSNR in dB on clips it has not seen.

    steps: updates on crops of single frames, on crops of clips, and on whole clips.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    training, _ = shapes.draw_many(clips, seed=seed + 1, held_out=True)
    unseen = clips_to_pixels(shapes.draw_many(64, seed=seed + 2, held_out=True)[0])
    vae = build_vae()
    total = sum(steps)
    optimizer = FlatMuon(vae.named_parameters(), matrix_lr=0.02, vector_lr=2e-3)
    optimizer.schedule(lambda step: min(1.0, (step + 1) / 40) * (0.01 + 0.99 * max(0.0, 1 - step / total)))
    began = time.perf_counter()
    for step in range(total):
        if step < steps[0]:
            pixels = draw_crops(training, rng, 48, frames=1, size=32)
        elif step < steps[0] + steps[1]:
            pixels = draw_crops(training, rng, 16, frames=shapes.FRAMES, size=32)
        else:
            pixels = draw_crops(training, rng, 8, frames=shapes.FRAMES, size=shapes.SIZE)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1.0 - posterior.logvar).mean()
        loss = error.pow(2).mean() + 0.05 * error.abs().mean() + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == total - 1:
            seconds = time.perf_counter() - began
            print(f"vae step {step}/{total} mse {error.pow(2).mean():.5f} kl {kl:.3f} {seconds:.0f}s", flush=True)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in clips_to_pixels(training[:512]).split(16)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    finished = build_vae(mean.tolist(), std.tolist())
    finished.load_state_dict(vae.state_dict())
    finished.eval()
    finished.save_pretrained(out)
    return psnr(finished, unseen)
