"""Options of memory in whole runs: what they are said to do happens, and the trained weights are the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.wan import encoders
from simpletuner_dmd.wan.encoders import TextEncoder, VideoCodec
from tests.e2e.conftest import ProjectMaker
from tests.support.runs import videos_dataset
from tests.support.videos import write_small_set

SAVING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_interval": 2,
    "gradient_checkpointing_backend": "offloaded",
    "musubi_blocks_to_swap": 2,
    "enable_group_offload": True,
    "offload_during_startup": True,
    "vae_enable_slicing": True,
}


def test_saving_memory_changes_no_bit(make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]) -> None:
    plain, saving = make_project("plain"), make_project("saving", **SAVING)
    assert plain.train() == 0
    capsys.readouterr()
    assert saving.train() == 0
    assert "blocks_to_swap: blocks 0, 1 live on the host" in capsys.readouterr().out
    assert saving.rows("export")[0]["passed"]
    for role in ("student", "critic"):
        expected = plain.trained(role)
        for name, tensor in saving.trained(role).items():
            assert torch.equal(tensor, expected[name]), name


def test_a_teacher_beside_full_networks_is_group_offloaded(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    offloaded: list[str] = []
    offload = encoders.offload_in_groups

    def watched(module: torch.nn.Module, device: torch.device) -> None:
        offloaded.append(type(module).__name__)
        offload(module, device)

    monkeypatch.setattr("simpletuner_dmd.cli.assemble.offload_in_groups", watched)
    monkeypatch.setattr("simpletuner_dmd.wan.encoders.offload_in_groups", watched)
    project = make_project(model_type="full", max_train_steps=2, enable_group_offload=True)
    assert project.train() == 0
    assert {"UMT5EncoderModel", "WanTransformer3DModel"} <= set(offloaded)


def test_encoders_are_never_there_together(
    make_project: ProjectMaker, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the caches are filled and in two validations, watched where each is loaded."""
    write_small_set(tmp_path / "videos", 2)
    assemblies: list[Assembly] = []
    loads: list[str] = []

    class Watched(Assembly):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assemblies.append(self)

    def there() -> list[str]:
        run = assemblies[-1].__dict__
        text, codec = run.get("text_encoder"), run.get("codec")
        return [name for name, part in (("text", text and text._loaded), ("vae", codec and codec._vae)) if part]

    def watch(name: str, loader: Any) -> Any:
        def load(*arguments: Any) -> Any:
            loads.append(name)
            assert there() == []
            return loader(*arguments)

        return load

    monkeypatch.setattr("simpletuner_dmd.cli.run.Assembly", Watched)
    monkeypatch.setattr(encoders, "load_text_encoder", watch("text", encoders.load_text_encoder))
    monkeypatch.setattr(encoders, "load_vae", watch("vae", encoders.load_vae))
    project = make_project(
        datasets=videos_dataset(tmp_path / "videos"), distillation={"rollout": "data_latent"}, max_train_steps=2,
        offload_during_startup=True, validation_disable=False, validation_step_interval=1, disable_benchmark=True,
    )  # fmt: skip
    assert project.train() == 0
    assert loads.count("text") >= 1 and loads.count("vae") >= 3  # latents, and each of the two validations
    assert there() == []


def test_tiles_and_slices_reach_the_vae(small_wan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from simpletuner_dmd.wan.sources import ModelSource

    source = ModelSource(*[str(small_wan)] * 4)
    whole = VideoCodec(source, device=torch.device("cpu"))
    tiled = VideoCodec(source, device=torch.device("cpu"), tiling=True, slicing=True)
    assert tiled.vae.use_tiling and tiled.vae.use_slicing and not whole.vae.use_tiling
    assert tiled.fingerprint != whole.fingerprint  # its latents are others
    assert VideoCodec(source, device=torch.device("cpu"), slicing=True).fingerprint == whole.fingerprint
    pixels = torch.randn((2, 3, 1, 48, 640), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    seen: list[tuple[int, ...]] = []
    tiled.vae.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape)))
    latents = tiled.encode(pixels)
    assert latents.shape == whole.encode(pixels).shape
    # This VAE folds 2x2 pixels into one before it cuts.
    assert {shape[0] for shape in seen} == {1} and max(shape[-1] for shape in seen) <= 256 and len(seen) > 2


def test_an_optimizer_that_cannot_run_here_is_refused_before_anything_is_loaded(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("simpletuner_dmd.training.optimizers.LIBRARIES", {"bnb-": ("not_there_at_all", "bitsandbytes")})
    monkeypatch.setattr(TextEncoder, "_load", lambda self: pytest.fail("loaded"))
    project = make_project(optimizer="bnb-adamw8bit-paged")
    for verb in (project.check, project.train):
        assert verb() == 2
        shown = capsys.readouterr()
        assert "needs bitsandbytes, which is not installed here" in shown.out + shown.err
        assert "pip install bitsandbytes" in shown.out + shown.err


def test_more_swapped_blocks_than_there_are(make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(blocks_to_swap=99, gradient_checkpointing=True)
    for verb in (project.check, project.train):
        assert verb() == 2
        shown = capsys.readouterr()
        assert "found 99, but this model has" in shown.out + shown.err
