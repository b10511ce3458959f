"""Renders the validation prompts: files first (mp4 and a poster), then a row for the log of each.

A video that cannot be made is a failure to report, never the end of a run: sampling and decoding change no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from simpletuner_dmd.config.prompts import file_name
from simpletuner_dmd.data.video import write_mp4, write_poster
from simpletuner_dmd.flow import Denoiser, TextEmbedding
from simpletuner_dmd.validation.measures import Specimen, clip_measures
from simpletuner_dmd.validation.sampling import VideoSampler

FOLDER = "validation"
ONCE = ("teacher", "undistilled")
RENDER_FAILURES = (RuntimeError, MemoryError, OSError, av.FFmpegError)
"""Out of memory, a broken decoder, a full disk. Anything else is a bug, and loud."""


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
        width, height, frames = self.size
        return f"{file_name(self.name)}-seed{self.seed}-{width}x{height}x{frames}f"


@dataclass
class Rendering:
    """What came of one kind of videos: a row for the log of each, its measures, and a sentence for each failure.

    specimens: by the number of the scene.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    specimens: dict[int, Specimen] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def merge(self, other: Rendering) -> None:
        self.rows += other.rows
        self.specimens |= other.specimens
        self.failures += other.failures


def to_frames(pixels_3THW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] to [T, H, W, 3] uint8, rounded to the nearest level."""
    levels = ((pixels_3THW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()


class Renderer:
    """Renders scenes with a network: first all latents, then all pixels, so that network and codec never work at once.

    decode: normalised latents [B, C, F, H, W] to pixels [B, 3, T, H, W] in [-1, 1]. unload: lets go of the codec and
    empties caches. share: the numbers of the scenes that this process renders; all of them where there is only one.
    """

    def __init__(
        self,
        output_dir: Path,
        scenes: Sequence[Scene],
        negative: TextEmbedding,
        decode: Callable[[Tensor], Tensor],
        framerate: float,
        device: torch.device,
        unload: Callable[[], None] = lambda: None,
        share: Iterable[int] | None = None,
    ) -> None:
        self.output_dir, self.scenes, self.negative = output_dir, scenes, negative
        self.decode, self.unload, self.framerate, self.device = decode, unload, framerate, device
        self.share = list(range(len(scenes)) if share is None else share)

    def render(self, denoiser: Denoiser, sampler: VideoSampler, kind: str, step: int) -> Rendering:
        """One video per scene under validation/step-NNNNNN/ (or validation/KIND/ for what is rendered once).

        kind: "student", "student-ema", "teacher" or "undistilled".
        """
        latents, failures = self.sample(denoiser, sampler)
        rendering = self.write(latents, kind, step, sampler.forwards)
        rendering.failures[:0] = failures
        return rendering

    def sample(self, denoiser: Denoiser, sampler: VideoSampler) -> tuple[dict[int, Tensor], list[str]]:
        """(number of the scene → latents [C, F, H, W] on the CPU, failures)."""
        found: dict[int, Tensor] = {}
        failures = []
        self.unload()
        for number in self.share:
            scene = self.scenes[number]
            text, negative = scene.text.to(self.device), self.negative.to(self.device)
            try:
                latents = sampler(denoiser, text, negative, (1, *scene.latent_shape), scene.seed, self.device)
                found[number] = latents[0].float().cpu()
            except RENDER_FAILURES as error:
                failures.append(f"{scene.name} could not be sampled: {_said(error)}")
        return found, failures

    def write(self, latents: Mapping[int, Tensor], kind: str, step: int, forwards: int) -> Rendering:
        """Decodes and writes what `sample` made. forwards: the steps it took, for the log."""
        rendering = Rendering()
        folder = self.output_dir / FOLDER / (kind if kind in ONCE else f"step-{step:06d}")
        for number, values in latents.items():
            scene = self.scenes[number]
            try:
                row, picture = self._written(scene, values, folder, kind, step, forwards)
            except RENDER_FAILURES as error:
                rendering.failures.append(f"{scene.name} could not be written: {_said(error)}")
                continue
            rendering.rows.append(row)
            rendering.specimens[number] = Specimen(scene.prompt, scene.seed, scene.size, values, picture)
        self.unload()
        return rendering

    def _written(
        self, scene: Scene, latents: Tensor, folder: Path, kind: str, step: int, forwards: int
    ) -> tuple[dict[str, Any], dict[str, float]]:
        frames = to_frames(self.decode(latents[None].to(self.device))[0])
        path = folder / f"{scene.file_stem}{'-ema' if kind.endswith('-ema') else ''}.mp4"
        write_mp4(path, frames, self.framerate)
        write_poster(path.with_suffix(".png"), frames)
        picture = clip_measures(frames)
        width, height, count = scene.size
        return {
            "step": step,
            "kind": kind,
            "name": scene.name,
            "prompt": scene.prompt,
            "seed": scene.seed,
            "steps": forwards,
            "width": width,
            "height": height,
            "frames": count,
            "file": path.relative_to(self.output_dir).as_posix(),
            "poster": path.with_suffix(".png").relative_to(self.output_dir).as_posix(),
            "measures": picture,
        }, picture


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
