"""Reading and writing video files, through PyAV.

Arrays are [T, H, W, 3] uint8 RGB: T frames, H and W pixels. Times are seconds from the first picture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import av.stream
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from simpletuner_dmd.data.buckets import CropPlan
from simpletuner_dmd.data.findings import CANNOT_DECODE, WRONG_KIND
from simpletuner_dmd.data.findings import UnusableFile as UnusableFile  # where it is looked for
from simpletuner_dmd.data.hdr import HLG, PQ, to_sdr
from simpletuner_dmd.data.kinds import kind_of_file
from simpletuner_dmd.data.pictures import is_picture, read_picture

# Containers that hold a picture or text although libav "opens" them as video.
NOT_VIDEO = re.compile(r"(^|,)(image2|tty|[a-z0-9]+_pipe)($|,)")
BT709, UNSPECIFIED = 1, 2
SMALL_PICTURE = 256 * 256
"""Pixels below which starting libav's threads takes longer than decoding, and disturbs the encoder beside it."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file shows: size in square pixels after rotation, frames and rate as stored, length in seconds.

    rotation: degrees counter-clockwise by which the stored picture is turned for display, a multiple of 90.
    """

    width: int
    height: int
    frames: int
    fps: float
    seconds: float
    rotation: int


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream); every way in which the file can fail becomes UnusableFile."""
    try:
        if path.stat().st_size == 0:
            raise UnusableFile(path, "the file is empty (0 bytes)")
        with av.open(str(path), metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not _is_cover_picture(s)]
            if NOT_VIDEO.search(container.format.name):
                kind = kind_of_file(path)
                # A picture may belong to a dataset of pictures in the same folder: nothing is wrong with the file.
                raise UnusableFile(path, f"not a video: it is {kind}", not kind.endswith("picture"), WRONG_KIND)
            if not streams:
                raise UnusableFile(path, f"it holds no video, only {_other_content(container)}", kind=WRONG_KIND)
            yield container, streams[0]
    except MemoryError:
        raise  # says nothing about the file (PyAV's own MemoryError is one of these too)
    except (PermissionError, FileNotFoundError) as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror or error}", damaged=False) from error
    except (av.error.FFmpegError, OSError) as error:
        if kind_of_file(path) == "unreadable":
            raise UnusableFile(path, f"cannot be read: {error.strerror or error}", damaged=False) from error
        reason = _why_undecodable(path, error)
        kind = WRONG_KIND if reason.startswith("not a video") else CANNOT_DECODE
        raise UnusableFile(path, reason, damaged=_is_damage(error), kind=kind) from error


def _is_damage(error: BaseException) -> bool:
    return isinstance(error, (av.error.InvalidDataError, av.error.EOFError, av.error.PatchWelcomeError))


