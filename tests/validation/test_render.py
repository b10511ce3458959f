"""Files and rows of a validation, and that nothing which goes wrong in one reaches the weights."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch

from simpletuner_dmd.flow import Schedule, TextEmbedding
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.validation.render import Renderer, Scene
from simpletuner_dmd.validation.sampling import Sampler

CPU = torch.device("cpu")
TEXT = TextEmbedding(torch.zeros(1, 1, 1))
SAMPLER = Sampler(Schedule(1.0, (1.0, 0.5)))
SCENES = [
    Scene(name, f"a {name}", TEXT, (16, 16, 5), (3, 5, 16, 16), seed)
    for name in ("anime_<token>", "dog") for seed in (1, 2)
]  # fmt: skip


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))

    def velocity(self, x_t, sigma, text, *, routed=None):
        return self.weight * x_t


def renderer(folder: Path, decode=lambda latents: latents.clamp(-1, 1), **options) -> Renderer:
    return Renderer(folder, SCENES, TEXT, decode, 16.0, CPU, **options)


def test_files_rows_and_specimens(tmp_path):
    found = renderer(tmp_path).render(Model(), SAMPLER, "student-ema", 200)
    assert not found.failures
    names = [row["file"] for row in found.rows]
    assert names[0] == "validation/step-000200/anime_-token-seed1-16x16x5f-ema.mp4" and len(set(names)) == 4
    for row in found.rows:
        assert (tmp_path / row["file"]).is_file() and (tmp_path / row["poster"]).is_file()
        assert row["steps"] == 2 and set(row["measures"]) >= {"saturation", "motion", "flow"}
    assert sorted(found.specimens) == [0, 1, 2, 3]
    once = renderer(tmp_path).render(Model(), SAMPLER, "teacher", 0)
    assert once.rows[0]["file"].startswith("validation/teacher/")


def test_processes_share_the_scenes_and_make_the_same_videos(tmp_path):
    whole = renderer(tmp_path / "one").render(Model(), SAMPLER, "student", 1)
    parts = [renderer(tmp_path / "two", share=range(rank, 4, 2)).render(Model(), SAMPLER, "student", 1)
             for rank in range(2)]  # fmt: skip
    assert [sorted(part.specimens) for part in parts] == [[0, 2], [1, 3]]
    parts[0].merge(parts[1])
    for number, specimen in whole.specimens.items():
        assert torch.equal(specimen.latents, parts[0].specimens[number].latents)


def test_network_and_codec_do_not_work_at_the_same_time(tmp_path):
    log: list[str] = []

    class Logging(Model):
        def velocity(self, x_t, sigma, text, *, routed=None):
            log.append("network")
            return super().velocity(x_t, sigma, text)

    def decode(latents):
        log.append("codec")
        return latents.clamp(-1, 1)

    renderer(tmp_path, decode, unload=lambda: log.append("unload")).render(Logging(), SAMPLER, "student", 1)
    assert [*dict.fromkeys(log)] == ["unload", "network", "codec"]
    assert log == ["unload", *["network"] * 8, *["codec"] * 4, "unload"]


def full_disk(latents):
    raise OSError(28, "No space left on device")


def broken(latents):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsecond line")


def bad_codec(latents):
    raise av.FFmpegError(1094995529, "Invalid data")


@pytest.mark.parametrize("decode", [full_disk, broken, bad_codec])
def test_a_failed_render_is_reported_and_the_average_is_out_of_the_model(tmp_path, decode):
    model = Model()
    ema = Ema([("weight", model.weight)], decay=0.9)
    with torch.no_grad():
        model.weight.fill_(0.25)
    with ema.swap():
        assert float(model.weight) == 0.5
        found = renderer(tmp_path, decode).render(model, SAMPLER, "student-ema", 1)
    assert float(model.weight) == 0.25
    assert len(found.failures) == 4 and not found.rows
    assert "could not be written" in found.failures[0] and "\n" not in found.failures[0]
    assert not list(tmp_path.rglob("*.mp4"))


def test_one_bad_scene_leaves_the_others(tmp_path):
    calls = []

    def decode(latents):
        calls.append(1)
        return full_disk(latents) if len(calls) == 2 else latents.clamp(-1, 1)

    found = renderer(tmp_path, decode).render(Model(), SAMPLER, "student", 1)
    assert len(found.failures) == 1 and sorted(found.specimens) == [0, 2, 3]


def test_a_sampling_failure_is_one_too_and_a_bug_is_not(tmp_path):
    class OutOfMemory(Model):
        def velocity(self, x_t, sigma, text, *, routed=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Bug(Model):
        def velocity(self, x_t, sigma, text, *, routed=None):
            raise TypeError("a bug")

    found = renderer(tmp_path).render(OutOfMemory(), SAMPLER, "student", 1)
    assert len(found.failures) == 4 and "could not be sampled" in found.failures[0]
    with pytest.raises(TypeError):
        renderer(tmp_path).render(Bug(), SAMPLER, "student", 1)


def test_an_exception_inside_the_swap_puts_the_weights_back(tmp_path):
    model = Model()
    ema = Ema([("weight", model.weight)], decay=0.9)
    with torch.no_grad():
        model.weight.fill_(0.25)
    with pytest.raises(TypeError), ema.swap():
        raise TypeError("a bug")
    assert float(model.weight) == 0.25
    ema.update(1)  # and the average can go on
