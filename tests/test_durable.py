"""Files that are whole or absent, whatever happens to the process or the disk while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from simpletuner_dmd import durable
from simpletuner_dmd.durable import (
    HashingFile,
    free_bytes,
    sha256_of,
    sweep,
    write_atomically,
    write_folder,
    write_json,
    write_several,
    write_text,
    write_through,
)

# Everything that changes the disk.
OPERATIONS = ("_write", "_sync", "_replace", "make_folder")
WRITERS: dict[str, Callable[[Path, str], object]] = {
    "bytes": lambda path, text: write_atomically(path, text.encode()),
    "text": write_text,
    "library": lambda path, text: write_through(path, lambda beside: beside.write_text(text) and None),
    "folder": lambda path, text: write_folder(path, lambda beside: (beside / "a").write_text(text) and None),
}


class Killed(BaseException):
    """The process is gone."""


def content_of(path: Path) -> str:
    return (path / "a" if path.is_dir() else path).read_text(encoding="utf-8")


def stopped_at(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], moment: int, error: BaseException) -> int:
    """Runs `act`; the operation number `moment` raises `error`. Returns how many operations there were."""
    count = 0
    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            original = getattr(durable, name)

            def operation(*arguments: object, original: Callable[..., object] = original) -> object:
                nonlocal count
                count += 1
                if count == moment:
                    raise error
                return original(*arguments)

            patch.setattr(durable, name, operation)
        with suppress(Killed, OSError):
            act()
    return count


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=["kill", "full"])
def test_a_reader_sees_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException
) -> None:
    old, new = "former" * 9, "new" * 50
    write = WRITERS[kind]
    monkeypatch.setattr(durable, "CHUNK", 40)  # several writes
    total = stopped_at(monkeypatch, lambda: write(tmp_path / "counted", new), 0, error)
    assert total >= 3
    for moment in range(1, total + 1):
        path = tmp_path / f"{moment}.txt"
        write(path, old)
        stopped_at(monkeypatch, lambda path=path: write(path, new), moment, error)
        assert content_of(path) in (old, new), moment
        write(path, new)
        assert content_of(path) == new, "the same command goes on"
        if isinstance(error, OSError):
            assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")], "nothing half is left"


def test_the_content_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    for name in ("_sync", "_replace"):
        original = getattr(durable, name)
        monkeypatch.setattr(durable, name, lambda *a, n=name, o=original: (happened.append(n), o(*a))[1])
    for kind, write in WRITERS.items():
        write(tmp_path / kind, "text")
        # The file, then its name, then the folder that holds the name.
        assert happened[-3:] == ["_sync", "_replace", "_sync"], kind
        happened.clear()


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from simpletuner_dmd import durable
left = int(sys.argv[2])
for name in ("_write", "_sync", "_replace"):
    def operation(*arguments, original=getattr(durable, name)):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    setattr(durable, name, operation)
durable.write_text(Path(sys.argv[1]), "new")
"""


def test_kill_9(tmp_path: Path) -> None:
    """write, fsync, rename, fsync of the folder: a real SIGKILL before each of them, and none."""
    found = []
    for moment in range(1, 6):
        path = tmp_path / f"{moment}" / "file"
        write_text(path, "former")
        result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), str(moment)], check=False)
        assert (result.returncode == 0) == (moment == 5)
        found.append(path.read_text())
        leftovers = [item for item in path.parent.iterdir() if item != path]
        for leftover in leftovers:
            os.utime(leftover, (1, 1))
        sweep(path.parent)
        assert list(path.parent.iterdir()) == [path]
    assert found == ["former"] * 3 + ["new"] * 2


def test_several_files_are_all_on_the_disk_before_one_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    for name in ("_write", "_sync", "_replace"):
        original = getattr(durable, name)
        monkeypatch.setattr(durable, name, lambda *a, n=name, o=original: (happened.append(n), o(*a))[1])
    write_several({tmp_path / place: place.encode() for place in ("one/a", "one/b", "two/c")})
    assert happened == ["_write"] * 3 + ["_sync"] * 3 + ["_replace"] * 3 + ["_sync"] * 2, "two folders"
    assert (tmp_path / "one" / "b").read_text() == "one/b"


def test_several_files_are_flushed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=20)
    monkeypatch.setattr(durable, "_sync", lambda descriptor: together.wait() and None)
    write_several({tmp_path / name / "file": b"x" for name in "abc"})  # one after the other would break the barrier
    assert together.broken is False


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=["kill", "full"])
def test_each_of_several_files_is_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    names, old, new = "abc", b"former" * 9, b"new" * 50

    def write(folder: Path, content: bytes) -> None:
        write_several({folder / name: content for name in names})

    monkeypatch.setattr(durable, "CHUNK", 40)  # several writes
    total = stopped_at(monkeypatch, lambda: write(tmp_path / "counted", new), 0, error)
    for moment in range(1, total + 1):
        folder = tmp_path / str(moment)
        write(folder, old)
        stopped_at(monkeypatch, lambda folder=folder: write(folder, new), moment, error)
        assert {(folder / name).read_bytes() for name in names} <= {old, new}, moment
        if isinstance(error, OSError):
            assert sorted(item.name for item in folder.iterdir()) == list(names), "nothing half is left"


def test_sweep_leaves_young_and_foreign_files(tmp_path: Path) -> None:
    young, old, foreign = (tmp_path / n for n in (".a.1-0123abcd.partial", ".b.1-0123abcd.partial.json", ".partial"))
    for path in (young, old, foreign):
        path.write_text("half")
    for path in (old, foreign):
        os.utime(path, (1, 1))
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, foreign])
    sweep(tmp_path / "absent")


def test_a_full_disk_keeps_its_name_through_safetensors(tmp_path: Path) -> None:
    def full(beside: Path) -> None:
        beside.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError) as caught:
        write_through(tmp_path / "x", full)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_json_and_hash(tmp_path: Path) -> None:
    assert write_json(tmp_path / "d" / "x.json", {"a": "ü"}).read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    with HashingFile(tmp_path / "y") as file:
        file.write(b"abc")
        file.write(memoryview(b"def"))
    assert (file.size, file.sha256) == (6, sha256_of(tmp_path / "y"))
    assert (tmp_path / "y").read_bytes() == b"abcdef"
    assert free_bytes(tmp_path / "not" / "yet") > 0
