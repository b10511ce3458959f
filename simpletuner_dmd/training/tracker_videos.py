"""A rendered video as each tracker can show it."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_FRAMES = 48  # of an animated picture: TensorBoard keeps it whole in its log
MAX_SIDE = 320


def send_video(tracker_name: str, tracker: Any, step: int, name: str, path: Path) -> None:
    """Hands a video file to a tracker of accelerate's; raises what the tracker's library raises."""
    _SENDERS[tracker_name](tracker, step, name, path)


def _as_file(module: str) -> Callable[[Any, int, str, Path], None]:
    """For libraries with a `Video` that takes a file. From an array wandb would need moviepy, and trackio ffmpeg."""

    def send(tracker: Any, step: int, name: str, path: Path) -> None:
        video = importlib.import_module(module).Video(str(path), format=path.suffix[1:])
        tracker.log({name: video}, step=step)

    return send


def _as_picture(tracker: Any, step: int, name: str, path: Path) -> None:
    """TensorBoard plays animated GIFs among its images; its own `add_video` needs moviepy, and makes the same."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    picture, width, height = animated(path)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture)
    tracker.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    tracker.writer.flush()


def animated(path: Path) -> tuple[bytes, int, int]:
    """(an animated GIF, width, height) of a video, at most MAX_FRAMES frames of at most MAX_SIDE pixels a side."""
    import av
    from PIL import Image

    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 16)
        frames: list[Image.Image] = [frame.to_image() for frame in container.decode(video=0)]
    every = -(-len(frames) // MAX_FRAMES)
    shown = frames[::every]
    for frame in shown:
        frame.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    duration = round(1000 * every / rate)
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=duration, loop=0)
    return buffer.getvalue(), *shown[0].size


_SENDERS: dict[str, Callable[[Any, int, str, Path], None]] = {
    "wandb": _as_file("wandb"),
    "trackio": _as_file("trackio"),
    "tensorboard": _as_picture,
}
