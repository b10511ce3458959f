"""Writes the export folder: adapter or transformer, scheduler, sampler, ComfyUI files, distill.json, model card.

export/
├── diffusers/pytorch_lora_weights.safetensors   (or transformer/) + scheduler/scheduler_config.json
├── lycoris/<run>.safetensors                    in its place where lora_type is lycoris: see `lycoris`
├── comfyui/<run>.safetensors + workflow.json
├── videos/                                      of the last validation, for the card
├── raw/                                         the same for the weights as trained, where the others are the average
├── sampler.py                                   the exact few-step sampler on stock diffusers
├── distill.json                                 what it is, for programs; written after the weights
└── README.md                                    what it is, for people: the model card
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simpletuner_dmd.durable import write_folder, write_json, write_text, write_through
from simpletuner_dmd.publish.card import model_card
from simpletuner_dmd.publish.causal_sampler import causal_sampler_file
from simpletuner_dmd.publish.dialects import DIFFUSERS_PREFIX, comfyui_key, to_diffusers
from simpletuner_dmd.publish.experts import LOW_NOISE_METADATA, experts_document, experts_sampler_file, low_noise_files
from simpletuner_dmd.publish.info import ExportInfo, decimals, ladder_text
from simpletuner_dmd.publish.native_experts import keep_other, native_document, native_sampler_file
from simpletuner_dmd.publish.schedulers import SchedulerChoice, scheduler_for
from simpletuner_dmd.publish.snippets import LORA_FILE, host_file, load_snippet, sampler_file
from simpletuner_dmd.publish.workflow import comfyui_workflow, native_workflow, two_expert_workflow

FORMATS = ("diffusers", "comfyui")
SMALL_BYTES = 100_000_000
"""Below this a LoRA is kept in fp32, so that loading it back can be compared to rounding; above, bf16 halves it."""


def export_lora(
    directory: Path,
    lora: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    info: ExportInfo,
    formats: Sequence[str] = FORMATS,
    dtype: torch.dtype | None = None,
    low_noise: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Writes a LoRA (PEFT names without prefix, see `dialects`) into `directory` in the chosen formats.

    dtype: of the stored factors; None takes fp32 for a small LoRA and bf16 for a large one. low_noise: the second LoRA
    of a two-expert student, of the same rank and alpha. Returns what was written.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"unknown export format {', '.join(sorted(unknown))}: choose from {', '.join(FORMATS)}")
    if not formats:
        raise ValueError(f"no export format: choose from {', '.join(FORMATS)}")
    folded = to_diffusers(lora, rank=rank, alpha=alpha)
    size = sum(tensor.numel() * 4 for tensor in folded.values())
    dtype = dtype or (torch.float32 if size < SMALL_BYTES else torch.bfloat16)
    folded = {key: tensor.to(dtype).contiguous() for key, tensor in folded.items()}
    comfyui = {comfyui_key(key.removeprefix(DIFFUSERS_PREFIX)): tensor for key, tensor in folded.items()} \
        if "comfyui" in formats else {}  # fmt: skip
    choice = scheduler_for(info.schedule, info.renoise)
    written = []
    if "diffusers" in formats:
        metadata = {"format": "pt", **own_metadata(info, choice, "diffusers")}
        written.append(save(directory / "diffusers" / LORA_FILE, folded, metadata))
    comfyui_file = f"{info.file_name}.safetensors" if comfyui else None
    if comfyui_file:
        metadata = {"format": "pt", **own_metadata(info, choice, "comfyui"), **foreign_metadata(info, rank, comfyui)}
        written.append(save(directory / "comfyui" / comfyui_file, comfyui, metadata))
        graph = comfyui_workflow(info, comfyui_file, choice.name)
        if low_noise is not None:
            graph = two_expert_workflow(graph, info, low_noise_files(info)["comfyui"].name)
        if info.native is not None:
            graph = native_workflow(graph, info, info.native, comfyui_file)
        written.append(write_json(directory / "comfyui" / "workflow.json", graph))
    adapter = {
        "rank": rank,
        "alpha": rank,
        "trained_alpha": alpha,
        "files": _relative(directory, written),
    }
    if low_noise is not None:
        low = _save_low_noise(directory, LowNoiseLora(low_noise, rank, alpha), info, choice, formats, dtype)
        adapter["low_noise_files"] = _relative(directory, low)
        written += low
    return written + describe(directory, info, choice, dtype_name(dtype), comfyui_file, adapter)


@dataclass(frozen=True)
class LowNoiseLora:
    """The second expert of a two-expert student as a LoRA: PEFT names without prefix, as for `export_lora`."""

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float


def _save_low_noise(directory: Path, lora: LowNoiseLora, info: ExportInfo, choice: SchedulerChoice,
                    formats: Sequence[str], dtype: torch.dtype) -> list[Path]:  # fmt: skip
    folded = {key: tensor.to(dtype).contiguous()
              for key, tensor in to_diffusers(lora.tensors, rank=lora.rank, alpha=lora.alpha).items()}  # fmt: skip
    written = []
    for dialect in formats:
        tensors = folded
        if dialect == "comfyui":
            tensors = {comfyui_key(key.removeprefix(DIFFUSERS_PREFIX)): folded[key] for key in folded}
        metadata = {"format": "pt", **own_metadata(info, choice, dialect), **LOW_NOISE_METADATA}
        written.append(save(directory / low_noise_files(info)[dialect], tensors, metadata))
    return written


def _relative(directory: Path, written: Sequence[Path]) -> list[str]:
    return [str(path.relative_to(directory)) for path in written if path.suffix == ".safetensors"]


def export_full(
    directory: Path,
    transformer: Any,
    info: ExportInfo,
    *,
    low_noise: LowNoiseLora | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Writes a full student. transformer: a diffusers model, or a callable that saves one into the folder it is given
    (a sharded student is gathered by its owner, a merged one is streamed), whose precision `dtype` then names.
    low_noise: the second expert, a LoRA on the base."""
    save_student: Callable[[Path], Any] = getattr(transformer, "save_pretrained", transformer)

    def write(folder: Path) -> None:
        save_student(folder)

    choice = scheduler_for(info.schedule, info.renoise)
    folder = write_folder(directory / "diffusers" / "transformer", write)
    dtype = dtype or getattr(transformer, "dtype", None)
    low: list[Path] = []
    adapter: dict[str, Any] = {}
    if low_noise is not None:
        # Beside a full copy its size does not matter: it is kept as precise.
        low = _save_low_noise(directory, low_noise, info, choice, ("diffusers",), dtype or torch.float32)
        adapter = {"rank": low_noise.rank, "alpha": low_noise.rank, "trained_alpha": low_noise.alpha, "files": [],
                   "low_noise_files": _relative(directory, low)}  # fmt: skip
    name = dtype_name(dtype) if dtype else "as saved"
    return [folder, *low, *describe(directory, info, choice, name, None, adapter)]


