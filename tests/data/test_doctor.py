"""The doctor finds each mistake that was made elsewhere, and says nothing about a healthy cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.doctor import Vae, examine_clips, examine_spread, examine_text, padding_is_zero, psnr
from simpletuner_dmd.data.store import LatentStore
from simpletuner_dmd.data.text_store import TextStore, text_key
from simpletuner_dmd.demo import path as demo_path
from tests.data.clips import Encoders, captioned, entry, prepared

# Of Wan's VAE, from the `vae/config.json` of Wan2.1-T2V-1.3B-Diffusers.
WAN_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916]  # fmt: skip
WAN_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]  # fmt: skip
PROMPTS = ["a cat surfs on a wave", "two robots dance in the rain", "fog over a lake at dawn"]


def text_store(folder: Path, rows: list[Tensor]) -> TextStore:
    store = TextStore(folder, compress=False)
    store.save({text_key(prompt, "umt5"): row for prompt, row in zip(PROMPTS, rows, strict=True)})
    return store


def random_rows(*lengths: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(length, 32, generator=source) for length in lengths]


def test_healthy_text(tmp_path: Path) -> None:
    assert examine_text(text_store(tmp_path, random_rows(5, 7, 5)), PROMPTS, "umt5", 16) == []


@pytest.mark.parametrize("mistake", ["zero", "nan", "alike", "too long"])
def test_text_that_is_no_use(tmp_path: Path, mistake: str) -> None:
    rows = random_rows(5, 7, 5)
    if mistake == "zero":
        rows[1] = torch.zeros(7, 32)
    elif mistake == "nan":
        rows[2][0, 0] = float("nan")
    elif mistake == "alike":  # what an embedding table of zeros leaves: every token embeds alike
        rows = [row[:1].expand(len(rest), -1) for row, rest in zip(rows[:1] * 3, rows, strict=True)]
    else:
        rows[0] = random_rows(20)[0]
    words = {"too long": "20 rows", "alike": "does not see the words"}.get(mistake, "zero or")
    with pytest.raises(UserError, match=words):
        examine_text(text_store(tmp_path, rows), PROMPTS, "umt5", 16)


def test_padding_kept_as_text_is_told(tmp_path: Path) -> None:
    rows = random_rows(5, 7, 5)
    rows[1] = torch.cat([rows[1], torch.zeros(9, 32)])
    (warning,) = examine_text(text_store(tmp_path, rows), PROMPTS, "umt5", 16)
    assert "9 rows of zeros" in warning and PROMPTS[1] in warning


def test_prompts_that_differ_in_one_unknown_word_are_only_told(tmp_path: Path) -> None:
    row, store = random_rows(5)[0], TextStore(tmp_path, compress=False)
    prompts = ["a square moves right 0", "a square moves right 1", "a square moves right"]
    store.save({text_key(prompt, "umt5"): row for prompt in prompts})
    assert len(examine_text(store, prompts, "umt5", 16)) == 3


def test_padding_must_be_zero() -> None:
    rows = torch.zeros(2, 4, 3)
    rows[0, :3], rows[1, :2] = 1, 1
    assert padding_is_zero(rows, [3, 2]) and not padding_is_zero(rows, [2, 2])


# --- latents ----------------------------------------------------------------------------------------------------------


def video_latents(count: int = 4) -> list[Tensor]:
    """Normalised latents as videos give them: each has its own mean and spread per channel."""
    source = torch.Generator().manual_seed(1)
    return [
        torch.randn(16, 5, 8, 8, generator=source) * (0.5 + torch.rand(16, 1, 1, 1, generator=source))
        + 0.5 * torch.randn(16, 1, 1, 1, generator=source)
        for _ in range(count)
    ]


def test_spread_of_each_mistake() -> None:
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    right = video_latents()
    cases = {
        "were not applied": [x * std + mean for x in right],
        "were applied twice": [(x - mean) / std for x in right],
        "multiplied instead of divided": [(x * std + mean - mean) * std for x in right],
        "far from mean 0": [x + 20 for x in right],
        "": right,
    }
    for words, latents in cases.items():
        warnings = examine_spread(latents, WAN_STD)
        assert any(words in warning for warning in warnings) if words else warnings == [], (words, warnings)


def test_a_vae_without_statistics_cannot_be_mistaken() -> None:
    assert examine_spread(video_latents(), [1.0] * 16) == []


def test_the_spread_of_the_demo_is_healthy() -> None:
    """Real latents: the clips that ship with the package, through the VAE that ships with it."""
    from simpletuner_dmd.data.encode import clip_to_pixels
    from simpletuner_dmd.data.video import read_clip
    from simpletuner_dmd.wan.encoders import VideoCodec
    from simpletuner_dmd.wan.sources import ModelSource

    model = str(demo_path.model_path())
    config = TrainConfig(pretrained_model_name_or_path=model)
    codec = VideoCodec(ModelSource.of(config), device=torch.device("cpu"))
    files = sorted(demo_path.data_path().glob("*.mp4"))[:4]
    pixels = [clip_to_pixels(read_clip(file, num_frames=9, framerate=16)) for file in files]
    latents = [codec.encode(clip[None])[0] for clip in pixels]
    assert examine_spread(latents, codec.config["latents_std"]) == []
    assert min(psnr(codec.decode(x[None])[0], clip) for x, clip in zip(latents, pixels, strict=True)) > 20


class Codec:
    """A VAE that loses nothing: latents are the pixels of every fourth frame, eight times smaller."""

    def __init__(self) -> None:
        self.decoded = 0

    def encode(self, pixels_B3THW: Tensor) -> Tensor:
        picked = pixels_B3THW[:, :1, ::4]
        small = torch.nn.functional.interpolate(picked, size=(picked.shape[2], *(s // 8 for s in picked.shape[3:])))
        return small.expand(-1, 16, -1, -1, -1).contiguous()

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        self.decoded += 1
        frames, height, width = latents_BCFHW.shape[2:]
        size = (4 * (frames - 1) + 1, 8 * height, 8 * width)
        return torch.nn.functional.interpolate(latents_BCFHW[:, :3], size=size)

    def vae(self, fingerprint: str = "vae-a") -> Vae:
        return Vae(fingerprint, self.encode, self.decode, [0.0] * 16, [1.0] * 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        captioned(tmp_path / "d" / f"{index}.mp4", caption=PROMPTS[index])
    return tmp_path / "d"


def test_a_healthy_cache_is_decoded_once(folder: Path, config: TrainConfig) -> None:
    for vae, expected in (("vae-a", 2), ("vae-a", 0), ("vae-b", 2)):
        codec = Codec()
        encoders = Encoders(LatentGeometry())
        data = prepared([entry(folder)], config, encoders, encode_video=codec.encode, vae=codec.vae(vae),
                        vae_fingerprint=vae)  # fmt: skip
        assert codec.decoded == expected and data.findings == []


def test_pixels_in_the_wrong_range_are_found(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    """The mistake that washed out other projects' runs: pixels in [0, 1] instead of [-1, 1]."""
    codec = Codec()
    with pytest.raises(UserError, match="decode to something else than the file shows"):
        prepared([entry(folder)], config, encoders, encode_video=lambda pixels: codec.encode((pixels + 1) / 2),
                 vae=codec.vae())  # fmt: skip


