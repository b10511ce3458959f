"""Checkpoints that a crash at any byte cannot spoil.

    checkpoints/
    ├── checkpoint-000200/
    │   ├── student.safetensors, critic.safetensors      what each role trains, nothing else
    │   ├── optimizer.student.{json,safetensors}, …      the optimizer's state
    │   ├── scheduler.student.json, …                    the learning-rate schedule's
    │   ├── ema.{json,safetensors}, method.{json,…}, cursor.json
    │   └── manifest.json                                written last: size and sha256 of each file
    ├── latest                                           a file with the name of the newest
    └── best                                             a file with the name of the best, never deleted by rotation

A checkpoint is written into `.checkpoint-000200.partial`, every file flushed, the manifest last, and then renamed.
Folders that start with a dot are never read as checkpoints.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from simpletuner_dmd import durable
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.packing import bytes_of, pack, read_safetensors, unpack, write_safetensors

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)$")
LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(partial|replaced|deleted)$")


@dataclass
class CheckpointState:
    """Everything that a run needs to go on with the same bits.

    tensors: role → name → weight. optimizers, schedulers: role → state_dict. ema, method: their state_dicts.
    meta: the cursor and whatever else is plain data (data position, configuration hash, …).
    Tensors may live on any device when saving; loading gives CPU tensors.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    ema: dict[str, Any] | None = None
    method: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:06d}"


# --- saving ---------------------------------------------------------------------------------------------------------


def save_checkpoint(root: Path, step: int, state: CheckpointState, keep: int | None) -> Path:
    """Writes `root`/checkpoint-<step> and returns it; then deletes all but the newest `keep` (None or 0: keep all).

    The one named in `root`/best is never deleted. Raises UserError when the disk is full or not writable: what was
    half written is gone then, and the earlier checkpoints are as they were.
    """
    assert state.step == step, "the state is of another step"
    trees = _trees(state)
    needed = sum(_bytes(document, tensors) for document, tensors in trees.values())
    unspoiled = "Nothing half-written was left, and earlier checkpoints are whole."
    target = root / checkpoint_name(step)
    what = f"checkpoint {step}"
    with durable.explaining(root, needed, what, unspoiled):
        durable.make_folder(root)
        _tidy(root)
        if durable.free_bytes(root) < needed:
            raise durable.disk_full(root, needed, what, unspoiled)
        sequence = 1 + max((_sequence(path) for path in complete_checkpoints(root)), default=0)
        partial = root / f".{target.name}.partial"
        try:
            durable.make_folder(partial)
            _write_files(partial, trees, {"format": FORMAT, "step": step, "sequence": sequence})
            _publish(partial, target)
        except BaseException:
            if partial.exists():
                durable.remove_folder(partial)
            raise
    with durable.explaining(root, len(target.name), "the file that names it", f"{target.name} itself is complete."):
        durable.write_atomically(root / "latest", f"{target.name}\n".encode())
    if keep:
        _rotate(root, keep, target)
    return target


def mark_best(root: Path, checkpoint: Path) -> None:
    """Names a checkpoint as the best; rotation spares it from then on."""
    with durable.explaining(root, len(checkpoint.name), "the name of the best checkpoint", "The old name stands."):
        durable.write_atomically(root / "best", f"{checkpoint.name}\n".encode())


def bytes_needed(state: CheckpointState) -> int:
    """Size of the checkpoint on disk, for checks before training starts."""
    return sum(_bytes(document, tensors) for document, tensors in _trees(state).values())


def _trees(state: CheckpointState) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """File stem → (JSON document or None, tensors)."""
    trees: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    for role, tensors in state.tensors.items():
        trees[role] = (None, tensors)
    parts: dict[str, Any] = {f"optimizer.{role}": tree for role, tree in state.optimizers.items()}
    parts |= {f"scheduler.{role}": tree for role, tree in state.schedulers.items()}
    parts |= {"method": state.method, "cursor": {"step": state.step, "meta": state.meta}}
    if state.ema is not None:
        parts["ema"] = state.ema
    assert not parts.keys() & trees.keys(), "a role has the name of another file"
    return trees | {stem: pack(tree) for stem, tree in parts.items()}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def _bytes(document: Any, tensors: Mapping[str, Tensor]) -> int:
    return bytes_of(tensors) + (len(_json(document)) if document is not None else 0)


def _write_files(folder: Path, trees: Mapping[str, tuple[Any, dict[str, Tensor]]], head: dict[str, Any]) -> None:
    files: dict[str, dict[str, Any]] = {}
    for stem, (document, tensors) in trees.items():
        if tensors or document is None:
            with durable.HashingFile(folder / f"{stem}.safetensors") as file:
                write_safetensors(file, tensors, {})
            files[file.path.name] = {"bytes": file.size, "sha256": file.sha256}
        if document is not None:
            with durable.HashingFile(folder / f"{stem}.json") as file:
                file.write(_json(document))
            files[file.path.name] = {"bytes": file.size, "sha256": file.sha256}
    with durable.HashingFile(folder / MANIFEST) as file:
        file.write(_json(head | {"files": files}))
    durable.sync_folder(folder)


def _publish(partial: Path, target: Path) -> None:
    """Gives the complete folder its name. A checkpoint of that name (a run repeated from an earlier one) makes way;
    a crash between the two renames is mended by `_tidy`."""
    if target.exists():
        replaced = target.with_name(f".{target.name}.replaced")
        durable.rename(target, replaced)
        try:
            durable.rename(partial, target)
        except OSError:
            if not target.exists():
                durable.rename(replaced, target)
            raise
        _discard(replaced)
    else:
        durable.rename(partial, target)