def describe(directory: Path, info: ExportInfo, choice: SchedulerChoice, weights_dtype: str,
             comfyui_file: str | None, adapter: Mapping[str, Any]) -> list[Path]:  # fmt: skip
    """Everything beside the weights. distill.json comes late: where it is, the weights are."""
    written = [write_text(directory / "diffusers" / "scheduler" / "scheduler_config.json",
                          choice.scheduler.to_json_string())]  # fmt: skip
    if (sampler := _sampler_text(info)) is not None:
        written.append(write_text(directory / "sampler.py", sampler))
    card = model_card(info, choice, weights_dtype=weights_dtype, comfyui_file=comfyui_file)
    written.append(write_text(directory / "README.md", card))
    if info.native is not None:
        written += keep_other(directory, info.native)
    written.append(write_json(directory / "distill.json", distill_document(info, choice, weights_dtype, adapter)))
    return written


def _sampler_text(info: ExportInfo) -> str | None:
    if not info.schedule.ladder:
        return host_file(info)
    if info.blocks is not None:
        return causal_sampler_file(info, info.blocks)
    if info.native is not None:
        return native_sampler_file(info, info.native)
    return experts_sampler_file(info) if info.boundary else sampler_file(info)


def _experts(info: ExportInfo) -> dict[str, Any] | None:
    if info.native is not None:
        return native_document(info, info.native)
    return experts_document(info) if info.boundary else None


