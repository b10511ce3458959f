"""Writing the files of a draft: whole or not at all, the former ones kept beside them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simpletuner_dmd.cli.wizard.draft import Draft
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.read import is_file
from simpletuner_dmd.durable import write_atomically, write_text

BACKUP = ".bak"


def save(draft: Draft) -> list[str]:
    """Writes config.json last, so that it never names what is not there. Returns a line for each file.

    Raises UserError if a place cannot be written; what was there then still is.
    """
    if draft.library is not None:
        draft.set("validation_prompt_library", draft.prompts_path.name)
    files: list[tuple[Path, str]] = []
    if draft.notes:
        files.append((draft.notes_path, "\n".join(draft.notes) + "\n"))
    if draft.library is not None and not is_file(draft.prompts_path):
        files.append((draft.prompts_path, _json(draft.library)))
    if draft.datasets and (draft.is_new or draft.datasets != draft.former[1]):
        files.append((draft.data_path, _json(draft.datasets)))
    files.append((draft.path, _json(draft.raw)))
    lines = []
    with _uninterrupted():
        for path, text in files:
            try:
                lines += _write(path, text)
            except OSError as error:
                raise UserError(f"cannot be written: {error.strerror}", file=str(path),
                                fix="choose another place with --output PATH") from error  # fmt: skip
    return lines


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> list[str]:
    kept = ""
    if is_file(path):
        former = path.read_bytes()
        if former == text.encode():
            return [f"{path} (unchanged)"]
        beside = path.with_name(path.name + BACKUP)
        write_atomically(beside, former)
        kept = f" (before: {beside.name})"
    write_text(path, text)
    return [f"{path}{kept}"]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the files, which take milliseconds."""
    waiting: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if waiting:
        raise KeyboardInterrupt
