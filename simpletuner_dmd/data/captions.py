"""Captions of a sample: from a text file, the file's name, one prompt for all, or a table."""

from __future__ import annotations

from pathlib import Path

from simpletuner_dmd.data.findings import NO_CAPTION, UnusableFile
from simpletuner_dmd.data.settings import DatasetSettings
from simpletuner_dmd.data.sources.items import Item
from simpletuner_dmd.data.sources.table import CaptionTable


def captions_of(item: Item, settings: DatasetSettings, table: CaptionTable | None = None) -> tuple[str, ...]:
    """All captions of a file, of which one is drawn per epoch. Raises UnusableFile where there is none.

    table: the captions of a `csv`, `parquet` or `jsonl` strategy.
    """
    strategy = settings.caption_strategy
    if strategy == "instanceprompt":
        if not settings.instance_prompt:
            raise _none(item.path, "caption_strategy is instanceprompt and instance_prompt is empty")
        return (settings.instance_prompt,)
    if strategy == "filename":
        captions = [caption_of_name(item.path)] if caption_of_name(item.path) else []
        if not captions:
            raise _none(item.path, "its name says nothing")
    elif item.captions:
        captions = list(item.captions)
    elif table is not None:
        captions = list(table.find(item.name))
        if not captions:
            raise _none(item.path, f"{table.path.name} has no caption for {item.name}")
    else:
        captions = captions_beside(item.path, split=not settings.disable_multiline_split)
    return tuple(prepended(captions, settings))


def prepended(captions: list[str], settings: DatasetSettings) -> list[str]:
    """With `prepend_instance_prompt`, each caption behind the instance prompt."""
    if settings.prepend_instance_prompt and settings.instance_prompt:
        return [f"{settings.instance_prompt} {caption}" for caption in captions]
    return captions


def caption_of_name(path: Path) -> str:
    """ "a_red_circle.mp4" -> "a red circle"."""
    return path.stem.replace("_", " ").strip()


def captions_beside(path: Path, *, split: bool) -> list[str]:
    """The .txt file beside a sample: each line that is not blank is a caption, or without `split` all of it is one."""
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _none(path, f"{beside.name} is missing") from None
    except UnicodeDecodeError:
        raise _none(path, f"{beside.name} is not UTF-8 text") from None
    except OSError as error:
        raise _none(path, f"{beside.name} cannot be read ({error.strerror})") from None
    captions = [line.strip() for line in text.split("\n") if line.strip()]
    if not captions:
        raise _none(path, f"{beside.name} is empty")
    return captions if split else [" ".join(captions)]


def _none(path: Path, reason: str) -> UnusableFile:
    return UnusableFile(path, f"no caption: {reason}", damaged=False, kind=NO_CAPTION)
