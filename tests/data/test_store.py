"""The caches: what is read is what was written, and whatever is not whole does not exist."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from simpletuner_dmd import durable
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data import disk, text_store
from simpletuner_dmd.data.disk import HashMemo, digest, hash_file, write_whole
from simpletuner_dmd.data.store import DamagedEntryError, LatentStore, decode_tensor, encode_tensor, latent_key
from simpletuner_dmd.data.text_store import TextStore, text_key, text_keys

KEY = "a1" * 16
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
    assert not store.has(KEY)
    store.save(KEY, LATENTS, {"source": "a.mp4"})
    assert store.has(KEY) and torch.equal(store.load(KEY), LATENTS) and store.note(KEY) == {"source": "a.mp4"}
    assert torch.equal(LatentStore(tmp_path, compress=True).load(KEY), LATENTS), "either form is read"


@pytest.mark.parametrize("compress", [False, True])
def test_a_damaged_latent_is_made_anew(tmp_path: Path, compress: bool) -> None:
    store = LatentStore(tmp_path, compress)
    store.save(KEY, LATENTS, {})
    store.flush()
    (file,) = [path for path in tmp_path.rglob(f"{KEY}.*")]
    file.write_bytes(file.read_bytes()[:-20])
    again = LatentStore(tmp_path, compress)
    assert not again.has(KEY) and not file.exists()


def test_rot_that_keeps_size_and_time_is_noticed_when_read(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, compress=False)
    store.save(KEY, LATENTS, {})
    (file,) = [path for path in tmp_path.rglob(f"{KEY}.*")]
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match="checksum"):
        store.load(KEY)
    assert not store.has(KEY), "the next start makes it anew"


# --- text -------------------------------------------------------------------------------------------------------------


def key(name: object) -> str:
    return text_key(str(name), "umt5")


def random_rows(count: int, width: int = 32, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(count)
    return {key(i): torch.randn(i % 7 + 1, width, generator=source).to(dtype) for i in range(count)}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("text-*.safetensors"))


def test_many_keys_are_the_keys_of_each() -> None:
    captions = ["", "a cat", "süß", "a cat "]
    assert text_keys(captions, "m") == [text_key(caption, "m") for caption in captions]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_store_keeps_real_rows_only(tmp_path: Path, compress: bool, dtype: torch.dtype) -> None:
    rows = random_rows(20, dtype=dtype)
    store = TextStore(tmp_path, compress)
    store.save(dict(list(rows.items())[:12]))
    store.save(dict(list(rows.items())[12:]))
    for again in (store, TextStore(tmp_path, not compress), (store.flush(), TextStore(tmp_path, compress))[1]):
        assert len(again) == 20 and again.missing([*rows, key("absent")]) == [key("absent")]
        for name, expected in rows.items():
            loaded = again.load(name)
            assert name in again and loaded.dtype == dtype and torch.equal(loaded, expected)
        assert again.bytes_on_disk == sum(path.stat().st_size for path in shards(tmp_path))
        assert again.bytes_on_disk < sum(r.nbytes for r in rows.values()) + 20 * 64 + 2 * 600, "no padding on disk"
    with pytest.raises(KeyError):
        store.load(key("absent"))


def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    rows = random_rows(3)
    TextStore(tmp_path, compress=False).save(rows)
    tensors = load_file(shards(tmp_path)[0])
    assert torch.equal(tensors["rows"], torch.cat(list(rows.values())))
    assert [row.numpy().tobytes().hex() for row in tensors["keys"]] == list(rows)
    assert tensors["ends"].tolist() == [64, 192, 384]


def test_equal_embeddings_of_different_prompts_keep_apart(tmp_path: Path) -> None:
    store = TextStore(tmp_path, compress=False)
    store.save({key("a"): torch.ones(2, 4)})
    store.save({key("b"): torch.ones(2, 4)})
    assert TextStore(tmp_path, compress=False).missing([key(c) for c in "abc"]) == [key("c")]


def test_keys_that_share_their_first_half(tmp_path: Path) -> None:
    names = [f"{'ab' * 8}{i:016x}" for i in range(5)] + ["00" * 16, "ff" * 16]
    store = TextStore(tmp_path, compress=False)
    store.save({name: torch.full((1, 4), float(i)) for i, name in enumerate(names)})
    store.flush()
    again = TextStore(tmp_path, compress=False)
    assert [int(again.load(name)[0, 0]) for name in names] == list(range(7))
    assert again.missing([f"{'ab' * 8}{9:016x}", names[3]]) == [f"{'ab' * 8}{9:016x}"]


def test_a_damaged_shard_loses_only_the_damaged_prompts(tmp_path: Path) -> None:
    rows = {key(i): torch.full((4, 8), float(i)) for i in range(5)}
    store = TextStore(tmp_path, compress=False)
    store.save(rows)
    store.flush()
    (shard,) = shards(tmp_path)
    data = bytearray(shard.read_bytes())
    at = data.index(rows[key(4)].numpy().tobytes())
    data[at + 3] ^= 1
    shard.write_bytes(data)
    again = TextStore(tmp_path, compress=False)
    assert again.missing(list(rows)) == [key(4)]
    again.save({key(4): rows[key(4)]})
    again.flush()
    assert torch.equal(TextStore(tmp_path, compress=False).load(key(4)), rows[key(4)])
    shard.write_bytes(data[: at - 20])
    assert TextStore(tmp_path, compress=False).missing(list(rows)) == [key(3)], "the last one came from its own shard"


def test_any_flipped_or_missing_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    rows = random_rows(4, width=8)
    TextStore(tmp_path, compress=False).save(rows)
    (shard,) = shards(tmp_path)
    data = shard.read_bytes()
    lost = []
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x10
        shard.write_bytes(broken)
        again = TextStore(tmp_path, compress=False)
        left = [name for name in rows if name in again]
        assert all(torch.equal(again.load(name), rows[name]) for name in left), at
        lost.append(len(rows) - len(left))
    # Only spaces, names and numbers of the header that nothing is read by may change without a loss.
    assert sum(count > 0 for count in lost) > len(data) - 200
    for length in range(0, len(data), 5):
        shard.write_bytes(data[:length])
        again = TextStore(tmp_path, compress=False)
        assert all(torch.equal(again.load(name), rows[name]) for name in rows if name in again)


@pytest.mark.parametrize("compress", [False, True])
def test_text_rot_that_keeps_size_and_time(tmp_path: Path, compress: bool) -> None:
    store = TextStore(tmp_path, compress)
    store.save(random_rows(3))
    store.flush()
    (shard,) = shards(tmp_path)
    status, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match="run the same command again"):
        [store.load(name) for name in random_rows(3)]
    assert len(TextStore(tmp_path, compress)) == 2, "the next start makes the third anew"


def test_the_index_is_only_a_shortcut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(9)
    store = TextStore(tmp_path, compress=True)
    store.save(rows)
    store.flush()
    index, read = tmp_path / text_store.INDEX, []
    genuine = text_store._read_shard
    monkeypatch.setattr(text_store, "_read_shard", lambda path, **o: (read.append(path), genuine(path, **o))[1])
    assert len(TextStore(tmp_path, True)) == 9 and read == [], "a shard that is as it was is not read again"
    whole = index.read_bytes()
    for content in (b"", b"[1, 2", whole[:-1], whole[:40], whole.replace(b'"1"', b'"0"'), b"\0" * 99):
        index.write_bytes(content)
        assert len(TextStore(tmp_path, True)) == 9
    index.unlink()
    assert len(TextStore(tmp_path, True)) == 9 and len(read) == 7
    index.write_bytes(whole)
    shards(tmp_path)[0].unlink()
    assert len(TextStore(tmp_path, True)) == 0, "what the index says of a shard that is gone counts for nothing"


def test_foreign_files_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "text-a.safetensors").write_bytes(b"")
    (tmp_path / "text-b.safetensors").write_bytes(save({"ends": torch.zeros(1)}, {"version": "1"}))
    (tmp_path / "text-c.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    (tmp_path / "text-d.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    assert len(TextStore(tmp_path, compress=False)) == 0


def test_two_stores_on_one_folder(tmp_path: Path) -> None:
    one, two = TextStore(tmp_path, True), TextStore(tmp_path, False)
    one.save({key("a"): torch.ones(1, 4)})
    two.save({key("b"): torch.ones(2, 4), key("a"): torch.ones(1, 4)})
    assert two.missing([key("a"), key("b")]) == [] and one.missing([key("b")]) == [key("b")]
    one.flush()
    two.flush()
    for store in (one, TextStore(tmp_path, True)):
        assert len(store) == 2 and len(store.load(key("b"))) == 2 and len(store.load(key("a"))) == 1


def test_merging_keeps_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "MERGE_AT", 10)
    store, names = TextStore(tmp_path, False), [key(i) for i in range(64)]
    for start in range(0, 64, 4):
        store.save({name: torch.full((1, 2), float(start)) for name in names[start : start + 8]})
    assert store.missing(names) == [] and len(store) == 64
    assert all(int(store.load(name)[0, 0]) in (i // 4 * 4, i // 4 * 4 - 4) for i, name in enumerate(names))


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    latents, text = LatentStore(tmp_path / "l", False), TextStore(tmp_path / "t", False)
    text.save({key("before"): torch.ones(1, 4)})
    monkeypatch.setattr(durable, "_sync", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        latents.save("k", LATENTS, {})
    assert "goes on from there" in caught.value.problems[0].fix
    with pytest.raises(UserError, match="the disk is full"):
        text.save({key("after"): torch.ones(1, 4)})
    monkeypatch.undo()
    assert not any(path.is_file() for path in (tmp_path / "l").rglob("*"))
    assert not LatentStore(tmp_path / "l", False).has("k")
    again = TextStore(tmp_path / "t", False)
    assert again.missing([key("before"), key("after")]) == text.missing([key("before"), key("after")]) == [key("after")]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "x" / "y", b"data")


def test_leftovers_of_a_kill_are_ignored_and_swept(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, False)
    store.save(KEY, LATENTS, {})
    (tmp_path / KEY[:2]).mkdir(exist_ok=True)
    old, young = (tmp_path / KEY[:2] / f".k1.{n}-0123abcd.partial.safetensors" for n in (1, 2))
    for leftover in (old, young):
        leftover.write_bytes(b"half a tens")
    os.utime(old, (1, 1))
    again = LatentStore(tmp_path, False)
    assert again.has(KEY) and not old.exists() and young.exists(), "a young one may be another run's"


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
