import errno
import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from simpletuner_dmd import durable
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.checkpoint import (
    CheckpointState,
    bytes_needed,
    complete_checkpoints,
    find_latest,
    load_checkpoint,
    mark_best,
    resolve_checkpoint,
    save_checkpoint,
)
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.optimizers import build_optimizer
from simpletuner_dmd.training.schedules import build_schedule

OPERATIONS = ("_write", "_sync", "make_folder", "rename", "remove_folder")


def make_state(step):
    generator = torch.Generator().manual_seed(step)
    student = [("blocks.0.lora_A.weight", Parameter(torch.randn(4, 3, generator=generator).bfloat16()))]
    critic = [("blocks.0.lora_A.weight", Parameter(torch.randn(4, 3, generator=generator)))]
    optimizers, schedulers = {}, {}
    for role, name, params in (("student", "adamw_bf16", student), ("critic", "torch-adamw", critic)):
        optimizer = build_optimizer(name, params, lr=1e-5)
        schedule = build_schedule("cosine", optimizer, updates=100)
        params[0][1].grad = torch.randn(4, 3, generator=generator).to(params[0][1].dtype)
        optimizer.step()
        schedule.step()
        optimizers[role], schedulers[role] = optimizer.state_dict(), schedule.state_dict()
    return CheckpointState(
        step=step,
        tensors={"student": {n: p.detach() for n, p in student}, "critic": {n: p.detach() for n, p in critic}},
        optimizers=optimizers,
        schedulers=schedulers,
        ema=Ema(student, 0.9).state_dict(),
        method={"probe": torch.arange(3), "ratio": 0.1},
        meta={"epoch": 1, "config": {"seed": 3}},
    )


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_round_trip_is_exact(tmp_path):
    state = make_state(200)
    path = save_checkpoint(tmp_path, 200, state, keep=None)
    assert path == tmp_path / "checkpoint-000200"
    assert_same(vars(load_checkpoint(path)), vars(state))
    assert names(tmp_path) == ["checkpoint-000200", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-000200\n"
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == set(names(path)) - {"manifest.json"}
    assert sum(file.stat().st_size for file in path.iterdir()) <= bytes_needed(state) + 4096


def test_a_minimal_state_round_trips(tmp_path):
    state = CheckpointState(step=0, tensors={"student": {"w": torch.zeros(1)}})
    assert_same(vars(load_checkpoint(save_checkpoint(tmp_path, 0, state, None))), vars(state))


def test_a_loaded_checkpoint_outlives_its_files(tmp_path):
    path = save_checkpoint(tmp_path, 1, make_state(1), None)
    loaded = load_checkpoint(path)
    shutil.rmtree(path)
    assert_same(vars(loaded), vars(make_state(1)))


# --- crashes --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing after it touches the disk, not even a clean-up."""


def count_operations(monkeypatch, act, fail_at=None, error=None, dead=True):
    """Runs `act`; the operation number `fail_at` on the disk raises, and (dead) so does every one after it."""
    seen = SimpleNamespace(count=0)
    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            original = getattr(durable, name)

            def operation(*args, original=original):
                seen.count += 1
                if fail_at is not None and (seen.count == fail_at or (dead and seen.count > fail_at)):
                    raise error
                return original(*args)

            patch.setattr(durable, name, operation)
        try:
            act()
            seen.error = None
        except (Killed, UserError, OSError) as raised:
            seen.error = raised
    return seen


def prepare(root, scenario):
    """A folder as it is before the save under test, and that save."""
    before = root.parent / "before"
    if not before.exists():
        save_checkpoint(before, 100, make_state(100), None)
        save_checkpoint(before, 200, make_state(200), None)
    shutil.copytree(before, root)
    if scenario == "repeat":  # the step is saved again, after a resume from 100
        return lambda: save_checkpoint(root, 200, make_state(200), None)
    return lambda: save_checkpoint(root, 300, make_state(300), 2)


@pytest.mark.parametrize("scenario", ["next", "repeat"])
def test_a_kill_at_any_operation_leaves_a_whole_newest_checkpoint(tmp_path, monkeypatch, scenario, caplog):
    total = count_operations(monkeypatch, prepare(tmp_path / "whole", scenario)).count
    assert total > 30
    for moment in range(1, total + 1):
        root = tmp_path / f"killed-{moment}"
        seen = count_operations(monkeypatch, prepare(root, scenario), moment, Killed())
        assert isinstance(seen.error, Killed), moment
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            latest = find_latest(root)
        assert latest is not None
        loaded = load_checkpoint(latest)
        assert loaded.step in (200, 300)
        assert_same(vars(loaded), vars(make_state(loaded.step)))
        for path in root.glob(".*.partial"):
            if path.is_dir():
                assert path.name in caplog.text
        # The same command goes on: the save is repeated, and nothing of the accident is left.
        save_checkpoint(root, 300, make_state(300), 2)
        assert load_checkpoint(find_latest(root)).step == 300
        assert not [name for name in names(root) if name.startswith(".checkpoint")], moment
        shutil.rmtree(root)


@pytest.mark.parametrize("scenario", ["next", "repeat"])
def test_a_full_disk_at_any_operation_leaves_what_was_there(tmp_path, monkeypatch, scenario):
    total = count_operations(monkeypatch, prepare(tmp_path / "whole", scenario)).count
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for moment in range(1, total + 1):
        root = tmp_path / f"full-{moment}"
        seen = count_operations(monkeypatch, prepare(root, scenario), moment, full, dead=False)
        # Deleting an old checkpoint may fail without harm; all else is told to the person.
        if seen.error is not None:
            assert isinstance(seen.error, UserError), moment
            text = str(seen.error)
            assert str(root) in text and "bytes are needed" in text and "free" in text and "Fix:" in text
            assert not list(root.glob(".checkpoint*.partial")), moment
        assert load_checkpoint(find_latest(root)).step in (200, 300)
        shutil.rmtree(root)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 100, make_state(100), None)
    before = names(tmp_path)
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 10)
    with pytest.raises(UserError, match="10 are free"):
        save_checkpoint(tmp_path, 200, make_state(200), None)
    assert names(tmp_path) == before


