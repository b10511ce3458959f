"""What a run measured: `metrics.jsonl`, always and first, and the trackers a person asked for.

A tracker is a guest. One that is missing or fails says so once and is left out; it never ends or blocks a run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from torch import Tensor

from simpletuner_dmd import durable
from simpletuner_dmd.training.tracker_videos import send_video
from simpletuner_dmd.validation.report_data import METRICS

log = logging.getLogger(__name__)

TRACKERS = ("wandb", "tensorboard", "trackio")


class Tracking:
    """Rows of metrics on disk, mirrored to the trackers in `report_to`.

    report_to: "none", "all" (those that are installed), a name, or several. project, run_name: as the trackers show
    them. config: shown by the trackers beside the run. accelerator: where given, only its main process writes.
    resume_step: the step that a resumed run goes on from, so that rows of later steps, which it will write again, are
    dropped; None starts a new file and moves an old one to metrics.1.jsonl, metrics.2.jsonl, …
    """

    def __init__(
        self,
        output_dir: Path,
        report_to: str | Sequence[str] = "none",
        project: str = "simpletuner-dmd",
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        accelerator: Any = None,
        resume_step: int | None = None,
    ):
        self.output_dir = output_dir
        self.active = accelerator is None or bool(accelerator.is_main_process)
        self.trackers: dict[str, Any] = {}
        if not self.active:
            return
        path = output_dir / METRICS
        with durable.explaining(path, 4096, METRICS, "The run has not started."):
            output_dir.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _move_aside(path) if resume_step is None else _forget_after(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        for name in _wanted(report_to):
            self._start(name, project, run_name or output_dir.name, config or {})

    def log(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """One row {"event": "step", "step": …, …}; numbers that are not finite become null."""
        numbers = {key: _number(value) for key, value in values.items()}
        self._row({"event": "step", "step": step, **numbers})
        self._mirror({key: value for key, value in numbers.items() if value is not None}, step)

    def event(self, name: str, /, **fields: Any) -> None:
        """One row {"event": name, …}: a start, a resume, a checkpoint, a warning."""
        self._row({"event": name, **fields})

    def measured(self, name: str, step: int, /, **fields: Any) -> None:
        """As `event`, for figures taken now and then; the trackers draw the numbers, nested ones by dotted names."""
        self._row({"event": name, "step": step, **fields})
        nested = {key: value for key, value in fields.items() if isinstance(value, Mapping)}
        flat = {f"{name}/{key}": value for key, value in fields.items() if isinstance(value, float)}
        flat |= {f"{name}/{outer}.{key}": value for outer, inner in nested.items() for key, value in inner.items()}
        prefix = f"{fields['kind']}/" if "kind" in fields else ""
        self._mirror({prefix + key: value for key, value in flat.items() if math.isfinite(value)}, step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Notes a rendered video, and hands it to the trackers."""
        place = path.relative_to(self.output_dir) if path.is_relative_to(self.output_dir) else path
        self._row({"event": "video", "step": step, "name": name, "path": place.as_posix()})
        for tracker_name, tracker in list(self.trackers.items()):
            try:
                send_video(tracker_name, tracker, step, name, path)
            except Exception as error:  # noqa: BLE001  a tracker's failure must not end the run
                self._drop(tracker_name, error)

    def close(self) -> None:
        """Finishes the trackers and closes the file; a second call does nothing."""
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001  a tracker's failure must not end the run
                self._drop(name, error)
        self.trackers.clear()
        if self.active:
            self._file.close()

    def _row(self, row: Mapping[str, Any]) -> None:
        if not self.active:
            return
        line = json.dumps(_plain(row), allow_nan=False, ensure_ascii=False) + "\n"
        with durable.explaining(self.output_dir / METRICS, len(line), METRICS, "The last checkpoint is whole."):
            self._file.write(line)
            self._file.flush()

    def _mirror(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # noqa: BLE001  a tracker's failure must not end the run
                self._drop(name, error)

    def _start(self, name: str, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        if name == "wandb" and not os.environ.get("WANDB_MODE") and not _wandb_key_present():
            os.environ["WANDB_MODE"] = "offline"
            log.warning(
                "wandb has no key, so the run is kept offline in %s; `wandb login` and `wandb sync` upload it.",
                self.output_dir / "wandb",
            )
        try:
            tracker = _open(name, self.output_dir, project, run_name)
            tracker.start()
            tracker.store_init_configuration({key: _shown(value) for key, value in config.items()})
            self.trackers[name] = tracker
        except Exception as error:  # noqa: BLE001  a tracker's failure must not end the run
            self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.trackers.pop(name, None)
        log.warning(
            "The tracker %s is left out from here on (%s: %s); %s has every row.", name, type(error).__name__, error,
            self.output_dir / METRICS,
        )  # fmt: skip


def _open(name: str, output_dir: Path, project: str, run_name: str) -> Any:
    """One of accelerate's trackers, not started. Its own `init_trackers` would skip a missing one without a word."""
    from accelerate import PartialState, tracking

    PartialState()  # the trackers ask it for the main process; a running Accelerator has made it already
    if name == "wandb":
        return tracking.WandBTracker(project, name=run_name, dir=str(output_dir))
    if name == "tensorboard":
        return tracking.TensorBoardTracker(run_name, logging_dir=str(output_dir / "tensorboard"))
    if name == "trackio":
        return tracking.TrackioTracker(project, name=run_name)
    raise ValueError(f"there is no tracker of that name; there are {', '.join(TRACKERS)}")


def _wanted(report_to: str | Sequence[str]) -> list[str]:
    names = report_to.split(",") if isinstance(report_to, str) else report_to
    cleaned = [name.strip() for name in names if name.strip() not in ("", "none")]
    if "all" in cleaned:
        return [name for name in TRACKERS if importlib.util.find_spec(name)]
    return list(dict.fromkeys(cleaned))


def _wandb_key_present() -> bool:
    """Asked before wandb starts: without a key it would stop and prompt a terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if path and (file := Path(path).expanduser()).is_file():
            try:
                if netrc.netrc(str(file)).authenticators(host):
                    return True
            except (netrc.NetrcParseError, OSError):
                continue
    return False


def _number(value: float | Tensor | None) -> float | None:
    if isinstance(value, Tensor):
        value = value.item()
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """What JSON can hold: tensors as numbers, paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, Tensor)):
        return _number(value)
    return str(value)


def _shown(value: Any) -> str | int | float | bool:
    """A configuration value as every tracker takes it."""
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(_plain(value), ensure_ascii=False)


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    durable.rename(path, aside)


def _forget_after(path: Path, step: int) -> None:
    """Keeps the rows up to `step`; a last line that a kill cut short goes too."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            if line.endswith(b"\n") and isinstance(row, dict) and row.get("step", 0) <= step:
                kept.append(line)
        except ValueError:
            continue
    durable.write_atomically(path, b"".join(kept))
