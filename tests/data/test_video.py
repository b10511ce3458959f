"""Decoding: the right pictures at the right times, and a plain reason for every file that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from simpletuner_dmd.data.buckets import SizeRules, crop_plan
from simpletuner_dmd.data.hdr import HLG, PQ, hlg_to_scene, pq_to_nits, to_sdr
from simpletuner_dmd.data.pictures import probe_picture, read_picture
from simpletuner_dmd.data.video import UnusableFile, check_reaches, probe, read_clip, write_mp4, write_poster
from simpletuner_dmd.demo import shapes
from tests.data.clips import levels_to_indices, write_video


def test_probe(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "a.mp4", frames=24, fps=24, size=(96, 64)))
    assert (info.width, info.height, info.frames, info.rotation) == (96, 64, 24, 0)
    assert info.fps == 24 and info.seconds == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("fps", [8, 16, 24, 30, 48])
def test_resampling_picks_the_nearest_pictures(tmp_path: Path, fps: int) -> None:
    path = write_video(tmp_path / "a.mp4", frames=50, fps=fps)
    clip = read_clip(path, num_frames=13, framerate=16)
    expected = [int(np.ceil(k * fps / 16 - 0.5)) for k in range(13)]  # nearest, ties to the earlier
    assert levels_to_indices(clip) == expected


def test_frame_interval_is_a_stride_in_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=40, fps=16)
    assert levels_to_indices(read_clip(path, num_frames=5, framerate=16, frame_interval=3)) == [0, 3, 6, 9, 12]


def test_start_seeks(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=50, fps=16)
    assert levels_to_indices(read_clip(path, num_frames=5, framerate=16, start_seconds=30 / 16)) == [30, 31, 32, 33, 34]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pictures libav decoded, one number per file that was opened."""
    counts: list[int] = []
    genuine = av.open

    class Counting:
        """A container that counts what comes out of `decode`, and of the packets of `demux`."""

        def __init__(self, container: Any) -> None:
            self._container = container
            counts.append(0)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self._container.close()

        def decode(self, stream: Any) -> Iterator[Any]:
            for frame in self._container.decode(stream):
                counts[-1] += 1
                yield frame

        def demux(self, stream: Any) -> Iterator[Any]:
            for packet in self._container.demux(stream):
                yield CountingPacket(packet)

    class CountingPacket:
        def __init__(self, packet: Any) -> None:
            self._packet = packet

        def __getattr__(self, name: str) -> Any:
            return getattr(self._packet, name)

        def decode(self) -> list[Any]:
            frames = list(self._packet.decode())
            counts[-1] += len(frames)
            return frames

    monkeypatch.setattr(av, "open", lambda *arguments, **options: Counting(genuine(*arguments, **options)))
    yield counts


