"""What is on disk is not made again, and what changed is."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.data.store import decode_tensor
from simpletuner_dmd.wan import encoders
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import Project, assert_same_bits, environment, frame_count, frame_size, videos_dataset
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

    latents, texts = cached("??/*.safetensors*"), cached("text-*.safetensors")
    write_moving_square(videos / "clip-0.mp4", caption="something else", level=60)
    assert project.train("resume_from_checkpoint=none") == 0
    assert len(cached("??/*.safetensors*") - latents) == 1
    assert len(cached("text-*.safetensors") - texts) == 1


# --- the raw files are gone -------------------------------------------------------------------------------------------


def test_training_goes_on_without_the_raw_files(
    make_project: ProjectMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_small_set(tmp_path / "videos")
    project = make_project(datasets=videos_dataset(videos), distillation={"rollout": "data_latent"})
    assert project.train() == 0
    before = project.exported()
    shutil.rmtree(videos)
    forbid_encoders(monkeypatch)
    assert project.check() == 0
    assert project.train("resume_from_checkpoint=none") == 0
    assert_same_bits(project.exported(), before)
    assert "the video files are gone, the cache stands in" in capsys.readouterr().out
    # Other pixels than those that are cached cannot be made any more.
    assert project.train("framerate=8", "resume_from_checkpoint=none") == 2
    assert "made with other settings: framerate" in capsys.readouterr().err
    shutil.rmtree(project.folder / "cache" / "vae")
    assert project.train("resume_from_checkpoint=none") == 2


def test_pictures_are_inspected_and_outlive_their_files(
    make_project: ProjectMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (60 * number, 90, 30)).save(folder / f"{number}.png")
    (folder / "metadata.csv").write_text("file_name,caption\n0.png,dark\n1.png,bright\n")
    entry = {"dataset_type": "image", "caption_strategy": "csv", "video": None}
    project = make_project(
        datasets=videos_dataset(folder, **entry), distillation={"rollout": "data_latent"}, train_batch_size=1
    )
    assert cache(project) == 0
    assert cache(project, "inspect", "--out", str(tmp_path / "seen")) == 0
    assert [frame_count(video) for video in sorted((tmp_path / "seen").rglob("*.mp4"))] == [1, 1]
    for picture in folder.glob("*.png"):
        picture.unlink()
    forbid_encoders(monkeypatch)
    assert cache(project) == 0, "the table that is left is no file to encode"


# --- the verb ---------------------------------------------------------------------------------------------------------


def cache(project: Project, *arguments: str) -> int:
    return main(["cache", *arguments, "--config", str(project.config)])


def test_cache_fills_what_training_needs(
    make_project: ProjectMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_small_set(tmp_path / "videos")
    (videos / "broken.mp4").write_bytes(b"no video")
    project = make_project(datasets=videos_dataset(videos), distillation={"rollout": "data_latent"})
    capsys.readouterr()
    assert cache(project, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"]["prompts"] == document["text"]["encoded"] == 5
    assert document["estimate"]["clips"] == 4 and document["estimate"]["latent_bytes"] == sum(
        tensor.numel() * 4 for tensor in latents_on_disk(project)
    )
    (dataset,) = document["datasets"]
    assert (dataset["usable"], dataset["latents"], document["latents_encoded"]) == (4, 4, 4)
    assert dataset["left_out"][0]["path"].endswith("broken.mp4")
    forbid_encoders(monkeypatch)
    assert cache(project) == 0
    said = capsys.readouterr().out
    assert said.index("From nothing: 4 captions, about") < said.index("5 prompts, 0 encoded")
    assert "latents of 4 clips, about" in said and "4 cached in" in said and "broken.mp4" in said
    assert project.train() == 0


def latents_on_disk(project: Project) -> list[torch.Tensor]:
    files = (project.folder / "cache" / "vae").rglob("??/*.safetensors*")
    return [decode_tensor(file.read_bytes())[0] for file in files]


def test_all_also_caches_latents_that_no_loss_reads(
    make_project: ProjectMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_small_set(tmp_path / "videos", 2)
    project = make_project(datasets=videos_dataset(videos))
    assert cache(project) == 0
    assert "no latents needed" in capsys.readouterr().out
    assert cache(project, "inspect") == 2
    assert "cache --all" in capsys.readouterr().err
    assert cache(project, "--all", "train_batch_size=1") == 0
    assert "2 cached in" in capsys.readouterr().out
    assert cache(project, "inspect", "--out", str(tmp_path / "seen"), "--limit", "1") == 0
    (video,) = (tmp_path / "seen").rglob("*.mp4")
    assert (frame_count(video), frame_size(video)) == (5, (32, 32))
    assert video.with_suffix(".txt").read_text() == "a square moves right 0\n"
    assert cache(project, "clear") == 2
    assert cache(project, "max_train_steps=0.5x") == 2


@pytest.mark.slow
def test_two_processes_fill_one_cache(make_project: ProjectMaker, tmp_path: Path) -> None:
    videos = write_small_set(tmp_path / "videos")
    options = {"datasets": videos_dataset(videos), "distillation": {"rollout": "data_latent"}, "vae_batch_size": 1}
    alone, shared = make_project("alone", **options), make_project("shared", num_processes=2, **options)
    assert cache(alone) == 0
    command = [*shared.command()[:3], "cache", "--config", str(shared.config), "--json"]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["datasets"][0]["latents"] == 4
    for file in (alone.folder / "cache" / "vae").rglob("??/*.safetensors*"):
        twin = shared.folder / "cache" / file.relative_to(alone.folder / "cache")
        left, right = (decode_tensor(path.read_bytes())[0] for path in (file, twin))
        assert torch.allclose(left, right, atol=1e-5)
