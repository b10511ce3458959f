"""LyCORIS networks on a shared Wan base: one per role, selected by the same switch as LoRAs.

`LycorisNetwork.apply_to` puts its own function in the place of each layer's `forward`, and two networks on one layer
then form a chain that depends on the order of their making. Here no layer is changed: lycoris makes the modules, and a
forward hook, torch's own door, adds to a layer's output what the selected role's module makes of the layer's input.
With no role selected the hook returns nothing and the output is the layer's own, bit for bit. What acts is read from
the switch at the moment of the forward, so a recompute under `BlockRunner` sees the state of its forward.

The change is computed in fp32 from the factors. Two ways, both equal to the merged weight (W + scale dW) that a file
becomes: LoRA, LoHa and LoKr apply their factors to the input; the others, whose dW depends on W or is W's own size,
form dW. lycoris' own short cut for rotations would turn the bias as well, which its merged weight does not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.lycoris import KEY, ROTATIONS, WEIGHT_ALGOS, LycorisModuleOptions, LycorisOptions
from simpletuner_dmd.randomness import derive_seed
from simpletuner_dmd.wan.adapters import AdapterSpec, AdapterSwitch
from simpletuner_dmd.wan.quantisation import dense_weight

CHILD = "lycoris_"
"""Before the role in the name of a network's place in the transformer: "lycoris_student"."""

# Names of a module's parameters -> names in lycoris' files, where they differ (`full` calls its difference a weight).
_FILE_NAMES = {"full": {"weight": "diff", "bias": "diff_b"}}


@dataclass(frozen=True)
class LycorisSpec:
    """One role's network. init_norm: LoKr starts as noise of this share of each layer's weight norm instead of 0."""

    options: LycorisOptions
    init_norm: float | None = None


def with_layers(options: LycorisOptions, names: Sequence[str]) -> LycorisOptions:
    """The options with these layers as targets too, apart from those that the preset excludes.

    As they are where one algorithm is a rotation: its block size was chosen for the layers of the preset, and need not
    divide others.
    """
    if options.algos & set(ROTATIONS):
        return options
    preset = options.apply_preset
    # A plain name is a shell pattern as it is. As a regular expression, its end is what keeps longer names out.
    patterns = list(names) if preset.use_fnmatch else [re.escape(name) + "$" for name in names]
    extended = preset.model_copy(update={"target_name": [*preset.target_name, *patterns]})
    return options.model_copy(update={"apply_preset": extended})


PICTURE_LAYERS = ("add_k_proj", "add_v_proj", "image_embedder")
"""Layers of a host that only ever see a picture's embedding, which no run here gives them."""


class FloatWeight:
    """Stands for a layer where lycoris asks for its weight: the weight of now, in fp32 like the factors it meets."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.detach().float()


class LycorisSwitch(AdapterSwitch):
    """Adds a LyCORIS network per role to one transformer and selects which acts. See AdapterSwitch."""

    def _attach(self, specs: Mapping[str, Any], seed: int) -> None:
        self.modules: dict[str, dict[str, Any]] = {}
        hooked: dict[nn.Module, dict[str, Any]] = {}
        device = self.transformer.get_parameter("patch_embedding.weight").device
        for role, spec in specs.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "adapter", role))
                self.modules[role] = made = _make_modules(self.transformer, spec)
            for module in made.values():
                module.to(device, torch.float32).requires_grad_(True)  # what trains is kept in fp32
                hooked.setdefault(module.org_module[0], {})[role] = module
                if _algo(module) in WEIGHT_ALGOS:
                    module.org_module = [FloatWeight(module.org_module[0])]
            # A child, as a LoRA's factors are: `train`, `to` and `named_parameters` of the transformer reach it.
            self.transformer.add_module(CHILD + role, nn.ModuleDict(made))
        for layer, by_role in hooked.items():
            layer.register_forward_hook(self._hook(by_role))
        self.strengths = {role: spec.options.multiplier for role, spec in specs.items()}

    def _hook(self, by_role: Mapping[str, Any]) -> Any:
        def add_change(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            role, scale = self.state
            if role is None or role not in by_role:
                return None
            change = _change(by_role[role], arguments[0].float(), scale * self.strengths[role])
            return (output + change).to(output.dtype)

        return add_change

    def _apply(self, state: tuple[str | None, float]) -> None:
        self.state = state

    def named_parameters(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        """The network's parameters under the names of lycoris' files: "lycoris_blocks_0_attn1_to_q.lokr_w1"."""
        return [
            (f"{name}.{_FILE_NAMES.get(_algo(module), {}).get(inner, inner)}", parameter)
            for name, module in self.modules[adapter].items()
            for inner, parameter in module.named_parameters()
        ]

    def constants(self, adapter: str) -> dict[str, float]:
        """Module name -> the alpha that it was made with (rotations: their constraint)."""
        return {
            name: float(module.alpha)
            for name, module in self.modules[adapter].items()
            if getattr(module, "alpha", None) is not None
        }


def make_switch(transformer: nn.Module, specs: Mapping[str, AdapterSpec | LycorisSpec], seed: int) -> AdapterSwitch:
    """The switch for these adapters; all of one kind."""
    kinds = {type(spec) for spec in specs.values()}
    assert len(kinds) <= 1, "a LoRA and a LyCORIS network on one transformer"
    if LycorisSpec in kinds:
        return LycorisSwitch(transformer, cast(Any, specs), seed)
    return AdapterSwitch(transformer, cast(dict[str, AdapterSpec], specs), seed)


def _change(module: Any, x: Tensor, scale: float) -> Tensor:
    """What the module adds to the layer's output at this scale; x in fp32."""
    if _algo(module) not in WEIGHT_ALGOS:
        return module.bypass_forward_diff(x, scale=scale)
    if _algo(module) == "full":
        return scale * functional.linear(x, module.weight, module.bias)
    difference, _ = module.get_diff_weight(scale)
    return functional.linear(x, difference)