def _tidy(root: Path) -> None:
    """Clears what a killed process left: half-written, replaced and half-deleted folders."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        match = LEFTOVER.match(path.name)
        if not match or not path.is_dir():
            continue
        original = root / match[1]
        if match[2] == "replaced" and not original.exists():
            durable.rename(path, original)
        else:
            durable.remove_folder(path)


def _rotate(root: Path, keep: int, newest: Path) -> None:
    present = complete_checkpoints(root)
    spared = {newest.name, _pointer(root, "best")}
    for path in [path for path in present if path.name not in spared][: max(0, len(present) - keep)]:
        _discard(path)


def _discard(path: Path) -> None:
    """Deletes a folder that is no longer needed; a failure costs space, not the run."""
    try:
        # Renamed first: a crash in the middle of deleting must not leave something that looks like a checkpoint.
        going = path.with_name(f".{path.name.strip('.').split('.')[0]}.deleted")
        durable.rename(path, going)
        durable.remove_folder(going)
    except OSError as error:
        log.warning("The old checkpoint %s could not be deleted (%s); the run goes on.", path, error)


# --- finding and loading --------------------------------------------------------------------------------------------


def complete_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints (by manifest and file sizes), in the order in which they were written."""
    if not root.is_dir():
        return []
    whole = [path for path in root.iterdir() if NAME.match(path.name) and path.is_dir() and _defect(path) is None]
    return sorted(whole, key=lambda path: (_sequence(path), path.name))


def find_latest(root: Path) -> Path | None:
    """The whole checkpoint that was written last, or None. Half-written ones are skipped, with a warning each.

    Found by looking, not by the file `latest`, which a crash right after a checkpoint may leave one behind. With
    several processes one of them asks and tells the others: the call also puts back what a crash left half-replaced.
    """
    if not root.is_dir():
        return None
    durable.sweep(root)
    for path in sorted(root.iterdir()):
        leftover = LEFTOVER.match(path.name)
        if leftover and leftover[2] == "replaced" and not (root / leftover[1]).exists():
            durable.rename(path, root / leftover[1])
        elif leftover and leftover[2] == "partial":
            log.warning("Skipping %s: the process ended while it was being written. The next save clears it.", path)
        elif NAME.match(path.name) and (defect := _defect(path)):
            log.warning("Skipping %s: %s.", path, defect)
    whole = complete_checkpoints(root)
    return whole[-1] if whole else None


def resolve_checkpoint(root: Path, which: str) -> Path | None:
    """`resume_from_checkpoint`: "latest" (None where there is none yet), "best", a name in `root`, or a path."""
    if which == "latest":
        return find_latest(root)
    name = _pointer(root, "best") if which == "best" else which
    if name is None:
        raise UserError("no checkpoint has been named the best yet", file=str(root / "best"),
                        key="resume_from_checkpoint", fix='use "latest" or the path of a checkpoint')  # fmt: skip
    for path in (root / name, Path(name)):
        if path.is_dir():
            return path
    present = ", ".join(path.name for path in complete_checkpoints(root)) or "none"
    raise UserError(f"there is no checkpoint {name}", file=str(root), key="resume_from_checkpoint",
                    fix=f'use "latest" or one of these: {present}')  # fmt: skip


def load_checkpoint(path: Path) -> CheckpointState:
    """Reads a checkpoint after comparing every file with the manifest. Raises UserError for one that is not whole."""
    defect = _defect(path)
    if defect is None:
        for name, entry in _manifest(path)["files"].items():
            if durable.sha256_of(path / name) != entry["sha256"]:
                defect = f"{name} is not what was written (its checksum differs)"
                break
    if defect is not None:
        raise UserError(
            f"this checkpoint cannot be used: {defect}",
            file=str(path),
            key="resume_from_checkpoint",
            fix="delete or move this folder; the same command then resumes from the one before",
        )
    stems = {name.rsplit(".", 1)[0] for name in _manifest(path)["files"]}
    cursor = _read(path, "cursor")
    return CheckpointState(
        step=cursor["step"],
        tensors={s: read_safetensors(path / f"{s}.safetensors") for s in sorted(stems) if _is_role(path, s)},
        optimizers={s.split(".", 1)[1]: _read(path, s) for s in sorted(stems) if s.startswith("optimizer.")},
        schedulers={s.split(".", 1)[1]: _read(path, s) for s in sorted(stems) if s.startswith("scheduler.")},
        ema=_read(path, "ema") if "ema" in stems else None,
        method=_read(path, "method"),
        meta=cursor["meta"],
    )


def _is_role(path: Path, stem: str) -> bool:
    return not (path / f"{stem}.json").exists()


def _read(path: Path, stem: str) -> Any:
    tensors = path / f"{stem}.safetensors"
    return unpack(
        json.loads((path / f"{stem}.json").read_bytes()), read_safetensors(tensors) if tensors.exists() else {}
    )


def _manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    return manifest


def _sequence(path: Path) -> int:
    return int(_manifest(path)["sequence"])


def _defect(path: Path) -> str | None:
    """Why a folder is not a whole checkpoint, without reading its tensors; None when it is one."""
    try:
        manifest = _manifest(path)
        if manifest["format"] > FORMAT:
            return f"it was written by a newer version (format {manifest['format']}, this one reads {FORMAT})"
        int(manifest["sequence"])
        expected = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it is half-written (it has no {MANIFEST})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
    return None


def _pointer(root: Path, name: str) -> str | None:
    try:
        return (root / name).read_text().strip() or None
    except FileNotFoundError:
        return None
