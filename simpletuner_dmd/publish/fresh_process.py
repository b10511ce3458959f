"""Loads an export with nothing but stock diffusers, and compares what it samples with the sampler of training.

`python -P fresh_process.py REQUEST` is how `load_back` runs it: a process that knows torch, diffusers and the files of
the export, like a user's, and nothing of this package. So this file imports nothing of it: only a quantised base, which
no user has, is quantised by the module that did it in training. A LyCORIS student is put on the transformer by lycoris.

REQUEST is a folder: request.json and tensors.safetensors (see `load_back.save_request`). The last line of the output is
the verdict as JSON: {"checked", "relative_error", "passed", "message", "unquantised"}.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

EXPERTS = ("high_noise", "low_noise")
"""What a two-expert sampler.py calls them."""
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By the coarser of the precisions that weights are stored in and the base computes in. The stock pipeline rounds the
latents to the base's precision between steps, which training does not: in bf16 up to 0.4% of each value."""


@dataclass(frozen=True)
class LoadBack:
    """relative_error: difference of the latents over their root mean square: the largest one where all is fp32, the
    root mean square of all where weights or base are in half precision. checked: False where the comparison could not
    be made, which says nothing about the files. unquantised: the same difference on the base as users have it, where
    training had it quantised; reported, not judged."""

    relative_error: float
    passed: bool
    message: str
    checked: bool = True
    unquantised: float | None = None


