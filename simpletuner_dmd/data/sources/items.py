"""What a source gives: local files with stable names, and what it could not give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.findings import Rejected
from simpletuner_dmd.randomness import permutation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """A file. name: stable and private to it within the dataset, whatever folder it lies in; it seeds a random crop.

    captions: what the source itself says about the file; empty where captions come from elsewhere.
    """

    name: str
    path: Path
    captions: tuple[str, ...] = ()


@dataclass
class Listing:
    """All files of a dataset, and everything that is no file: rows that cannot be read, downloads that failed.

    content: names what a source elsewhere held when it was listed; another value means that it has changed.
    """

    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    content: str = ""


def chosen(everything: Sequence[T], most: int | None, dataset: str) -> list[T]:
    """At most `most` of them in their own order: the same choice for this dataset at every start."""
    if most is None or len(everything) <= most:
        return list(everything)
    return [everything[index] for index in sorted(permutation(len(everything), "max_num_samples", dataset)[:most])]


def missing_extra(extra: str, library: str, what: str, key: str) -> UserError:
    """The message for an entry that needs an optional library."""
    return UserError(
        f"{what} needs {library}, which is not installed",
        key=key,
        fix=f'pip install "simpletuner-dmd[{extra}]" (in a checkout: pip install -e ".[{extra}]")',
    )
