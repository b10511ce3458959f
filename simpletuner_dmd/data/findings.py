"""Why a file or a row is left out, in words and in kinds, and what a person can do about each kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TOO_SHORT = "too short"
FRAME_COUNT = "wrong frame count"
TOO_SMALL = "too small"
NO_CAPTION = "no caption"
CANNOT_DECODE = "cannot decode"
WRONG_KIND = "wrong kind of file"
CANNOT_READ = "cannot read"
CANNOT_FETCH = "cannot fetch"
BAD_ROW = "bad row"

FIXES = {
    TOO_SHORT: "lower video.min_frames (it may be below video.num_frames), or use longer clips",
    FRAME_COUNT: "raise video.max_frames or leave it out, or cut the clips",
    TOO_SMALL: "lower minimum_image_size, or use larger originals",
    NO_CAPTION: "write the caption, or choose another caption_strategy (filename, instanceprompt)",
    CANNOT_DECODE: "fetch the file again or re-encode it (ffmpeg -i old.mp4 -c:v libx264 new.mp4); "
    "delete_problematic_images: true moves such files to a folder `rejected`",
    WRONG_KIND: "keep such files elsewhere; pictures belong to a dataset of dataset_type image",
    CANNOT_READ: "check that it is there and that you may read it",
    CANNOT_FETCH: "check the address and your access; the next start tries again",
    BAD_ROW: "correct the line in the table",
}
"""Every kind, in the order of the table that `check` prints, with the fix."""


class UnusableFile(Exception):  # noqa: N818 - it describes a file, the program goes on
    """This file cannot be used; the rest of the folder can.

    reason: what is wrong, in words. damaged: the content cannot be decoded (rather than, say, not be read).
    kind: one of FIXES; without it, the one that `damaged` implies.
    """

    def __init__(self, path: Path, reason: str, damaged: bool = True, kind: str = "") -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.damaged = path, reason, damaged
        self.kind = kind or (CANNOT_DECODE if damaged else CANNOT_READ)


@dataclass(frozen=True)
class Rejected:
    """A file that is left out. damaged: its content cannot be decoded. kind: as for UnusableFile."""

    path: Path
    reason: str
    damaged: bool = False
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", CANNOT_DECODE if self.damaged else CANNOT_READ)

    @property
    def fix(self) -> str:
        return FIXES[self.kind]

    @classmethod
    def of(cls, error: UnusableFile) -> Rejected:
        return cls(error.path, error.reason, error.damaged, error.kind)
