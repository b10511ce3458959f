"""Quantises frozen weights with optimum-quanto, under the names users know."""

from __future__ import annotations

import torch
from torch import nn

from simpletuner_dmd.config.errors import UserError

# Only the linear layers of the blocks: embedders, modulation, norms and the head are small and sensitive.
BLOCK_LISTS = ("blocks", "encoder")


def quantise(model: nn.Module, precision: str, via: torch.device | None = None) -> int:
    """Quantises the linear layers of the model's blocks in place; returns how many. "no_change" does nothing.

    precision: int8-quanto | int4-quanto | fp8-quanto | no_change. via: the device on which the work is done.
    Raises UserError where int4 cannot be unpacked on a machine without CUDA.
    """
    if precision == "no_change":
        return 0
    from optimum.quanto import QModuleMixin, freeze, qfloat8, qint4, qint8, quantize

    weights = {"int8-quanto": qint8, "int4-quanto": qint4, "fp8-quanto": qfloat8}[precision]
    if via is not None:
        model.to(via)
    blocks = next(getattr(model, name) for name in BLOCK_LISTS if hasattr(model, name))
    quantize(blocks, weights=weights)
    freeze(blocks)
    count = sum(isinstance(module, QModuleMixin) for module in blocks.modules())
    assert count > 0, f"nothing was quantised to {precision}"
    if precision == "int4-quanto" and not torch.cuda.is_available():
        _check_unpacking(blocks)
    return count


def _check_unpacking(blocks: nn.Module) -> None:
    """quanto unpacks int4 on the CPU with a kernel that it compiles on first use: better now than in the first step."""
    from optimum.quanto import QModuleMixin

    module = next(module for module in blocks.modules() if isinstance(module, QModuleMixin))
    try:
        module.weight.dequantize()
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"int4-quanto cannot run on this CPU: its kernel could not be compiled ({str(error).splitlines()[0]})",
            key="base_model_precision",
            fix="install a C++ compiler and `pip install ninja`, or choose int8-quanto",
        ) from error
