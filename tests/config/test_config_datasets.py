"""Entries of multidatabackend.json."""

from pathlib import Path
from typing import Any

import pytest

from simpletuner_dmd.config import TrainConfig
from simpletuner_dmd.config.datasets import Datasets, complete, needs_videos, read_entries, size_notices

FILE = "multidatabackend.json"
VIDEO: dict[str, Any] = {"id": "clips", "dataset_type": "video", "instance_data_dir": "videos"}
PROMPTS: dict[str, Any] = {"id": "words", "dataset_type": "prompts", "instance_data_dir": "prompts.txt"}


def read(*entries: Any) -> Datasets:
    return read_entries(list(entries), FILE)


def completed(*entries: Any, **options: Any) -> Datasets:
    found = read(*entries)
    assert found.problems == []
    complete(found, TrainConfig(**options), lambda value: Path("/here") / value, Path("/here"))
    return found


def test_an_entry_takes_what_it_leaves_out_from_the_config() -> None:
    found = completed(VIDEO, resolution=320, resolution_type="pixel", maximum_image_size=900, cache_dir_vae="c")
    entry = found.entries[0]
    assert (entry.resolution, entry.resolution_type) == (320, "pixel")
    assert (entry.maximum_image_size, entry.target_downsample_size) == (900, 900)
    assert entry.cache_dir_vae == "/here/c/clips"
    assert entry.instance_data_dir == "/here/videos"
    assert (entry.video.num_frames, entry.video.min_frames) == (81, 81)
    own = {**VIDEO, "resolution": 0.5, "resolution_type": "area", "minimum_image_size": 0.1}
    entry = completed(own, resolution=320, minimum_image_size=9).entries[0]
    assert (entry.resolution, entry.resolution_type, entry.minimum_image_size) == (0.5, "area", 0.1)


def test_prompt_and_sizes_of_the_config_are_defaults_of_the_entries() -> None:
    cut = {
        **VIDEO,
        "crop": True,
        "crop_style": "corner",
        "crop_aspect": "closest",
        "caption_strategy": "instanceprompt",
    }
    config = {"instance_prompt": "a film of xyz", "maximum_image_size": 900, "target_downsample_size": 700}
    found = completed(cut, **config)
    assert found.notices == [] and found.problems == []
    entry = found.entries[0]
    assert (entry.instance_prompt, entry.maximum_image_size, entry.target_downsample_size) == (
        "a film of xyz",
        900,
        700,
    )
    own = completed({**cut, "instance_prompt": "mine", "target_downsample_size": 800}, **config).entries[0]
    assert (own.instance_prompt, own.target_downsample_size) == ("mine", 800)
    for raw in ({"caption_strategy": "instanceprompt"}, {"prepend_instance_prompt": True}):
        (problem,) = completed({**VIDEO, **raw}).problems
        assert (problem.key, problem.message) == ('dataset "clips": instance_prompt', "is needed and missing")


def test_sizes_of_the_config_in_another_unit_are_not_taken() -> None:
    found = completed({**VIDEO, "resolution_type": "area"}, resolution=480, minimum_image_size=300)
    assert [problem.key.split()[-1] for problem in found.problems] == ["resolution", "minimum_image_size"]
    assert 'config.json\'s 480 is in the unit of resolution_type "pixel_area"' in found.problems[0].message
    own = {**VIDEO, "resolution_type": "area", "resolution": 0.5, "minimum_image_size": 0.1}
    assert completed(own, minimum_image_size=300).problems == []
    assert completed({**VIDEO, "resolution_type": "pixel"}, minimum_image_size=300).problems == []


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"maximum_image_size": 9}, "maximum_image_size act only with crop: true"),
        ({"crop_style": "random", "crop_aspect": "closest"}, "crop_aspect, crop_style act only with crop: true"),
        ({"crop": True, "target_downsample_size": 9}, "acts only on files above maximum_image_size"),
    ],
)
def test_keys_of_the_crop_that_cannot_act_are_named(raw: dict[str, Any], expected: str) -> None:
    (notice,) = completed({**VIDEO, **raw}).notices
    assert expected in notice


def test_the_text_cache_has_a_default_and_an_entry() -> None:
    text = completed(VIDEO, cache_dir_text="t", write_batch_size=7).text_embeds
    assert text is not None
    assert (text.cache_dir, text.write_batch_size) == ("/here/t", 7)
    text = completed(VIDEO, {"id": "te", "dataset_type": "text_embeds", "cache_dir": "x", "default": True}).text_embeds
    assert text is not None
    assert text.cache_dir == "/here/x"


def test_the_short_entry_of_the_dmd_guide() -> None:
    short = {"dataset_type": "video", "cache_dir": "cache/wan-dmd", "resolution_type": "pixel_area", "crop": False,
             "num_frames": 121, "frame_interval": 1, "resolution": 480,
             "minimum_image_size": 0, "repeats": 0}  # fmt: skip
    missing = read_entries(short, FILE)
    assert [problem.key for problem in missing.problems] == ["dataset 1: instance_data_dir"]
    found = read_entries({**short, "instance_data_dir": "my/films"}, FILE)
    assert found.problems == []
    assert found.entries[0].id == "films"
    assert found.entries[0].video.num_frames == 121
    assert found.entries[0].cache_dir_vae == "cache/wan-dmd"
    assert len(found.notices) == 3


