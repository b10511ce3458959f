"""What the validation options become: prompts of the guide's library, samplers, lengths, the held-out dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner_dmd.config import UserError, load
from simpletuner_dmd.config.health import BANDS
from simpletuner_dmd.config.prompts import LIBRARIES, file_name
from simpletuner_dmd.config.schema import TrainConfig

GUIDE = Path(__file__).parents[1] / "e2e" / "data" / "wan-lora"
VIDEOS = {"dataset_type": "video", "instance_data_dir": "videos", "video": {"num_frames": 81}}


def read(folder: Path, datasets=None, **options):
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    entries = [{**VIDEOS, "id": "one"}] if datasets is None else datasets
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    return load([], config=str(folder / "config.json"), environ={}, cwd=folder)


def test_the_guides_library_is_read_after_the_own_prompt(tmp_path):
    library = str(GUIDE / "user_prompt_library.json")
    prompts = read(tmp_path, user_prompt_library=library, validation_prompt="mine").validation_prompts
    written = json.loads((GUIDE / "user_prompt_library.json").read_text(encoding="utf-8"))
    assert list(prompts) == ["validation", *written] and prompts["woman"] == written["woman"]
    assert len({file_name(name) for name in prompts}) == len(prompts) == 16


@pytest.mark.parametrize(("written", "names"), [(True, "general"), ("motion", "motion"), (False, None)])
def test_built_in_libraries_by_name(tmp_path, written, names):
    prompts = read(tmp_path, validation_prompt_library=written).validation_prompts
    assert prompts == (LIBRARIES[names] if names else {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a b": "one", "a-b": "two"}, "the file name of a b's"),
        ({"Cat": "one", "cat": "two"}, "the file name of Cat's"),
        ({"cat": {"prompt": "one", "adapter_strength": 0.5}}, "must be a prompt in quotes"),
    ],
)
def test_a_library_whose_videos_would_overwrite_each_other(tmp_path, content, words):
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read(tmp_path, validation_prompt_library="prompts.json")


def test_samplers_follow_the_training():
    assert TrainConfig().validation_noise_scheduler == "unipc"
    assert TrainConfig(distillation_method="dmd").validation_noise_scheduler == "few-step"
    assert TrainConfig(distillation_method="diffusion_forcing").validation_noise_scheduler == "euler"


def test_a_block_wise_student_takes_no_stock_solver(tmp_path):
    with pytest.raises(UserError, match="block by block"):
        read(tmp_path, distillation_method="self_forcing", validation_noise_scheduler="unipc")


def test_lengths_are_a_number_or_a_list(tmp_path):
    found = read(tmp_path, validation_num_video_frames="49,80,77")
    assert found.config.validation_num_video_frames == [49, 77]
    assert any("49, 77: Wan takes 4n+1 frames" in notice for notice in found.notices)


def test_what_has_no_effect_is_said(tmp_path):
    notices = " ".join(read(tmp_path, distillation_method="dmd", validation_guidance_skip_layers=[9],
                            evaluation_type="clip", eval_steps_interval=10).notices)  # fmt: skip
    for words in ("validation_guidance_skip_layers: no effect", "evaluation_type clip: not for video",
                  "eval_steps_interval has no effect"):  # fmt: skip
        assert words in notices


def test_the_held_out_dataset_takes_no_part_in_training(tmp_path):
    entries = [{**VIDEOS, "id": "one"}, {**VIDEOS, "id": "two"}]
    found = read(tmp_path, entries, eval_dataset_id="two")
    assert {entry.id: entry.probability for entry in found.datasets} == {"one": 1.0, "two": 0.0}
    with pytest.raises(UserError, match="nothing is left to train on"):
        read(tmp_path, eval_dataset_id="one")


def test_bands_are_filled_up(tmp_path):
    bands = read(tmp_path, health_bands={"motion": [0.3, 0.5, None, None]}).config.health_bands
    assert bands["motion"] == (0.3, 0.5, None, None)
    assert {name: band for name, band in bands.items() if name != "motion"} == {
        name: band for name, band in BANDS.items() if name != "motion"
    }
