"""The optimizers a person can name, and the libraries behind the names."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.training.adamw_bf16 import AdamWBF16

log = logging.getLogger(__name__)

NamedParameters = Sequence[tuple[str, Parameter]]
HALF_PRECISION = (torch.bfloat16, torch.float16)

# Above this, bf16 state times beta2 rounds back to itself (half a spacing is 0.2-0.4%), see adamw_bf16.py.
LARGEST_SAFE_BF16_BETA2 = 0.995


def build_optimizer(
    name: str,
    named_params: NamedParameters,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
) -> Optimizer:
    """The optimizer called `name` over one role's parameters, in the order of their names.

    That order makes the saved state independent of how the model was put together. lion has no eps. adan has three
    betas; with two they are its first and last (gradient average and second moment), its middle one is 0.92.
    Raises UserError for a name or a dtype that cannot work, with what to use instead.
    """
    if name not in BUILDERS:
        raise _unknown(name)
    params = [parameter for _, parameter in sorted(named_params, key=lambda item: item[0])]
    assert params, "an optimizer needs parameters"
    assert len({id(parameter) for parameter in params}) == len(params), "a parameter appears twice"
    return BUILDERS[name](params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps)


def _adamw_bf16(params: list[Parameter], **options: Any) -> Optimizer:
    # fp32 weights need no care: at lr 1e-6 they resolve steps 10,000 times finer than bf16, and torch's is fused.
    if _dtypes(params) == {torch.float32}:
        return _torch_adamw(params, **options)
    if unfit := _dtypes(params) - {torch.bfloat16, torch.float32}:
        raise _error(f"adamw_bf16 trains bf16 and fp32 weights, not {_names(unfit)}", "train in bf16 (mixed_precision)")
    return AdamWBF16(params, **options)


def _torch_adamw(params: list[Parameter], **options: Any) -> Optimizer:
    if low := _dtypes(params) & set(HALF_PRECISION):
        raise _error(
            f"torch-adamw on {_names(low)} weights would leave most of them where they are: "
            "93% never move at learning rate 1e-5",
            'use "adamw_bf16", which keeps the bits that the rounding drops',
        )
    # One kernel for all parameters where torch has it; elsewhere torch picks its own best (foreach or a loop).
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in params)
    return torch.optim.AdamW(params, fused=True if fused else None, **options)


def _optimi(class_name: str) -> Callable[..., Optimizer]:
    """A torch-optimi optimizer; its Kahan summation switches itself on for bf16 and fp16 weights."""

    def build(params: list[Parameter], *, betas: tuple[float, ...], eps: float, **options: Any) -> Optimizer:
        try:
            import optimi
        except ImportError as error:
            raise _error(
                "the optimi optimizers need torch-optimi, which is not installed here",
                'pip install torch-optimi, or use "adamw_bf16", which needs nothing',
            ) from error
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


BUILDERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_bf16": _adamw_bf16,
    "torch-adamw": _torch_adamw,
    "optimi-adamw": _optimi("AdamW"),
    "optimi-lion": _optimi("Lion"),
    "optimi-stableadamw": _optimi("StableAdamW"),
    "optimi-adan": _optimi("Adan"),
    "optimi-ranger": _optimi("Ranger"),
}
OPTIMIZERS = tuple(BUILDERS)


def _dtypes(params: Sequence[Parameter]) -> set[torch.dtype]:
    return {parameter.dtype for parameter in params}


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _unknown(name: str) -> UserError:
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.75)
    message = f'no optimizer "{name}" can run here' + (f'; did you mean "{close[0]}"?' if close else "")
    return _error(message, f'use "adamw_bf16", or one of {", ".join(OPTIMIZERS)}')


def _error(message: str, fix: str) -> UserError:
    return UserError(message, key="optimizer", fix=fix)
