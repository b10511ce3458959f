"""Training data made by the teacher: right, resumable, and usable as a dataset in both forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner_dmd.cli import synthesise
from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.config import load
from simpletuner_dmd.data.manifest import MADE_HERE
from simpletuner_dmd.data.store import LatentStore
from simpletuner_dmd.data.video import read_clip, write_mp4
from simpletuner_dmd.flow import TextEmbedding, euler_sigmas
from simpletuner_dmd.validation.render import to_frames
from simpletuner_dmd.validation.sampling import Sampler, reference_noise
from simpletuner_dmd.wan import encoders
from simpletuner_dmd.wan.loading import load_transformer
from tests.e2e.conftest import ProjectMaker
from tests.e2e.test_caches import forbid_encoders
from tests.support.runs import PROMPTS, Project, videos_dataset

PROMPTS_FILE = "prompts.txt"


@pytest.fixture
def project(make_project: ProjectMaker) -> Project:
    return make_project(benchmark_guidance=2.0, benchmark_num_inference_steps=3)


def make(project: Project, out: Path, *arguments: str) -> int:
    prompts = ["--prompts", str(project.folder / PROMPTS_FILE), "--out", str(out)]
    return main(["synthesise", "--config", str(project.config), *prompts, *arguments])


def record(out: Path) -> dict[str, dict[str, object]]:
    document = json.loads((out / synthesise.RECORD).read_text(encoding="utf-8"))
    return {row["prompt"]: row for row in document["samples"]}


def by_hand(project: Project, prompt: str, seed: int) -> torch.Tensor:
    """The teacher's latents of one prompt, from the stock transformer and Euler written out."""
    assembly = Assembly(load(config=str(project.config)), torch.device("cpu"))
    transformer = load_transformer(assembly.source, torch.float32)
    texts = assembly.embed([prompt, assembly.negative_prompt])
    x, _ = reference_noise(seed, (1, 16, 2, 4, 4))
    sigmas = [*euler_sigmas(3, 3.0), 0.0]

    def velocity(text: TextEmbedding, sigma: float) -> torch.Tensor:
        return transformer(x, torch.tensor([1000 * sigma]), text.rows_BLD, return_dict=False)[0]

    with torch.no_grad():
        for sigma, to in zip(sigmas, sigmas[1:], strict=False):
            unconditional = velocity(texts[assembly.negative_prompt], sigma)
            x = x + (to - sigma) * (unconditional + 2.0 * (velocity(texts[prompt], sigma) - unconditional))
    return x[0]


