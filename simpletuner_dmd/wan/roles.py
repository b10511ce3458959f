"""Teacher, student and critic as three Denoisers over one or more Wan transformers.

With a LoRA student and a LoRA critic all three share one (possibly quantised) base: the teacher is the base with its
adapters off. A full student or a full critic owns its own weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner_dmd.flow import TextEmbedding
from simpletuner_dmd.wan.adapters import AdapterSpec, AdapterSwitch
from simpletuner_dmd.wan.causal import Blocks, CausalWanDenoiser, Window
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.lycoris import CHILD, LycorisSpec, make_switch
from simpletuner_dmd.wan.runner import BlockRunner, Recompute


@dataclass(frozen=True)
class CausalLayout:
    """How a causal student cuts a clip into blocks, and how far these look back."""

    blocks: Blocks
    window: Window


@dataclass
class Roles:
    """The Denoisers and the parameters that move.

    denoisers: moving role -> its Denoiser: "student", and what the method adds ("critic", "detail").
    parameters: moving role -> [(name, parameter)] in a fixed order; LoRA names carry no adapter name. A role may have
    parameters and no Denoiser (a discriminator's head).
    adapters: role -> its AdapterSpec where the role is a LoRA.
    """

    teacher: WanDenoiser
    denoisers: dict[str, WanDenoiser]
    parameters: dict[str, list[tuple[str, nn.Parameter]]]
    adapters: dict[str, AdapterSpec | LycorisSpec]

    @property
    def student(self) -> WanDenoiser:
        return self.denoisers["student"]

    @property
    def critic(self) -> WanDenoiser | None:
        return self.denoisers.get("critic")

    def add_head(self, role: str, head: nn.Module, prefix: str = "") -> None:
        """Lets the parameters of `head` move with `role`, under `prefix` and their own names."""
        self.parameters.setdefault(role, []).extend(
            (prefix + name, parameter) for name, parameter in head.named_parameters()
        )

    def transformers(self) -> list[nn.Module]:
        """Each network once."""
        networks = [self.teacher, *self.denoisers.values()]
        return list({id(role.transformer): role.transformer for role in networks}.values())

    def tensors(self, role: str) -> dict[str, Tensor]:
        """The trained tensors of a role, detached, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters[role]}

    @torch.no_grad()
    def load_tensors(self, role: str, tensors: dict[str, Tensor]) -> None:
        """Copies tensors saved by `tensors` back; names must match exactly."""
        expected = {name for name, _ in self.parameters[role]}
        if expected != set(tensors):
            missing, extra = sorted(expected - set(tensors))[:3], sorted(set(tensors) - expected)[:3]
            raise ValueError(f"the {role}'s tensors do not fit this model: missing {missing}, unknown {extra}")
        for name, parameter in self.parameters[role]:
            parameter.copy_(tensors[name])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """eval() inside, the former mode afterwards."""
        modes = [(network, network.training) for network in self.transformers()]
        for network, _ in modes:
            network.eval()
        try:
            yield
        finally:
            for network, training in modes:
                network.train(training)


