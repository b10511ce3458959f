"""Caching end to end: encoders run for what is missing or changed, and for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data import encode
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.encode import clip_to_pixels
from simpletuner_dmd.data.video import UnusableFile
from simpletuner_dmd.demo import shapes
from tests.data.clips import Encoders, captioned, entry, make_config, prepared, prompts_entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clips, combinations = shapes.draw_many(3, seed=0)
    for index, (clip, combination) in enumerate(zip(clips, combinations, strict=True)):
        captioned(tmp_path / "d" / f"{index}.mp4", caption=combination.caption, pictures=clip)
    return tmp_path / "d"


def test_pixels_are_in_minus_one_to_one() -> None:
    frames = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, axis=3)
    assert clip_to_pixels(frames).tolist() == [[[[-1.0]], [[1.0]]]] * 3


def test_first_run_encodes_second_run_reads(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    prepared([entry(folder)], config, encoders)
    assert encoders.clips == 3
    captions = [c.caption for c in shapes.TRAINING_COMBINATIONS[:3]]
    assert sorted(encoders.prompts) == sorted(["ugly", "a validation prompt", *captions])
    again = Encoders(LatentGeometry())
    data = prepared([entry(folder)], config, again)
    assert (again.clips, again.prompts) == (0, [])
    batch = data.micro_batch(0, 0, 0, micro_batch_size=3, accumulation=1, world=1)
    assert batch.latents_BCFHW.shape == (3, 16, 3, 8, 8) and batch.latent_shape == (16, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "clips", "prompts"),
    [
        ("caption", 0, 1),
        ("video", 1, 0),
        ("renamed", 0, 0),
        ("resolution", 3, 0),
        ("frames", 3, 0),
        ("framerate", 3, 0),
        ("crop", 3, 0),
        ("text_fingerprint", 0, 5),
        ("vae_fingerprint", 3, 0),
        ("compress", 0, 0),
    ],
)
def test_only_what_changed_is_encoded_again(
    folder: Path, tmp_path: Path, encoders: Encoders, change: str, clips: int, prompts: int
) -> None:
    base: dict[str, Any] = {"crop": True, "crop_aspect": "square"}
    prepared([entry(folder, **base)], make_config(tmp_path), encoders)
    config, options = make_config(tmp_path), {}
    if change == "caption":
        (folder / "0.txt").write_text("something else")
    elif change == "video":
        captioned(folder / "0.mp4", caption=(folder / "0.txt").read_text())
    elif change == "renamed":
        (folder / "0.mp4").rename(folder / "9.mp4")
        (folder / "0.txt").rename(folder / "9.txt")
    elif change == "resolution":
        base["resolution"] = 48
    elif change == "frames":
        base["video"] = {"num_frames": 5}
    elif change == "framerate":
        config = make_config(tmp_path, framerate=18)
    elif change == "crop":
        base["resolution"], base["crop_style"] = "64x32", "corner"
    elif change == "compress":
        config = make_config(tmp_path, compress_disk_cache=True)
    else:
        options = {change: "another"}
    again = Encoders(LatentGeometry())
    prepared([entry(folder, **base)], config, again, **options)
    assert (again.clips, len(again.prompts)) == (clips, prompts)


def test_encoders_are_not_called_for_nothing(tmp_path: Path, config: TrainConfig, encoders: Encoders) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\none\n")
    data = prepared([prompts_entry(tmp_path / "p.txt")], config, encoders, needs_latents=False, encode_video=None)
    assert sorted(encoders.prompts) == ["a validation prompt", "one", "two", "ugly"], "each prompt once"
    batch = data.micro_batch(0, 0, 0, micro_batch_size=2, accumulation=1, world=1)
    assert batch.latents_BCFHW is None and batch.latent_shape == (16, 3, 4, 8)


def test_videos_without_latents_give_their_shape(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    data = prepared([entry(folder)], config, encoders, needs_latents=False, encode_video=None)
    batch = data.micro_batch(0, 0, 0, micro_batch_size=1, accumulation=1, world=1)
    assert encoders.clips == 0 and batch.latents_BCFHW is None and batch.latent_shape == (16, 3, 8, 8)


def test_prompts_cannot_give_latents(tmp_path: Path, config: TrainConfig, encoders: Encoders) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(UserError, match="needs videos"):
        prepared([prompts_entry(tmp_path / "p.txt")], config, encoders)


def test_capping_cuts_latents_to_their_first_frames(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    whole = prepared([entry(folder)], config, encoders)
    capped = prepared([entry(folder)], config, encoders, max_latent_frames=2)
    sizes = {"micro_batch_size": 3, "accumulation": 1, "world": 1}
    long, short = (data.micro_batch(0, 0, 0, **sizes) for data in (whole, capped))
    assert short.latent_shape == (16, 2, 8, 8)
    assert torch.equal(short.latents_BCFHW, long.latents_BCFHW[:, :, :2])
    assert encoders.clips == 3, "the cache is the same"


def test_a_damaged_cache_is_mended(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    before = prepared([entry(folder)], config, encoders)
    sizes = {"micro_batch_size": 3, "accumulation": 1, "world": 1}
    expected = before.micro_batch(0, 0, 0, **sizes)
    for pattern in ("vae/*/??/*.safetensors", "text/text-*.safetensors"):
        for file in (Path(config.cache_dir_text).parent).glob(pattern):
            file.write_bytes(file.read_bytes()[:-5])
    again = Encoders(LatentGeometry())
    after = prepared([entry(folder)], config, again)
    assert again.clips == 3 and len(again.prompts) >= 1
    batch = after.micro_batch(0, 0, 0, **sizes)
    assert torch.equal(batch.latents_BCFHW, expected.latents_BCFHW)
    assert torch.equal(batch.text.rows_BLD, expected.text.rows_BLD)


def test_what_was_encoded_before_a_failure_is_kept(folder: Path, tmp_path: Path, encoders: Encoders) -> None:
    config = make_config(tmp_path)
    calls = 0

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encoders.video(pixels)

    with pytest.raises(KeyboardInterrupt):
        prepared([entry(folder)], config, encoders, encode_video=failing)
    again = Encoders(LatentGeometry())
    prepared([entry(folder)], config, again)
    assert again.clips == 1


def test_text_encoded_before_a_failure_is_kept(tmp_path: Path, config: TrainConfig, encoders: Encoders) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(40)))

    def failing(prompts: list[str]) -> list[torch.Tensor]:
        if len(encoders.prompts) >= 32:
            raise RuntimeError("out of memory")
        return encoders.text(prompts)

    options: dict[str, Any] = {"needs_latents": False, "encode_video": None}
    with pytest.raises(RuntimeError):
        prepared([prompts_entry(tmp_path / "p.txt")], config, encoders, encode_text=failing, **options)
    again = Encoders(LatentGeometry())
    prepared([prompts_entry(tmp_path / "p.txt")], config, again, **options)
    assert len(again.prompts) == 42 - 32


@pytest.mark.parametrize("poison", ["nan", "shape"])
def test_wrong_latents_are_never_cached(folder: Path, config: TrainConfig, encoders: Encoders, poison: str) -> None:
    def wrong(pixels: torch.Tensor) -> torch.Tensor:
        latents = encoders.video(pixels)
        return latents * float("nan") if poison == "nan" else latents[:, :, :1]

    with pytest.raises(RuntimeError, match="the VAE gave"):
        prepared([entry(folder)], config, encoders, encode_video=wrong)
    assert not list(Path(config.cache_dir_vae).rglob("*.safetensors*"))


def test_zero_text_is_refused(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    with pytest.raises(RuntimeError, match="only zeros"):
        prepared([entry(folder)], config, encoders, encode_text=lambda ps: [torch.zeros(3, 6) for _ in ps])


def test_a_file_that_fails_only_while_encoding_is_listed(
    folder: Path, tmp_path: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = encode.read_clip

    def failing(path: Path, **options: Any) -> np.ndarray:
        if path.name == "1.mp4":
            raise UnusableFile(path, "the picture at 0.25 s is damaged")
        return genuine(path, **options)

    monkeypatch.setattr(encode, "read_clip", failing)
    config = make_config(tmp_path, delete_problematic_images=True)
    data = prepared([entry(folder)], config, encoders)
    assert any("1.mp4: the picture at 0.25 s is damaged" in notice for notice in data.notices)
    assert sum(len(group.samples) for group in data.groups) == 2
    assert (folder / "rejected" / "1.mp4").exists()


def test_vae_batches_are_of_one_shape(tmp_path: Path, encoders: Encoders) -> None:
    for index in range(5):
        size = (64, 64) if index % 2 else (96, 48)
        captioned(tmp_path / "d" / f"{index}.mp4", caption=str(index), size=size, frames=9 + index)
    seen: list[tuple[int, ...]] = []

    def watching(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(pixels.shape))
        return encoders.video(pixels)

    prepared([entry(tmp_path / "d")], make_config(tmp_path, vae_batch_size=2), encoders, encode_video=watching)
    assert sorted(shape[0] for shape in seen) == [1, 2, 2] and encoders.clips == 5
