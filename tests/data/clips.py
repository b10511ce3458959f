"""Small videos and stand-in encoders for the tests of the data room."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.prepare import prepare

WIDTH = 6  # of the stand-in text embeddings


def write_video(
    path: Path,
    *,
    frames: int = 9,
    fps: float = 16,
    size: tuple[int, int] = (64, 64),
    times: Sequence[float] | None = None,
    container_format: str | None = None,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int | None = None,
    pictures: np.ndarray | None = None,
    gop: int = 12,
) -> Path:
    """Frame k is a plain grey of level 20 + 4k (or `pictures`), shown at times[k] seconds (or k / fps)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "8"}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for k in range(frames):
            picture = pictures[k] if pictures is not None else np.full((height, width, 3), 20 + 4 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[k] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def levels_to_indices(clip: np.ndarray) -> list[int]:
    """Which frame of a `write_video` clip each frame is."""
    return [round((float(frame.mean()) - 20) / 4) for frame in clip]


def captioned(path: Path, caption: str = "a grey field", **options: Any) -> Path:
    write_video(path, **options)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def entry(folder: Path, **options: Any) -> DatasetEntry:
    video = {"num_frames": 9, **options.pop("video", {})}
    defaults: dict[str, Any] = {"id": "clips", "instance_data_dir": str(folder), "resolution": 64, "video": video}
    return DatasetEntry(**{key: value for key, value in {**defaults, **options}.items() if value is not None})


def prompts_entry(path: Path, **options: Any) -> DatasetEntry:
    return entry(path, **{"id": "prompts", "dataset_type": "prompts", "resolution": "64x32", **options})


def make_config(root: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "pretrained_model_name_or_path": "none-needed",
        "output_dir": str(root / "out"),
        "cache_dir_text": str(root / "cache" / "text"),
        "cache_dir_vae": str(root / "cache" / "vae"),
        "compress_disk_cache": False,
        "disable_bucket_pruning": True,
        "train_batch_size": 1,
        "tokenizer_max_length": 16,
        "max_train_steps": 10,
        "seed": 7,
    }
    return TrainConfig(**{**defaults, **options})


class Encoders:
    """Stand-ins that count: text rows depend on the prompt, latents on the pixels."""

    def __init__(self, geometry: LatentGeometry) -> None:
        self.geometry = geometry
        self.prompts: list[str] = []
        self.clips = 0

    def text(self, prompts: list[str]) -> list[torch.Tensor]:
        self.prompts += prompts
        return [
            torch.arange(1.0, 1 + WIDTH).repeat(1 + len(prompt) % 7, 1) * (1 + sum(map(ord, prompt)) % 101)
            for prompt in prompts
        ]

    def video(self, pixels_B3THW: torch.Tensor) -> torch.Tensor:
        assert pixels_B3THW.dtype == torch.float32 and pixels_B3THW.abs().max() <= 1
        self.clips += len(pixels_B3THW)
        _, _, frames, height, width = pixels_B3THW.shape
        channels, latent_frames, latent_height, latent_width = self.geometry.latent_shape(width, height, frames)
        picked = pixels_B3THW[:, :1, :: self.geometry.temporal]
        small = torch.nn.functional.interpolate(picked, size=(latent_frames, latent_height, latent_width))
        return small.expand(-1, channels, -1, -1, -1).contiguous()


def prepared(datasets: list[DatasetEntry], config: TrainConfig, encoders: Encoders, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "encode_text": encoders.text,
        "encode_video": encoders.video,
        "text_fingerprint": "umt5-a",
        "vae_fingerprint": "vae-a",
        "latent_geometry": encoders.geometry,
        "needs_latents": True,
        "negative_prompt": "ugly",
        "extra_prompts": ["a validation prompt"],
        "max_latent_frames": None,
        "progress": False,
    }
    return prepare(datasets, config, **{**defaults, **options})