def distill_document(
    info: ExportInfo, choice: SchedulerChoice, weights_dtype: str, adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """distill.json."""
    document: dict[str, Any] = {
        "format_version": 1,
        "run_name": info.run_name,
        "method": info.method or "supervised",
        "model_type": info.model_type,
        "steps": info.steps,
        "ladder": {"timesteps": list(info.schedule.timesteps), "sigmas": list(info.schedule.ladder)},
        "renoise": info.renoise if info.schedule.ladder else None,
        "sampler": choice.name,
        "blocks": None if info.blocks is None else asdict(info.blocks),
        "experts": _experts(info),
        "shift": info.schedule.shift,
        "guidance": 1.0 if info.schedule.ladder else info.guidance,
        "scheduler": {
            "class": type(choice.scheduler).__name__,
            "exact": choice.exact,
            "max_sigma_error": choice.max_error,
            "needs_sampler_file": choice.needs_sampler_file,
        },
        "base": info.base_name,
        "flavour": info.flavour,
        "picture_channels": info.picture_channels,
        "base_hash": info.base_hash or None,
        "teacher": info.teacher or None,
        "teacher_lora": info.teacher_lora.as_dict() if info.teacher_lora else None,
        "trained_sizes": [{"width": w, "height": h, "frames": f} for w, h, f in info.trained_sizes],
        "framerate": info.framerate,
        "tokenizer_max_length": info.tokenizer_max_length,
        "train_steps": info.train_steps,
        "weights": info.weights,
        "weights_dtype": weights_dtype,
        "adapter": dict(adapter) or None,
        "licence": info.licence,
        "validation": {
            "prompts": list(info.validation_prompts),
            "seed": info.validation_seed,
            "sizes": [{"width": w, "height": h, "frames": f} for w, h, f in info.validation_sizes],
        },
        "extracted": dict(info.extracted) if info.extracted else None,
        "metrics": dict(info.metrics),
        "health": [{"colour": colour, "name": name, "sentence": said} for colour, name, said in info.health],
        "config": dict(info.config),
        "tool": f"SimpleTuner-DMD {info.tool_version}".strip(),
        "snippet": load_snippet(info, choice),
    }
    return document


# --- safetensors metadata: strings only -----------------------------------------------------------------------------


def own_metadata(info: ExportInfo, choice: SchedulerChoice, dialect: str) -> dict[str, str]:
    """The recipe under names of our own. No `lora_adapter_metadata`: diffusers would take it instead of the tensors."""
    sigmas = ", ".join(decimals(sigma) for sigma in (*info.schedule.ladder, 0.0)) if info.schedule.ladder else ""
    entries = {
        "run_name": info.run_name, "method": info.method or "supervised", "dialect": dialect,
        "steps": str(info.steps), "timesteps": ladder_text(info), "sigmas": sigmas, "sampler": choice.name,
        "guidance": "1" if info.schedule.ladder else f"{info.guidance:g}", "shift": f"{info.schedule.shift:g}",
        "base": info.base_name, "base_hash": info.base_hash, "weights": info.weights,
        "trained_sizes": json.dumps([list(size) for size in info.trained_sizes]),
        "tool_version": info.tool_version, "extracted": json.dumps(dict(info.extracted)) if info.extracted else "",
    }  # fmt: skip
    return {f"simpletuner_dmd.{name}": value for name, value in entries.items() if value}


def foreign_metadata(info: ExportInfo, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What ComfyUI's and kohya's tools read. No trigger words: a distilled LoRA has none.

    ss_base_model_version takes Civitai's own name. Anything with "distill" in it would be shown as "Illustrious" by
    ComfyUI-Lora-Manager, which looks for "il" in it.
    """
    digest = tensor_hash(tensors)
    hint = f"{info.steps} steps, cfg {info.guidance:g}"
    if info.schedule.ladder:
        sampler = "lcm" if info.renoise == "sde" else "euler"
        hint = f"{info.steps} steps, cfg 1, sampler {sampler}, timesteps {ladder_text(info)}"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": info.run_name,
        "modelspec.description": f"LoRA for {info.base_name}. {hint}",
        "modelspec.date": time.strftime("%Y-%m-%d"),
        "modelspec.license": info.licence,
        "modelspec.usage_hint": hint,
        "modelspec.hash_sha256": f"0x{digest}",
        "ss_base_model_version": f"Wan Video {info.base_size} t2v" if info.base_size else "Wan Video",
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": info.file_name,
        "sshs_model_hash": digest,
    }


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensor bytes in the order of the file: by name, all tensors being of one dtype."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """A safetensors file, whole or not at all."""
    return write_through(path, lambda temporary: save_file(dict(tensors), temporary, metadata=dict(metadata)))


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")