def test_latents_are_the_teachers_own(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    assert make(project, out, "--latents") == 0
    rows = json.loads((out / MADE_HERE).read_text())["samples"]
    assert [row["captions"] for row in rows] == [[prompt] for prompt in PROMPTS]
    store = LatentStore(out, compress=True)
    seeds = {prompt: int(row["seed"]) for prompt, row in record(out).items()}  # type: ignore[call-overload]
    assert len(set(seeds.values())) == len(PROMPTS)
    for row in rows[:2]:
        expected = by_hand(project, row["captions"][0], seeds[row["captions"][0]])
        assert torch.allclose(store.load(row["key"]), expected, atol=1e-5)
        assert store.note(row["key"])["seed"] == str(seeds[row["captions"][0]])


def test_a_batch_makes_the_same_videos_in_fewer_forwards(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, sizes = Sampler.sample, []

    def counting(self: Sampler, denoiser: Any, first: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(first))
        return genuine(self, denoiser, first, *rest)

    monkeypatch.setattr(Sampler, "sample", counting)
    for name, batch in (("one", "1"), ("three", "3")):
        assert make(project, tmp_path / name, "--latents", "--batch", batch) == 0
    assert len(PROMPTS) == 4 and sizes == [1, 1, 1, 1, 3, 1]
    one, three = (LatentStore(tmp_path / name, compress=True) for name in ("one", "three"))
    for row in json.loads((tmp_path / "one" / MADE_HERE).read_text())["samples"]:
        assert torch.allclose(one.load(row["key"]), three.load(row["key"]), atol=1e-5)
        assert one.note(row["key"]) == three.note(row["key"])
    assert make(project, tmp_path / "none", "--batch", "0") == 2


def test_latents_train_without_any_encoding(
    project: Project, make_project: ProjectMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "latents"
    assert make(project, out, "--latents") == 0
    student = make_project("student", datasets=videos_dataset(out), distillation={"rollout": "data_latent"})
    assert main(["cache", "inspect", "--config", str(student.config), "--out", str(tmp_path / "seen")]) == 0
    assert len(list((tmp_path / "seen").rglob("*.mp4"))) == len(PROMPTS)
    monkeypatch.setattr(encoders, "load_vae", None)
    assert student.check() == 0
    assert student.train() == 0
    assert not list((student.folder / "cache" / "vae").rglob("*.safetensors*")), "read where they were made"


def test_videos_are_a_dataset(project: Project, make_project: ProjectMaker, tmp_path: Path) -> None:
    out = tmp_path / "videos"
    assert make(project, out, "--size", "48x32", "--per-prompt", "2", "--frames", "9") == 0
    videos = sorted(out.glob("*.mp4"))
    assert len(videos) == 2 * len(PROMPTS)
    for video in videos:
        assert video.with_suffix(".txt").read_text().strip() in PROMPTS
        assert read_clip(video, num_frames=9, framerate=16).shape == (9, 32, 48, 3)
    student = make_project("student", datasets=videos_dataset(out), distillation={"rollout": "data_latent"})
    assert student.train() == 0


def test_a_video_shows_its_latents(project: Project, tmp_path: Path) -> None:
    assert make(project, tmp_path / "videos") == 0
    row = record(tmp_path / "videos")[PROMPTS[0]]
    frames = read_clip(tmp_path / "videos" / f"{row['name']}.mp4", num_frames=5, framerate=16)
    assembly = Assembly(load(config=str(project.config)), torch.device("cpu"))
    latents = by_hand(project, PROMPTS[0], int(row["seed"]))  # type: ignore[call-overload]
    write_mp4(tmp_path / "expected.mp4", to_frames(assembly.codec.decode(latents[None])[0]), 16)
    expected = read_clip(tmp_path / "expected.mp4", num_frames=5, framerate=16)
    assert abs(frames.astype(float) - expected).mean() < 1


@pytest.mark.parametrize("form", [[], ["--latents"]])
def test_what_is_there_is_not_made_again(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    out = tmp_path / "out"
    genuine, left = synthesise._write, [2]

    def stop(*arguments: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(synthesise, "_write", stop)
    assert make(project, out, *form) == 130
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4*")} | {
        path: path.stat().st_mtime_ns for path in out.glob("??/*.safetensors*")
    }
    assert len(before) == 2
    made: list[str] = []

    def noting(assembly: Assembly, item: synthesise.Item, *rest: Any) -> None:
        made.append(item.prompt)
        genuine(assembly, item, *rest)

    monkeypatch.setattr(synthesise, "_write", noting)
    assert make(project, out, *form) == 0
    assert len(made) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    forbid_encoders(monkeypatch)
    assert make(project, out, *form) == 0, "nothing to do loads nothing"
    seeds = {prompt: row["seed"] for prompt, row in record(out).items()}
    # One more prompt, in front of the others: it is made, they stay, with their seeds.
    monkeypatch.undo()
    file = project.folder / PROMPTS_FILE
    file.write_text("a new prompt\n" + file.read_text())
    monkeypatch.chdir(tmp_path)
    assert make(project, out, *form) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert {prompt: row["seed"] for prompt, row in record(out).items() if prompt != "a new prompt"} == seeds


def test_mistakes(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(project, tmp_path / "out", "--size", "33x32") == 2
    assert make(project, tmp_path / "out", "--size", "wide") == 2
    assert make(project, tmp_path / "out", "--per-prompt", "0") == 2
    assert not (tmp_path / "out").exists()
    assert main(["synthesise", "--config", str(project.config), "--prompts", "none.txt", "--out", "x"]) == 2
    assert make(project, tmp_path / "out", "--latents") == 0
    capsys.readouterr()
    assert make(project, tmp_path / "out", "--latents", "benchmark_guidance=3") == 2
    assert "made with other settings: guidance" in capsys.readouterr().err
    assert make(project, tmp_path / "out") == 2, "videos do not go among latents"