def test_frames_that_are_not_4n1_are_rounded_down_and_said() -> None:
    found = completed({**VIDEO, "video": {"num_frames": 75, "min_frames": 75}})
    assert (found.entries[0].video.num_frames, found.entries[0].video.min_frames) == (73, 75)
    assert "75 -> 73" in found.notices[0]


def test_prompts_have_the_native_size_unless_they_say_otherwise() -> None:
    entry = completed(PROMPTS, resolution=480).entries[0]
    assert (entry.size, entry.video.num_frames) == ((832, 480), 81)
    assert completed(PROMPTS, model_flavour="ti2v-5b-2.2").entries[0].size == (1280, 704)
    assert completed({**PROMPTS, "resolution": "64 X 48"}).entries[0].size == (64, 48)


def test_disabled_entries_are_left_out_whatever_else_they_hold() -> None:
    found = read(VIDEO, {"id": "off", "disabled": True}, {**VIDEO, "id": "off2", "disable": "true"})
    assert found.problems == []
    assert [entry.id for entry in found.entries] == ["clips"]


@pytest.mark.parametrize(
    ("entry", "key", "expected"),
    [
        ({**VIDEO, "type": "csv"}, "csv_file", "where the table is"),
        ({**VIDEO, "type": "huggingface"}, "dataset_name", "which dataset"),
        ({**VIDEO, "type": "aws"}, "aws_bucket_name", "which bucket"),
        ({**VIDEO, "instance_data_dir": "{env:NO_SUCH_NAME}x"}, "instance_data_dir", "no variable NO_SUCH_NAME"),
        ({**VIDEO, "instance_data_dir": "builtin"}, "instance_data_dir", "a set of prompts, not of videos"),
        ({**VIDEO, "table": {"pth": "x"}}, "table.pth", "did you mean"),
        ({**VIDEO, "caption_strategy": "csv", "metadata_backend": "parquet"}, "metadata_backend", "one table"),
        ({**VIDEO, "dataset_type": "vidoe"}, "dataset_type", "must be one of"),
        ({**VIDEO, "metadata_backend": "tar"}, "metadata_backend", "must be one of"),
        ({**VIDEO, "video": {"num_frame": 5}}, "video.num_frame", "did you mean"),
        ({**VIDEO, "video": {"num_frames": 0}}, "video.num_frames", "at least 1"),
        ({**VIDEO, "video": {"num_frames": 9, "max_frames": 8}}, "video.max_frames", "every clip"),
        ({**VIDEO, "resolution": "832x480"}, "resolution", "one number"),
        ({**VIDEO, "resolution": 0}, "resolution", "above 0"),
        ({**VIDEO, "caption_shuffle": {"enable": True}}, "caption_shuffle", "not available yet"),
        ({"id": "clips", "dataset_type": "video"}, "instance_data_dir", "missing"),
        ({**PROMPTS, "id": "clips", "resolution": 480}, "resolution", "both sides"),
    ],
)
def test_one_mistake(entry: dict[str, Any], key: str, expected: str) -> None:
    found = read(entry)
    assert [problem.key for problem in found.problems] == [f'dataset "clips": {key}']
    assert expected in found.problems[0].message + found.problems[0].fix
    assert found.problems[0].file == FILE


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", "..", "a..b", "-x", "a\nb"])
def test_a_name_cannot_leave_its_folder(name: str) -> None:
    assert "plain name" in read({**VIDEO, "id": name}).problems[0].message


@pytest.mark.parametrize("folder", ["/", "..", "~", "a/..", "ünï/", "x/.hidden"])
def test_a_name_made_from_a_folder_is_plain(folder: str) -> None:
    name = read({**VIDEO, "id": "", "instance_data_dir": folder}).entries[0].id
    assert read({**VIDEO, "id": name}).problems == []


def test_whole_files_that_make_no_sense() -> None:
    assert read().problems
    assert read_entries("x", FILE).problems
    assert read(7).problems
    assert "second" in read(VIDEO, {"dataset_type": "text_embeds"}, {"dataset_type": "text_embeds"}).problems[0].message
    assert "this name" in read(VIDEO, VIDEO).problems[0].message


def test_keys_that_do_nothing_on_an_entry_are_said() -> None:
    assert "crop" in read({**PROMPTS, "crop": True}).notices[0]


def test_losses_that_read_videos_need_videos() -> None:
    entries = read(PROMPTS).entries
    assert needs_videos(TrainConfig(), entries, FILE)
    distil = {"distillation_method": "dmd"}
    assert not needs_videos(TrainConfig.model_validate(distil), entries, FILE)
    latents = {**distil, "distillation_config": {"rollout": "data_latent"}}
    assert needs_videos(TrainConfig.model_validate(latents), entries, FILE)


