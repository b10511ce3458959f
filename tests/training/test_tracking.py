import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from simpletuner_dmd.training import tracking
from simpletuner_dmd.training.tracker_videos import animated
from simpletuner_dmd.training.tracking import Tracking
from tests.support.videos import write_moving_square


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Recorder:
    def __init__(self, fail=()):
        self.fail, self.calls = fail, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fail:
                raise RuntimeError(f"{name} is down")

        return call

    def named(self, name):
        return [(args, kwargs) for call, args, kwargs in self.calls if call == name]


@pytest.fixture
def guest(monkeypatch):
    """Trackers are recorders; `guest.fail` names the calls that raise."""
    recorder = Recorder()
    monkeypatch.setattr(tracking, "_open", lambda name, output_dir, project, run_name: recorder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return recorder


def test_rows_are_on_disk_at_once_and_valid_json(tmp_path):
    run = Tracking(tmp_path)
    run.event("start", version="1", folder=tmp_path, numbers=[float("inf"), 1])
    run.log(1, {"loss": 0.5, "bad": float("nan"), "large": float("inf"), "tensor": torch.tensor(2.0), "off": None})
    expected = {"event": "step", "step": 1, "loss": 0.5, "bad": None, "large": None, "tensor": 2.0, "off": None}
    assert rows(tmp_path)[1] == expected
    assert rows(tmp_path)[0] == {"event": "start", "version": "1", "folder": str(tmp_path), "numbers": [None, 1]}
    run.video(1, "a cat", tmp_path / "validation" / "x.mp4")
    assert rows(tmp_path)[2]["path"] == "validation/x.mp4"
    run.close()
    run.close()


def test_a_resumed_run_writes_the_later_rows_again(tmp_path):
    run = Tracking(tmp_path)
    run.event("start")
    for step in range(1, 6):
        run.log(step, {"loss": step})
    run.event("checkpoint", step=4)
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 2, "lo')
    again = Tracking(tmp_path, resume_step=3)
    again.log(4, {"loss": 44})
    again.close()
    assert [row.get("step") for row in rows(tmp_path)] == [None, 1, 2, 3, 4]
    assert rows(tmp_path)[-1]["loss"] == 44


def test_a_new_run_in_an_old_folder_keeps_the_old_rows_beside(tmp_path):
    for loss in (1, 2, 3):
        run = Tracking(tmp_path)
        run.log(1, {"loss": loss})
        run.close()
    assert [rows(tmp_path, name)[0]["loss"] for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")] == [
        1,
        2,
        3,
    ]


def test_only_the_main_process_writes(tmp_path):
    run = Tracking(tmp_path, "all", accelerator=SimpleNamespace(is_main_process=False))
    run.log(1, {"loss": 1.0})
    run.event("x")
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_trackers_see_the_numbers(tmp_path, guest):
    run = Tracking(tmp_path, "wandb, tensorboard", config={"lr": 1e-5, "prompts": ["a", None], "path": tmp_path})
    assert set(run.trackers) == {"wandb", "tensorboard"}
    assert guest.named("store_init_configuration")[0][0][0] == {
        "lr": 1e-5, "prompts": '["a", null]', "path": json.dumps(str(tmp_path)),
    }  # fmt: skip
    run.log(7, {"loss": 0.5, "bad": float("nan")})
    assert guest.named("log")[0] == (({"loss": 0.5},), {"step": 7})
    run.close()
    assert len(guest.named("finish")) == 2


@pytest.mark.parametrize("fail", ["start", "store_init_configuration", "log", "finish"])
def test_a_failing_tracker_warns_once_and_the_run_goes_on(tmp_path, guest, fail, caplog):
    guest.fail = (fail,)
    with caplog.at_level(logging.WARNING):
        run = Tracking(tmp_path, ["tensorboard"])
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0})
        run.close()
    assert len([record for record in caplog.records if "tensorboard is left out" in record.getMessage()]) == 1
    assert len(rows(tmp_path)) == 3


