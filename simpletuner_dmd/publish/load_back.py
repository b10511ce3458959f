"""Loads an export with nothing but stock diffusers, and compares what it samples with the sampler of training.

A LyCORIS student is put on the stock transformer by lycoris itself.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.publish.dialects import DIFFUSERS_PREFIX, comfyui_key
from simpletuner_dmd.publish.experts import HIGH, LOW
from simpletuner_dmd.publish.lycoris import to_comfyui
from simpletuner_dmd.publish.schedulers import ladder_error

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By the coarser of the precisions that weights are stored in and the base computes in. The stock pipeline rounds the
latents to the base's precision between steps, which training does not: in bf16 up to 0.4% of each value."""


@dataclass(frozen=True)
class LoadBack:
    """relative_error: difference of the latents over their root mean square: the largest one where all is fp32, the
    root mean square of all where weights or base are in half precision."""

    relative_error: float
    passed: bool
    message: str


@torch.no_grad()
def check_export(
    pipeline: Any,
    export_dir: Path,
    *,
    prompt_embeds: Tensor,
    shape: Sequence[int],
    seed: int,
    reference_latents: Tensor,
    schedule: Schedule,
    renoise: str,
    max_sequence_length: int = 512,
    tolerance: float | None = None,
) -> LoadBack:
    """Whether the exported files, in a stock `WanPipeline` of the base, sample what training's sampler does.

    pipeline: made by the caller from the base, without adapters, in the precision and quantisation of training; VAE and
    text encoder may be None. It is handed back as it came. prompt_embeds: [B, L, D], padded as in training.
    reference_latents: normalised; `flow.sample_few_step` on `validation.sampling.reference_noise(seed, shape, device)`.
    schedule: of the run; without a ladder in the export (supervised training), the Euler ladder the reference took.
    tolerance: None takes 1e-4 in fp32 and more where weights are stored, or the base computes, in half precision.
    """
    document = json.loads((export_dir / "distill.json").read_text(encoding="utf-8"))
    if tolerance is None:
        precisions = (document["weights_dtype"], str(getattr(pipeline.transformer, "dtype", "")).removeprefix("torch."))
        tolerance = max(TOLERANCES.get(name, TOLERANCES["float32"]) for name in precisions)
    try:
        _compare_dialects(export_dir, document)
        scheduler = exported_scheduler(export_dir, document, schedule, renoise)
        two = document["experts"] is not None and document["experts"].get("other", "same base") is not None
        experts = _load_sampler(export_dir / "sampler.py") if two else None
        with _student(pipeline, export_dir, document, experts), _swapped(pipeline, "scheduler", scheduler):
            if document["blocks"] is not None:
                latents = _sample_blocks(pipeline, export_dir, prompt_embeds, shape, seed)
            else:
                switch = getattr(experts, "switch_expert", None)  # a full one is switched by the pipeline itself
                # A host that expects a picture is told that there is none, by the function that users have.
                first_noise = _load_sampler(export_dir / "sampler.py").without_picture \
                    if document["picture_channels"] else None  # fmt: skip
                latents = _sample(
                    pipeline, prompt_embeds, shape, seed, len(schedule.ladder), max_sequence_length, switch, first_noise
                )
    except _Unfit as unfit:
        return LoadBack(float("inf"), passed=False, message=f"the export does not load back: {unfit}")
    if latents.shape != reference_latents.shape:
        return LoadBack(float("inf"), False, f"the stock pipeline returns latents of shape {tuple(latents.shape)}, "
                        f"the sampler of training {tuple(reference_latents.shape)}")  # fmt: skip
    reference = reference_latents.to(latents.device, torch.float32)
    scale = reference.square().mean().sqrt().clamp_min(1e-12)
    difference = latents.float() - reference
    # In half precision single elements stray by rounding alone, further in a deeper network; the whole does not.
    exact = tolerance <= TOLERANCES["float32"]
    error = float((difference.abs().max() if exact else difference.square().mean().sqrt()) / scale)
    passed = error <= tolerance  # False for NaN
    verdict, which = ("agree with" if passed else "DIFFER from"), ("largest" if exact else "mean")
    message = (
        f"stock diffusers loaded the export; its latents {verdict} the sampler of training: "
        f"{which} difference {error:.2g} of their size (allowed {tolerance:g})"
    )
    return LoadBack(error, passed, message)