def test_no_more_is_decoded_than_is_needed(tmp_path: Path, decoded: list[int]) -> None:
    """Of 400 pictures with a key picture every 20: counted, because a slow decoder gives the same clip."""
    pictures = np.broadcast_to((np.arange(400) // 2).astype(np.uint8).reshape(-1, 1, 1, 1), (400, 64, 64, 3))
    path = write_video(tmp_path / "a.mp4", frames=400, fps=16, gop=20, pictures=pictures)
    decoded.clear()
    probe(path)
    check_reaches(path, 8 / 16)
    assert sum(decoded) <= 2, "to judge a file, its first picture, and one near the last moment"
    decoded.clear()
    check_reaches(path, 399 / 16)
    assert sum(decoded) <= 1, "at the end of the file too"
    decoded.clear()
    assert len(read_clip(path, num_frames=9, framerate=16)) == 9
    assert decoded == [10], "the nine and the one behind them, which says where the ninth ends"
    decoded.clear()
    read_clip(path, num_frames=5, framerate=4)
    assert decoded == [18], "to the last that is needed, of a file of 400"
    decoded.clear()
    read_clip(path, num_frames=5, framerate=16, start_seconds=330 / 16)
    assert decoded[0] <= 10 + 5 + 1, "from the key picture before the start, at 320"


def test_variable_frame_rate(tmp_path: Path) -> None:
    times = [0.0, 0.05, 0.1, 0.6, 0.61, 0.62, 1.2]
    path = write_video(tmp_path / "a.mkv", frames=7, fps=25, times=times)
    moments = [k / 8 for k in range(9)]
    expected = [int(np.argmin([abs(time - moment) for time in times])) for moment in moments]
    assert levels_to_indices(read_clip(path, num_frames=9, framerate=8)) == expected


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a.mov", "a.ts"])
def test_containers(tmp_path: Path, name: str) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_video(tmp_path / name, frames=20, fps=16, codec=codec)
    assert probe(path).seconds == pytest.approx(20 / 16, abs=0.07)
    check_reaches(path, 19 / 16)
    assert levels_to_indices(read_clip(path, num_frames=17, framerate=16)) == list(range(17))


def test_gif(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 64), (20 + 4 * k,) * 3) for k in range(12)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    assert probe(tmp_path / "a.gif").seconds == pytest.approx(1.2, abs=0.11)
    assert levels_to_indices(read_clip(tmp_path / "a.gif", num_frames=9, framerate=10)) == list(range(9))


def test_a_last_picture_that_is_held_for_long(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", frames=5, times=[0.0, 0.1, 0.2, 0.3, 2.0])
    check_reaches(path, 1.9)
    assert levels_to_indices(read_clip(path, num_frames=5, framerate=2)) == [0, 3, 3, 4, 4]


def test_ten_bit_and_alpha(tmp_path: Path) -> None:
    deep = write_video(tmp_path / "deep.mp4", pixel_format="yuv420p10le")
    assert levels_to_indices(read_clip(deep, num_frames=5, framerate=16)) == [0, 1, 2, 3, 4]
    clear = write_video(tmp_path / "clear.mkv", codec="ffv1", pixel_format="yuva420p")
    assert read_clip(clear, num_frames=5, framerate=16).shape == (5, 64, 64, 3)


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[..., :3] = 200
    picture[:32, :, 3] = 255
    picture[32:, :, 3] = 128
    path = tmp_path / "half.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgra"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="bgra")))
        container.mux(stream.encode(None))
    shown = read_clip(path, num_frames=1, framerate=16)[0]
    assert (shown[:32] == 200).all() and (shown[32:] == round(200 * 128 / 255)).all()


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_wide_range_is_shown_as_a_screen_shows_it(tmp_path: Path, transfer: int) -> None:
    """Levels of grey in a file that says PQ or HLG, against the curve applied by hand."""
    levels = [200, 400, 600, 800]  # of 1023
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "gbrp10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 0, 2
        for level in levels:
            plane = np.full((64, 64, 3), round(level / 1023 * 65535), np.uint16)
            frame = av.VideoFrame.from_ndarray(plane, format="rgb48le").reformat(format="gbrp10le")
            frame.color_trc, frame.color_primaries = transfer, 9
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown = read_clip(path, num_frames=4, framerate=16)
    for level, frame in zip(levels, shown, strict=True):
        code = np.full((1, 1, 3), round(level / 1023 * 65535), np.uint16)
        assert np.abs(frame.astype(int) - to_sdr(code, transfer)[0, 0].astype(int)).max() <= 1


def test_the_curves_of_wide_range() -> None:
    # ST 2084 and BT.2100, tables of their annexes: 100 cd/m² is code .508, 203 is .581, 1000 is .752, 10000 is 1.
    codes = np.array([0.5081, 0.5806, 0.7518, 1.0])
    assert pq_to_nits(codes) == pytest.approx([100, 203, 1000, 10000], rel=2e-3)
    assert hlg_to_scene(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 / 12, 1], abs=1e-6)

    def grey(code: float, transfer: int) -> np.ndarray:
        return to_sdr(np.full((1, 1, 3), round(code * 65535), np.uint16), transfer)[0, 0]

    # Below the knee light is only re-encoded: 26 cd/m² is .1281 of white, shown at its 2.4th root.
    code = float(np.interp(26, pq_to_nits(np.linspace(0, 1, 65536)), np.linspace(0, 1, 65536)))
    assert grey(code, PQ) == pytest.approx([255 * (26 / 203) ** (1 / 2.4)] * 3, abs=1)
    # HLG's own diffuse white is 75% code, PQ's 58%: both are the same light here.
    assert np.abs(grey(0.75, HLG).astype(int) - grey(0.5806, PQ)).max() <= 2
    brighter = [int(grey(code, PQ)[0]) for code in np.linspace(0, 1, 60)]
    assert brighter == sorted(brighter)
    # 1000 cd/m²: 4.926 of white is 14.09 knees above the knee, so .7 + .3 * 14.09 / 15.09 = .980 of white.
    assert grey(0.7518, PQ) == pytest.approx([255 * 0.980 ** (1 / 2.4)] * 3, abs=1)


