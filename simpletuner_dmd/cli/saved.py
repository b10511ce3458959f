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
from simpletuner_dmd.cli.moving import STUDENT_ROLES, student_parameters
from simpletuner_dmd.config import DatasetEntry, LoadedConfig, TrainConfig, UserError
from simpletuner_dmd.durable import write_atomically
from simpletuner_dmd.training.checkpoint import CheckpointState, find_latest, load_checkpoint, resolve_checkpoint
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.trainer import CHECKPOINTS
from simpletuner_dmd.wan.roles import Roles

RESOLVED = "config.resolved.json"


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


@contextmanager
def student_of(assembly: Assembly, state: CheckpointState, *, raw: bool) -> Iterator[tuple[Roles, bool]]:
    """(roles with the checkpoint's student in place, whether it is the average)."""
    roles, _ = assembly.roles()
    for role in (role for role in STUDENT_ROLES if role in roles.parameters):
        roles.load_tensors(role, {name: tensor.to(assembly.device) for name, tensor in state.tensors[role].items()})
    if raw or state.ema is None:
        yield roles, False
        return
    config = assembly.config
    ema = Ema(student_parameters(roles), config.ema_decay, config.ema_update_interval, config.ema_start_step)
    ema.load_state_dict(state.ema)
    with ema.swap(), torch.no_grad():
        yield roles, True
