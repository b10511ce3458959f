"""Datasets in a bucket, on moto's S3 server."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.datasets import read_entries
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.scan import look, scan
from simpletuner_dmd.data.sources import bucket
from tests.data.clips import Encoders, entry, prepared, prompts_entry, write_video

BUCKET = "films"


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(store: str) -> Iterator[Any]:
    client = boto3.client(
        "s3", endpoint_url=store, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET)
    yield client
    for about in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=about["Key"])
    client.delete_bucket(Bucket=BUCKET)


def upload(client: Any, key: str, body: bytes) -> None:
    client.put_object(Bucket=BUCKET, Key=key, Body=body)


def upload_clip(client: Any, folder: Path, key: str, caption: str | None, frames: int = 9) -> None:
    upload(client, key, write_video(folder / "upload.mp4", frames=frames).read_bytes())
    if caption is not None:
        upload(client, str(Path(key).with_suffix(".txt")), caption.encode())


def bucket_entry(store: str, tmp_path: Path, prefix: str = "set", make: Any = entry, **options: Any) -> DatasetEntry:
    place = {"aws_bucket_name": BUCKET, "aws_endpoint_url": store, "aws_region_name": "us-east-1"}
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}
    downloads = str(tmp_path / "downloads")
    found = make(tmp_path, type="aws", download_dir=downloads, **{**place, **keys, **options})
    return found.model_copy(update={"instance_data_dir": prefix})


def test_a_bucket_is_a_folder_from_elsewhere(store: str, client: Any, tmp_path: Path, config: TrainConfig) -> None:
    upload_clip(client, tmp_path, "set/a.mp4", "first")
    upload_clip(client, tmp_path, "set/sub/süß 文.mp4", "second")
    upload_clip(client, tmp_path, "set/silent.mp4", None)
    upload_clip(client, tmp_path, "set/short.mp4", "too short", frames=5)
    upload_clip(client, tmp_path, "setting/b.mp4", "another prefix")
    upload(client, "set/", b"")
    result = scan(bucket_entry(store, tmp_path), config)
    assert [sample.captions for sample in result.usable] == [("first",), ("second",)]
    assert result.counts == {"usable": 2, "too short": 1, "no caption": 1}


def test_only_what_changed_is_fetched(
    store: str, client: Any, tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        upload_clip(client, tmp_path, f"set/{name}.mp4", name)
    source = bucket_entry(store, tmp_path)
    scan(source, config)
    fetched: list[str] = []
    genuine = bucket.copy_whole

    def counting(target: Path, *rest: Any) -> None:
        fetched.append(target.name)
        genuine(target, *rest)

    monkeypatch.setattr(bucket, "copy_whole", counting)
    scan(source, config)
    assert fetched == []
    upload(client, "set/a.txt", b"A")  # the same length as before
    client.delete_object(Bucket=BUCKET, Key="set/b.mp4")
    (tmp_path / "downloads" / "c.mp4").unlink()
    result = scan(source, config)
    assert sorted(fetched) == ["a.txt", "c.mp4"]
    assert [sample.captions for sample in result.usable] == [("A",), ("c",)]


def test_a_complete_cache_needs_no_object(
    store: str, client: Any, tmp_path: Path, config: TrainConfig, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, frames in (("a", 9), ("b", 10)):
        upload_clip(client, tmp_path, f"set/{name}.mp4", name, frames)
    source = bucket_entry(store, tmp_path)
    samples = [group.samples for group in prepared([source], config, encoders).groups]
    assert encoders.clips == 2
    shutil.rmtree(tmp_path / "downloads")
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "copy_whole", None)
        again = prepared([source], config, encoders)
        assert [group.samples for group in again.groups] == samples and encoders.clips == 2
    upload(client, "set/a.txt", b"A")
    changed = prepared([source], config, encoders)
    assert changed.groups[0].samples[0].captions == ("A",) and encoders.clips == 2, "the pixels are the same"


def test_prompts_in_a_bucket(store: str, client: Any, tmp_path: Path, config: TrainConfig) -> None:
    upload(client, "words/p.txt", b"one\ntwo\n")
    source = bucket_entry(store, tmp_path, "words", make=prompts_entry)
    assert [sample.captions for sample in scan(source, config).usable] == [("one",), ("two",)]


@pytest.mark.parametrize("key", ["set/../../../outside.mp4", "set/a/../../b.mp4", "set/a\\b.mp4"])
def test_a_name_that_would_leave_the_folder_is_refused(
    store: str, client: Any, tmp_path: Path, config: TrainConfig, key: str
) -> None:
    class Listing:
        def find(self, root: str, detail: bool) -> dict[str, Any]:
            return {f"{BUCKET}/{key}": {"type": "file", "size": 1, "ETag": "x"}}

    before = sorted(tmp_path.rglob("*"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bucket, "open_store", lambda _: Listing())
        with pytest.raises(UserError, match="outside"):
            scan(bucket_entry(store, tmp_path), config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bucket_that_is_not_there(store: str, client: Any, tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(UserError, match="cannot be listed|holds no object") as caught:
        look(bucket_entry(store, tmp_path, aws_bucket_name="nowhere"), config)
    assert caught.value.problems[0].fix
    with pytest.raises(UserError, match="s3://films/empty holds no object"):
        look(bucket_entry(store, tmp_path, "empty"), config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="cannot be listed"):
        look(bucket_entry(closed, tmp_path), config)


def test_without_s3fs_the_extra_is_named(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install \"simpletuner-dmd\[s3\]\""):
        look(bucket_entry("http://x", tmp_path), config)


def test_keys_come_from_the_environment_and_are_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FILMS_SECRET", "very-secret")
    raw = {"id": "films", "type": "aws", "aws_bucket_name": BUCKET, "aws_secret_access_key": "{env:FILMS_SECRET}"}
    found = read_entries([raw], "multidatabackend.json")
    assert found.problems == []
    secret = found.entries[0].aws_secret_access_key
    assert secret is not None and secret.get_secret_value() == "very-secret"
    assert "very-secret" not in found.entries[0].model_dump_json() + repr(found.entries[0])
