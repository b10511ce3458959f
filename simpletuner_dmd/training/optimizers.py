"""The optimizers a person can name, and the libraries behind the names."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.adamw_bf16 import AdamWBF16
from simpletuner_dmd.training.muon import MuonWithAdamW, is_hidden_matrix

log = logging.getLogger(__name__)

NamedParameters = Sequence[tuple[str, Parameter]]
HALF_PRECISION = (torch.bfloat16, torch.float16)

# Above this, bf16 state times beta2 rounds back to itself (half a spacing is 0.2-0.4%), see adamw_bf16.py.
LARGEST_SAFE_BF16_BETA2 = 0.995

# Beginning of a name -> (module, what to install) where that is not one of the packages that are always there.
LIBRARIES = {
    "optimi-": ("optimi", "torch-optimi"),
    "bnb-": ("bitsandbytes", "bitsandbytes"),
    "ao-": ("torchao", "torchao"),
    "prodigy": ("prodigyopt", "prodigyopt"),
}
COMPILERS = ("c++", "g++", "clang++", "cl")


def check_runs_here(name: str, device: torch.device) -> None:
    """Raises UserError where the optimizer `name` cannot run on this machine, with the reason and what to use.

    Imports none of the libraries: for answers before anything is loaded.
    """
    if name not in BUILDERS:
        raise _unknown(name)
    for beginning, (module, package) in LIBRARIES.items():
        if name.startswith(beginning) and importlib.util.find_spec(module) is None:
            raise _error(
                f"{name} needs {package}, which is not installed here",
                f'pip install {package}, or use "adamw_bf16", which needs nothing',
            )
    if not name.startswith("ao-"):
        return
    # torchao compiles its update at the first step.
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise _error(f"{name} compiles its update with triton, which is not installed here",
                     'pip install triton, or use "bnb-adamw8bit"')  # fmt: skip
    if device.type == "cpu" and not any(shutil.which(command) for command in (os.environ.get("CXX", ""), *COMPILERS)):
        raise _error(f"{name} compiles its update, and this machine has no C++ compiler",
                     'install one (on Debian: apt install g++), or use "bnb-adamw8bit"')  # fmt: skip


def build_optimizer(
    name: str,
    named_params: NamedParameters,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    settings: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The optimizer called `name` over one role's parameters, in the order of their names.

    That order makes the saved state independent of how the model was put together. lion has no eps, adafactor neither
    betas nor eps. adan has three betas; with two they are its first and last (gradient average and second moment), its
    middle one is 0.92. settings: arguments of the library (config.optimizer_options.SETTINGS).
    Raises UserError for a name or a dtype that cannot work, with what to use instead.
    """
    pairs = sorted(named_params, key=lambda item: item[0])
    assert pairs, "an optimizer needs parameters"
    params = [parameter for _, parameter in pairs]
    assert len({id(parameter) for parameter in params}) == len(params), "a parameter appears twice"
    check_runs_here(name, params[0].device)
    if name not in FOR_HALF_PRECISION and (low := _dtypes(params) & set(HALF_PRECISION)):
        raise _error(
            f"{name} on {_names(low)} weights would leave most of them where they are: "
            "93% never move at learning rate 1e-5",
            'use "adamw_bf16", which keeps the bits that the rounding drops',
        )
    options = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "eps": eps, **(settings or {})}
    return BUILDERS[name](pairs, **options)


def _adamw_bf16(pairs: NamedParameters, **options: Any) -> Optimizer:
    params = _parameters(pairs)
    # fp32 weights need no care: at lr 1e-6 they resolve steps 10,000 times finer than bf16, and torch's is fused.
    if _dtypes(params) == {torch.float32}:
        return _torch_adamw(pairs, **options)
    if unfit := _dtypes(params) - {torch.bfloat16, torch.float32}:
        raise _error(f"adamw_bf16 trains bf16 and fp32 weights, not {_names(unfit)}", "train in bf16 (mixed_precision)")
    return AdamWBF16(params, **options)


def _torch_adamw(pairs: NamedParameters, **options: Any) -> Optimizer:
    params = _parameters(pairs)
    # One kernel for all parameters where torch has it; elsewhere torch picks its own best (foreach or a loop).
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in params)
    return torch.optim.AdamW(params, fused=True if fused else None, **options)


def _torch_muon(pairs: NamedParameters, **options: Any) -> Optimizer:
    matrices = [parameter for name, parameter in pairs if is_hidden_matrix(name, parameter)]
    others = [parameter for name, parameter in pairs if not is_hidden_matrix(name, parameter)]
    if not matrices:
        raise _error("torch-muon moves matrices inside the blocks, and nothing that trains here is one",
                     'use "adamw_bf16", or an adapter made of matrices (LoRA, LoHa, LoKr)')  # fmt: skip
    return MuonWithAdamW(matrices, others, **options)


def _optimi(class_name: str) -> Callable[..., Optimizer]:
    """A torch-optimi optimizer; its Kahan summation switches itself on for bf16 and fp16 weights."""

    def build(pairs: NamedParameters, *, betas: tuple[float, ...], eps: float, **options: Any) -> Optimizer:
        import optimi

        params = _parameters(pairs)
        if class_name == "Adan" and len(betas) == 2:
            betas = (betas[0], 0.92, betas[1])
        if class_name != "Lion":
            options["eps"] = eps
        # Lion's only state is a sign average; the others divide by a second moment that bf16 cannot let fall.
        if class_name != "Lion" and betas[-1] > LARGEST_SAFE_BF16_BETA2 and _dtypes(params) & set(HALF_PRECISION):
            log.warning(
                "optimi keeps its second moment in the dtype of the weights, where a beta2 of %g cannot let it fall: "
                "the steps stay small after gradients shrink. Use adamw_bf16, or a beta2 of 0.99.",
                betas[-1],
            )
        return getattr(optimi, class_name)(params, betas=betas, kahan_sum=None, **options)

    return build


