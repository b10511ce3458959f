"""A run put together without its weights, and its training step observed on the meta device.

`Blueprint` is the `Assembly` of the run with another source of networks; roles, adapters, method and losses are the
production code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.moving import student_average
from simpletuner_dmd.config import LoadedConfig
from simpletuner_dmd.config.flavours import Part, flavour_of
from simpletuner_dmd.distill.blocks import CausalDenoiser, sample_blocks
from simpletuner_dmd.distill.method import Method
from simpletuner_dmd.flow import Batch, Schedule, TextEmbedding
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.training.ema import AveragedDenoiser
from simpletuner_dmd.wan import blueprint
from simpletuner_dmd.wan.flavours import published_config
from simpletuner_dmd.wan.roles import Roles
from simpletuner_dmd.wan.shadow import Observation, Shadow, cast_products, no_content, stored_bytes
from simpletuner_dmd.wan.sources import ModelSource
from simpletuner_dmd.wan.tread import Route

LatentShape = tuple[int, int, int, int]

SCANNED_STEPS = 20_000
"""The turns of a method repeat, or change once or twice at the start: this many steps show all of them."""


def local_config(loaded: LoadedConfig, part: Part) -> dict[str, Any] | None:
    """The config.json of a part that is on this machine, in a folder or in the Hub's cache; nothing is downloaded."""
    source = ModelSource.of(loaded.config)
    folder = source.folder(part)
    if folder is not None:
        file = folder / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        arguments = source.arguments(part)
        name = "/".join([*filter(None, [arguments.get("subfolder")]), "config.json"])
        place = arguments["pretrained_model_name_or_path"]
        cached = try_to_load_from_cache(place, name, revision=arguments.get("revision"))
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def known_config(loaded: LoadedConfig, part: Part) -> dict[str, Any]:
    """The part's own config, or that of the flavour as published."""
    flavour = flavour_of(loaded.config.model_flavour)
    # Two experts are equal in shape, and a run has one of them.
    return local_config(loaded, part) or published_config(flavour, part)


@dataclass(frozen=True)
class _Draws(RandomStream):
    """Noise without content, and always the same exit."""

    exit_rung: int = 0

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        return torch.empty((len(self.positions), *shape), device=blueprint.META)

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.positions),), 0.5, dtype=torch.float64)

    def shared_index(self, count: int, purpose: str) -> int:
        return min(self.exit_rung, count - 1)


