"""Makes the plan of a run from its configuration: memory by role, stretch and side, disk, time, and what to change.

The training step and the encoders are observed on the meta device (`cli.blueprint`, `wan.blueprint`); the rest is
addition. Weights are not needed: what is not on this machine is planned from the flavour's published configs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from simpletuner_dmd.cli.blueprint import LatentShape, Training, known_config, local_config, observe
from simpletuner_dmd.cli.capacity import Machine, host_now
from simpletuner_dmd.cli.check_data import needs_latents
from simpletuner_dmd.config import LoadedConfig
from simpletuner_dmd.config.flavours import flavour_of
from simpletuner_dmd.config.memory_rules import offloads_teacher
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.wan import blueprint
from simpletuner_dmd.wan.loading import DTYPES
from simpletuner_dmd.wan.plan import Component, Phase, Plan, fitting

if TYPE_CHECKING:
    from simpletuner_dmd.data.scan import DatasetScan

TRAINING = "training"

# What a process takes of a GPU before the first tensor: the driver's context, and the workspaces of matrix products.
CUDA_CONTEXT = 600_000_000
ON_DEVICE = 2
"""Blocks whose weights, or inputs, are on the device where they live on the host: the one at work and the next."""

OPTIMIZER_BYTES = {
    "adamw_bf16": 8.0, "torch-adamw": 8.0, "torch-muon": 4.0, "optimi-adamw": 8.0, "optimi-lion": 4.0,
    "optimi-stableadamw": 8.0, "optimi-adan": 16.0, "optimi-ranger": 12.0, "bnb-adamw": 8.0, "bnb-adamw8bit": 2.0,
    "bnb-adamw-paged": 8.0, "bnb-adamw8bit-paged": 2.0, "bnb-lion": 4.0, "bnb-lion8bit": 1.0, "bnb-lion-paged": 4.0,
    "bnb-lion8bit-paged": 1.0, "ao-adamw8bit": 2.0, "ao-adamw4bit": 1.0, "prodigy": 16.0, "adafactor": 0.1,
}  # fmt: skip
"""State per trained number, which is fp32, as documentation/MEMORY.md has it; tests/cli/test_planning.py weighs those
that run anywhere."""

SMALLEST_RANK, FEWEST_FRAMES = 8, 17


@dataclass(frozen=True)
class Sizes:
    """(C, F, H, W) of the latents that a step trains on, the largest there are, and of the largest validation video."""

    trained: LatentShape
    sampled: LatentShape | None
    geometry: LatentGeometry

    def pixels(self) -> tuple[int, int, int]:
        """(width, height, frames) of what is trained on."""
        _, frames, height, width = self.trained
        spatial, temporal = self.geometry.spatial, self.geometry.temporal
        return width * spatial, height * spatial, (frames - 1) * temporal + 1


def geometry_of(loaded: LoadedConfig) -> LatentGeometry:
    vae, network = known_config(loaded, "vae"), known_config(loaded, "transformer")
    return LatentGeometry(
        channels=int(vae.get("z_dim", 16)),
        spatial=int(vae.get("scale_factor_spatial", 8)),
        temporal=int(vae.get("scale_factor_temporal", 4)),
        patch=int(network["patch_size"][1]),
    )


def sizes_of(loaded: LoadedConfig, scans: Sequence[DatasetScan] = (), shapes: Sequence[LatentShape] = ()) -> Sizes:
    """From the batches themselves (`shapes`), from the files, or from what the datasets ask for."""
    config, geometry = loaded.config, geometry_of(loaded)

    def latent(width: int, height: int, frames: int) -> LatentShape:
        multiple = geometry.multiple
        return geometry.latent_shape(width // multiple * multiple, height // multiple * multiple,
                                     geometry.round_frames(frames))  # fmt: skip

    found = list(shapes) or [latent(*clip) for clip in _clips(loaded, scans)]
    if config.distillation_config is not None:
        most = config.distillation.num_training_frames
        found = [(channels, min(frames, most), *rest) for channels, frames, *rest in found]  # type: ignore[misc]
    videos = [] if config.validation_disable else [
        latent(*size, frames)
        for size in config.validation_resolution
        for frames in config.validation_num_video_frames
    ]  # fmt: skip
    return Sizes(max(found, key=_volume), max(videos, key=_volume) if videos else None, geometry)


def _volume(shape: LatentShape) -> int:
    return shape[1] * shape[2] * shape[3]


def _clips(loaded: LoadedConfig, scans: Sequence[DatasetScan]) -> Iterable[tuple[int, int, int]]:
    """(width, height, frames) of what is trained on; at least one."""
    from simpletuner_dmd.data.scan import VideoSample

    found = {
        (sample.crop.width, sample.crop.height, sample.frames)
        if isinstance(sample, VideoSample)
        else (sample.width, sample.height, sample.frames)
        for scan in scans
        for sample in scan.usable
    }
    if found:
        return found
    flavour = flavour_of(loaded.config.model_flavour)
    wide, high = flavour.native_size
    for entry in loaded.datasets:
        if entry.size is not None:
            found.add((*entry.size, entry.video.num_frames))
            continue
        # One number: the native shape, at that size.
        asked = float(entry.resolution) if isinstance(entry.resolution, (int, float)) else float(min(wide, high))
        scale = {
            "pixel": asked / min(wide, high),
            "pixel_area": asked / (wide * high) ** 0.5,
            "area": (asked * 1e6 / (wide * high)) ** 0.5,
        }[entry.resolution_type or loaded.config.resolution_type]
        found.add((round(wide * scale), round(high * scale), entry.video.num_frames))
    return found or [(wide, high, flavour.frames)]


# --- the plan ---------------------------------------------------------------------------------------------------------


def make_plan(
    loaded: LoadedConfig,
    machine: Machine,
    *,
    scans: Sequence[DatasetScan] = (),
    shapes: Sequence[LatentShape] = (),
    caches: int = 0,
    steps: int | None = None,
) -> Plan:
    """The plan of this run on that machine.

    scans: of its datasets, or shapes: of its batches, where they are known. caches: bytes of text and latents on disk.
    steps: of the run, where epochs set its length.
    """
    sizes = sizes_of(loaded, scans, shapes)
    plan = _plan(loaded, machine, sizes, caches, steps or loaded.config.max_train_steps or None)
    return replace(plan, changes=partial(_changes, loaded, machine, sizes))


def _plan(loaded: LoadedConfig, machine: Machine, sizes: Sizes, caches: int, steps: int | None) -> Plan:
    config = loaded.config
    training = observe(loaded, sizes.trained, sizes.sampled or sizes.trained)
    parts = _Parts(loaded, sizes)
    components = list(_components(loaded, training, parts, machine))
    phases = list(_phases(loaded, training, parts, components, machine))
    if machine.device == "cpu":  # one memory: what would be on the device is on the host
        components = [Component(part.role, part.part, 0, part.gpu + part.host) for part in components]
        phases = [Phase(phase.name, 0, phase.gpu + phase.host) for phase in phases]
    held, frames = training.held, sizes.trained[1]
    saved = sum(held.trained.values()) + _state(loaded, training) + held.average
    writes = 1 if steps is None else -(-steps // config.checkpoint_step_interval)
    kept = min(writes, (config.checkpoints_total_limit or writes) + 1)
    patch = known_config(loaded, "transformer")["patch_size"]
    tokens = frames * sizes.trained[2] * sizes.trained[3] // (patch[0] * patch[1] * patch[2])
    formats = 2 if config.model_type == "lora" and config.lora_format == "both" else 1
    return Plan(
        device=machine.device,
        components=tuple(components),
        phases=tuple(phases),
        disk={"caches": caches, f"checkpoints ({kept})": kept * saved, "export": formats * held.trained["student"]},
        tokens_per_sample=tokens,
        shape=sizes.pixels(),
        flops=training.flops * config.gradient_accumulation_steps,
        rate=machine.rate,
        steps=steps,
        key=_key(loaded, sizes, machine),
        assumptions=tuple(_assumptions(loaded, machine)),
        missing=_missing(loaded, parts, training),
    )


@cache
def _part_sizes(part: str, text: str, dtype: torch.dtype, precision: str, work: tuple[Any, ...]) -> tuple[int, int]:
    """(bytes of the weights, most beyond them while it works) of an encoder; text: its config as JSON."""
    config = json.loads(text)
    if part == "text_encoder":
        model: Any = blueprint.text_encoder(config, dtype, precision)
        tokens = torch.empty((1, work[0]), dtype=torch.long, device=blueprint.META)
        return blueprint.weights_of(model), blueprint.work_of(model, lambda: model(tokens, tokens)).peak
    model = blueprint.vae(config)
    if precision == "tiling":
        model.enable_tiling()
    if work[0] == "decode":
        return blueprint.weights_of(model), blueprint.decode_peak(model, work[1])
    return blueprint.weights_of(model), blueprint.encode_peak(model, work[1], work[2], work[3])


class _Parts:
    """What the encoders weigh and hold."""

    def __init__(self, loaded: LoadedConfig, sizes: Sizes) -> None:
        self.loaded, self.sizes, self.config = loaded, sizes, loaded.config

    def _of(self, part: Any, dtype: torch.dtype, precision: str, *work: Any) -> tuple[int, int]:
        text = json.dumps(known_config(self.loaded, part), sort_keys=True)
        return _part_sizes(part, text, dtype, precision, work)

    @property
    def text_layers(self) -> int:
        return int(known_config(self.loaded, "text_encoder").get("num_layers", 24))

    def text_encoder(self) -> tuple[int, int]:
        config = self.config
        dtype = DTYPES[config.mixed_precision]
        return self._of("text_encoder", dtype, config.text_encoder_1_precision, config.tokenizer_max_length)

    @property
    def _cut(self) -> str:
        """How the VAE takes its input apart."""
        return "tiling" if self.config.vae_enable_tiling else "no_change"

    def decoding(self) -> tuple[int, int]:
        assert self.sizes.sampled is not None
        return self._of("vae", torch.float32, self._cut, "decode", self.sizes.sampled)

    def encoding(self) -> tuple[int, int]:
        geometry = self.sizes.geometry
        scale = (geometry.spatial, geometry.temporal)
        return self._of(
            "vae", torch.float32, self._cut, "encode", self.sizes.trained, self.config.vae_batch_size, scale
        )


def _state(loaded: LoadedConfig, training: Training, role: str | None = None) -> int:
    """Bytes of optimizer state, of one role or of all."""
    rates = {"discriminator": OPTIMIZER_BYTES["torch-adamw"]}
    chosen = OPTIMIZER_BYTES[loaded.config.optimizer]
    counts = training.held.counts
    return round(sum(rates.get(name, chosen) * counts[name] for name in counts if role in (None, name)))


def _components(loaded: LoadedConfig, training: Training, parts: _Parts, machine: Machine) -> Iterable[Component]:
    """What the training step holds, and on which side."""
    config, held = loaded.config, training.held
    away = _away(loaded, training)
    yield Component("base", f"weights ({_precision(loaded)})", held.base - away.weights, away.weights_on_host)
    for role, weights in held.trained.items():
        yield Component(role, "weights", weights)
        yield Component(role, "optimizer state", _state(loaded, training, role))
    if held.average:
        yield Component("student", "running average", held.average)
    gradients = max(held.trained.values())
    if config.num_processes > 1:  # one flat copy goes through the collective
        yield Component("run", "gradients on their way to the other processes", gradients)
    yield Component("run", "gradients", min(gradients, training.peak))
    yield Component("run", "activations", max(0, training.peak - gradients - away.inputs), away.inputs)
    stays = not (config.offload_during_startup or config.enable_group_offload)
    if parts.sizes.sampled is not None and stays:
        yield Component("run", "VAE, after the first validation", parts.decoding()[0])
    if machine.device == "cuda":
        yield Component("run", "CUDA context and workspaces", CUDA_CONTEXT)
    yield Component("run", "Python and its libraries", 0, host_now())


@dataclass(frozen=True)
class _Away:
    """What the options of memory keep on the host instead of the device, in bytes.

    weights: of the base that the device is spared. weights_on_host: what they take there. inputs: of the recomputed
    blocks, where they wait for the backward pass.
    """

    weights: int = 0
    weights_on_host: int = 0
    inputs: int = 0


def _away(loaded: LoadedConfig, training: Training) -> _Away:
    config, held = loaded.config, training.held
    weights = on_host = inputs = 0
    if offloads_teacher(config):  # a layer at a time, the next one on its way
        weights, on_host = held.base - ON_DEVICE * held.block, held.base
    elif config.blocks_to_swap:
        weights = max(0, config.blocks_to_swap - ON_DEVICE) * held.block
        on_host = config.blocks_to_swap * held.block
    if config.gradient_checkpointing and config.gradient_checkpointing_backend == "offloaded":
        recomputed = -(-held.depth // config.gradient_checkpointing_interval)
        inputs = max(0, recomputed - ON_DEVICE) * training.block_input
    return _Away(weights, on_host, inputs)


def _phases(
    loaded: LoadedConfig, training: Training, parts: _Parts, components: Sequence[Component], machine: Machine
) -> Iterable[Phase]:
    """The stretches of the run in their order."""
    config, held, libraries = loaded.config, training.held, components[-1].host
    context = CUDA_CONTEXT if machine.device == "cuda" else 0
    on_gpu = machine.device != "cpu"

    def encoder(name: str, weights: int, work: int, layers: int) -> Phase:
        here = ON_DEVICE * weights // layers if config.enable_group_offload and on_gpu else weights
        return Phase(name, context + here + work, libraries + (weights if on_gpu else 0))

    text_layers = 1 if config.text_encoder_1_precision != "no_change" else parts.text_layers
    yield encoder("encoding text", *parts.text_encoder(), text_layers)
    if needs_latents(loaded):
        yield encoder("encoding videos", *parts.encoding(), 1)
    whole, away = _unquantised(loaded, training), _away(loaded, training)
    loading, on_host = _loading(loaded, training, on_gpu)
    yield Phase("loading", context + loading, libraries + on_host)
    resting = sum(part.gpu for part in components if part.part not in ("gradients", "activations"))
    elsewhere = sum(part.host for part in components)
    saved = sum(held.trained.values()) + _state(loaded, training) + held.average
    yield Phase(TRAINING, resting + training.peak - away.inputs, elsewhere + (saved if on_gpu else 0))
    if parts.sizes.sampled is not None:
        weights, work = parts.decoding()
        resident = any(part.part.startswith("VAE") for part in components)
        own = held.trained["student"] if held.average else 0  # put aside while the average is in the model
        yield Phase("validation", resting + own + max(training.sampling.peak, work + (0 if resident else weights)),
                    elsewhere + (weights if on_gpu else 0))  # fmt: skip
    second = held.base if config.model_type == "lora" else whole  # what trained is gone by then
    yield Phase("loading the export back", context + second + training.sampling.peak,
                libraries + (whole if on_gpu else 0))  # fmt: skip


def _loading(loaded: LoadedConfig, training: Training, on_gpu: bool) -> tuple[int, int]:
    """Most on the device and on the host while the base is put together: block by block, each dense until it is
    quantised. On the host there is all of it at last, also where it is kept for the next start."""
    config, held = loaded.config, training.held
    if config.base_model_precision == "no_change":
        return (held.base - _away(loaded, training).weights, held.base) if on_gpu else (held.base, 0)
    peak = held.base + _weights(*_network(loaded))[1]
    if not on_gpu:
        return peak, 0
    return (peak if config.quantize_via == "accelerator" else held.base - _away(loaded, training).weights), peak


def _unquantised(loaded: LoadedConfig, training: Training) -> int:
    """Bytes of the transformer before it is quantised."""
    config = loaded.config
    if config.base_model_precision == "no_change":
        return training.held.base
    return _weights(*_network(loaded))[0]


def _network(loaded: LoadedConfig) -> tuple[str, torch.dtype]:
    """The transformer's config as JSON, and the precision of the run."""
    text = json.dumps(known_config(loaded, "transformer"), sort_keys=True)
    return text, DTYPES[loaded.config.mixed_precision]


