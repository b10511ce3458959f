"""The export folder: layout, metadata, workflow, sampler.py, card."""

import ast
import hashlib
import json
import re

import pytest
import torch
import yaml
from safetensors import safe_open

from simpletuner_dmd.config.health import BANDS
from simpletuner_dmd.flow import Schedule, uniform_ladder
from simpletuner_dmd.publish import record
from simpletuner_dmd.publish.export import export_full, export_lora
from simpletuner_dmd.publish.info import decimals
from simpletuner_dmd.training.tracking import Tracking
from simpletuner_dmd.validation.health import Knobs, Signs, judge, worst

from .conftest import ALPHA, RANK, SDE3, make_info

LITERAL4 = Schedule(1.0, (1.0, 0.757, 0.522, 0.25))


@pytest.fixture
def exported(tmp_path, lora):
    written = export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info())
    return tmp_path, written


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_layout(exported):
    folder, written = exported
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "diffusers/pytorch_lora_weights.safetensors", "diffusers/scheduler/scheduler_config.json",
        "comfyui/my-run.safetensors", "comfyui/workflow.json", "sampler.py", "distill.json", "README.md",
    }  # fmt: skip
    assert {str(path.relative_to(folder)) for path in written} == found


def test_distill_json(exported):
    document = json.loads((exported[0] / "distill.json").read_text())
    assert document["ladder"] == {"timesteps": [1000.0, 757.0, 522.0], "sigmas": [1.0, 0.757, 0.522]}
    assert (document["method"], document["guidance"], document["sampler"], document["shift"]) == ("dmd", 1.0, "lcm", 1)
    assert document["base"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert document["trained_sizes"] == [{"width": 64, "height": 64, "frames": 9}]
    assert document["weights_dtype"] == "float32"
    ast.parse(document["snippet"])


def test_workflow_has_the_same_sigmas(exported):
    graph = json.loads((exported[0] / "comfyui" / "workflow.json").read_text())
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    # ComfyUI picks the numbers out of the string; its expression knows no exponents
    numbers = [float(n) for n in re.findall(r"[-+]?(?:\d*\.*\d+)", kinds["ManualSigmas"]["sigmas"])]
    assert numbers == [*SDE3.ladder, 0.0]
    assert kinds["KSamplerSelect"]["sampler_name"] == "lcm"
    assert kinds["LoraLoaderModelOnly"] == {"model": ["1", 0], "lora_name": "my-run.safetensors", "strength_model": 1.0}
    assert "ModelSamplingSD3" not in kinds
    for node in graph.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in graph


def test_supervised_workflow_keeps_guidance(tmp_path, lora):
    info = make_info(Schedule(3.0), "sde", method="", guidance=5.0)
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info)
    graph = json.loads((tmp_path / "comfyui" / "workflow.json").read_text())
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert kinds["CFGGuider"]["cfg"] == 5.0
    assert kinds["ModelSamplingSD3"]["shift"] == 3.0
    assert not (tmp_path / "sampler.py").exists()
    assert "guidance_scale=5.0" in (tmp_path / "README.md").read_text()


def test_decimals_are_plain():
    assert [decimals(s) for s in (1.0, 0.0, 5 / 6, 1e-3)] == ["1.0", "0.0", "0.833333333", "0.001"]


def test_comfyui_metadata(exported):
    path = exported[0] / "comfyui" / "my-run.safetensors"
    found = metadata(path)
    # ComfyUI-Lora-Manager shows anything with "il" in this value as Illustrious, so "distill" must not be in it
    assert found["ss_base_model_version"] == "Wan Video 1.3B t2v"
    assert found["ss_network_dim"] == found["ss_network_alpha"] == str(RANK)
    assert "trigger" not in " ".join(found).lower()
    assert found["simpletuner_dmd.sigmas"] == "1.0, 0.757, 0.522, 0.0"
    raw = path.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert "lora_adapter_metadata" not in found
    assert "lora_adapter_metadata" not in metadata(exported[0] / "diffusers" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_sampler_file_is_short_and_stock(tmp_path, lora, pipeline, model_type):
    info = make_info(LITERAL4, "ode", model_type=model_type, base='odd "base')
    if model_type == "lora":
        export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info)
    else:
        export_full(tmp_path, pipeline.transformer, info)
    text = (tmp_path / "sampler.py").read_text()
    assert len(text.splitlines()) <= 30
    imports = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
               for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert imports <= {"sys", "pathlib", "torch", "diffusers", "diffusers.utils"}
    assert "nearest" in (tmp_path / "README.md").read_text()


def split_card(folder):
    _, matter, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), body


def test_card_front_matter(exported):
    matter, body = split_card(exported[0])
    assert matter["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert (matter["library_name"], matter["pipeline_tag"]) == ("diffusers", "text-to-video")
    assert matter["base_model_relation"] == "adapter"
    assert "lora" in matter["tags"]  # exactly this word makes the Hub show code that loads a LoRA
    assert "instance_prompt" not in matter
    assert "1000, 757, 522" in body
    assert "64x64, 9 frames" in body
    assert "a \\`red\\` \\[circle\\]" in body


@pytest.mark.parametrize("schedule", [SDE3, LITERAL4, Schedule(5.0, uniform_ladder(4, 5.0)), Schedule(3.0)])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_card_snippet_is_python_with_the_right_numbers(tmp_path, lora, pipeline, schedule, model_type):
    info = make_info(schedule, "ode", model_type=model_type)
    if model_type == "lora":
        export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info)
    else:
        export_full(tmp_path, pipeline.transformer, info)
    code = re.search(r"```python\n(.*?)```", split_card(tmp_path)[1], re.DOTALL)[1]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    call = next(node for node in calls if getattr(node.func, "id", "") == "pipe")
    values = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    assert values["num_inference_steps"] == (len(schedule.ladder) or 50)
    assert values["guidance_scale"] == 1.0
    assert values["max_sequence_length"] == 16
    assert ast.literal_eval(call.args[0]) == 'a "red" circle'


