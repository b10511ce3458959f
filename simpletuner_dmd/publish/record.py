"""What an export takes over from the record of its run: the last validation videos, the health, the settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner_dmd.durable import make_folder
from simpletuner_dmd.validation.report_data import recorded

VIDEOS = "videos"
# Of one machine, or secret: nothing that helps a reader.
_NOT_SHOWN = ("webhook_config", "output_dir", "data_backend_config", "cache_dir_text", "cache_dir_vae")


def last_videos(output_dir: Path, step: int | None = None) -> list[tuple[str, Path]]:
    """(prompt, file) of the newest validation of the student; of its average where that was rendered too.

    step: of a checkpoint; what came after it is left out.
    """
    rows = [row for row in _until(output_dir, "validation", step) if str(row.get("kind", "")).startswith("student")]
    newest = [row for row in rows if row["step"] == rows[-1]["step"]]
    averaged = [row for row in newest if row["kind"] == "student-ema"]
    found = {row["file"]: row["prompt"] for row in averaged or newest}
    return [(prompt, output_dir / file) for file, prompt in found.items() if (output_dir / file).is_file()]


def copy_videos(output_dir: Path, export_dir: Path, step: int | None = None) -> tuple[tuple[str, str], ...]:
    """The newest validation videos into the export: (prompt, path within it) of each."""
    folder, copied = export_dir / VIDEOS, []
    shutil.rmtree(folder, ignore_errors=True)
    for prompt, file in last_videos(output_dir, step):
        make_folder(folder)
        shutil.copyfile(file, folder / file.name)
        copied.append((prompt, f"{VIDEOS}/{file.name}"))
    return tuple(copied)


def last_health(output_dir: Path, step: int | None = None) -> tuple[tuple[str, str, str], ...]:
    """(colour, name, sentence) of each light at the newest validation (of those up to `step`, where it is given)."""
    rows = _until(output_dir, "health", step)
    lights = rows[-1]["lights"] if rows else []
    return tuple((light["colour"], light["name"], light["sentence"]) for light in lights)


def shown_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set, without secrets and without the folders of this machine."""
    return {key: _placeless(value) for key, value in options.items()
            if key not in _NOT_SHOWN and value not in (None, "", [], {})}  # fmt: skip


def _placeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _placeless(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(item) for item in value]
    if not isinstance(value, str) or len(value) > 4096 or "\n" in value or "\0" in value:
        return value
    path = Path(value).expanduser()
    return path.name if path.is_absolute() or ("/" in value and path.exists()) else value


def _until(output_dir: Path, event: str, step: int | None) -> list[dict[str, Any]]:
    return [row for row in recorded(output_dir, event) if step is None or row["step"] <= step]