@cache
def _weights(text: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a transformer's weights, and of one block's; text: its config as JSON."""
    network = json.loads(text)
    depth = int(network["num_layers"])
    two, three = (blueprint.weights_of(blueprint.transformer(network, count, dtype)) for count in (2, 3))
    return two + (depth - 2) * (three - two), three - two


def _precision(loaded: LoadedConfig) -> str:
    config = loaded.config
    names = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    return names[config.mixed_precision] if config.base_model_precision == "no_change" else config.base_model_precision


def _missing(loaded: LoadedConfig, parts: _Parts, training: Training) -> dict[str, int]:
    """Parts that have to be downloaded -> bytes, in the precision that they are published in."""
    place = loaded.config.pretrained_model_name_or_path
    found = {}
    if local_config(loaded, "transformer") is None:
        found[f"transformer of {place}"] = _unquantised(loaded, training)
    if local_config(loaded, "text_encoder") is None:
        found["text encoder"] = parts.text_encoder()[0]
    if local_config(loaded, "vae") is None:
        found["VAE"] = parts.decoding()[0] if parts.sizes.sampled is not None else parts.encoding()[0]
    return found


def _assumptions(loaded: LoadedConfig, machine: Machine) -> Iterable[str]:
    yield machine.sentence
    if loaded.config.tread_config is not None:
        yield "tread_config is not counted: it lowers time and memory"
    if machine.device == "cuda":
        yield f"CUDA's context and workspaces are taken as {CUDA_CONTEXT / 1e9:g} GB; fragmentation is not counted"
    if machine.device == "cpu":
        yield "tensors are counted; what the C library keeps of freed memory comes on top"


def _key(loaded: LoadedConfig, sizes: Sizes, machine: Machine) -> str:
    """Names a run by what its memory depends on: two runs of one key hold the same."""
    options = {key: value for key, value in loaded.options().items() if not key.startswith(("output", "validation_p"))}
    return hashlib.blake2b(repr((sorted(options.items(), key=str), sizes.trained, machine.device)).encode(),
                           digest_size=8).hexdigest()  # fmt: skip


# --- what to change ---------------------------------------------------------------------------------------------------


def _changes(loaded: LoadedConfig, machine: Machine, sizes: Sizes, limit: int) -> list[Any]:
    """From mild to harsh. Each candidate is planned as the run itself is."""
    config = loaded.config
    lora = config.model_type == "lora"

    def once(key: str, value: Any) -> list[tuple[str, Any]]:
        return [(key, value)] if getattr(config, key) != value else []

    def halves() -> Iterable[tuple[str, Any]]:
        rank = config.lora_rank // 2 if lora and config.lora_type == "standard" else 0
        while rank >= SMALLEST_RANK:
            yield "lora_rank", rank
            rank //= 2

    def shorter() -> Iterable[tuple[str, Any]]:
        frames = sizes.pixels()[2]
        step = max(4, (frames - FEWEST_FRAMES) // 4 // 4 * 4)
        while (frames := frames - step) >= FEWEST_FRAMES:
            yield "num_frames", frames

    def swapping() -> Iterable[tuple[str, Any]]:
        depth = int(known_config(loaded, "transformer")["num_layers"])
        if lora and config.gradient_checkpointing and not config.compile:
            yield from (("blocks_to_swap", count) for count in range(max(3, config.blocks_to_swap + 1), depth + 1))

    def offloading() -> list[tuple[str, Any]]:
        return once("gradient_checkpointing_backend", "offloaded") if config.gradient_checkpointing else []

    kinds = [
        lambda: once("gradient_checkpointing", True),
        lambda: once("offload_during_startup", True),
        lambda: once("enable_group_offload", True),
        lambda: once("vae_enable_tiling", True) if sizes.sampled is not None else [],
        swapping,
        offloading,
        lambda: once("base_model_precision", "int8-quanto") if lora else [],
        halves,
        shorter,
        lambda: once("model_type", "lora"),
    ]
    return fitting(kinds, lambda changes: _changed(loaded, machine, sizes, changes).peak, limit)


def _changed(loaded: LoadedConfig, machine: Machine, sizes: Sizes, changes: dict[str, Any]) -> Plan:
    """The plan with other settings, as if they had been written."""
    config, changes = loaded.config, dict(changes)
    frames = changes.pop("num_frames", None)
    if frames is not None:
        latent = (frames - 1) // sizes.geometry.temporal + 1
        sizes = replace(sizes, trained=(sizes.trained[0], latent, *sizes.trained[2:]))
    settings = config.distillation_config
    rank = changes.get("lora_rank")
    if rank is not None and config.critic is not None:
        smaller = {"fake_score_lora_rank": min(rank, config.critic.fake_score_lora_rank)}
        settings = config.critic.model_copy(update=smaller)
    if changes.get("model_type") == "lora" and config.critic is not None:
        settings = config.critic.model_copy(update={"fake_score_type": "lora"})
    changed = config.model_copy(update={**changes, "distillation_config": settings})
    return _plan(replace(loaded, config=changed), machine, sizes, 0, None)