def _is_cover_picture(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _other_content(container: Any) -> str:
    return " and ".join(sorted({stream.type for stream in container.streams})) or "an empty container"


def _why_undecodable(path: Path, error: BaseException) -> str:
    kind = kind_of_file(path)
    if kind == "an mp4/mov video":
        with path.open("rb") as file:
            has_index = any(b"moov" in block for block in _blocks_with_overlap(file))
        if not has_index:
            return "the file is cut off: its index, which is stored at the end, is missing"
        return "the file is cut off or damaged: its pictures cannot be decoded"
    if kind.endswith("video") or kind == "of an unknown kind":
        return f"cannot be decoded ({getattr(error, 'strerror', None) or error})"
    return f"not a video: it is {kind}"


def _blocks_with_overlap(file: Any, size: int = 1 << 20) -> Iterator[bytes]:
    tail = b""
    while block := file.read(size):
        yield tail + block
        tail = block[-4:]


def _duration(container: Any, stream: Any) -> float | None:
    """Length of the pictures in seconds as the header tells it, or None."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska and WebM
    if match := re.fullmatch(r"(\d+):(\d+):([\d.]+)", tag):
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return container.duration / 1e6 if container.duration else None


def _count_packets(path: Path) -> tuple[int, float]:
    """(frames, seconds) by walking the file without decoding, for containers without a length in the header."""
    count, end, start = 0, 0.0, None
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            time = float(packet.pts * packet.time_base)
            start = time if start is None else min(start, time)
            end = max(end, time + (float(packet.duration * packet.time_base) if packet.duration else 1 / rate))
            count += 1
    return count, end - (start or 0.0)


def probe(path: Path) -> VideoInfo:
    """Reads the header and the first picture. Raises UnusableFile."""
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise UnusableFile(path, "it holds no picture")
        _refuse_cut_off(path, stream)
        rotation = round(first.rotation / 90) * 90 % 360
        pixel_aspect = stream.sample_aspect_ratio
        width = round(first.width * pixel_aspect) if pixel_aspect else first.width
        height = first.height
        seconds, frames = _duration(container, stream), int(stream.frames)
    if seconds is None:
        frames, seconds = _count_packets(path)
    fps = float(rate) if rate else (frames / seconds if seconds else 25.0)
    if rotation % 180:
        width, height = height, width
    return VideoInfo(width, height, frames or max(1, round(seconds * fps)), fps, seconds, rotation)


def _refuse_cut_off(path: Path, stream: Any) -> None:
    """Where the container has an index of its packets (mp4, mov, avi), each must lie inside the file."""
    size = path.stat().st_size
    end = max((entry.pos + entry.size for entry in stream.index_entries if entry.pos >= 0), default=0)
    if end > size:
        raise UnusableFile(path, f"the file is cut off: {size:,} of at least {end:,} bytes are there")


def check_reaches(path: Path, seconds: float) -> None:
    """Raises UnusableFile unless the pictures up to `seconds` are there, without decoding them all.

    Decodes the key picture at or before that time and walks the packets from there.
    """
    with _opened(path) as (container, stream):
        target = _seek(container, stream, seconds)
        reached, frame_time = 0.0, 1 / float(stream.average_rate or stream.guessed_rate or 25)
        decoded = False
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            if packet.is_corrupt:
                break
            if not decoded:
                # The decoder may hold the picture back until it is flushed; an error surfaces either way.
                decoded = bool(packet.decode()) or packet.is_keyframe
            reached = max(reached, float(packet.pts * packet.time_base))
            if reached >= target - frame_time:
                return
        # A variable frame rate may hold the last picture for long; what was decoded then reaches the end.
        start = _start(stream)
        length = _duration(container, stream)
    complete = length is not None and _last_packet_shows_until(path) >= length - 2 * frame_time
    if not complete:
        end = max(0.0, reached - start)
        raise UnusableFile(path, f"the file is cut off: its pictures end after {end:.2f} s, {seconds:.2f} s are needed")


def _last_packet_shows_until(path: Path) -> float:
    return _count_packets(path)[1]


def _start(stream: Any) -> float:
    return float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0


def _seek(container: Any, stream: Any, seconds: float) -> float:
    """Moves to the key picture at or before `seconds`; returns that time on the stream's own clock."""
    target = _start(stream) + seconds
    container.seek(int(target / stream.time_base), stream=stream, backward=True)
    return target


def read_clip(
    path: Path,
    *,
    num_frames: int,
    framerate: float,
    frame_interval: int = 1,
    crop: CropPlan | None = None,
    start_seconds: float = 0.0,
) -> np.ndarray:
    """[num_frames, H, W, 3] uint8: the pictures nearest to start + k * frame_interval / framerate.

    Decodes from the key picture before the start to the last picture that is needed. Rotation is applied; `crop`
    resizes (bicubic, anti-aliased) and cuts, without it the size is the file's own. Raises UnusableFile, also when
    the pictures end before the last moment that is asked for. A picture file is a video of one frame.
    """
    if num_frames == 1 and is_picture(path):
        return read_picture(path, crop)
    moments = [start_seconds + k * frame_interval / framerate for k in range(num_frames)]
    chosen: list[np.ndarray] = []
    # One for all frames: each of them would make its own, with threads of its own, which takes longer than decoding.
    colours = VideoReformatter()
    with _opened(path) as (container, stream):
        if stream.width * stream.height < SMALL_PICTURE:
            stream.thread_count = 1
        for frame, repeat in _nearest(path, container, stream, moments):
            picture = _picture(frame, stream, crop, colours)
            chosen.extend([picture] * repeat)
    return np.stack(chosen)


def _timed_frames(path: Path, container: Any, stream: Any, start: float) -> Iterator[tuple[float, Any]]:
    """(seconds from the first picture, frame), from the key picture before `start`."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    # AVI stores no display times, and what libav makes up goes wrong with B-frames; its rate is constant by definition.
    counted = container.format.name == "avi"
    origin: float | None = _start(stream) if start > 0 and not counted else None
    if start > 0 and not counted:
        _seek(container, stream, start)
    for index, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise UnusableFile(path, f"the picture at {frame.time or index / rate:.2f} s is damaged")
        time = index / rate if counted or frame.time is None else frame.time
        origin = time if origin is None else origin
        yield time - origin, frame


def _nearest(path: Path, container: Any, stream: Any, moments: list[float]) -> Iterator[tuple[Any, int]]:
    """(frame, how many of the moments it is nearest to), in order. Ties go to the earlier picture."""
    done = 0
    before: tuple[float, Any] | None = None
    last_gap = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    for time, frame in _timed_frames(path, container, stream, moments[0]):
        if before is not None:
            # Every moment up to the midpoint between two pictures belongs to the earlier one. The rounding slack keeps
            # time bases that cannot express the rate from deciding a tie.
            count = 0
            while done < len(moments) and moments[done] - before[0] <= time - moments[done] + 1e-4:
                done, count = done + 1, count + 1
            if count:
                yield before[1], count
            if done == len(moments):
                return
            last_gap = max(last_gap, time - before[0])
        before = (time, frame)
    if before is None:
        raise UnusableFile(path, "it holds no picture")
    # The last picture shows for its own duration; a header may promise more than the file has.
    shown = float(before[1].duration * before[1].time_base) if before[1].duration else 0.0
    if moments[-1] > before[0] + max(shown, last_gap) + 1e-3:
        raise UnusableFile(path, f"its pictures end after {before[0]:.2f} s, {moments[-1]:.2f} s are needed")
    yield before[1], len(moments) - done


def _picture(frame: Any, stream: Any, crop: CropPlan | None, colours: VideoReformatter) -> np.ndarray:
    """One decoded frame as [H, W, 3] uint8: to standard RGB on black (any bit depth), rotated, resized, cropped."""
    array = _rgb(frame, colours)
    turns = round(frame.rotation / 90) % 4
    pixel_aspect = stream.sample_aspect_ratio
    square_pixels = not pixel_aspect or pixel_aspect == 1
    if crop is None and not square_pixels:
        wide = round(array.shape[1] * pixel_aspect)
        array = np.asarray(Image.fromarray(array).resize((wide, array.shape[0]), Image.Resampling.BICUBIC))
    array = np.ascontiguousarray(np.rot90(array, turns)) if turns else array
    if crop is None:
        return array
    if array.shape[:2] != (crop.resize_height, crop.resize_width):
        size = (crop.resize_width, crop.resize_height)
        array = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(array[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width])


def _rgb(frame: Any, colours: VideoReformatter) -> np.ndarray:
    """[H, W, 3] uint8 in BT.709, as a player shows it: wide range tone-mapped, transparent parts black."""
    # The convention of players for files that do not say: HD is BT.709, smaller is BT.601 (what libswscale assumes).
    assumed = BT709 if int(frame.colorspace) == UNSPECIFIED and frame.height >= 720 else None
    if int(frame.color_trc) in (PQ, HLG):
        deep = colours.reformat(frame, format="rgb48le", src_colorspace=assumed, threads=1).to_ndarray()
        return to_sdr(deep, int(frame.color_trc))
    if any(component.is_alpha for component in frame.format.components):
        clear = colours.reformat(frame, format="rgba", src_colorspace=assumed, threads=1).to_ndarray()
        opacity = clear[..., 3:].astype(np.uint16)
        return ((clear[..., :3] * opacity + 127) // 255).astype(np.uint8)
    return np.asarray(colours.reformat(frame, format="rgb24", src_colorspace=assumed, threads=1).to_ndarray())


# --- writing ----------------------------------------------------------------------------------------------------------


def write_mp4(path: Path, frames_THWC: np.ndarray, fps: float, crf: int = 12) -> None:
    """Writes [T, H, W, 3] uint8 as H.264 that browsers play; odd sizes gain one repeated row or column.

    The file appears whole or not at all.
    """
    assert frames_THWC.dtype == np.uint8 and frames_THWC.ndim == 4 and len(frames_THWC), "frames are [T, H, W, 3] uint8"
    height, width = frames_THWC.shape[1:3]
    # yuv420p shares colour between 2 x 2 pixels, so libx264 refuses odd sizes.
    frames = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
            stream.options = {"crf": str(crf), "preset": "medium"}
            # Said in the file, so that no player has to guess the colour matrix from the size.
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = BT709, 1, 1, 1
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=BT709)))
            container.mux(stream.encode(None))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_poster(path: Path, frames_THWC: np.ndarray) -> None:
    """Writes the middle frame of [T, H, W, 3] uint8 as a PNG; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}.tmp")
    try:
        Image.fromarray(frames_THWC[len(frames_THWC) // 2]).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