def _bitsandbytes(class_name: str) -> Callable[..., Optimizer]:
    """A bitsandbytes optimizer. Paged state leaves the GPU when memory is short; on the CPU there is nothing to page,
    and after a resume the state that was loaded stays where it is."""

    def build(pairs: NamedParameters, *, eps: float, **options: Any) -> Optimizer:
        import bitsandbytes

        params = _parameters(pairs)
        paged = class_name.startswith("Paged") and params[0].device.type == "cuda"
        name = class_name if paged else class_name.removeprefix("Paged")
        if "Lion" not in class_name:
            options["eps"] = eps
        return getattr(bitsandbytes.optim, name)(params, **options)

    return build


def _torchao(class_name: str) -> Callable[..., Optimizer]:
    """A torchao optimizer, whose saved state is plain tensors: a checkpoint holds no library's own kind."""

    def build(pairs: NamedParameters, **options: Any) -> Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that other parts of the library would have
            import torchao.optim

        optimizer: Optimizer = getattr(torchao.optim, class_name)(_parameters(pairs), **options)
        optimizer.register_state_dict_post_hook(_taken_apart)
        optimizer.register_load_state_dict_pre_hook(_put_together)
        return optimizer

    return build


QUANTISED = "quantised"


def _taken_apart(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torchao's state with each quantised tensor as a dictionary of plain ones."""

    def plain(value: Any) -> Any:
        if not hasattr(value, "tensor_attrs"):
            return value
        parts = {name: getattr(value, name) for name in value.tensor_attrs}
        return {QUANTISED: type(value).__name__, "signed": value.signed, "shape": list(value.shape), **parts}

    state = {
        number: {key: plain(value) for key, value in entry.items()} for number, entry in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _put_together(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_taken_apart`; the tensors are copies."""
    from torchao.optim import subclass_4bit, subclass_8bit

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def whole(value: Any, parameter: Parameter) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        if not isinstance(value, dict):
            return value
        parts = [value[name].clone().to(parameter.device) for name in ("codes", "scale", "qmap")]
        if value[QUANTISED] == "OptimState4bit":
            shape = torch.Size(value["shape"])
            return subclass_4bit.OptimState4bit(*parts, value["signed"], shape, dtype=parameter.dtype)
        return subclass_8bit.OptimState8bit(*parts, value["signed"], dtype=parameter.dtype)

    state = {
        number: {key: whole(value, parameters[number]) for key, value in entry.items()}
        for number, entry in state_dict["state"].items()
    }
    return state_dict | {"state": state}


def _prodigy(pairs: NamedParameters, **options: Any) -> Optimizer:
    from prodigyopt import Prodigy

    with redirect_stdout(None):  # it prints which kind of weight decay it takes
        return Prodigy(_parameters(pairs), **options)


def _adafactor(pairs: NamedParameters, *, betas: Any, eps: float, **options: Any) -> Optimizer:
    """At the learning rate given: by itself it scales the rate by each weight's size, which is 0 for a new LoRA."""
    from transformers.optimization import Adafactor

    return Adafactor(
        _parameters(pairs), relative_step=False, warmup_init=False, **{"scale_parameter": False, **options}
    )


BUILDERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_bf16": _adamw_bf16,
    "torch-adamw": _torch_adamw,
    "torch-muon": _torch_muon,
    "optimi-adamw": _optimi("AdamW"),
    "optimi-lion": _optimi("Lion"),
    "optimi-stableadamw": _optimi("StableAdamW"),
    "optimi-adan": _optimi("Adan"),
    "optimi-ranger": _optimi("Ranger"),
    "bnb-adamw": _bitsandbytes("AdamW"),
    "bnb-adamw8bit": _bitsandbytes("AdamW8bit"),
    "bnb-adamw-paged": _bitsandbytes("PagedAdamW"),
    "bnb-adamw8bit-paged": _bitsandbytes("PagedAdamW8bit"),
    "bnb-lion": _bitsandbytes("Lion"),
    "bnb-lion8bit": _bitsandbytes("Lion8bit"),
    "bnb-lion-paged": _bitsandbytes("PagedLion"),
    "bnb-lion8bit-paged": _bitsandbytes("PagedLion8bit"),
    "ao-adamw8bit": _torchao("AdamW8bit"),
    "ao-adamw4bit": _torchao("AdamW4bit"),
    "prodigy": _prodigy,
    "adafactor": _adafactor,
}
OPTIMIZERS = tuple(BUILDERS)
# What keeps the small steps that rounding would drop; the others are for fp32 weights.
FOR_HALF_PRECISION = tuple(name for name in OPTIMIZERS if name == "adamw_bf16" or name.startswith("optimi-"))


def _parameters(pairs: NamedParameters) -> list[Parameter]:
    return [parameter for _, parameter in pairs]


def _dtypes(params: Sequence[Parameter]) -> set[torch.dtype]:
    return {parameter.dtype for parameter in params}


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _unknown(name: str) -> UserError:
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.75)
    message = f'no optimizer is called "{name}"' + (f'; did you mean "{close[0]}"?' if close else "")
    return _error(message, f'use "adamw_bf16", or one of {", ".join(OPTIMIZERS)}')


def _error(message: str, fix: str) -> UserError:
    return UserError(message, key="optimizer", fix=fix)
