"""Real mp4 files of a moving square, in any size, length and rate."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_moving_square(
    path: Path,
    size: tuple[int, int] = (32, 32),
    frames: int = 9,
    rate: float = 16,
    caption: str | None = "a square moves right",
    level: int = 220,
) -> Path:
    """size is (width, height); caption None writes no caption file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    side = max(4, min(size) // 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.full((height, width, 3), 40, np.uint8)
            left = (width - side) * index // max(1, frames - 1)
            top = (height - side) // 2
            picture[top : top + side, left : left + side] = level
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return path


def write_small_set(folder: Path, count: int = 4) -> Path:
    """`count` captioned clips of 32x32, 9 frames at 16 per second, of different brightness."""
    for index in range(count):
        write_moving_square(
            folder / f"clip-{index}.mp4", caption=f"a square moves right {index}", level=120 + 30 * index
        )
    return folder
