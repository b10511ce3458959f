"""What a file is, by its first bytes, in words for a person who has to decide what to do with it."""

from __future__ import annotations

import codecs
from pathlib import Path

# (offset, bytes, words)
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"II*\x00", "a TIFF picture"),
    (0, b"MM\x00*", "a TIFF picture"),
    (8, b"WEBP", "a WebP picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyphei", "a HEIC picture"),
    (4, b"ftypM4A", "a sound file"),
    (4, b"ftyp", "an mp4/mov video"),
    (4, b"moov", "an mp4/mov video"),
    (4, b"mdat", "an mp4/mov video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
    (0, b"GIF8", "a GIF video"),
    (0, b"FLV", "a Flash video"),
    (8, b"WAVE", "a sound file"),
    (0, b"ID3", "a sound file"),
    (0, b"fLaC", "a sound file"),
    (0, b"OggS", "an Ogg file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"7z\xbc\xaf", "a 7-zip archive"),
    (0, b"%PDF", "a PDF document"),
    (0, b"SQLite format", "a database"),
    (0, b"\x7fELF", "a program"),
    (0, b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the file itself"),
)


SUFFIXES = {
    "a PNG picture": ".png",
    "a JPEG picture": ".jpg",
    "a WebP picture": ".webp",
    "an mp4/mov video": ".mp4",
    "a Matroska or WebM video": ".mkv",
    "an AVI video": ".avi",
    "a GIF video": ".gif",
}


def suffix_of(content: bytes) -> str:
    """The ending that a file of this content should have; ".bin" where it is not known."""
    return SUFFIXES.get(kind_of_bytes(content[:4096]), ".bin")


def kind_of_file(path: Path) -> str:
    """A noun phrase such as "a PNG picture", "text" or "of an unknown kind"; "unreadable" when it cannot be opened."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return "unreadable"
    return kind_of_bytes(head)


def kind_of_bytes(head: bytes) -> str:
    """As `kind_of_file`, of a file's first 4096 bytes."""
    if not head:
        return "empty (0 bytes)"
    for offset, magic, words in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return words
    if b"\x00" not in head:
        start = head.lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            return "a web page (a download that failed often looks like this)"
        # An incremental decoder forgives the character that the cut at 4096 bytes splits.
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError:
            return "of an unknown kind"
        return "text"
    return "of an unknown kind"
