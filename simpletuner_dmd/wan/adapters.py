"""LoRA adapters on a shared Wan base, and the switch that says which of them a forward sees.

PEFT's own `set_adapter` toggles requires_grad, which silently leaves gradients None when the role changes between a
forward and its backward; and standard gradient checkpointing recomputes under whatever adapter is active by then,
which silently gives gradients that are wrong by more than their own size. So requires_grad is set once, switching is a
flag on the adapter layers, and checkpointing goes through `BlockRunner`, which restores the state of the forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from simpletuner_dmd.randomness import derive_seed

# Attention and feed-forward projections; embedders, modulation and the head stay as they are.
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

CONDITIONING_TARGETS = (
    "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2", "proj_out",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterSpec:
    """One LoRA: its rank, alpha (scale = alpha / rank), initialisation and targets (None: DEFAULT_TARGETS).

    dora: also trains the norm of each row of the adapted weights (Liu et al. 2024, "DoRA").
    """

    rank: int
    alpha: float
    init: str | bool = True
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    dora: bool = False


AdapterState = tuple[str | None, float]


class AdapterSwitch:
    """Adds adapters to one transformer and selects which acts. State: (adapter name or None, scale)."""

    def __init__(self, transformer: nn.Module, specs: dict[str, AdapterSpec], seed: int) -> None:
        self.transformer = transformer
        transformer.requires_grad_(False)
        self.state: AdapterState = (None, 1.0)
        self._attach(specs, seed)
        self._apply(self.state)

    def _attach(self, specs: dict[str, AdapterSpec], seed: int) -> None:
        """Adds the adapters, in fp32 and with gradients, none of them selected yet."""
        transformer = self.transformer
        device = transformer.get_parameter("patch_embedding.weight").device  # a swapped block's weights are elsewhere
        network: Any = transformer  # a stock WanTransformer3DModel
        for name, spec in specs.items():
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
                torch.manual_seed(derive_seed(seed, "adapter", name))
                network.add_adapter(_lora_config(spec), adapter_name=name)
        self.layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        for parameter_name, parameter in transformer.named_parameters():
            adapter = adapter_of(parameter_name, specs)
            parameter.requires_grad_(adapter is not None)
            if adapter is not None:
                parameter.data = parameter.data.to(device, torch.float32)  # what trains is kept in fp32

    def _apply(self, state: AdapterState) -> None:
        name, scale = state
        for layer in self.layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
                layer.set_scale(name, scale)
        self.state = state

    @contextmanager
    def use(self, name: str | None, scale: float = 1.0) -> Iterator[None]:
        """Selects an adapter (None: the bare base) for the forwards inside, and restores the former one."""
        before, wanted = self.state, (name, scale)
        if before == wanted:
            yield
            return
        self._apply(wanted)
        try:
            yield
        finally:
            self._apply(before)

    def named_parameters(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        """The adapter's parameters under names without the adapter: "blocks.0.attn1.to_q.lora_A.weight"."""
        return [
            (name.replace(f".{adapter}.", "."), parameter)
            for name, parameter in self.transformer.named_parameters()
            if adapter_of(name, [adapter]) is not None
        ]


def adapter_of(parameter_name: str, adapters: Sequence[str] | dict[str, Any]) -> str | None:
    """Which adapter a parameter belongs to; None for the base."""
    if "lora_" not in parameter_name:
        return None
    return next((adapter for adapter in adapters if f".{adapter}." in parameter_name), None)


def _lora_config(spec: AdapterSpec) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        init_lora_weights=spec.init,
        use_dora=spec.dora,
        target_modules=list(spec.targets or DEFAULT_TARGETS),
    )