def _algo(module: Any) -> str:
    """The algorithm's name in a configuration."""
    return {
        "LoConModule": "locon",
        "LohaModule": "loha",
        "LokrModule": "lokr",
        "FullModule": "full",
        "DiagOFTModule": "diag-oft",
        "ButterflyOFTModule": "boft",
        "GLoRAModule": "glora",
    }[type(module).__name__]


# --- making the modules -----------------------------------------------------------------------------------------------


def _make_modules(transformer: nn.Module, spec: LycorisSpec) -> dict[str, Any]:
    """lycoris' own modules by lycoris' own names; the layers of `transformer` are left as they are."""
    import lycoris

    options = spec.options
    with _preset(options):
        try:
            network = lycoris.create_lycoris(
                transformer,
                1.0,
                linear_dim=options.linear_dim,
                linear_alpha=options.linear_alpha,
                algo=options.algo,
                factor=options.factor,
                full_matrix=options.full_matrix,
                decompose_both=options.decompose_both,
                constraint=options.constraint,
                warn_on_unmatched=False,
            )
        except (ValueError, AssertionError, ZeroDivisionError) as error:
            raise UserError(
                f"lycoris cannot make {' and '.join(sorted(options.algos))} for the layers of this model: {error}",
                key=f"{KEY}.algo",
                fix='choose another linear_dim, boft for attention alone ("apply_preset": {"target_module": '
                '["WanAttention"]}), or "algo": "lokr"',
            ) from error
    modules = {
        module.lora_name: module
        for module in network.loras
        if not any(part in module.lora_name for part in PICTURE_LAYERS)
    }
    if not modules:
        raise UserError(
            f"no layer of the transformer is named: target_module {options.apply_preset.target_module}, "
            f"target_name {options.apply_preset.target_name}",
            key=f"{KEY}.apply_preset",
            fix=f"classes of this model are {', '.join(_classes(transformer))}",
        )
    for module in modules.values():
        if hasattr(module, "_org_weight"):
            # `full` keeps a copy of every weight, and counts its own from there once it is applied, which it never is.
            module._org_weight, module.org_bias = [torch.zeros(())], [torch.zeros(())]
    if spec.init_norm is not None:
        _perturb(modules, spec.init_norm)
    return modules


def _classes(transformer: nn.Module) -> list[str]:
    """Classes of modules that hold linear layers."""
    return sorted(
        {
            type(module).__name__
            for module in transformer.modules()
            if module is not transformer and any(isinstance(inner, nn.Linear) for inner in module.modules())
        }
    )


@contextmanager
def _preset(options: LycorisOptions) -> Iterator[None]:
    """The preset in force, all of it: lycoris keeps it on its class, and keys not given would keep their last value."""
    from lycoris import LycorisNetwork

    former = {name: getattr(LycorisNetwork, name) for name in vars(LycorisNetwork) if re.fullmatch("[A-Z_]+", name)}
    logger = logging.getLogger("LyCORIS")
    level, preset = logger.level, options.apply_preset
    LycorisNetwork.apply_preset(
        {
            "enable_conv": False,
            "target_module": preset.target_module,
            "target_name": preset.target_name,
            "exclude_name": preset.exclude_name,
            "use_fnmatch": preset.use_fnmatch,
            "module_algo_map": {name: _override(inner) for name, inner in preset.module_algo_map.items()},
            "name_algo_map": {name: _override(inner) for name, inner in preset.name_algo_map.items()},
            "lora_prefix": "lycoris",
        }
    )
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in former.items():
            setattr(LycorisNetwork, name, value)


def _override(options: LycorisModuleOptions) -> dict[str, Any]:
    given = options.model_dump(exclude_none=True)
    names = {"linear_dim": "dim", "linear_alpha": "alpha"}
    return {names.get(name, name): value for name, value in given.items()}


@torch.no_grad()
def _perturb(modules: Mapping[str, Any], share: float) -> None:
    """LoKr with w1 = 1 and w2 normal, so that |dW| = share x |W| in every layer."""
    for name, module in modules.items():
        if _algo(module) != "lokr" or not (module.use_w1 and module.use_w2):
            raise UserError(
                f"a norm to start from needs LoKr with whole factors, but {name} has decomposed ones or is no LoKr",
                key="init_lokr_norm",
                fix='set "full_matrix": true in lycoris_config, or leave init_lokr_norm out',
            )
        size = dense_weight(module.org_module[0]).float().norm()
        module.lokr_w1.fill_(1.0)
        noise = torch.randn(module.lokr_w2.shape)
        module.lokr_w2.copy_(noise * (share * size.cpu() / (noise.norm() * module.lokr_w1.norm().cpu())))
