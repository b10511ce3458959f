"""Files of a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner_dmd.data.findings import CANNOT_READ, Rejected

REJECTED_FOLDER = "rejected"


def list_files(folder: Path, skip: Sequence[Path] = ()) -> tuple[list[Path], list[Rejected]]:
    """Every file under `folder`, sorted, and the folders that could not be listed.

    Hidden files and `rejected` folders are left out; a file itself stands for itself. Links are followed; a folder
    that was seen already (a loop) is not entered again.
    """
    if folder.is_file():
        return [folder], []
    skipped = {path.resolve() for path in skip}
    seen: set[Path] = set()
    failed: list[Rejected] = []

    def walk(place: Path) -> Iterator[Path]:
        real = place.resolve()
        if real in seen or real in skipped:
            return
        seen.add(real)
        try:
            with os.scandir(place) as entries:
                children = sorted(entries, key=lambda child: child.name)
        except OSError as error:
            # A folder may vanish, or turn out to be somebody else's, while the rest of the tree is fine.
            failed.append(Rejected(place, f"the folder cannot be listed: {error.strerror}", kind=CANNOT_READ))
            return
        for child in children:
            if child.name.startswith("."):
                continue
            path = place / child.name
            if _is_folder(child):
                if child.name != REJECTED_FOLDER:
                    yield from walk(path)
            else:
                yield path

    return list(walk(folder)), failed


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:
        return False  # a link that leads round in a circle; opening it as a file says so