def test_a_poor_vae_is_told_and_remembered(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    codec = Codec()
    poor = Vae("vae-a", codec.encode, lambda x: codec.decode(x) * 0 + 1, [0.0] * 16, [1.0] * 16)
    for decoded in (4, 4):
        data = prepared([entry(folder)], config, encoders, encode_video=codec.encode, vae=poor)
        assert len(data.findings) == 2 and "comes back from the VAE at" in data.findings[0]
        assert any("comes back from the VAE" in notice for notice in data.notices)
        assert codec.decoded == decoded, "looked at once"


def test_only_the_main_process_decodes(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    codec = Codec()
    prepared([entry(folder)], config, encoders, encode_video=codec.encode, vae=codec.vae(), main=False)
    assert codec.decoded == 0


def test_files_that_are_gone_are_not_compared(folder: Path, config: TrainConfig, encoders: Encoders) -> None:
    codec = Codec()
    data = prepared([entry(folder)], config, encoders, encode_video=codec.encode)
    store: LatentStore = next(iter(data.latent_stores.values()))
    from simpletuner_dmd.data.manifest import manifest_path, restore

    settings = data.scans[0].settings
    _, clips = restore(manifest_path(settings), entry(folder), config, LatentGeometry())
    for file in folder.glob("*.mp4"):
        file.unlink()
    assert examine_clips(store, clips, codec.vae()) == [] and codec.decoded == 0


def test_psnr() -> None:
    assert psnr(torch.zeros(3), torch.zeros(3)) == float("inf")
    assert psnr(torch.zeros(3), torch.full((3,), 0.2)) == pytest.approx(20.0, abs=1e-4)
