"""Whether an export gives what training's sampler gave: asked of a fresh process that has only stock diffusers.

What is compared is written down while the student is in memory (`Reference`); the process itself is started after the
memory of the training was freed, so that a second base fits where the first one was. See `fresh_process` for its side.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.publish import fresh_process
from simpletuner_dmd.publish.dialects import DIFFUSERS_PREFIX, comfyui_key
from simpletuner_dmd.publish.fresh_process import LoadBack
from simpletuner_dmd.publish.lycoris import to_comfyui
from simpletuner_dmd.publish.read_adapter import AdapterFile

# Set by launchers for the processes of one run; the fresh process is none of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_KILLED = (-int(signal.SIGKILL), 128 + int(signal.SIGKILL)) if hasattr(signal, "SIGKILL") else ()


@dataclass(frozen=True)
class Base:
    """The base of the training, for another process to load. source: arguments of the transformer's `from_pretrained`.

    dtype: "float32", … precision: "no_change" or a quantisation, made on `quantised_on` (None: where it was loaded).
    teacher_lora: a fine-tune that was merged into it, and its strength.
    other: of a model of two networks whose experts are sampled together, the arguments for the network of the other
    expert; expert: which one `source` is, "high" or "low", and boundary: the sigma between the two.
    """

    source: Mapping[str, Any]
    dtype: str
    precision: str = "no_change"
    quantised_on: str | None = None
    teacher_lora: tuple[AdapterFile, float] | None = None
    other: Mapping[str, Any] | None = None
    expert: str = "high"
    boundary: float | None = None


@dataclass(frozen=True)
class Reference:
    """What training's own sampler made of one prompt, to be reproduced from the exported files.

    prompt_embeds: [B, L, D], padded as in training. latents: normalised, [B, C, F, H, W], drawn from `seed`.
    base: None where the export is a whole network. vae_scale: pixels and frames per latent. device: to compare on.
    """

    prompt_embeds: Tensor
    latents: Tensor
    seed: int
    schedule: Schedule
    renoise: str
    max_sequence_length: int
    base: Base | None
    vae_scale: tuple[int, int]
    device: str
    timestep_per_token: bool = False
    """Whether the base's pipeline gives every token a timestep of its own (TI2V-5B)."""


def load_back(export_dir: Path, reference: Reference, *, judged: bool = True) -> LoadBack:
    """The verdict of a fresh process on the export. judged: False where files are not meant to give the same (a merge
    into another precision, an extraction): the difference is reported and passes.

    Raises RuntimeError where that process fails by itself.
    """
    if (problem := compare_dialects(export_dir)) is not None:
        return LoadBack(float("inf"), passed=False, message=f"the export does not load back: {problem}")
    with tempfile.TemporaryDirectory(prefix="load-back-") as folder:
        save_request(Path(folder), export_dir, reference, None if judged else math.inf)
        return in_fresh_process(Path(folder))


def save_request(folder: Path, export_dir: Path, reference: Reference, tolerance: float | None = None) -> None:
    """request.json and tensors.safetensors, as `fresh_process` reads them."""
    schedule, base = reference.schedule, reference.base
    request = {
        "export": str(export_dir.resolve()),
        "device": reference.device,
        "vae_scale": list(reference.vae_scale),
        "expand_timesteps": reference.timestep_per_token,
        "sampling": {
            "seed": reference.seed,
            "sigmas": list(schedule.ladder),
            "shift": schedule.shift,
            "renoise": reference.renoise,
            "max_sequence_length": reference.max_sequence_length,
            "tolerance": tolerance,
        },
        "base": None if base is None else {
            "source": dict(base.source),
            "dtype": base.dtype,
            "precision": base.precision,
            "quantised_on": base.quantised_on,
            "teacher_lora": _save_fine_tune(folder, base),
            "other": None if base.other is None else dict(base.other),
            "expert": base.expert,
            "boundary": base.boundary,
        },
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    tensors = {"prompt_embeds": reference.prompt_embeds, "latents": reference.latents}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "tensors.safetensors")


def _save_fine_tune(folder: Path, base: Base) -> dict[str, Any] | None:
    """At strength 1 and under one kind of names: the process needs no rules for those of others."""
    if base.teacher_lora is None:
        return None
    adapter, strength = base.teacher_lora
    prefix = DIFFUSERS_PREFIX if adapter.kind == "lora" else ""
    save_file({prefix + name: t.contiguous() for name, t in adapter.tensors.items()}, folder / "fine_tune.safetensors")
    return {"file": "fine_tune.safetensors", "kind": adapter.kind, "strength": strength}


def in_fresh_process(folder: Path) -> LoadBack:
    """Runs `fresh_process` on the request in `folder`. Raises RuntimeError with what it said where it fails."""
    # -P: the folder of the script has a lycoris.py of its own, which is not the library.
    command = [sys.executable, "-P", fresh_process.__file__, str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode in _KILLED:
        return LoadBack(0.0, passed=False, checked=False, message="the process that compares was killed, as happens "
                        "where memory runs out")  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the process that loads the export back failed:\n{done.stderr[-4000:]}")
    return LoadBack(**json.loads(done.stdout.strip().splitlines()[-1]))


def compare_dialects(export_dir: Path) -> str | None:
    """Every file is there, and ComfyUI's holds the same factors under its names, so the same change of the weights.

    It has no alpha: ComfyUI takes alpha = rank where a file has none, which the files were made for. Returns what is
    wrong, or None.
    """
    document = json.loads((export_dir / "distill.json").read_text(encoding="utf-8"))
    adapter = document["adapter"] or {}
    for entry in ("files", "low_noise_files"):
        files = [export_dir / name for name in adapter.get(entry, [])]
        for file in files:
            if not file.exists():
                return f"{file.relative_to(export_dir)} is missing"
        if len(files) > 1:
            problem = _compare_files(files[0], files[1], lycoris=adapter.get("kind") == "lycoris")
            if problem is not None:
                return problem
    return None


def _compare_files(ours: Path, theirs: Path, *, lycoris: bool) -> str | None:
    tensors, found = load_file(ours), load_file(theirs)
    expected = to_comfyui(tensors) if lycoris else \
        {comfyui_key(key.removeprefix(DIFFUSERS_PREFIX)): tensor for key, tensor in tensors.items()}  # fmt: skip
    name, own = f"comfyui/{theirs.name}", f"lycoris/{ours.name}" if lycoris else ours.name
    if expected is None or expected.keys() != found.keys():
        return f"{name} does not name the same modules as {own}"
    for key, tensor in expected.items():
        if not torch.equal(found[key], tensor):
            return f"{name} differs from {own} at {key}"
    return None