def test_missing_and_unknown_trackers_warn(tmp_path, monkeypatch, caplog):
    for module in ("tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        Tracking(tmp_path, "tensorboard,mlfow").close()
    assert "tensorboard is left out" in caplog.text and "mlfow is left out" in caplog.text


def test_what_was_asked_for():
    assert tracking._wanted("none") == [] == tracking._wanted([]) == tracking._wanted("")
    assert tracking._wanted("wandb,wandb") == ["wandb"]
    assert set(tracking._wanted("all")) <= set(tracking.TRACKERS)


def test_no_wandb_key_means_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "_open", lambda *args: Recorder())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    with caplog.at_level(logging.WARNING):
        Tracking(tmp_path / "a", "wandb").close()
        assert tracking.os.environ["WANDB_MODE"] == "" and not caplog.records
        (tmp_path / ".netrc").unlink()
        Tracking(tmp_path / "a", "wandb").close()
    assert tracking.os.environ["WANDB_MODE"] == "offline"
    assert len(caplog.records) == 1 and "wandb has no key" in caplog.text


def test_a_video_goes_to_wandb_as_a_file(tmp_path, guest, monkeypatch):
    made = []
    fake = SimpleNamespace(Video=lambda path, format: made.append((path, format)) or "video", __spec__=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = Tracking(tmp_path, "wandb")
    run.video(3, "a cat", tmp_path / "x.mp4")
    assert made == [(str(tmp_path / "x.mp4"), "mp4")]
    assert guest.named("log")[-1] == (({"a cat": "video"},), {"step": 3})
    run.close()


def test_accelerates_trackers_are_made_as_it_makes_them(tmp_path, monkeypatch):
    """The real classes, without their services."""
    pytest.importorskip("accelerate")
    assert tracking._open("wandb", tmp_path, "project", "run").run_name == "project"
    board = tracking._open("tensorboard", tmp_path, "project", "run")
    assert (board.run_name, board.logging_dir_param) == ("run", str(tmp_path / "tensorboard"))
    assert tracking._open("trackio", tmp_path, "project", "run").init_kwargs == {"name": "run"}


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_real_tracker_takes_a_whole_run(tmp_path, monkeypatch, caplog, name):
    """The libraries themselves, without account or network: what the recorders above cannot know."""
    accelerate = pytest.importorskip("accelerate")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for variable, value in {**settings, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name, reason=f"{name} is an extra")  # trackio reads its folder when it is imported
    video = write_moving_square(tmp_path / "x.mp4", frames=5)
    try:
        with caplog.at_level(logging.WARNING, logger=tracking.__name__):
            run = Tracking(tmp_path, name, run_name="r", config={"lr": 1e-5, "list": [1, None], "none": None})
            assert list(run.trackers) == [name]
            run.log(1, {"loss": 0.5, "bad": float("nan")})
            run.video(1, "a cat", video)
            assert list(run.trackers) == [name], caplog.text
            run.close()
    finally:
        accelerate.PartialState._reset_state()
    assert not [record for record in caplog.records if record.name == tracking.__name__]
    if name == "tensorboard":
        events = b"".join(path.read_bytes() for path in (tmp_path / name).rglob("events.*"))
        assert events.count(b"GIF89a") == 1 and b"a cat" in events
    else:
        where = "wandb/offline-run-*/files/media/videos/*.mp4" if name == "wandb" else "trackio/**/*.mp4"
        copies = list(tmp_path.glob(where))
        assert len(copies) == 1 and copies[0].read_bytes() == video.read_bytes()


def test_an_animated_picture_is_small(tmp_path):
    video = write_moving_square(tmp_path / "x.mp4", size=(640, 320), frames=100)
    picture, width, height = animated(video)
    with Image.open(io.BytesIO(picture)) as opened:
        assert (opened.n_frames, opened.size, (width, height)) == (34, (320, 160), (320, 160))
        assert abs(opened.info["duration"] - 3000 / 16) < 10  # GIF counts in hundredths of a second


def test_figures_are_a_row_and_numbers_for_the_trackers(tmp_path: Path) -> None:
    class Noting:
        seen: list[tuple[dict[str, float], int]] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.seen.append((values, step))

        def finish(self) -> None:
            pass

    tracking = Tracking(tmp_path)
    tracking.trackers["noting"] = Noting()
    tracking.measured("measures", 20, kind="student", videos=3, motion=0.5, of_teacher={"motion": 0.8}, channels=[1.0])
    tracking.close()
    assert Noting.seen == [({"student/measures/motion": 0.5, "student/measures/of_teacher.motion": 0.8}, 20)]
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["event"] == "measures" and row["step"] == 20 and row["channels"] == [1.0] and row["videos"] == 3
