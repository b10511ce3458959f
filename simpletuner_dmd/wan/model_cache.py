"""Quantised weights on the disk, so that a second start reads only them.

An entry is one safetensors file and a JSON file beside it, which is written last and says what the entry is, how large
and with which hash. Without it, or where it does not agree with the file, the entry is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from simpletuner_dmd.durable import NO_SPACE, NOT_WRITABLE, make_folder, sha256_of, sweep, write_json, write_through
from simpletuner_dmd.wan.checkpoints import Checkpoint
from simpletuner_dmd.wan.schemes import Scheme
from simpletuner_dmd.wan.streaming import saved_tensors

FORMAT = 1
"""Of the entries; part of their key, so that a change is a miss."""


@dataclass(frozen=True)
class Entry:
    """One model in one scheme. facts: everything that the weights follow from."""

    folder: Path
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        written = json.dumps({"format": FORMAT, **self.facts}, sort_keys=True)
        return hashlib.blake2b(written.encode(), digest_size=12).hexdigest()

    @property
    def file(self) -> Path:
        return self.folder / f"{self.facts['part']}-{self.facts['scheme']}-{self.key}.safetensors"

    @property
    def document(self) -> Path:
        return self.file.with_suffix(".json")

    def find(self) -> dict[str, Any] | None:
        """The document of a whole entry; None where there is none, or its file is not the one that was written."""
        try:
            document = json.loads(self.document.read_text(encoding="utf-8"))
            status = self.file.stat()
            if status.st_size != document["bytes"]:
                return None
            # The hash of a file that nobody has touched since it was written is not computed again.
            if status.st_mtime_ns != document["written"] and sha256_of(self.file) != document["sha256"]:
                return None
            with safe_open(self.file, "pt") as opened:
                opened.keys()
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return document

    def checkpoint(self) -> Checkpoint:
        return Checkpoint.of([self.file], "cache_dir_models")

    def write_tensors(self, model: nn.Module, scheme: Scheme, lines: list[str]) -> dict[str, str] | None:
        """Writes the weights; returns the notes that belong to them, or None, and a line, where there is no room."""
        with _telling(self.folder, lines):
            make_folder(self.folder)
            sweep(self.folder)
            tensors, notes = saved_tensors(model, scheme)
            write_through(self.file, lambda path: save_file(tensors, path))
            return notes
        return None

    def write_document(self, more: dict[str, Any], lines: list[str]) -> None:
        """Makes the entry valid. more: what else to keep with it."""
        with _telling(self.folder, lines):
            status = self.file.stat()
            proof = {"bytes": status.st_size, "written": status.st_mtime_ns, "sha256": sha256_of(self.file)}
            write_json(self.document, {**self.facts, **proof, **more})
            lines.append(f"the quantised {self.facts['part']} is kept in {self.file} ({status.st_size / 1e9:.2f} GB)")


@contextmanager
def _telling(folder: Path, lines: list[str]) -> Iterator[None]:
    """A cache that cannot be written is a line, not the end of a run; any other error stays one."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*NO_SPACE, *NOT_WRITABLE):
            raise
        lines.append(f"warning: quantised weights are not kept for the next start: {folder}: {error.strerror}")