def test_a_folder_that_is_not_writable_is_told(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(durable, "make_folder", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        save_checkpoint(tmp_path, 1, make_state(1), None)


def test_a_bug_while_saving_is_loud_and_leaves_nothing(tmp_path):
    state = make_state(1)
    state.tensors["student"]["odd"] = torch.zeros(1, dtype=torch.complex64)
    with pytest.raises(TypeError, match="complex64"):
        save_checkpoint(tmp_path, 1, state, None)
    assert names(tmp_path) == []


# --- damage ---------------------------------------------------------------------------------------------------------


def test_one_changed_byte_anywhere_is_detected(tmp_path):
    path = save_checkpoint(tmp_path, 1, make_state(1), None)
    for file in sorted(path.iterdir()):
        if file.name == "manifest.json":
            continue
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(UserError, match=file.name):
            load_checkpoint(path)
        file.write_bytes(content)
    load_checkpoint(path)


@pytest.mark.parametrize("damage", ["no manifest", "cut manifest", "short file", "missing file", "newer"])
def test_half_written_checkpoints_are_skipped_by_name(tmp_path, caplog, damage):
    save_checkpoint(tmp_path, 100, make_state(100), None)
    path = save_checkpoint(tmp_path, 200, make_state(200), None)
    manifest = path / "manifest.json"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "cut manifest":
        manifest.write_bytes(manifest.read_bytes()[:50])
    elif damage == "short file":
        (path / "student.safetensors").write_bytes(b"x")
    elif damage == "missing file":
        (path / "ema.safetensors").unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == tmp_path / "checkpoint-000100"
    assert "checkpoint-000200" in caplog.text
    with pytest.raises(UserError, match="cannot be used"):
        load_checkpoint(path)


def test_nothing_there(tmp_path):
    assert find_latest(tmp_path) is None and find_latest(tmp_path / "absent") is None
    assert resolve_checkpoint(tmp_path, "latest") is None


# --- rotation and names ---------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (100, 200, 300):
        path = save_checkpoint(tmp_path, step, make_state(step), 2)
        if step == 100:
            mark_best(tmp_path, path)
    assert names(tmp_path) == ["best", "checkpoint-000100", "checkpoint-000300", "latest"]
    save_checkpoint(tmp_path, 400, make_state(400), 1)
    assert names(tmp_path) == ["best", "checkpoint-000100", "checkpoint-000400", "latest"]


@pytest.mark.parametrize("keep", [None, 0])
def test_no_limit_keeps_all(tmp_path, keep):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, make_state(step), keep)
    assert len(complete_checkpoints(tmp_path)) == 3


def test_the_latest_is_the_one_written_last_not_the_highest_step(tmp_path):
    """A person went back to step 100; the abandoned 300 must not win the next time."""
    for step in (100, 300, 150):
        save_checkpoint(tmp_path, step, make_state(step), None)
    assert find_latest(tmp_path) == tmp_path / "checkpoint-000150"
    save_checkpoint(tmp_path, 300, make_state(300), None)
    assert find_latest(tmp_path) == tmp_path / "checkpoint-000300"


def test_resolving_what_a_person_writes(tmp_path):
    path = save_checkpoint(tmp_path, 100, make_state(100), None)
    with pytest.raises(UserError, match="named the best"):
        resolve_checkpoint(tmp_path, "best")
    mark_best(tmp_path, path)
    for which in ("latest", "best", "checkpoint-000100", str(path)):
        assert resolve_checkpoint(tmp_path, which) == path
    with pytest.raises(UserError, match="one of these: checkpoint-000100"):
        resolve_checkpoint(tmp_path, "checkpoint-000200")
