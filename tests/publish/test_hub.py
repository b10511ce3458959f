"""Uploads against a server on loopback that speaks the Hub's API, with what goes wrong on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.publish import hub
from simpletuner_dmd.publish.hub import QUEUE, HubUploader, Queue, Upload, check_access, push_command
from tests.support.fake_hub import READ, WRITE, FakeHub, fake_hub
from tests.support.runs import environment

REPOSITORY = "someone/student"


@pytest.fixture
def server(monkeypatch):
    """Online as far as the library is concerned, by plain LFS: its other protocol needs servers of its own."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with fake_hub() as server:
        yield server


@pytest.fixture
def short_waits(monkeypatch):
    """The library's own waits between its attempts, a hundredth as long."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds / 100, 0.05)))


def export_in(folder: Path, weights: bytes = b"weights" * 1000) -> Path:
    export = folder / "export"
    (export / "diffusers").mkdir(parents=True)
    (export / "diffusers" / "pytorch_lora_weights.safetensors").write_bytes(weights)
    (export / "videos").mkdir()
    (export / "videos" / "a cat.mp4").write_bytes(b"moving pictures")
    snippet = 'source = "path/to/export"  # a Hub repository or the export folder\n'
    (export / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n```python\n{snippet}```\n")
    (export / "distill.json").write_text(json.dumps({"snippet": snippet}))
    (export / ".half.partial").write_bytes(b"of a killed process")
    return export


def uploader(server: FakeHub, folder: Path, **options) -> HubUploader:
    options = {"token": WRITE, "endpoint": server.url, "waits": (0.01, 0.01), **options}
    return HubUploader(REPOSITORY, folder, **options)


# --- access, before any training --------------------------------------------------------------------------------------


def test_a_token_that_can_write_makes_a_private_repository(server):
    access = check_access("student", token=WRITE, endpoint=server.url)
    assert access == hub.Access(REPOSITORY, True)
    assert server.repositories[REPOSITORY].private
    assert check_access("student", token=WRITE, endpoint=server.url).usable  # it is there now


def test_what_is_public_already_is_said(server):
    check_access("student", private=False, token=WRITE, endpoint=server.url)
    access = check_access("student", token=WRITE, endpoint=server.url)
    assert access.usable and "public" in access.problem


@pytest.mark.parametrize(
    ("token", "name", "word"),
    [("hf_wrong", "student", "not valid"), (READ, "student", "only read"), (WRITE, "other/student", "may not write")],
)
def test_a_token_that_cannot_write_is_known_at_once(server, token, name, word):
    access = check_access(name, token=token, endpoint=server.url)
    assert not access.usable and word in access.problem
    assert not server.repositories


def test_a_repository_of_others_that_is_there_is_not_taken_for_writable(server):
    check_access("student", token=WRITE, endpoint=server.url)
    server.repositories["other/student"] = server.repositories[REPOSITORY]
    assert not check_access("other/student", token=WRITE, endpoint=server.url).usable


def test_a_hub_that_is_ill_is_tried_nevertheless(server):
    server.fail("whoami", 500, times=9)
    access = check_access("student", token=WRITE, endpoint=server.url)
    assert access.usable and "tried nevertheless" in access.problem


def test_a_hub_that_hangs_does_not_hold_up_the_start(server, monkeypatch):
    monkeypatch.setattr(hub, "ASKING_SECONDS", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        began = time.monotonic()
        access = check_access("student", token=WRITE, endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")
    assert access.usable and "did not answer" in access.problem
    assert time.monotonic() - began < 5


def test_without_a_token_or_network_nothing_is_asked(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no Hugging Face token" in check_access("student", endpoint=server.url).problem
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in check_access("student", token=WRITE, endpoint=server.url).problem
    assert not server.requests


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_an_export_arrives_whole_and_can_be_fetched(server, tmp_path):
    export = export_in(tmp_path)
    upload = uploader(server, tmp_path)
    upload.upload(export)
    assert upload.close(30) and not upload.failures
    files = server.repositories[REPOSITORY].files
    assert {name: content for name, content in files.items()} == {
        path.relative_to(export).as_posix(): path.read_bytes()
        for path in export.rglob("*") if path.is_file() and not path.name.startswith(".")
    }  # fmt: skip
    name = "diffusers/pytorch_lora_weights.safetensors"
    found = hf_hub_download(REPOSITORY, name, endpoint=server.url, token=WRITE, cache_dir=tmp_path / "cache")
    assert Path(found).read_bytes() == (export / name).read_bytes()
    listed = HfApi(endpoint=server.url, token=WRITE).list_repo_tree(REPOSITORY, recursive=True)
    assert sorted(entry.path for entry in listed) == sorted(files)
    assert not (tmp_path / QUEUE).exists()


def test_checkpoints_go_beside_and_leave_the_disk(server, tmp_path):
    upload = uploader(server, tmp_path)
    folders = []
    for step in (1, 2):
        folders.append(export_in(tmp_path / f"checkpoint-{step}", weights=bytes([step])))
        upload.upload(folders[-1], path_in_repo=f"checkpoint-{step}", message=f"step {step}", temporary=True)
    assert upload.close(30) and not upload.failures
    repository = server.repositories[REPOSITORY]
    assert repository.commits == ["step 1", "step 2"]
    assert repository.files["checkpoint-2/diffusers/pytorch_lora_weights.safetensors"] == b"\x02"
    assert not any(folder.exists() for folder in folders)


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize(
    ("pattern", "how", "method"),
    [("preupload", 500, "POST"), ("/lfs/", 500, "PUT"), ("/lfs/", "drop", "PUT"), ("objects/batch", 503, "POST"),
     ("/commit/", 500, "POST"), ("/commit/", "drop", "POST"), ("verify", 500, "POST"), ("repos/create", 502, "POST")],
)  # fmt: skip
def test_what_fails_half_way_is_tried_again(server, tmp_path, pattern, how, method):
    server.fail(pattern, how, times=2, method=method)
    upload = uploader(server, tmp_path)
    upload.upload(export_in(tmp_path, weights=os.urandom(300_000)))
    assert upload.close(60, patient=True) and not upload.failures
    repository = server.repositories[REPOSITORY]
    assert len(repository.files) == 4 and len(repository.commits) == 1


def test_what_is_forbidden_is_not_tried_again(server, tmp_path, caplog):
    check_access("student", token=WRITE, endpoint=server.url)
    upload = uploader(server, tmp_path, token=READ)
    with caplog.at_level(logging.WARNING):
        upload.upload(export_in(tmp_path))
        assert upload.close(30, patient=True)
    assert server.count("POST", "preupload") <= 1
    assert push_command(tmp_path) in upload.failures[0]
    assert READ not in caplog.text
    assert [entry.folder for entry in Queue(tmp_path / QUEUE).waiting()] == ["export"]


@pytest.mark.usefixtures("short_waits")
def test_a_hub_that_stays_away_leaves_the_upload_on_the_list(server, tmp_path, caplog):
    export = export_in(tmp_path)
    server.fail("/commit/", 500, times=99)
    upload = uploader(server, tmp_path)
    with caplog.at_level(logging.WARNING):
        upload.upload(export)
        assert upload.close(60, patient=True)
    assert server.count("POST", "/commit/") == 3 and len(upload.failures) == 1
    assert server.url not in caplog.text and WRITE not in caplog.text
    server.failures.clear()
    put = server.count("PUT", "/lfs/")
    later = uploader(server, tmp_path)
    assert later.resume() == 1
    assert later.close(30) and not later.failures
    assert len(server.repositories[REPOSITORY].files) == 4
    assert server.count("PUT", "/lfs/") == put, "what had arrived was sent again"
    assert not (tmp_path / QUEUE).exists()


def test_the_end_of_a_run_does_not_wait_for_attempts_to_come(server, tmp_path):
    server.fail("repos/create", 500, times=99)
    upload = uploader(server, tmp_path, waits=(100.0, 100.0))
    upload.upload(export_in(tmp_path))
    while not server.requests:
        time.sleep(0.01)
    began = time.monotonic()
    assert upload.close(60)
    assert time.monotonic() - began < 10 and upload.failures


def test_uploading_does_not_hold_up_the_run(server, tmp_path):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        upload = uploader(server, tmp_path, endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        upload.upload(export_in(tmp_path))
        assert upload.close(0.2) is False
        assert time.monotonic() - began < 5
    assert len(Queue(tmp_path / QUEUE).waiting()) == 1


def test_the_list_is_of_folders_that_are_there(tmp_path):
    queue = Queue(tmp_path / QUEUE)
    assert queue.waiting() == []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        queue.add(Upload(str(tmp_path / name), "same place" if name == "a" else ""))
    newer = Upload(str(tmp_path / "b"), "same place")
    queue.add(newer)
    assert [upload.folder for upload in queue.waiting()] == [str(tmp_path / "b")] * 2
    (tmp_path / "b").rmdir()
    assert queue.waiting() == []
    (tmp_path / QUEUE).write_text("{")
    assert queue.waiting() == []


# --- simpletuner push -------------------------------------------------------------------------------------------------


def finished_run(folder: Path) -> Path:
    export_in(folder, weights=b"w" * 300_000)
    options = {"hub_model_id": None, "tracker_run_name": "student", "model_card_private": True}
    document = {key: {"value": value, "origin": "default"} for key, value in options.items()}
    (folder / "config.resolved.json").write_text(json.dumps({**document, "datasets": {"value": []}}))
    return folder


def push(server: FakeHub, folder: Path) -> subprocess.Popen[str]:
    settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(folder / "home")}  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "simpletuner_dmd", "push", str(folder)], text=True,
                            env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def test_push_in_a_process_of_its_own_goes_on_after_a_kill(server, tmp_path):
    folder = finished_run(tmp_path)
    processes: list[subprocess.Popen[str]] = []
    server.on_put = lambda: processes[0].send_signal(signal.SIGKILL)  # the first of two large files has arrived
    server.fail("/commit/", 500, times=1)  # not before the kill, however fast
    processes.append(push(server, folder))
    processes[0].communicate(timeout=60)
    assert not server.repositories[REPOSITORY].files
    assert [upload.path_in_repo for upload in Queue(folder / QUEUE).waiting()] == [""]
    kept = set(server.objects)
    assert kept
    server.on_put = None
    server.failures.clear()
    server.requests.clear()
    output, _ = push(server, folder).communicate(timeout=60)
    assert f"to {REPOSITORY}" in output and WRITE not in output
    repository = server.repositories[REPOSITORY]
    assert len(repository.files) == 4 and repository.private
    sent = {path.removeprefix("/lfs/") for method, path in server.requests if method == "PUT"}
    assert sent == set(server.objects) - kept
    assert f'source = "{REPOSITORY}"' in repository.files["README.md"].decode()
    assert not (folder / QUEUE).exists()


def test_push_says_what_it_lacks(server, tmp_path, capsys, monkeypatch):
    assert main(["push", str(tmp_path)]) == 2
    assert "not the output folder of a run" in capsys.readouterr().err
    folder = finished_run(tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(folder)]) == 2
    assert "hf auth login" in capsys.readouterr().err
    (folder / "export" / "distill.json").unlink()
    assert main(["push", str(folder)]) == 2
    assert "holds no export" in capsys.readouterr().err
