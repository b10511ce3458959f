"""Every flavour trains, renders, exports and loads back, on a tiny model of its shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.main import main
from simpletuner_dmd.cli.other_expert import load_other
from simpletuner_dmd.config import load
from simpletuner_dmd.wan.quantisation import dense_weight
from tests.e2e.conftest import ProjectMaker
from tests.support.pipelines import save_small_host, save_small_pair, save_small_ti2v
from tests.support.runs import PROMPTS, Project, prompts_dataset, videos_dataset
from tests.support.videos import write_small_set

LADDER = {"student_steps": 4, "generator_update_interval": 1}
SHOWN = {
    "flow_schedule_shift": 5, "max_train_steps": 2, "learning_rate": 1e-2,
    "validation_disable": False, "validation_step_interval": 2,
    "benchmark_num_inference_steps": 4, "disable_benchmark": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_pair(tmp_path_factory.mktemp("models") / "small-pair")


def kinds(project: Project) -> set[str]:
    return {row["kind"] for row in project.rows("validation")}


def test_two_experts_in_two_runs(
    make_project: ProjectMaker, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """High, then the latents it hands over, then low on them: rendered, exported and loaded back as a pair."""
    shared = {**SHOWN, "pretrained_model_name_or_path": str(pair)}
    high = make_project("high", distillation=LADDER, model_flavour="t2v-14b-2.2-high", **shared)
    assert high.train() == 0
    said = capsys.readouterr().out
    assert "makes the steps 1000, 937.5" in said and "hands over to the other at 833.333" in said
    assert kinds(high) == {"teacher", "undistilled", "student"}
    assert {row["exit_rung"] for row in high.rows("step") if "exit_rung" in row} <= {0.0, 1.0}
    document = json.loads((high.output / "export" / "distill.json").read_text())
    assert document["experts"] == {
        "expert": "high", "transformer": "transformer", "boundary": 0.875, "high_noise_steps": 2, "other": None,
    }  # fmt: skip

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    handed = tmp_path / "handed"
    low = make_project(
        "low",
        [{"id": "handed", "dataset_type": "video", "instance_data_dir": str(handed), "resolution": 32,
          "video": {"num_frames": 5}}],
        distillation=LADDER, model_flavour="t2v-14b-2.2-low", other_expert_run=str(high.output), **shared,
    )  # fmt: skip
    arguments = ["synthesise", "--config", str(low.config), "--prompts", str(tmp_path / "prompts.txt"), "--out",
                 str(handed), "--latents", "--handover", "--size", "32x32", "--frames", "5"]  # fmt: skip
    assert main(arguments) == 0
    assert json.loads((handed / ".synthesised.json").read_text())["settings"]["kind"] == "handover"
    assert low.train() == 0
    assert kinds(low) == {"teacher", "undistilled", "student"}
    exits = {row["exit_rung"] for row in low.rows("step") if "exit_rung" in row}
    assert exits and exits <= {2.0, 3.0}
    (verdict,) = low.rows("export")
    assert verdict["passed"] and verdict["relative_error"] < 1e-4
    export = low.output / "export"
    assert json.loads((export / "distill.json").read_text())["experts"]["other"] == "other_expert"
    ours = load_file(high.output / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    kept = load_file(export / "other_expert" / "diffusers" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(kept[name], ours[name]) for name in ours)
    graph = json.loads((export / "comfyui" / "workflow.json").read_text())
    assert graph["2"]["inputs"]["lora_name"] == "output-high-noise.safetensors"
    low_loader = {"model": ["25", 0], "lora_name": "output-low-noise.safetensors", "strength_model": 1.0}
    assert graph["20"]["inputs"] == low_loader
    assert graph["21"]["inputs"]["step"] == 2


def test_the_other_expert_is_quantised_like_the_base(
    make_project: ProjectMaker, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And kept in the cache, so that the second validation reads it; a subfolder that is named is this run's own."""
    project = make_project(
        distillation=LADDER, model_flavour="t2v-14b-2.2-high", pretrained_model_name_or_path=str(pair),
        base_model_precision="int8-quanto", cache_dir_models=str(tmp_path / "quantised"),
        pretrained_transformer_subfolder="transformer",
    )  # fmt: skip
    assembly = Assembly(load(config=str(project.config)), torch.device("cpu"))
    layer = "blocks.1.attn1.to_q"
    weights = {
        name: dense_weight(network.get_submodule(layer)).float()
        for name, network in [("own", assembly.base_transformer()), ("other", load_other(assembly, None).transformer)]
    }
    for name, folder in [("own", "transformer"), ("other", "transformer_2")]:
        stock = WanTransformer3DModel.from_pretrained(pair, subfolder=folder).get_submodule(layer).weight.detach()
        assert 0 < float((weights[name] - stock).norm() / stock.norm()) < 0.02, name
    assert len(list((tmp_path / "quantised").glob("*.safetensors"))) == 2
    monkeypatch.setattr("simpletuner_dmd.wan.loading.stream", lambda *unused, **named: pytest.fail("loaded anew"))
    again = load_other(assembly, None).transformer
    assert torch.equal(dense_weight(again.get_submodule(layer)).float(), weights["other"])


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_fine_tuned_alone(make_project: ProjectMaker, pair: Path, tmp_path: Path, expert: str) -> None:
    """Full, on its own side of the boundary; its network is the one that moved."""
    videos = write_small_set(tmp_path / "videos", 2)
    project = make_project(
        "supervised", videos_dataset(videos), distillation_method=None, model_type="full", disable_benchmark=True,
        model_flavour=f"t2v-14b-2.2-{expert}", pretrained_model_name_or_path=str(pair), max_train_steps=2,
        validation_disable=False, validation_num_inference_steps=3,
    )  # fmt: skip
    assert project.train() == 0
    assert project.rows("export")[0]["passed"] and kinds(project) == {"student"}
    exported = project.exported()
    distance = {
        name: sum(float((tensor - exported[key]).abs().sum()) for key, tensor in load_file(
            pair / name / "diffusion_pytorch_model.safetensors").items())
        for name in ("transformer", "transformer_2")
    }  # fmt: skip
    own, other = ("transformer", "transformer_2") if expert == "high" else ("transformer_2", "transformer")
    assert 0 < distance[own] < 0.5 * distance[other]


