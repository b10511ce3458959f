"""Renders the validation prompts: files first (mp4 and a poster), then a row for the log of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simpletuner_dmd.data.video import write_mp4, write_poster
from simpletuner_dmd.flow import Denoiser, TextEmbedding
from simpletuner_dmd.validation.sampling import VideoSampler

FOLDER = "validation"


@dataclass(frozen=True)
class Scene:
    """One video to render: a prompt, its embedding, the size in pixels and frames, and the shape of its latents."""

    name: str
    prompt: str
    text: TextEmbedding
    size: tuple[int, int, int]  # width, height, frames
    latent_shape: tuple[int, int, int, int]
    seed: int

    @property
    def file_stem(self) -> str:
        plain = re.sub(r"[^\w.-]+", "-", self.name).strip("-.")[:80] or "prompt"
        width, height, frames = self.size
        return f"{plain}-seed{self.seed}-{width}x{height}x{frames}f"


def to_frames(pixels_3THW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] to [T, H, W, 3] uint8, rounded to the nearest level."""
    levels = ((pixels_3THW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()


class Renderer:
    """Renders scenes with a network and records each video.

    decode: normalised latents [B, C, F, H, W] to pixels [B, 3, T, H, W] in [-1, 1]. record: takes the fields of one
    "validation" row; paths in it are relative to the output folder.
    """

    def __init__(
        self,
        output_dir: Path,
        scenes: Sequence[Scene],
        negative: TextEmbedding,
        decode: Callable[[Tensor], Tensor],
        record: Callable[[dict[str, Any]], None],
        framerate: float,
        device: torch.device,
    ) -> None:
        self.output_dir, self.scenes, self.negative = output_dir, scenes, negative
        self.decode, self.record, self.framerate, self.device = decode, record, framerate, device

    def render(self, denoiser: Denoiser, sampler: VideoSampler, kind: str, step: int) -> list[Path]:
        """One video per scene under validation/step-NNNNNN/ (or validation/KIND/ for what is rendered once).

        kind: "student", "student-ema", "teacher" or "undistilled".
        """
        once = kind in ("teacher", "undistilled")
        folder = self.output_dir / FOLDER / (kind if once else f"step-{step:06d}")
        suffix = "-ema" if kind.endswith("-ema") else ""
        paths = []
        for scene in self.scenes:
            text = scene.text.to(self.device)
            latents = sampler(
                denoiser, text, self.negative.to(self.device), (1, *scene.latent_shape), scene.seed, self.device
            )
            frames = to_frames(self.decode(latents)[0])
            path = folder / f"{scene.file_stem}{suffix}.mp4"
            write_mp4(path, frames, self.framerate)
            write_poster(path.with_suffix(".png"), frames)
            width, height, count = scene.size
            self.record(
                {
                    "step": step,
                    "kind": kind,
                    "name": scene.name,
                    "prompt": scene.prompt,
                    "seed": scene.seed,
                    "steps": sampler.forwards,
                    "width": width,
                    "height": height,
                    "frames": count,
                    "file": path.relative_to(self.output_dir).as_posix(),
                    "poster": path.with_suffix(".png").relative_to(self.output_dir).as_posix(),
                }
            )
            paths.append(path)
        return paths