def test_a_wide_colour_keeps_its_hue() -> None:
    red = np.zeros((1, 1, 3), np.uint16)
    red[..., 0] = round(0.65 * 65535)
    shown = to_sdr(red, PQ)[0, 0]
    assert shown[0] > 200 and shown[1] == 0 and shown[2] == 0


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_videos_of_one_frame(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert probe_picture(tmp_path / "a.png") == (60, 40)
    assert np.array_equal(read_clip(tmp_path / "a.png", num_frames=1, framerate=16), pixels[None])
    plan = crop_plan(60, 40, SizeRules(32.0), "x")
    cut = read_clip(tmp_path / "a.png", num_frames=1, framerate=16, crop=plan)[0]
    whole = Image.fromarray(pixels).resize((plan.resize_width, plan.resize_height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
    assert np.array_equal(cut, expected)


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    clear = np.full((8, 8, 4), 200, np.uint8)
    clear[:4, :, 3], clear[4:, :, 3] = 255, 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    shown = read_picture(tmp_path / "clear.png")[0]
    assert (shown[:4] == 200).all() and (shown[4:] == 0).all()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert (read_picture(tmp_path / "deep.png") == round(40000 / 257)).all()
    sideways = Image.fromarray(np.concatenate([np.zeros((8, 8, 3), np.uint8), np.full((8, 24, 3), 255, np.uint8)], 1))
    exif = sideways.getexif()
    exif[0x0112] = 6  # turned a quarter clockwise to be shown, so the dark left side is on top
    sideways.save(tmp_path / "sideways.png", exif=exif)
    assert probe_picture(tmp_path / "sideways.png") == (8, 32)
    turned = read_picture(tmp_path / "sideways.png")[0]
    assert turned.shape == (32, 8, 3) and turned[:8].max() == 0 and turned[8:].min() == 255


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "empty (0 bytes)"),
        ("text.png", b"hello", "not a picture: it is text"),
        ("head.png", b"\x89PNG\r\n\x1a\nnothing", "cannot be decoded"),
        ("cut.jpg", None, "cut off or damaged"),
        ("moving.gif", b"GIF89a", "not a picture: it is a GIF video"),
    ],
)
def test_unusable_pictures_say_why(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:900]
    path.write_bytes(content)
    with pytest.raises(UnusableFile) as caught:
        probe_picture(path)
    assert words in caught.value.reason


@pytest.mark.parametrize("set_rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, set_rotation: int) -> None:
    # The upper left corner is white; the stored matrix says where it is shown.
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :16] = 255
    path = write_video(tmp_path / "a.mp4", size=(64, 32), rotation=set_rotation, pictures=np.stack([picture] * 9))
    info = probe(path)
    shown = read_clip(path, num_frames=1, framerate=16)[0]
    assert shown.shape[:2] == (info.height, info.width)
    a, b, c, d = _matrix(path)
    # QuickTime: a stored point (x, y) is shown at (a x + c y, b x + d y), y downwards, up to a shift.
    corner = np.array([-1.0, -1.0])
    x, y = a * corner[0] + c * corner[1], b * corner[0] + d * corner[1]
    rows = slice(0, 8) if y < 0 else slice(-8, None)
    columns = slice(0, 8) if x < 0 else slice(-8, None)
    assert shown[rows, columns].mean() > 200
    assert shown.mean() < 80
    plan = crop_plan(info.width, info.height, SizeRules(32.0), "x")
    cropped = read_clip(path, num_frames=1, framerate=16, crop=plan)[0]
    assert cropped.shape[:2] == (plan.height, plan.width) and cropped[rows, columns].mean() > 150