def test_a_local_base_does_not_leave_the_machine(tmp_path, lora, base_folder):
    info = make_info(base=str(base_folder))
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info)
    assert "base_model" not in split_card(tmp_path)[0]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert str(base_folder.parent).encode() not in path.read_bytes()


def test_large_loras_are_stored_in_half_precision(tmp_path, lora, monkeypatch):
    monkeypatch.setattr("simpletuner_dmd.publish.export.SMALL_BYTES", 1000)
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info())
    assert json.loads((tmp_path / "distill.json").read_text())["weights_dtype"] == "bfloat16"
    with safe_open(tmp_path / "comfyui" / "my-run.safetensors", "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.bfloat16


def test_unknown_format_is_refused(tmp_path, lora):
    with pytest.raises(ValueError, match="kohya"):
        export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=make_info(), formats=("kohya",))
    assert not any(tmp_path.iterdir())


def test_the_card_says_how_the_run_was(tmp_path, lora):
    """Health, settings and what an extraction lost; a fence in a prompt does not end the block of settings."""
    found = {"rank": 4, "relative_error": 0.25, "left_out": 0.5, "worst_layer": "blocks.0", "worst_error": 0.75}
    info = make_info(
        health=(("yellow", "motion", "motion is 48% of the teacher's"),), config={"prompt": "a ``` b", "seed": 5},
        extracted=found, videos=(("a cat", "videos/cat.mp4"),), raw_beside=True,
    )  # fmt: skip
    export_lora(tmp_path, lora, rank=RANK, alpha=ALPHA, info=info)
    matter, body = split_card(tmp_path)
    assert matter["widget"] == [{"text": "a cat", "output": {"url": "videos/cat.mp4"}}]
    assert "| yellow motion | motion is 48% of the teacher's |" in body
    assert "lossy" in body and "25%" in body and "75%" in body and "50%" in body
    (block,) = re.findall(r"^(`{4,})json\n(.*?)\n\1$", body, re.DOTALL | re.MULTILINE)
    assert json.loads(block[1]) == {"prompt": "a ``` b", "seed": 5}
    document = json.loads((tmp_path / "distill.json").read_text())
    assert document["extracted"] == found and document["health"][0]["colour"] == "yellow"
    assert json.loads(metadata(tmp_path / "comfyui" / "my-run.safetensors")["simpletuner_dmd.extracted"]) == found


def test_what_a_run_recorded_is_taken_over(tmp_path):
    rows = [
        {"event": "validation", "step": 1, "kind": "student", "file": "old.mp4", "prompt": "a"},
        {"event": "validation", "step": 2, "kind": "student", "file": "raw.mp4", "prompt": "a"},
        {"event": "validation", "step": 2, "kind": "student-ema", "file": "ema.mp4", "prompt": "a"},
        {"event": "validation", "step": 2, "kind": "student-ema", "file": "gone.mp4", "prompt": "b"},
        {"event": "validation", "step": 0, "kind": "teacher", "file": "teacher.mp4", "prompt": "a"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "vali')
    for name in ("old", "raw", "ema", "teacher"):
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    assert record.copy_videos(tmp_path, tmp_path / "export") == (("a", "videos/ema.mp4"),)
    assert (tmp_path / "export" / "videos" / "ema.mp4").read_bytes() == b"ema"
    assert record.copy_videos(tmp_path, tmp_path / "first", step=1) == (("a", "videos/old.mp4"),)
    assert record.last_health(tmp_path / "nothing") == record.copy_videos(tmp_path / "nothing", tmp_path / "b") == ()


def test_health_is_that_of_the_newest_validation_up_to_the_checkpoint(tmp_path):
    """Rows and lights as training writes them."""
    tracking = Tracking(tmp_path)
    for step, motion in ((1, 0.3), (2, 0.5), (3, 1.0)):
        lights = judge(Signs({"motion": motion}, {}), BANDS, Knobs())
        tracking.event("health", step=step, colour=worst(lights), score=None, best=False,
                       lights=[light.as_dict() for light in lights])  # fmt: skip
    tracking.close()
    assert record.last_health(tmp_path) == (("green", "motion", "motion is 100% of the teacher's"),)
    yellow = ("yellow", "motion", "motion is 50% of the teacher's: stop earlier or lower guidance")
    assert record.last_health(tmp_path, step=2) == (yellow,)
    assert record.last_health(tmp_path, step=0) == ()


def test_settings_are_shown_without_the_machine(tmp_path):
    options = {
        "webhook_config": {"webhook_url": "secret"},
        "output_dir": "/home/me/out",
        "seed": 5,
        "hub_model_id": None,
        "pretrained_model_name_or_path": "Wan-AI/Wan2.1",
        "init_lora": str(tmp_path / "it.safetensors"),
        "names": ["/home/me/a", "plain"],
    }
    assert record.shown_config(options) == {
        "seed": 5, "pretrained_model_name_or_path": "Wan-AI/Wan2.1", "init_lora": "it.safetensors",
        "names": ["a", "plain"],
    }  # fmt: skip
