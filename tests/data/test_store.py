"""The caches: what is read is what was written, and whatever is not whole does not exist."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data import disk
from simpletuner_dmd.data.disk import HashMemo, digest, hash_file, write_whole
from simpletuner_dmd.data.store import (
    DamagedEntryError,
    LatentStore,
    TextStore,
    decode_tensor,
    encode_tensor,
    latent_key,
    text_key,
)

LATENTS = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_bit_for_bit(compress: bool, dtype: torch.dtype) -> None:
    tensor, note = decode_tensor(encode_tensor(LATENTS.to(dtype), {"source": "süß.mp4"}, compress))
    assert tensor.dtype == dtype and torch.equal(tensor, LATENTS.to(dtype)) and note == {"source": "süß.mp4"}


@pytest.mark.parametrize("compress", [False, True])
def test_any_flipped_or_missing_byte_is_noticed(compress: bool) -> None:
    data = encode_tensor(LATENTS[:, :1, :2, :2], {}, compress)
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 0x10
        try:
            tensor, _ = decode_tensor(bytes(broken))
        except DamagedEntryError:
            continue
        # A flip in the notes beside the tensor can pass; one in the tensor or its shape cannot.
        assert torch.equal(tensor, LATENTS[:, :1, :2, :2])
    for length in range(0, len(data), 13):
        with pytest.raises(DamagedEntryError):
            decode_tensor(data[:length])


def test_keys_tell_apart_what_differs() -> None:
    assert text_key("a", "m") != text_key("b", "m") != text_key("b", "n")
    keys = {latent_key(c, s, f) for c in "ab" for s in ({"frames": 9}, {"frames": 5}) for f in "mn"}
    assert len(keys) == 8
    assert latent_key("a", {"x": 1, "y": 2}, "m") == latent_key("a", {"y": 2, "x": 1}, "m")
    assert digest("ab", "c") != digest("a", "bc")


def test_latent_store(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, compress=False)
    assert not store.has("k1")
    store.save("k1", LATENTS, {"source": "a.mp4"})
    assert store.has("k1") and torch.equal(store.load("k1"), LATENTS) and store.note("k1") == {"source": "a.mp4"}
    assert torch.equal(LatentStore(tmp_path, compress=True).load("k1"), LATENTS), "either form is read"


@pytest.mark.parametrize("compress", [False, True])
def test_a_damaged_latent_is_made_anew(tmp_path: Path, compress: bool) -> None:
    store = LatentStore(tmp_path, compress)
    store.save("k1", LATENTS, {})
    store.flush()
    (file,) = [path for path in tmp_path.rglob("k1.*")]
    file.write_bytes(file.read_bytes()[:-20])
    again = LatentStore(tmp_path, compress)
    assert not again.has("k1") and not file.exists()


def test_rot_that_keeps_size_and_time_is_noticed_when_read(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, compress=False)
    store.save("k1", LATENTS, {})
    (file,) = [path for path in tmp_path.rglob("k1.*")]
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match="checksum"):
        store.load("k1")
    assert not store.has("k1"), "the next start makes it anew"


@pytest.mark.parametrize("compress", [False, True])
def test_text_store_keeps_real_rows_only(tmp_path: Path, compress: bool) -> None:
    rows = {f"key{i}": torch.randn(i + 1, 32).bfloat16() for i in range(20)}
    store = TextStore(tmp_path, compress)
    store.save(dict(list(rows.items())[:12]))
    store.save(dict(list(rows.items())[12:]))
    store.flush()
    again = TextStore(tmp_path, compress)
    assert len(again) == 20
    for key, expected in rows.items():
        assert key in again and torch.equal(again.load(key), expected)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.pack"))
    assert size < sum(r.nbytes for r in rows.values()) + 20 * 400, "no padding on disk"


def test_equal_embeddings_of_different_prompts_keep_apart(tmp_path: Path) -> None:
    store = TextStore(tmp_path, compress=False)
    store.save({"a": torch.ones(2, 4)})
    store.save({"b": torch.ones(2, 4)})
    assert {"a", "b"} <= {key for key in "abc" if key in TextStore(tmp_path, compress=False)}


def test_a_damaged_pack_loses_only_the_damaged_prompts(tmp_path: Path) -> None:
    rows = {f"key{i}": torch.full((4, 8), float(i)) for i in range(5)}
    store = TextStore(tmp_path, compress=False)
    store.save(rows)
    store.flush()
    (pack,) = tmp_path.glob("*.pack")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1  # the last prompt's last byte
    pack.write_bytes(data)
    again = TextStore(tmp_path, compress=False)
    assert len(again) == 4 and "key4" not in again
    pack.write_bytes(data[: len(data) // 2])
    assert len(TextStore(tmp_path, compress=False)) == 2
    again.save({"key4": rows["key4"]})
    assert torch.equal(TextStore(tmp_path, compress=False).load("key4"), rows["key4"])


def test_text_rot_that_keeps_size_and_time(tmp_path: Path) -> None:
    store = TextStore(tmp_path, compress=False)
    store.save({"k": torch.ones(4, 8)})
    store.flush()
    (pack,) = tmp_path.glob("*.pack")
    status, data = pack.stat(), bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    os.utime(pack, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match="run the same command again"):
        store.load("k")
    assert "k" not in TextStore(tmp_path, compress=False), "the next start makes it anew"


def test_a_pack_without_its_index_does_not_exist(tmp_path: Path) -> None:
    store = TextStore(tmp_path, compress=False)
    store.save({"k": torch.ones(1, 4)})
    next(tmp_path.glob("*.json")).unlink()
    assert len(TextStore(tmp_path, compress=False)) == 0
    (tmp_path / "x.json").write_text("[1, 2")
    (tmp_path / "y.json").write_text('{"entries": {"k": [1]}}')
    (tmp_path / "z.json").write_text(json.dumps({"entries": {"k": [0, 4, "00"]}}))
    (tmp_path / MEMO).write_text('{"a": 1}')
    assert len(TextStore(tmp_path, compress=False)) == 0


MEMO = "hashes.json"


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    latents, text = LatentStore(tmp_path / "l", False), TextStore(tmp_path / "t", False)
    text.save({"before": torch.ones(1, 4)})
    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        latents.save("k", LATENTS, {})
    assert "goes on from there" in caught.value.problems[0].fix
    with pytest.raises(UserError, match="the disk is full"):
        text.save({"after": torch.ones(1, 4)})
    monkeypatch.undo()
    assert not any(path.is_file() for path in (tmp_path / "l").rglob("*"))
    assert not LatentStore(tmp_path / "l", False).has("k")
    again = TextStore(tmp_path / "t", False)
    assert "before" in again and "after" not in again and "after" not in text


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "x" / "y", b"data")


def test_leftovers_of_a_kill_are_ignored_and_swept(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, False)
    store.save("k1", LATENTS, {})
    old, young = tmp_path / "k1" / ".tmp-1-aa", tmp_path / "k1" / ".tmp-2-bb"
    for leftover in (old, young):
        leftover.write_bytes(b"half a tens")
    os.utime(old, (1, 1))
    again = LatentStore(tmp_path, False)
    assert again.has("k1") and not old.exists() and young.exists(), "a young one may be another run's"


def test_memo_hashes_again_only_when_the_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    memo = HashMemo(tmp_path / "m.json")
    first = memo.hash(file)
    memo.save()
    taken: list[Path] = []
    monkeypatch.setattr(disk, "hash_file", lambda path: (taken.append(path), hash_file(path))[1])
    again = HashMemo(tmp_path / "m.json")
    assert again.hash(file) == first and taken == []
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert again.hash(file) != first and taken == [file]
    (tmp_path / "m.json").write_text("{broken")
    assert HashMemo(tmp_path / "m.json").hash(file) == again.hash(file)
