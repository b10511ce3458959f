"""Caching by several processes, runs that meet in one folder, and kills: nothing lost, nothing half-true."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simpletuner_dmd import durable
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data import sharing
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.encode import LOT_BATCHES, Pace
from simpletuner_dmd.data.sharing import Claims, Saver, share_out
from simpletuner_dmd.data.store import LatentStore, decode_tensor
from simpletuner_dmd.data.text_store import TextStore, text_key
from tests.data.clips import Encoders, captioned, entry, make_config, prepared, prompts_entry

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
PROMPTS = [f"prompt number {number}" for number in range(60)]
KILL_POINTS = 20
OPERATIONS = ("_write", "_sync", "_replace")


def in_process(act: Callable[[], object]) -> int:
    """Starts `act` in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def status_of(child: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for index in range(6):
        captioned(tmp_path / "d" / f"{index}.mp4", caption=f"clip {index}", pictures=None, frames=9 + index)
    return tmp_path / "d"


def fill(root: Path, videos: Path, encoders: Encoders | None = None, slow: float = 0.0) -> None:
    """Caches 60 prompts and 6 clips below `root`."""
    encoders = encoders or Encoders(LatentGeometry())
    root.mkdir(exist_ok=True)
    durable.write_text(root / "p.txt", "\n".join(PROMPTS))
    config = make_config(root, write_batch_size=8, vae_batch_size=2)

    def text(prompts: list[str]) -> list[torch.Tensor]:
        time.sleep(slow)
        return encoders.text(prompts)

    def video(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(slow)
        return encoders.video(pixels)

    prepared([prompts_entry(root / "p.txt")], config, encoders, encode_text=text, needs_latents=False)
    prepared([entry(videos)], config, encoders, encode_text=text, encode_video=video)


@pytest.fixture
def reference(tmp_path: Path, videos: Path) -> Path:
    """A cache that was filled without any accident."""
    fill(tmp_path / "reference", videos)
    return tmp_path / "reference"


def latents_of(root: Path) -> dict[str, torch.Tensor]:
    """By file name; raises where a file is not what was written."""
    files = sorted((root / "cache" / "vae").rglob("??/*.safetensors*"))
    return {file.name: decode_tensor(file.read_bytes())[0] for file in files if not file.name.startswith(".")}


def missing_text(root: Path, prompts: list[str] = PROMPTS) -> list[str]:
    return TextStore(root / "cache" / "text", False).missing([text_key(prompt, "umt5-a") for prompt in prompts])


def assert_whole(root: Path, reference: Path) -> None:
    """Every entry below `root` is the one of `reference`, and none is missing."""
    prompts = [*PROMPTS, "ugly", *(f"clip {index}" for index in range(6))]
    assert missing_text(root, prompts) == []
    mine, right = (TextStore(place / "cache" / "text", False) for place in (root, reference))
    keys = [text_key(prompt, "umt5-a") for prompt in prompts]
    assert all(torch.equal(mine.load(key), right.load(key)) for key in keys)
    found, expected = latents_of(root), latents_of(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# --- kills ------------------------------------------------------------------------------------------------------------


def killing_at(moment: int, act: Callable[[], object]) -> int:
    """Runs `act` here, with a SIGKILL right before the operation on the disk with this number; returns their count."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            genuine: Callable[..., object] = getattr(durable, name)

            def operation(*arguments: object, original: Callable[..., object] = genuine) -> object:
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)

            patch.setattr(durable, name, operation)
        act()
    return count


def test_kill_9_at_twenty_points(
    tmp_path: Path, videos: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A point to be killed at, but not done: the system keeps what a killed process wrote, flushed or not.
    monkeypatch.setattr(durable, "_sync", lambda descriptor: None)
    operations = killing_at(0, lambda: fill(tmp_path / "counted", videos))
    assert operations > 2 * KILL_POINTS
    lost_text, kept_latents = set(), set()
    for number in range(KILL_POINTS):
        root, moment = tmp_path / f"killed-{number}", 1 + number * operations // KILL_POINTS
        child = in_process(lambda moment=moment, root=root: killing_at(moment, lambda: fill(root, videos)))
        assert status_of(child) == -signal.SIGKILL
        # Nothing half-true: what is there is whole. Nothing lost: only what is not there is made again.
        missing, before = missing_text(root), latents_of(root)
        again = Encoders(LatentGeometry())
        fill(root, videos, again)
        assert again.clips == 6 - len(before), moment
        assert len([prompt for prompt in again.prompts if prompt in PROMPTS]) == len(missing), moment
        assert_whole(root, reference)
        lost_text.add(len(missing))
        kept_latents.add(len(before))
    assert len(lost_text) >= 4 and len(kept_latents) >= 4, "the kills fell at different stages"


def test_a_claim_dies_with_its_process(tmp_path: Path) -> None:
    key = "ab" * 16

    def hold() -> None:
        with Claims(tmp_path / "store") as claims:
            assert claims.take(key)
            (tmp_path / "holding").touch()
            time.sleep(60)

    child = in_process(hold)
    while not (tmp_path / "holding").exists():
        time.sleep(0.01)
    with Claims(tmp_path / "store") as claims:
        assert not claims.take(key) and claims.take("cd" * 16)
        os.kill(child, signal.SIGKILL)
        claims.wait(key)
        assert status_of(child) == -signal.SIGKILL and claims.take(key)


def test_the_rest_of_a_process_that_died_is_taken_over(tmp_path: Path, videos: Path, reference: Path) -> None:
    root = tmp_path / "shared"
    dying = in_process(lambda: fill(root, videos, slow=0.2))
    living = in_process(lambda: fill(root, videos, slow=0.01))
    time.sleep(0.3)
    os.kill(dying, signal.SIGKILL)
    assert status_of(living) == 0 and status_of(dying) == -signal.SIGKILL
    assert_whole(root, reference)


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_two_at_once_share_the_work(tmp_path: Path, videos: Path, reference: Path) -> None:
    root = tmp_path / "shared"

    def work(name: str) -> None:
        encoders = Encoders(LatentGeometry())
        fill(root, videos, encoders, slow=0.05)
        (tmp_path / name).write_text(json.dumps([encoders.prompts, encoders.clips]))

    children = [in_process(lambda name=name: work(name)) for name in ("one", "two")]
    assert [status_of(child) for child in children] == [0, 0]
    (left, clips_left), (right, clips_right) = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert clips_left + clips_right == 6, "nothing twice"
    assert sorted(left + right) == sorted({*left, *right})
    assert min(clips_left, clips_right) >= 2 and min(len(left), len(right)) >= 16, "both had their share"
    assert_whole(root, reference)


def test_share_out_hands_out_everything_once(tmp_path: Path) -> None:
    names = [f"{number:032x}"[::-1] for number in range(10)]
    done: set[str] = set()
    batches = []

    def missing(some: list[str]) -> list[str]:
        return [name for name in some if name not in done]

    with Claims(tmp_path) as claims:
        for batch in share_out(names, str, missing, claims, 4):
            assert batch is not None, "nobody else works here"
            batches.append(batch)
            done |= {*batch, names[5]}  # another process has made this one
            claims.give_back(batch)
    assert batches == [names[:4], [names[4], *names[6:8]], names[8:]]


def test_an_error_of_the_saver_comes_out_and_what_was_handed_over_is_saved() -> None:
    saved: list[int] = []

    def full() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="full"), Saver() as saver:
        saver.save(lambda: saved.append(1))
        saver.save(full)
        saver.save(lambda: saved.append(2))
    with pytest.raises(KeyError), Saver() as saver:
        saver.save(lambda: (time.sleep(0.05), saved.append(3))[1])
        raise KeyError
    assert saved == [1, 3]


def test_nothing_is_saved_after_an_error_although_it_waited_in_line() -> None:
    saved: list[int] = []

    def full() -> None:
        time.sleep(0.1)
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="full"), Saver(depth=8) as saver:
        saver.save(lambda: saved.append(1))
        saver.save(full)
        saver.save(lambda: saved.append(2))
        assert saved in ([], [1]), "the caller did not wait"
    assert saved == [1]


def test_a_lot_is_as_much_as_the_encoder_does_in_a_moment() -> None:
    pace = Pace()
    sizes = []
    for _ in range(7):
        sizes.append(pace.batches)
        pace.learn(pace.batches, 0.02 * pace.batches)
    assert sizes == [1, 2, 4, 8, 12, 12, 12], "12 batches of 20 ms are a quarter of a second"
    pace.learn(12, 12.0)
    assert pace.batches == 1, "large clips go one batch at a time"
    for _ in range(9):
        pace.learn(pace.batches, 0.0)
    assert pace.batches == LOT_BATCHES


def test_latents_are_flushed_together(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 clips that take no time to encode: a few lots, all of whose files are flushed before their names appear."""
    for index in range(6, 24):
        captioned(videos / f"{index}.mp4", caption=f"clip {index}", frames=9 + index)
    happened: list[str] = []
    for name in ("_sync", "_replace"):
        original = getattr(durable, name)
        monkeypatch.setattr(durable, name, lambda *a, n=name, o=original: (happened.append(n), o(*a))[1])
    prepared([entry(videos)], make_config(tmp_path), Encoders(LatentGeometry()))
    named = sum(1 for before, after in zip(happened, happened[1:], strict=False) if before == after == "_replace")
    assert named >= 15, "most files take their name right after another"


def test_a_file_system_without_locks_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sharing.fcntl, "lockf", none)
    with Claims(tmp_path) as claims:
        assert claims.take("ab" * 16) and claims.take("ab" * 16)
        claims.wait("ab" * 16)
        claims.give_back(["ab" * 16])


def test_a_disk_that_fills_up_while_caching(
    tmp_path: Path, videos: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, genuine = tmp_path / "full", durable._write
    (root / "cache").mkdir(parents=True)
    left = 0

    def write(descriptor: int, chunk: memoryview) -> int:
        nonlocal left
        if len(chunk) > left:
            genuine(descriptor, chunk[: max(left, 0)])
            left = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= len(chunk)
        return genuine(descriptor, chunk)

    for space in (4000, 9000, 20000):
        left = space
        monkeypatch.setattr(durable, "_write", write)
        with pytest.raises(UserError, match="the disk is full"):
            fill(root, videos)
        monkeypatch.setattr(durable, "_write", genuine)
        latents_of(root)  # whatever is there is whole
        assert not list(root.rglob("*.partial*")), "nothing half is left"
    fill(root, videos)
    assert_whole(root, reference)


def test_two_runs_do_not_forget_what_the_other_verified(tmp_path: Path) -> None:
    one, two = LatentStore(tmp_path, False), LatentStore(tmp_path, False)
    keys = ["ab" * 16, "cd" * 16]
    for store, key in zip((one, two), keys, strict=True):
        store.save(key, torch.ones(1, 1, 2, 2), {})
    one.flush()
    two.flush()
    read = LatentStore(tmp_path, False)
    for key in keys:
        assert read.memo.known(tmp_path / key[:2] / f"{key}.safetensors")