def exported_scheduler(export_dir: Path, document: dict[str, Any], schedule: Schedule, renoise: str) -> Any:
    """The scheduler as a user gets it: from `sampler.py` where the ladder needs it, else from the saved config."""
    if not document["ladder"]["sigmas"]:
        # A supervised export ships a solver for many steps; a few Euler steps of its grid test the weights as well.
        return diffusers.FlowMapEulerDiscreteScheduler(shift=schedule.shift)
    if document["scheduler"]["needs_sampler_file"]:
        scheduler = _load_sampler(export_dir / "sampler.py").few_step_scheduler()
    else:
        folder = export_dir / "diffusers" / "scheduler"
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    if (error := ladder_error(scheduler, schedule.ladder)) > 1e-5:
        raise _Unfit(f"the exported scheduler's sigmas are off by {error:.3g}")
    if len(schedule.ladder) > 1 and bool(getattr(scheduler.config, "stochastic_sampling", False)) != (renoise == "sde"):
        raise _Unfit(f"the exported scheduler does not sample as renoise {renoise!r} does")
    return scheduler


class _Unfit(Exception):  # noqa: N818 - a verdict on the export, not an error of the program
    """The export cannot be used; the text says why."""


@contextmanager
def _seeded(pipeline: Any, seed: int) -> Iterator[None]:
    """As a user seeds: `torch.manual_seed`, and everything draws from the global generator."""
    device = pipeline._execution_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _sample_blocks(pipeline: Any, export_dir: Path, prompt_embeds: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """A causal student by its own sampler.py."""
    device = pipeline._execution_device
    with _seeded(pipeline, seed):
        noise = torch.randn(tuple(shape), device=device)
        blocks = _load_sampler(export_dir / "sampler.py").blocks_of
        return torch.cat(list(blocks(pipeline.transformer, noise, prompt_embeds.to(device))), dim=2)


def _sample(
    pipeline: Any, prompt_embeds: Tensor, shape: Sequence[int], seed: int, steps: int, max_sequence_length: int,
    switch_expert: Any = None, first_noise: Any = None,
) -> Tensor:  # fmt: skip
    """A user's call: `torch.manual_seed`, then the pipeline draws all noise itself. Returns normalised latents."""
    _, _, frames, height, width = shape
    spatial, temporal = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    device, size = pipeline._execution_device, (width * spatial, height * spatial, (frames - 1) * temporal + 1)
    with _seeded(pipeline, seed):
        # With output_type "latent" the pipeline returns the latents it denoised, before it un-normalises them.
        return pipeline(
            prompt_embeds=prompt_embeds.to(device), width=size[0], height=size[1], num_frames=size[2],
            latents=first_noise(pipeline, *size) if first_noise else None, num_inference_steps=steps,
            guidance_scale=1.0,
            max_sequence_length=max_sequence_length, output_type="latent", return_dict=False,
            callback_on_step_end=switch_expert,
        )[0]  # fmt: skip


@contextmanager
def _student(pipeline: Any, export_dir: Path, document: dict[str, Any], experts: Any) -> Iterator[None]:
    """The exported weights in the pipeline, and out of it again. experts: sampler.py of a two-expert student."""
    if experts is not None and "expert" in document["experts"]:
        with _native_pair(pipeline, export_dir, experts):
            yield
        return
    if experts is not None:
        with _two_experts(pipeline, export_dir, document, experts):
            yield
        return
    folder = export_dir / "diffusers"
    if document["model_type"] == "full":
        former = pipeline.transformer
        dtype = former.dtype if former is not None else torch.float32
        student = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
        student = student.to(pipeline._execution_device).eval()
        with _swapped(pipeline, "transformer", student):
            yield
        return
    file = export_dir / document["adapter"]["files"][0]
    if document["adapter"].get("kind") == "lycoris":
        with _lycoris(pipeline.transformer, file):
            yield
        return
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="load_back")
    except (ValueError, KeyError, RuntimeError) as error:
        raise _Unfit(f"diffusers refuses {file.name}: {error}") from error
    try:
        # Keys that diffusers does not know are only a log line; then no adapter is active.
        if "load_back" not in pipeline.get_active_adapters():
            raise _Unfit(f"diffusers found no adapter in {file.name}")
        yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def _two_experts(pipeline: Any, export_dir: Path, document: dict[str, Any], sampler: Any) -> Iterator[None]:
    """Both experts of a student, loaded by the function that its sampler.py gives users."""
    former, lycoris = pipeline.transformer, (document["adapter"] or {}).get("kind") == "lycoris"
    try:
        sampler.load_experts(pipeline, export_dir)
        if lycoris:
            for expert in (LOW, HIGH):  # made when it is put on: a file that does not fit is found here
                sampler.put_on(pipeline, expert)
    except (AssertionError, ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise _Unfit(f"an expert is refused: {error}") from error
    try:
        # Keys that diffusers does not know are only a log line.
        found = {name for names in pipeline.get_list_adapters().values() for name in names}
        wanted = set() if lycoris else {LOW} if document["model_type"] == "full" else {HIGH, LOW}
        if found != wanted:
            raise _Unfit(f"diffusers found the adapters {sorted(found)} instead of {sorted(wanted)}")
        yield
    finally:
        if lycoris:
            sampler.put_on(pipeline, None)
        pipeline.unload_lora_weights()
        pipeline.register_modules(transformer=former, transformer_2=None)
        pipeline.register_to_config(boundary_ratio=None)


@contextmanager
def _native_pair(pipeline: Any, export_dir: Path, sampler: Any) -> Iterator[None]:
    """Both experts, each on its own network of the base, by sampler.py's `load_experts`."""
    former = pipeline.transformer, pipeline.transformer_2
    try:
        sampler.load_experts(pipeline, export_dir)
    except (AssertionError, ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise _Unfit(f"an expert is refused: {error}") from error
    try:
        yield
    finally:
        pipeline.unload_lora_weights()
        pipeline.register_modules(transformer=former[0], transformer_2=former[1])


@contextmanager
def _lycoris(transformer: Any, file: Path) -> Iterator[None]:
    """A LyCORIS file on the transformer as its users apply it, and off again."""
    import lycoris

    try:
        network, tensors = lycoris.create_lycoris_from_weights(1.0, str(file), transformer)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _Unfit(f"lycoris refuses {file.name}: {error}") from error
    # A module that lycoris finds no layer for is left out without a word.
    if len(network.loras) != (named := len({key.partition(".")[0] for key in tensors})):
        raise _Unfit(f"lycoris finds {len(network.loras)} of the {named} modules of {file.name} in the base")
    for module in network.loras:
        module.to(transformer.device, transformer.dtype)
    network.apply_to()
    try:
        yield
    finally:
        network.restore()


@contextmanager
def _swapped(pipeline: Any, name: str, component: Any) -> Iterator[None]:
    former = getattr(pipeline, name)
    setattr(pipeline, name, component)
    try:
        yield
    finally:
        setattr(pipeline, name, former)


def _compare_dialects(export_dir: Path, document: dict[str, Any]) -> None:
    """Every file is there, and ComfyUI's holds the same factors under its names, so the same change of the weights.

    It has no alpha: ComfyUI takes alpha = rank where a file has none, which the files were made for.
    """
    adapter = document["adapter"] or {}
    for entry in ("files", "low_noise_files"):
        files = [export_dir / name for name in adapter.get(entry, [])]
        for file in files:
            if not file.exists():
                raise _Unfit(f"{file.relative_to(export_dir)} is missing")
        if len(files) > 1:
            _compare_files(files[0], files[1], lycoris=adapter.get("kind") == "lycoris")


def _compare_files(ours: Path, theirs: Path, *, lycoris: bool) -> None:
    tensors, found = load_file(ours), load_file(theirs)
    expected = to_comfyui(tensors) if lycoris else \
        {comfyui_key(key.removeprefix(DIFFUSERS_PREFIX)): tensor for key, tensor in tensors.items()}  # fmt: skip
    name, own = f"comfyui/{theirs.name}", f"lycoris/{ours.name}" if lycoris else ours.name
    if expected is None or expected.keys() != found.keys():
        raise _Unfit(f"{name} does not name the same modules as {own}")
    for key, tensor in expected.items():
        if not torch.equal(found[key], tensor):
            raise _Unfit(f"{name} differs from {own} at {key}")


def _load_sampler(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_sampler", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
