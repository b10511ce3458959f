"""Validation inside whole runs: what it measures and keeps, and that it cannot hurt the training."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.encoders import VideoCodec
from tests.e2e.conftest import ProjectMaker
from tests.support.pipelines import save_small_pipeline
from tests.support.runs import assert_same_bits, environment, prompts_dataset, videos_dataset
from tests.support.videos import write_small_set

GUIDE = Path(__file__).parent / "data" / "wan-lora"
LOOKING: dict[str, Any] = {
    "validation_disable": False, "validation_step_interval": 2, "checkpoint_step_interval": 2, "max_train_steps": 4,
    "use_ema": True, "ema_validation": "comparison", "num_validation_images": 2, "validation_on_startup": True,
    "health_grace_steps": 2,
}  # fmt: skip


def test_a_run_measures_its_student_and_keeps_the_best(make_project: ProjectMaker, tmp_path: Path) -> None:
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"anime_<token>": {"prompt": "a red circle moves up"}}))
    videos = write_small_set(tmp_path / "videos", 2)
    options = {**LOOKING, "ema_validation": "ema_only", "eval_dataset_id": "held-out", "eval_steps_interval": 1}
    project = make_project(
        datasets=[*prompts_dataset(tmp_path), *videos_dataset(videos, id="held-out")],
        validation_prompt_library=str(library),
        validation_resolution="32x32,48x32",
        validation_num_video_frames="5,9",
        eval_timesteps=4,
        num_eval_images=2,
        **options,
    )
    project_prompts = tmp_path / "prompts.txt"
    (project.folder / "prompts.txt").write_text(project_prompts.read_text())
    assert project.train() == 0

    videos_per_kind = 2 * 2 * 2 * 2  # prompts, sizes, lengths, seeds
    rows = project.rows("validation")
    kinds = [(row["step"], row["kind"]) for row in rows]
    for place in ((0, "teacher"), (0, "undistilled"), (0, "student-ema"), (4, "student-ema")):
        assert kinds.count(place) == videos_per_kind
    assert rows[0]["name"] == "validation" and all((project.output / row["file"]).is_file() for row in rows)
    assert len({row["file"] for row in rows}) == len(rows)

    measured = {(row["step"], row["kind"]): row for row in project.rows("measures")}
    assert measured[0, "undistilled"]["seed_diversity"] > 0
    # A student that has not trained is the undistilled model, video by video.
    assert measured[0, "student-ema"]["of_teacher"] == pytest.approx(measured[0, "undistilled"]["of_teacher"])
    assert [row["step"] for row in project.rows("critic")] == [0, 2, 4]
    assert project.rows("critic")[0]["critic_reach"] == 0 and project.rows("critic")[0]["critic_ratio_q1"] == 1
    assert project.rows("critic")[2]["critic_ratio_q1"] != 1
    assert [row["step"] for row in project.rows("evaluation")] == [1, 2, 3, 4]

    health = {row["step"]: row for row in project.rows("health")}
    assert not health[0]["lights"] and health[0]["score"] is None  # grace
    assert {light["name"] for light in health[4]["lights"]} >= {"motion", "critic", "stability", "latents"}
    best = min((2, 4), key=lambda step: health[step]["score"])
    assert (project.output / "checkpoints" / "best").read_text().strip() == f"checkpoint-{best:06d}"
    assert not project.rows("validation_failed")

    # Trackers keep one video per name and step, and every one is sent.
    sent = [(row["step"], row["name"]) for row in project.rows("video")]
    assert len(set(sent)) == len(sent) == len(rows)

    # The card tells the health of what is exported.
    earlier = project.folder / "earlier"
    assert main(["export", str(project.output), "--checkpoint", "checkpoint-000002", "--out", str(earlier)]) == 0
    for step, export in ((4, project.output / "export"), (2, earlier)):
        told = json.loads((export / "distill.json").read_text(encoding="utf-8"))["health"]
        assert told == [{key: light[key] for key in ("colour", "name", "sentence")} for light in health[step]["lights"]]
        shown = {path.name for path in (export / "videos").iterdir()}
        assert shown == {Path(row["file"]).name for row in rows if row["step"] == step}
        card = (export / "README.md").read_text(encoding="utf-8")
        assert "## Health at the last validation" in card and f"| {told[0]['colour']} {told[0]['name']} |" in card

    # From the best, with the same references: nothing is rendered twice.
    assert project.train("resume_from_checkpoint=best", "max_train_steps=6") == 0
    assert project.rows("start")[-1]["resumed_at"] == best
    assert len([row for row in project.rows("validation") if row["kind"] == "teacher"]) == videos_per_kind


def test_a_decoder_that_fails_changes_nothing_but_the_log(
    make_project: ProjectMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = make_project("quiet", max_train_steps=4, use_ema=True)
    assert quiet.train() == 0

    def full(self: VideoCodec, latents: torch.Tensor) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoCodec, "decode", full)
    failing = make_project("failing", **LOOKING)
    assert failing.train() == 0
    assert "No space left on device" in failing.rows("validation_failed")[0]["message"]
    assert not failing.rows("validation") and len(failing.rows("finish")) == 1
    assert "the run goes on" in caplog.text
    for role in ("student", "critic"):
        assert_same_bits(quiet.trained(role), failing.trained(role))
    assert_same_bits(quiet.exported(), failing.exported())


def test_a_red_light_stops_where_asked(make_project: ProjectMaker, capsys: pytest.CaptureFixture[str]) -> None:
    # Whatever the motion of random weights is, it is outside this band.
    options = {**LOOKING, "health_bands": {"stability": [None, None, -2, -1]}, "health_on_red": "stop",
               "health_grace_steps": 0, "checkpoint_step_interval": 100, "push_checkpoints_to_hub": True}  # fmt: skip
    project = make_project(**options)
    assert project.train() == 3
    assert project.checkpoints == ["checkpoint-000002"] and not list(project.output.glob("export*"))
    assert not (project.output / "hub-queue.json").exists()  # nor does a stopped student leave the machine
    (stopped,) = project.rows("stopped")
    assert stopped["step"] == 2 and "lower learning_rate" in stopped["reason"]
    assert "Stopped at step 2 by a red light" in capsys.readouterr().out
    assert project.train("health_on_red=continue") == 0
    assert project.rows("finish")[0]["step"] == 4


def test_the_lora_guides_validation_on_30_blocks(
    make_project: ProjectMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guidance, skipped layer and EMA as written; sizes, frames and steps are a test's, and so are the prompts: the
    tiny text encoder knows no Chinese."""
    written = json.loads((GUIDE / "config.json").read_text(encoding="utf-8"))
    keys = {key: value for key, value in written.items() if key.startswith("validation_guidance")}
    keys["ema_validation"] = written["ema_validation"]
    assert keys["validation_guidance_skip_layers"] == [9] and keys["validation_guidance_skip_layers_stop"] == 1.0
    skipped: list[tuple[int, ...]] = []
    solvers: set[str] = set()
    original, sample = WanDenoiser.velocity_without, Sampler.sample

    def noted(self: WanDenoiser, x: Any, sigma: Any, text: Any, blocks: Any) -> torch.Tensor:
        skipped.append(tuple(blocks))
        return original(self, x, sigma, text, blocks)

    def sampled(self: Sampler, *arguments: Any) -> torch.Tensor:
        if not self.schedule.ladder:
            solvers.add(self.solver)
        return sample(self, *arguments)

    monkeypatch.setattr(WanDenoiser, "velocity_without", noted)
    monkeypatch.setattr(Sampler, "sample", sampled)
    project = make_project(
        datasets=videos_dataset(write_small_set(tmp_path / "videos", 2)), distillation_method=None,
        pretrained_model_name_or_path=str(save_small_pipeline(tmp_path / "deep", layers=30)), max_train_steps=1,
        validation_disable=False, validation_num_inference_steps=3, benchmark_num_inference_steps=3, use_ema=True,
        validation_negative_prompt="a blue square moves left", **keys,
    )  # fmt: skip
    assert project.train() == 0
    assert skipped == [(9,)] * 6  # every step of the reference video and of the student's
    assert solvers == {"unipc"}
    assert [row["kind"] for row in project.rows("validation")] == ["teacher", "student-ema"]


@pytest.mark.slow
def test_two_processes_share_the_videos_and_judge_as_one(make_project: ProjectMaker) -> None:
    options = {**LOOKING, "validation_on_startup": False, "train_batch_size": 2}
    one = make_project("one", **options)
    assert one.train() == 0
    two = make_project("two", **{**options, "train_batch_size": 1, "num_processes": 2})
    finished = subprocess.run(
        two.command(), env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    files = [sorted(row["file"] for row in project.rows("validation")) for project in (one, two)]
    assert files[0] == files[1] and all((two.output / file).is_file() for file in files[1])
    for event in ("measures", "critic", "health"):
        left, right = one.rows(event), two.rows(event)
        assert [row["step"] for row in left] == [row["step"] for row in right]
    for left, right in zip(one.rows("measures"), two.rows("measures"), strict=True):
        assert right["videos"] == left["videos"] == 2
        assert right["latent_std"] == pytest.approx(left["latent_std"], rel=1e-4)
        assert right["motion"] == pytest.approx(left["motion"], rel=1e-2)
    assert finished.stdout.count("Rendering the teacher's reference videos") == 1