@torch.no_grad()
def check_export(
    pipeline: Any,
    export_dir: Path,
    *,
    prompt_embeds: Tensor,
    shape: Sequence[int],
    seed: int,
    reference_latents: Tensor,
    sigmas: Sequence[float],
    shift: float,
    renoise: str,
    max_sequence_length: int = 512,
    tolerance: float | None = None,
    device: str = "cpu",
) -> LoadBack:
    """Whether the exported files, in a stock `WanPipeline` of the base, sample what training's sampler does.

    pipeline: made from the base, without adapters, in the precision and quantisation of training; VAE and text encoder
    may be None. It is handed back as it came. prompt_embeds: [B, L, D], padded as in training. reference_latents:
    normalised; `flow.sample_few_step` on `validation.sampling.reference_noise(seed, shape, device)`.
    sigmas, shift: of the run; without a ladder in the export (supervised training), those that the reference took.
    tolerance: None takes 1e-4 in fp32 and more where weights are stored, or the base computes, in half precision;
    infinite: any difference passes.
    device: of a full student where the pipeline came without a transformer, which it replaces.
    """
    document = json.loads((export_dir / "distill.json").read_text(encoding="utf-8"))
    if tolerance is None:
        precisions = (document["weights_dtype"], str(getattr(pipeline.transformer, "dtype", "")).removeprefix("torch."))
        tolerance = max(TOLERANCES.get(name, TOLERANCES["float32"]) for name in precisions)
    try:
        scheduler = exported_scheduler(export_dir, document, sigmas, shift, renoise)
        two = document["experts"] is not None and document["experts"].get("other", "same base") is not None
        experts = _load_sampler(export_dir / "sampler.py") if two else None
        with _student(pipeline, export_dir, document, experts, device), _swapped(pipeline, "scheduler", scheduler):
            if document["blocks"] is not None:
                latents = _sample_blocks(pipeline, export_dir, prompt_embeds, shape, seed)
            else:
                switch = getattr(experts, "switch_expert", None)  # a full one is switched by the pipeline itself
                # A host that expects a picture is told that there is none, by the function that users have.
                first_noise = _load_sampler(export_dir / "sampler.py").without_picture \
                    if document["picture_channels"] else None  # fmt: skip
                latents = _sample(
                    pipeline, prompt_embeds, shape, seed, len(sigmas), max_sequence_length, switch, first_noise
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
    judged = math.isfinite(tolerance)
    message = (
        f"stock diffusers loaded the export; its latents {verdict if judged else 'compare with'} the sampler of "
        f"training: {which} difference {error:.2g} of their size "
        f"({f'allowed {tolerance:g}' if judged else 'reported, not judged'})"
    )
    return LoadBack(error, passed, message)


def exported_scheduler(
    export_dir: Path, document: Mapping[str, Any], sigmas: Sequence[float], shift: float, renoise: str
) -> Any:
    """The scheduler as a user gets it: from `sampler.py` where the ladder needs it, else from the saved config."""
    if not document["ladder"]["sigmas"]:
        # A supervised export ships a solver for many steps; a few Euler steps of its grid test the weights as well.
        return diffusers.FlowMapEulerDiscreteScheduler(shift=shift)
    if document["scheduler"]["needs_sampler_file"]:
        scheduler = _load_sampler(export_dir / "sampler.py").few_step_scheduler()
    else:
        folder = export_dir / "diffusers" / "scheduler"
        config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(folder)
    scheduler.set_timesteps(len(sigmas), device="cpu")
    found = [*scheduler.sigmas.tolist(), *(timestep / 1000 for timestep in scheduler.timesteps.tolist())]
    wanted = [*sigmas, 0.0, *sigmas]
    error = max((abs(a - b) for a, b in zip(found, wanted, strict=False)), default=float("inf"))
    if len(found) != len(wanted) or not error <= 1e-5:
        raise _Unfit(f"the exported scheduler's sigmas are off by {error:.3g}")
    if len(sigmas) > 1 and bool(getattr(scheduler.config, "stochastic_sampling", False)) != (renoise == "sde"):
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
def _student(pipeline: Any, export_dir: Path, document: dict[str, Any], experts: Any, device: str) -> Iterator[None]:
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
        dtype = former.dtype if former is not None else _stored_dtype(document)
        student = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
        student = student.to(device if former is None else former.device).eval()
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
            for expert in EXPERTS[::-1]:  # made when it is put on: a file that does not fit is found here
                sampler.put_on(pipeline, expert)
    except (AssertionError, ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise _Unfit(f"an expert is refused: {error}") from error
    try:
        # Keys that diffusers does not know are only a log line.
        found = {name for names in pipeline.get_list_adapters().values() for name in names}
        wanted = set() if lycoris else {EXPERTS[1]} if document["model_type"] == "full" else set(EXPERTS)
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


def _load_sampler(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_sampler", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stored_dtype(document: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, document["weights_dtype"], torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


# --- the process ----------------------------------------------------------------------------------------------------


def run(folder: Path) -> LoadBack:
    """The verdict on the request in `folder`."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "tensors.safetensors")

    def check(base: Mapping[str, Any] | None) -> LoadBack:
        transformer, second = (None, None) if base is None else base_transformers(base, folder)
        boundary = None if base is None or second is None else base["boundary"]
        return check_export(
            stock_pipeline(transformer, second, request["vae_scale"], request["device"], boundary_ratio=boundary,
                           expand_timesteps=request["expand_timesteps"]),
            Path(request["export"]), prompt_embeds=tensors["prompt_embeds"], reference_latents=tensors["latents"],
            shape=tensors["latents"].shape, device=request["device"], **request["sampling"],
        )  # fmt: skip

    base = request["base"]
    result = check(base)
    if base is None or base["precision"] == "no_change" or not result.passed:
        return result
    try:
        plain = check(base | {"precision": "no_change"})
    except torch.OutOfMemoryError:
        return replace(result, message=f"{result.message}; the base without quantisation does not fit into memory here")
    return replace(result, unquantised=plain.relative_error, message=f"{result.message}; on the base without "
                   f"quantisation they are {plain.relative_error:.2g} away")  # fmt: skip


def stock_pipeline(
    transformer: Any, second: Any, vae_scale: Sequence[int], device: str, *, boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
) -> Any:  # fmt: skip
    """`WanPipeline` for embedded prompts and latents. second: the low-noise network of a model of two, which takes over
    at boundary_ratio. vae_scale: pixels per latent, frames per latent."""
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer, transformer_2=second, boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )  # fmt: skip
    pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal = vae_scale
    pipeline.set_progress_bar_config(disable=True)
    if transformer is not None:
        pipeline.to(device)
    return pipeline


def base_transformers(base: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """The base's network, and None; or both of a model of two, high noise first, where both experts are sampled."""
    own = _network(base, base["source"], folder)
    if base["other"] is None:
        return own, None
    other = _network(base, base["other"], folder)
    return (own, other) if base["expert"] == "high" else (other, own)


def _network(base: Mapping[str, Any], source: Mapping[str, Any], folder: Path) -> Any:
    """As training had it: weights, merged fine-tune, quantisation."""
    stock, dtype = diffusers.WanTransformer3DModel, getattr(torch, base["dtype"])
    if "config" in source:
        transformer = stock.from_single_file(torch_dtype=dtype, **source)
    else:
        transformer = stock.from_pretrained(dtype=dtype, **source)
    transformer.requires_grad_(False)
    if base["teacher_lora"] is not None:
        _merge_fine_tune(transformer, base["teacher_lora"], folder)
    if base["precision"] != "no_change":
        from simpletuner_dmd.wan.quantisation import quantise  # the base of the training, which no user has

        quantise(transformer, base["precision"], torch.device(base["quantised_on"]) if base["quantised_on"] else None)
    return transformer.eval()


def _merge_fine_tune(transformer: Any, fine_tune: Mapping[str, Any], folder: Path) -> None:
    """As the card says: loaded and fused by diffusers; by lycoris where it is a LyCORIS network."""
    file, strength = folder / fine_tune["file"], fine_tune["strength"]
    if fine_tune["kind"] == "lora":
        pipeline = stock_pipeline(transformer, None, (8, 4), "cpu")
        pipeline.load_lora_weights(str(folder), weight_name=file.name)
        pipeline.fuse_lora(lora_scale=strength)
        pipeline.unload_lora_weights()
        return
    import lycoris

    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), transformer)
    for module in network.loras:
        change, bias = module.get_diff_weight(1.0)
        layer = module.org_module[0]
        layer.weight.copy_(layer.weight.float() + strength * change)
        if bias is not None:
            layer.bias.copy_(layer.bias.float() + strength * bias)


if __name__ == "__main__":
    try:
        verdict = run(Path(sys.argv[1]))
    except torch.OutOfMemoryError:
        verdict = LoadBack(0.0, passed=False, checked=False, message="there was not enough memory to load the base")
    print(json.dumps(asdict(verdict)))