def test_validation_of_another_size_than_training_is_said() -> None:
    found = completed({**VIDEO, "resolution": 480}, validation_resolution="1280x704", validation_num_video_frames=121)
    config = TrainConfig(validation_resolution="1280x704", validation_num_video_frames=121)  # type: ignore[arg-type]
    assert len(size_notices(config, found.entries)) == 2
    same = completed({**PROMPTS, "resolution": "832x480"})
    assert size_notices(TrainConfig(), same.entries) == []


# --- where samples come from ------------------------------------------------------------------------------------------


def test_the_wan_guides_file_is_read_as_it_is() -> None:
    """The multidatabackend.json of SimpleTuner's Wan guide."""
    clips = {"id": "disney-black-and-white", "type": "local", "dataset_type": "video", "crop": False,
             "resolution": 480, "minimum_image_size": 480, "maximum_image_size": 480, "target_downsample_size": 480,
             "resolution_type": "pixel_area", "cache_dir_vae": "cache/vae/wan/disney-black-and-white",
             "instance_data_dir": "datasets/disney-black-and-white", "disabled": False,
             "caption_strategy": "textfile", "metadata_backend": "discovery", "repeats": 0,
             "video": {"num_frames": 75, "min_frames": 75}}  # fmt: skip
    text = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True,
            "cache_dir": "cache/text/wan", "disabled": False, "write_batch_size": 128}  # fmt: skip
    found = completed(clips, text)
    assert found.notices == [
        'dataset "disney-black-and-white": num_frames 75 -> 73: Wan takes 4n+1 frames.',
        'dataset "disney-black-and-white": maximum_image_size, target_downsample_size act only with crop: true; each '
        "video keeps its own shape.",
    ]
    assert (found.entries[0].video.num_frames, found.entries[0].video.min_frames) == (73, 75)


def test_simpletuners_names_for_a_table() -> None:
    raw = {"id": "web", "type": "csv", "dataset_type": "video", "csv_file": "list.csv", "csv_url_column": "link",
           "csv_caption_column": "words", "csv_cache_dir": "/kept", "caption_strategy": "csv"}  # fmt: skip
    found = completed(raw)
    entry = found.entries[0]
    assert (entry.table.path, entry.table.filename_column, entry.table.caption_column) == (
        "/here/list.csv", "link", "words",
    )  # fmt: skip
    assert (entry.download_dir, found.notices) == ("/kept", [])
    block = {"path": "t.parquet", "filename_column": "id", "width_column": "w", "identifier_includes_extension": False}
    parquet = completed({**VIDEO, "caption_strategy": "parquet", "parquet": block})
    assert parquet.entries[0].table.filename_column == "id" and parquet.entries[0].table_kind == "parquet"
    assert "width_column" in parquet.notices[0]


def test_simpletuners_names_for_a_hub_dataset() -> None:
    raw = {"id": "hub", "type": "huggingface", "dataset_type": "video", "dataset_name": "owner/films",
           "metadata_backend": "huggingface", "caption_strategy": "huggingface", "cache_dir": "kept",
           "huggingface": {"caption_column": "words", "video_column": "clip", "split": "test"}}  # fmt: skip
    found = completed(raw)
    entry = found.entries[0]
    assert (entry.caption_column, entry.video_column, entry.split) == ("words", "clip", "test")
    assert (entry.download_dir, entry.cache_dir, found.notices) == ("/here/kept", None, [])
    refused = read({**raw, "huggingface": {"filter_func": {"min_width": 5}}})
    assert [problem.key for problem in refused.problems] == ['dataset "hub": filter_func']


def test_downloads_of_each_dataset_have_a_folder_of_their_own() -> None:
    assert completed(VIDEO).entries[0].download_dir == "/here/cache/downloads/clips"


def test_pictures_are_one_frame() -> None:
    entry = completed({**VIDEO, "dataset_type": "image", "minimum_image_size": 64}).entries[0]
    assert (entry.video.num_frames, entry.video.min_frames) == (1, 1)
    found = read({**VIDEO, "dataset_type": "image", "video": {"num_frames": 9}})
    assert found.notices == ['dataset "clips": video has no effect on dataset_type image, type local.']


@pytest.mark.parametrize(
    "extra",
    [{"aws_bucket_name": "x"}, {"dataset_name": "a/b"}, {"download_dir": "x"}, {"table": {"path": "x"}}],
    ids=lambda extra: next(iter(extra)),
)
def test_keys_of_another_place_are_said_to_do_nothing(extra: dict[str, Any]) -> None:
    (notice,) = read({**VIDEO, **extra}).notices
    assert next(iter(extra)) in notice


def test_the_built_in_prompts_are_not_looked_for_in_a_folder() -> None:
    assert completed({**PROMPTS, "instance_data_dir": "builtin"}).entries[0].instance_data_dir == "builtin"