class _StayThere(TorchFunctionMode):
    """lycoris' `full` modules copy the base's weight to the CPU, and a tensor without content has nothing to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class Blueprint(Assembly):
    """The run in a network of `depth` blocks, on the meta device."""

    def __init__(self, loaded: LoadedConfig, depth: int) -> None:
        # TREAD only lowers what is planned, every attention kernel that trains holds the same, and what leaves the
        # device is added up in `cli.planning`.
        plain = {
            "attention_mechanism": "native", "tread_config": None, "teacher_lora": None, "compile": False,
            "blocks_to_swap": 0, "gradient_checkpointing_backend": "torch", "enable_group_offload": False,
        }  # fmt: skip
        config = loaded.config.model_copy(update=plain)
        super().__init__(replace(loaded, config=_shallow(config, depth)), blueprint.META)
        self.depth = depth

    @property
    def network(self) -> dict[str, Any]:
        return {**known_config(self.loaded, "transformer"), "num_layers": self.depth}

    def _fit_lines(self) -> list[str]:
        return []  # `check` and the run itself say it

    @property
    def routes(self) -> tuple[Route, ...]:
        return ()

    def base_transformer(
        self, *, quantised: bool = True, swapped: bool = False, lines: list[str] | None = None
    ) -> nn.Module:
        precision = self.config.base_model_precision if quantised else "no_change"
        return blueprint.transformer(self.network, self.depth, self.dtype, precision)

    def _full_network(self) -> nn.Module:
        network = blueprint.transformer(self.network, self.depth, torch.float32)
        if self.dtype != torch.float32:
            cast_products(network, self.dtype)
        return network

    def roles(self) -> tuple[Roles, list[str]]:
        with blueprint.META, _StayThere():  # adapters and heads too
            roles, lines = super().roles()
        for denoiser in roles.denoisers.values():
            denoiser.autocast = None  # torch has none for this device; `cast_products` does it
        for network in roles.transformers():
            no_content(network)
        return roles, lines

    def run(self) -> tuple[Roles, Method, Any]:
        """Roles, method and the average of the student, where there is one."""
        roles, _ = self.roles()
        average = student_average(self.config, roles)
        target = None if average is None else AveragedDenoiser(roles.student, average)
        with blueprint.META:
            method = self.method(roles, target)
        return roles, method, average

    def batch(self, shape: LatentShape) -> Batch:
        """What the data room would hand over."""
        config = self.config
        rows = (config.tokenizer_max_length, int(self.network["text_dim"]))

        def text(count: int) -> TextEmbedding:
            return TextEmbedding(torch.empty((count, *rows), device=blueprint.META))

        count = config.train_batch_size
        latents = torch.empty((count, *shape), device=blueprint.META) if self.needs_latents else None
        return Batch(tuple(range(count)), text(count), text(1), shape, latents)


def _shallow(config: Any, depth: int) -> Any:
    """The settings for a network of few blocks: blocks that are named become as many of those that are there."""
    settings = config.distillation_config
    blocks = getattr(settings, "gan_blocks", "auto")
    if blocks == "auto" or settings is None:
        return config
    named = tuple(range(depth))[-len(blocks) :]
    return config.model_copy(update={"distillation_config": settings.model_copy(update={"gan_blocks": named})})


# --- observing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes that are there from the first step to the last, in a network of `depth` blocks."""

    depth: int
    base: int
    block: int  # of the base: the weights of one block
    trained: dict[str, int]  # role -> weights
    counts: dict[str, int]  # role -> number of parameters
    average: int

    def deeper(self, other: Held, depth: int) -> Held:
        share = (depth - self.depth) / (other.depth - self.depth)

        def line(here: int, there: int) -> int:
            return round(here + share * (there - here))

        def lines(here: dict[str, int], there: dict[str, int]) -> dict[str, int]:
            return {role: line(here[role], there[role]) for role in here}

        return Held(depth, line(self.base, other.base), self.block, lines(self.trained, other.trained),
                    lines(self.counts, other.counts), line(self.average, other.average))  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Steps in which the same roles take their turns: how large a share of the run they are, and what one is."""

    roles: tuple[str, ...]
    share: float
    observed: Observation


@dataclass(frozen=True)
class Training:
    """The training step of the run: what stays, what comes and goes, and a student's forward while sampling.

    block_input: bytes of the tokens that enter one block.
    """

    held: Held
    kinds: tuple[Kind, ...]
    sampling: Observation
    block_input: int

    @property
    def peak(self) -> int:
        return max(kind.observed.peak for kind in self.kinds)

    @property
    def flops(self) -> float:
        """Of a step with one micro-batch, the mean over the run."""
        return sum(kind.share * kind.observed.flops for kind in self.kinds)


def observe(loaded: LoadedConfig, shape: LatentShape, sampled: LatentShape) -> Training:
    """The training step on latents of `shape`, and sampling at `sampled`, in the depth of the model."""
    depth = int(known_config(loaded, "transformer")["num_layers"])
    return _observed(_Question(loaded, shape, sampled, depth))


class _Question:
    """What an observation depends on; two that ask the same are equal, so that nothing is observed twice."""

    def __init__(self, loaded: LoadedConfig, shape: LatentShape, sampled: LatentShape, depth: int) -> None:
        self.loaded, self.shape, self.sampled, self.depth = loaded, shape, sampled, depth
        config = loaded.config
        relevant = config.model_dump(
            mode="json",
            include={
                "model_type", "mixed_precision", "base_model_precision", "gradient_checkpointing",
                "gradient_checkpointing_interval", "lora_type", "lora_rank", "peft_lora_target_modules", "use_dora",
                "lycoris_config", "distillation_method", "distillation_config", "train_batch_size",
                "tokenizer_max_length", "use_ema", "caption_dropout_probability", "max_train_steps",
            },
        )  # fmt: skip
        relevant |= {"network": known_config(loaded, "transformer"), "accumulated": _accumulates(config)}
        self.text = json.dumps([relevant, shape, sampled, depth], sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and other.text == self.text


def _accumulates(config: Any) -> bool:
    return bool(config.gradient_accumulation_steps > 1)


@cache
def _observed(question: _Question) -> Training:
    loaded, depth = question.loaded, question.depth
    shallow, deeper = _depths(loaded, depth)
    first = _look(loaded, shallow, question)
    if shallow == depth:
        return first
    costliest = max(first.kinds, key=lambda kind: kind.observed.peak)
    second = _look(loaded, deeper, question, only=costliest.roles)
    kinds = []
    for kind in first.kinds:
        if kind is costliest:
            kinds.append(replace(kind, observed=kind.observed.deeper(second.kinds[0].observed, depth)))
        else:
            kinds.append(replace(kind, observed=kind.observed.at_depth(depth)))
    return Training(
        first.held.deeper(second.held, depth),
        tuple(kinds),
        first.sampling.deeper(second.sampling, depth),
        first.block_input,
    )


def _depths(loaded: LoadedConfig, depth: int) -> tuple[int, int]:
    """Two depths that show how the cost grows with it; the depth itself where it is small."""
    settings = loaded.config.distillation_config
    reads_features = settings is not None and (settings.has_discriminator or getattr(settings, "gan_weight", 0.0) > 0)
    # The default taps of a discriminator are three from 5 blocks on.
    every = 5 if reads_features else max(2, 2 * loaded.config.gradient_checkpointing_interval)
    step = max(1, every // 2)
    return (every, every + step) if every + step < depth else (depth, depth)


def _look(loaded: LoadedConfig, depth: int, question: _Question, only: tuple[str, ...] | None = None) -> Training:
    plan = Blueprint(loaded, depth)
    roles, method, average = plan.run()
    base = roles.teacher.transformer
    own = {role: [parameter for _, parameter in roles.parameters[role]] for role in roles.parameters}
    adapters = {id(parameter) for parameters in own.values() for parameter in parameters}
    blocks: Any = base.blocks
    frozen = [parameter for parameter in base.parameters() if id(parameter) not in adapters]
    held = Held(
        depth,
        stored_bytes(frozen),
        stored_bytes(parameter for parameter in blocks[0].parameters() if id(parameter) not in adapters),
        {role: stored_bytes(parameters) for role, parameters in own.items()},
        {role: sum(parameter.numel() for parameter in parameters) for role, parameters in own.items()},
        0 if average is None else stored_bytes(average.shadow.values()),
    )
    existing = [] if average is None else list(average.shadow.values())
    existing += [parameter for parameters in own.values() for parameter in parameters]
    found = []
    rungs = len(plan.schedule.ladder)
    for number, (turns, step, share) in enumerate(_kinds(method, loaded.config.max_train_steps)):
        if only is not None and turns != only:
            continue
        # The exit is uniform over the rungs: below and above its mean in turn.
        rung = math.floor((rungs - 1) / 2) if number % 2 == 0 else math.ceil((rungs - 1) / 2)
        shadow = Shadow(roles.transformers(), existing)
        _step(plan, method, own, shadow, step, max(0, rung), question.shape)
        found.append(Kind(turns, share, shadow.seen))
    shadow = Shadow(roles.transformers(), existing)
    with shadow.watching(), torch.no_grad(), roles.evaluating():
        _sample(plan, roles, question.sampled)
    return Training(held, tuple(found), shadow.seen, _block_input(plan, roles, question.shape))


def _block_input(plan: Blueprint, roles: Roles, shape: LatentShape) -> int:
    frames, height, width = roles.student.token_grid(shape)
    tokens = plan.config.train_batch_size * frames * height * width
    return tokens * roles.student.width * plan.dtype.itemsize


def _kinds(method: Method, steps: int) -> Iterator[tuple[tuple[str, ...], int, float]]:
    """(roles that take their turns, the last step in which they do, share of the run's steps)."""
    counts: dict[tuple[str, ...], int] = {}
    last: dict[tuple[str, ...], int] = {}
    looked = min(steps or SCANNED_STEPS, SCANNED_STEPS)
    for step in range(looked):
        roles = tuple(turn.role for turn in method.turns(step))
        counts[roles] = counts.get(roles, 0) + 1
        last[roles] = step
    for roles in sorted(counts, key=len, reverse=True):
        yield roles, last[roles], counts[roles] / looked


def _step(
    plan: Blueprint,
    method: Method,
    own: dict[str, list[nn.Parameter]],
    shadow: Shadow,
    step: int,
    rung: int,
    shape: LatentShape,
) -> None:
    """As the Trainer takes it, up to the optimizers."""
    batch = plan.batch(shape)
    with shadow.watching():
        for turn in method.turns(step):
            shadow.turn = turn.role
            parameters = own[turn.role]
            if _accumulates(plan.config):  # the micro-batches before have left their gradients
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
            for loss in turn.losses(batch, _Draws(0, step, batch.positions, exit_rung=rung)):
                shadow.begin_backward()
                loss.value.backward(inputs=parameters)
                shadow.end_backward()
            for parameter in parameters:
                parameter.grad = None
        method.end_step()


def _sample(plan: Blueprint, roles: Roles, shape: LatentShape) -> None:
    """One forward of the student; a causal one makes its clip, because its memory grows with it."""
    text = plan.batch(shape).negative_text
    x_t = torch.empty((1, *shape), device=blueprint.META)
    if plan.block_sampling is None:
        roles.student.velocity(x_t, torch.full((1,), 0.7, device=blueprint.META), text)
        return
    blocks, student = plan.block_sampling, cast(CausalDenoiser, roles.student)
    once = Schedule(1.0, (1.0,))
    sample_blocks(student, x_t, text, once, "ode", lambda block, rung, like: like, blocks.plan(shape[1]),
                  blocks.context_noise)  # fmt: skip