def build_roles(
    base: nn.Module,
    *,
    adapters: Mapping[str, AdapterSpec | LycorisSpec],
    full: dict[str, nn.Module] | None = None,
    causal: CausalLayout | None = None,
    gradient_checkpointing: bool = False,
    recompute: Recompute = Recompute(),  # noqa: B008 (frozen)
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> Roles:
    """Puts the roles on `base` (frozen here) and on the networks given.

    adapters: the roles that are LoRAs on the base. full: the roles that own a network. `autocast` is the compute dtype
    of full networks whose weights are fp32 masters; base forwards run in the base's own dtype. causal: the student
    works block by block; whoever shares its network does not notice. gradient_checkpointing, recompute: whether and
    which blocks run again in backward.
    """

    def role(name: str, network: nn.Module, switch: AdapterSwitch | None, cast: torch.dtype | None) -> WanDenoiser:
        adapter = name if switch is not None else None
        if name != "student" or causal is None:
            return WanDenoiser(network, switch, adapter, cast)
        return CausalWanDenoiser(network, switch, adapter, cast, blocks=causal.blocks, window=causal.window)

    full = full or {}
    assert "student" in adapters.keys() | full.keys(), "every run has a student"
    assert not adapters.keys() & full.keys(), "a role is an adapter or a network of its own"
    switch = make_switch(base, dict(adapters), seed)
    BlockRunner(base, switch, gradient_checkpointing, recompute)
    base.train()
    denoisers = {name: role(name, base, switch, None) for name in adapters}
    parameters: dict[str, list[tuple[str, nn.Parameter]]] = {name: switch.named_parameters(name) for name in adapters}
    for name, network in full.items():
        network.requires_grad_(True).train()
        BlockRunner(network, None, gradient_checkpointing, recompute)
        parameters[name] = list(network.named_parameters())
        denoisers[name] = role(name, network, None, autocast)
    order = sorted(denoisers, key=lambda name: name != "student")  # the student first, whoever owns a network
    return Roles(
        WanDenoiser(base, switch, None),
        {name: denoisers[name] for name in order},
        {name: parameters[name] for name in order},
        dict(adapters),
    )


class SelfTestError(RuntimeError):
    """A broken invariant of the role layout: a bug, never a person's mistake."""


def self_test(
    roles: Roles,
    x_t_BCFHW: Tensor,
    text: TextEmbedding,
    *,
    fresh: bool,
    shared_numerics: bool = True,
    started_elsewhere: Container[str] = (),
) -> list[str]:
    """Checks at step 0 that student and critic start as the teacher and that gradients reach exactly the moving role.

    fresh: adapters are new, so outputs must agree bit for bit (on resume only gradients are checked).
    shared_numerics: no full network beside a quantised base; where False the difference is returned as a line to print.
    started_elsewhere: roles that do not start as the teacher on purpose; their difference is returned as well.
    Returns lines worth printing; raises SelfTestError.
    """
    lines = []
    sigma_B = torch.full((len(x_t_BCFHW),), 0.7, device=x_t_BCFHW.device)
    moving = roles.denoisers
    if fresh:
        with torch.no_grad():
            expected = roles.teacher.velocity(x_t_BCFHW, sigma_B, text)
            for name, role in moving.items():
                actual = role.velocity(x_t_BCFHW, sigma_B, text)
                if torch.equal(actual, expected):
                    lines.append(f"self-test: the {name} equals the teacher bit for bit")
                    continue
                difference = float((actual - expected).norm() / expected.norm())
                if shared_numerics and role.autocast is None and name not in started_elsewhere:
                    raise SelfTestError(f"the {name} does not start as the teacher: relative difference {difference:g}")
                lines.append(f"self-test: the {name} starts {difference:.2e} (relative) away from the teacher")
    target = torch.randn(x_t_BCFHW.shape, generator=torch.Generator().manual_seed(0)).to(x_t_BCFHW.device)
    # Every parameter there is, frozen base included: a gradient where none belongs must be seen.
    everything = [item for network in roles.transformers() for item in network.named_parameters()]
    for name, role in moving.items():
        loss = (role.velocity(x_t_BCFHW, sigma_B, text) - target).pow(2).mean()
        if not loss.requires_grad:
            raise SelfTestError(f"a {name} update misses all of its parameters: they are frozen")
        loss.backward()
        # A head on the role's features moves with it, but no velocity reaches it.
        own_ids = {id(parameter) for _, parameter in roles.parameters[name]}
        for parameter_name, parameter in everything:
            gradient, parameter.grad = parameter.grad, None
            if (gradient is not None) != (id(parameter) in own_ids):
                raise SelfTestError(f"a {name} update {'misses' if gradient is None else 'reaches'} {parameter_name}")
            starts_at_zero = "lora_B" in parameter_name or (parameter_name.startswith(CHILD) and not parameter.any())
            zero_initialised = starts_at_zero and fresh
            if gradient is not None and zero_initialised and not bool(gradient.any()):
                raise SelfTestError(f"{parameter_name} of the {name} would never move: its gradient is exactly zero")
    lines.append("self-test: gradients reach exactly the moving role")
    return lines