def test_ti2v_has_its_own_vae_and_sizes(make_project: ProjectMaker, tmp_path: Path) -> None:
    model = save_small_ti2v(tmp_path / "small-ti2v")
    assert WanPipeline.from_pretrained(model).config.expand_timesteps
    shared = {**SHOWN, "pretrained_model_name_or_path": str(model), "model_flavour": "ti2v-5b-2.2",
              "validation_resolution": "64x32"}  # fmt: skip
    videos = write_small_set(tmp_path / "videos", 2)
    data = videos_dataset(videos, resolution=64)
    project = make_project("dmd", data, distillation={**LADDER, "rollout": "data_latent"}, **shared)
    assert project.train() == 0
    (verdict,) = project.rows("export")
    assert verdict["passed"] and verdict["relative_error"] < 1e-4
    (clip, *_) = project.rows("validation")
    assert (clip["width"], clip["height"]) == (64, 32)
    graph = json.loads((project.output / "export" / "comfyui" / "workflow.json").read_text())
    assert graph["6"]["class_type"] == "Wan22ImageToVideoLatent" and graph["6"]["inputs"]["vae"] == ["5", 0]


@pytest.mark.parametrize("lora_type", ["standard", "lycoris"])
def test_a_picture_host_trains_a_text_to_video_adapter(
    make_project: ProjectMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str], lora_type: str
) -> None:
    model = save_small_host(tmp_path / "small-host")
    project = make_project(
        "host", prompts_dataset(tmp_path), distillation=LADDER, model_flavour="i2v-14b-2.1", lora_type=lora_type,
        pretrained_model_name_or_path=str(model), **SHOWN,
    )  # fmt: skip
    (project.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    assert project.train() == 0
    assert "its 20 picture channels get zeros" in capsys.readouterr().out
    (verdict,) = project.rows("export")
    assert verdict["passed"] and verdict["relative_error"] < 1e-4
