"""Where a run starts from when it is not the bare base: `init_lora` for the student, `teacher_lora` for the base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner_dmd.config import UserError
from simpletuner_dmd.config.starting import split_strength
from simpletuner_dmd.durable import sha256_of
from simpletuner_dmd.publish.info import TeacherLora
from simpletuner_dmd.publish.lycoris import ALPHA, by_module, scaled, strength
from simpletuner_dmd.publish.read_adapter import AdapterFile, LayerChanges, find_adapter, read_adapter
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.lycoris import LycorisSpec, LycorisSwitch
from simpletuner_dmd.wan.roles import Roles


def start_student(roles: Roles, path: Path) -> list[str]:
    """The student's adapter takes over the values of `init_lora`; returns lines worth printing.

    Raises UserError where the file is of another kind, of another rank, or names layers that have no adapter here.
    """
    adapter = read_adapter(find_adapter(path, "init_lora"), "init_lora")
    spec = roles.adapters["student"]
    given = _lycoris_values(roles, adapter, spec) if isinstance(spec, LycorisSpec) else _lora_values(adapter, spec)
    own = roles.tensors("student")
    _check(given, own, adapter)
    roles.load_tensors("student", {**own, **{name: tensor.to(own[name].device) for name, tensor in given.items()}})
    rest = f"; {len(own) - len(given)} of its {len(own)} tensors are not in it" if len(given) < len(own) else ""
    return [f"the student starts from {adapter.path}{rest}"]


def _lora_values(adapter: AdapterFile, spec: AdapterSpec) -> dict[str, Tensor]:
    """The file's factors, with the run's own alpha / rank taken out of B again."""
    if adapter.kind != "lora":
        raise _unfit(adapter, "it is a LyCORIS file, and lora_type is standard", 'set "lora_type": "lycoris"')
    factor = spec.rank / spec.alpha
    return {name: tensor * factor if ".lora_B." in name else tensor for name, tensor in adapter.tensors.items()}


def _lycoris_values(roles: Roles, adapter: AdapterFile, spec: LycorisSpec) -> dict[str, Tensor]:
    if adapter.kind != "lycoris":
        raise _unfit(adapter, "it is a LoRA, and lora_type is lycoris", 'set "lora_type": "standard"')
    switch = roles.student.switch
    assert isinstance(switch, LycorisSwitch)
    alphas = switch.constants("student")
    given: dict[str, Tensor] = {}
    for name, module in by_module(adapter.tensors).items():
        trained = {inner: tensor for inner, tensor in module.items() if inner != ALPHA}
        own = strength(trained, alphas.get(name)) * spec.options.multiplier
        given |= {f"{name}.{inner}": tensor for inner, tensor in scaled(trained, 1 / own).items()}
    return given


def _check(given: dict[str, Tensor], own: dict[str, Tensor], adapter: AdapterFile) -> None:
    for name, tensor in given.items():
        if name not in own:
            raise _unfit(adapter, f"it holds {name}, which the student's adapter does not have",
                         "choose the algorithm and the target layers that the file was trained with")  # fmt: skip
        if tensor.shape != own[name].shape:
            raise _unfit(adapter, f"{name} is {tuple(tensor.shape)} in it, and {tuple(own[name].shape)} in this run",
                         "set the rank that the file was trained with (lora_rank, or linear_dim and factor in "
                         "lycoris_config)")  # fmt: skip


def _unfit(adapter: AdapterFile, reason: str, fix: str) -> UserError:
    return UserError(f"the student cannot start from {adapter.path}: {reason}", key="init_lora", fix=fix)


class AdapterMerge:
    """An adapter that becomes part of a network while it is loaded: W <- W + strength dW, summed in fp32 and stored in
    W's own precision."""

    def __init__(self, path: Path, strength: float, key: str) -> None:
        """path: a file, or a folder with one. key: the option that named it. Raises UserError."""
        self.strength, self.key = strength, key
        self.adapter = read_adapter(find_adapter(path, key), key)

    @property
    def fingerprint(self) -> str:
        return f"{sha256_of(self.adapter.path)}:{self.strength}"

    def start(self, model: nn.Module) -> None:
        """Raises UserError for layers that are not there; no weight needs to be there yet."""
        self._changes = LayerChanges(self.adapter, model)

    @torch.no_grad()
    def __call__(self, name: str, layer: nn.Linear) -> None:
        if name not in self._changes:
            return
        weight_change, bias_change = self._changes.of(name)
        if layer.weight.shape != weight_change.shape:
            raise UserError(
                f"{self.adapter.path} does not fit this model: it changes {name} by {tuple(weight_change.shape)}",
                key=self.key,
                fix="name an adapter that was trained on this size of Wan",
            )
        layer.weight.copy_(layer.weight.float() + self.strength * weight_change.to(layer.weight.device))
        if bias_change is not None:
            layer.bias.copy_(layer.bias.float() + self.strength * bias_change.to(layer.bias.device))


class TeacherMerge(AdapterMerge):
    """The fine-tune that becomes part of the base."""

    def __init__(self, written: str) -> None:
        """written: "path:0.8". Raises UserError."""
        path, strength = split_strength(written)
        super().__init__(Path(path), strength, "teacher_lora")

    def record(self) -> TeacherLora:
        """What an export says about it."""
        return TeacherLora(self.adapter.path.name, self.strength, sha256_of(self.adapter.path))