def _matrix(path: Path) -> list[float]:
    """a, b, c, d of the track header, read from the bytes: independent of libav's sign conventions."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4
    start = at + (40 if data[at] == 0 else 52)
    values = np.frombuffer(data[start : start + 36], dtype=">i4") / 65536
    return [values[0], values[1], values[3], values[4]]


def test_odd_sizes_survive_a_round_trip(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 1, 1, 3), dtype=np.uint8) * np.ones((1, 33, 35, 1), np.uint8)
    write_mp4(tmp_path / "odd.mp4", frames, 16)
    back = read_clip(tmp_path / "odd.mp4", num_frames=3, framerate=16)
    assert back.shape == (3, 34, 36, 3)
    assert np.abs(back[:, :33, :35].astype(int) - frames).mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == ["odd.mp4"], "no temporary file is left"


def test_demo_clip_round_trip_keeps_its_colours(tmp_path: Path) -> None:
    clip = shapes.draw_clip(shapes.TRAINING_COMBINATIONS[0], np.random.default_rng(1))
    write_mp4(tmp_path / "a.mp4", clip, shapes.FRAMERATE)
    back = read_clip(tmp_path / "a.mp4", num_frames=len(clip), framerate=shapes.FRAMERATE)
    error = np.mean((back.astype(float) - clip) ** 2)
    assert 10 * np.log10(255**2 / error) > 27, "colour is stored at half size, so edges lose a little"
    write_poster(tmp_path / "a.png", clip)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), clip[len(clip) // 2])


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simpletuner_dmd.data.video.os.fsync", full)
    with pytest.raises(OSError):
        write_mp4(tmp_path / "a.mp4", np.zeros((3, 32, 32, 3), np.uint8), 16)
    assert list(tmp_path.iterdir()) == []


# --- files that cannot be used ----------------------------------------------------------------------------------------


def truncated(path: Path, share: float = 0.6, **options: object) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    write_video(path, frames=40, pictures=frames, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def reason(path: Path) -> str:
    with pytest.raises(UnusableFile) as caught:
        check_reaches(path, 39 / 16 if probe(path) else 0)
    return caught.value.reason


def test_truncated_mp4_without_its_index(tmp_path: Path) -> None:
    assert "cut off" in reason(truncated(tmp_path / "a.mp4"))


def test_truncated_mp4_with_its_index_in_front(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames=40, pictures=_noise(40))
    front = tmp_path / "front.mp4"
    with av.open(str(whole)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    front.write_bytes(front.read_bytes()[: front.stat().st_size * 6 // 10])
    assert "cut off" in reason(front)


def test_truncated_matroska(tmp_path: Path) -> None:
    path = truncated(tmp_path / "a.mkv")
    assert "cut off" in reason(path)
    with pytest.raises(UnusableFile):
        read_clip(path, num_frames=40, framerate=16)


def _noise(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=40, pictures=_noise(40))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40_000] = np.random.default_rng(1).bytes(40_000)  # several pictures with their lengths
    path.write_bytes(data)
    with pytest.raises(UnusableFile):
        read_clip(path, num_frames=40, framerate=16)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.mp4", b"", "empty"),
        ("a.mp4", b"this is a plain note\n" * 20, "text"),
        ("a.mp4", "schöne Grüße\n".encode() * 900, "text"),
        ("a.mp4", b"<!DOCTYPE html><html>not found</html>", "web page"),
        ("a.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS"),
        ("a.zip", b"PK\x03\x04" + bytes(200), "zip"),
        ("a.mp4", bytes(range(256)) * 8, "cannot be decoded"),
    ],
)
def test_not_a_video(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnusableFile) as caught:
        probe(path)
    assert words in caught.value.reason


def test_pictures_and_sound_are_no_videos(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.jpg")
    for name, words in (("a.png", "PNG"), ("b.jpg", "JPEG")):
        with pytest.raises(UnusableFile, match=words):
            probe(tmp_path / name)
    with av.open(str(tmp_path / "c.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnusableFile, match="only audio"):
        probe(tmp_path / "c.m4a")


def test_reading_past_the_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=9)
    with pytest.raises(UnusableFile, match="end after"):
        read_clip(path, num_frames=30, framerate=16)


def test_out_of_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setattr("simpletuner_dmd.data.video._picture", _raise_memory_error)
    with pytest.raises(MemoryError):
        read_clip(path, num_frames=5, framerate=16)


def _raise_memory_error(*_: object) -> None:
    raise av.error.MemoryError(12, "Cannot allocate memory")
