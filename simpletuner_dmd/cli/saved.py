"""What a run leaves of itself in its output folder, and how the verbs `sample` and `export` open it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.common import RESOLVED, quiet_libraries
from simpletuner_dmd.cli.moving import STUDENT_ROLES, student_parameters
from simpletuner_dmd.cli.shipping import Shipper, check_text
from simpletuner_dmd.config import DatasetEntry, LoadedConfig, TrainConfig, UserError
from simpletuner_dmd.durable import write_atomically
from simpletuner_dmd.publish.load_back import Reference
from simpletuner_dmd.training.checkpoint import CheckpointState, find_latest, load_checkpoint, resolve_checkpoint
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.progress import free_memory
from simpletuner_dmd.training.trainer import CHECKPOINTS


def write_resolved(loaded: LoadedConfig, output_dir: Path) -> None:
    """config.resolved.json: every option with its value and where it came from, and the datasets."""
    resolved = loaded.resolved_json()
    document = {**resolved["options"], "datasets": {"value": resolved["datasets"], "origin": "data_backend_config"}}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(output_dir / RESOLVED, text.encode())


def open_run(folder: Path) -> LoadedConfig:
    """The configuration that a run was started with. Raises UserError where the folder is not a run's."""
    path = folder / RESOLVED
    if not path.is_file():
        raise UserError(
            f"{folder} is not the output folder of a run: it has no {RESOLVED}",
            fix="name the `output_dir` of a run that was started with `simpletuner train`",
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    datasets = document.pop("datasets", {"value": []})["value"]
    nested: dict[str, Any] = {}
    for dotted, entry in document.items():
        *parents, key = dotted.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[key] = entry["value"]
    try:
        config = TrainConfig.model_validate(nested)
        entries = [DatasetEntry.model_validate(_given(entry)) for entry in datasets]
    except ValidationError as error:
        raise UserError(f"{path} cannot be read by this version: {error.errors()[0]['msg']}") from error
    config.output_dir = str(folder)
    text = next((entry for entry in entries if entry.dataset_type == "text_embeds"), None)
    if text is None:
        text = DatasetEntry(id="text-embeds", dataset_type="text_embeds", cache_dir=config.cache_dir_text)
    return LoadedConfig(
        config=config,
        path=path,
        origins={},
        datasets=[entry for entry in entries if entry.dataset_type != "text_embeds"],
        text_embeds=text,
        validation_prompts={},
        notices=[],
        folders=(Path.cwd(), folder),
    )


def _given(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def open_checkpoint(folder: Path, which: str) -> CheckpointState:
    """The checkpoint `which` (latest, best, a name or a path) of the run in `folder`, verified."""
    root = folder / CHECKPOINTS
    path = find_latest(root) if which == "latest" else resolve_checkpoint(root, which)
    if path is None:
        raise UserError(f"{root} holds no complete checkpoint", fix="train first, or name another run")
    return load_checkpoint(path)


class SavedStudent:
    """The student of a checkpoint in its roles, as trained; `best` puts the average in its place, where there is one.

    raw: there is no average, as far as `best` is concerned.
    """

    def __init__(self, assembly: Assembly, state: CheckpointState, *, raw: bool) -> None:
        self.roles, _ = assembly.roles()
        for role in (role for role in STUDENT_ROLES if role in self.roles.parameters):
            tensors = {name: tensor.to(assembly.device) for name, tensor in state.tensors[role].items()}
            self.roles.load_tensors(role, tensors)
        self._ema: Ema | None = None
        if state.ema is not None and not raw:
            config, parameters = assembly.config, student_parameters(self.roles)
            self._ema = Ema(parameters, config.ema_decay, config.ema_update_interval, config.ema_start_step)
            self._ema.load_state_dict(state.ema)

    @contextmanager
    def best(self) -> Iterator[bool]:
        """Yields whether the roles hold the average."""
        if self._ema is None:
            yield False
            return
        with self._ema.swap(), torch.no_grad():
            yield True


class OpenRun:
    """A run's student and data, to be exported again. Raises UserError where the folder holds none."""

    def __init__(self, folder: Path, checkpoint: str, *, raw: bool) -> None:
        from accelerate import Accelerator

        quiet_libraries()
        loaded = open_run(folder)
        state = open_checkpoint(folder, checkpoint)
        self.updates = int(state.meta["updates"]["student"])
        self.assembly = Assembly(loaded, Accelerator(cpu=not torch.cuda.is_available()).device)
        self.data = self.assembly.data([])
        self.shipper = Shipper(self.assembly, folder, publishing=False, step=state.step)  # publishing is for `push`
        self.student = SavedStudent(self.assembly, state, raw=raw)

    def reference(self) -> Reference:
        """What the sampler of training makes of the student as it is in place now."""
        return self.shipper.reference(self.student.roles, *check_text(self.data))

    def close(self) -> None:
        """Gives the memory back, for another process to load the export into; `student` is gone."""
        self.data.close()
        del self.student
        free_memory()
