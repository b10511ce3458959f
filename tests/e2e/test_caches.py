"""What is on disk is not made again, and what changed is."""

from pathlib import Path

import pytest

from simpletuner_dmd.wan import encoders
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import assert_same_bits, videos_dataset
from tests.support.videos import write_moving_square, write_small_set


def forbid_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an encoder was loaded although everything is cached")

    monkeypatch.setattr(encoders, "load_vae", refuse)
    monkeypatch.setattr(encoders, "load_text_encoder", refuse)


def test_second_start_loads_no_encoder(
    make_project: ProjectMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = write_small_set(tmp_path / "videos")
    project = make_project(datasets=videos_dataset(videos), distillation={"rollout": "data_latent"})
    assert project.train() == 0
    before = project.exported()
    forbid_encoders(monkeypatch)
    assert project.train("resume_from_checkpoint=none") == 0
    assert_same_bits(project.exported(), before)


def test_prompts_alone_never_load_the_vae(make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    text = encoders.load_text_encoder
    forbid_encoders(monkeypatch)
    monkeypatch.setattr(encoders, "load_text_encoder", text)
    assert make_project().train() == 0


def test_a_changed_video_and_a_changed_caption_are_encoded_again(make_project: ProjectMaker, tmp_path: Path) -> None:
    videos = write_small_set(tmp_path / "videos", 2)
    project = make_project(datasets=videos_dataset(videos), distillation={"rollout": "data_latent"})
    assert project.train() == 0

    def cached(pattern: str) -> set[Path]:
        return set((project.folder / "cache").rglob(pattern))

    latents, texts = cached("*.safetensors*"), cached("*.pack")
    write_moving_square(videos / "clip-0.mp4", caption="something else", level=60)
    assert project.train("resume_from_checkpoint=none") == 0
    assert len(cached("*.safetensors*") - latents) == 1
    assert len(cached("*.pack") - texts) == 1
