"""What a quantised linear layer is in each library: how it is made, what of it is saved, how it comes back.

A scheme takes one `nn.Linear` and gives the library's own layer in its place. The dense weight is read once and may be
dropped afterwards; the activations stay in the precision of the run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from simpletuner_dmd.config.errors import Problem

Saved = tuple[dict[str, Tensor], str]
"""A layer's tensors by their names inside it, and what else is needed to put it together again."""


class Scheme(ABC):
    """One way to store the weight of a linear layer. library: what `pip` calls it; module: what Python calls it."""

    library: str
    module: str

    @property
    def version(self) -> str:
        return f"{self.library} {importlib.metadata.version(self.library)}"

    @property
    def in_use(self) -> bool:
        """Whether this process may have such layers: their library is imported."""
        return self.module in sys.modules

    @abstractmethod
    def quantise(self, layer: nn.Linear) -> nn.Module:
        """The layer in this scheme, on the device of its weight. `layer` must not be used afterwards."""

    @abstractmethod
    def restore(self, layer: nn.Linear, tensors: dict[str, Tensor], notes: str) -> nn.Module:
        """The layer that `save` was given, from a `layer` of the same shape and precision without storage (meta)."""

    @abstractmethod
    def owns(self, module: nn.Module) -> bool:
        """Whether this is a layer in this scheme."""

    def save(self, module: nn.Module) -> Saved:
        """Tensors are those of the layer's own state_dict, unless a library has another form for files."""
        return {name: tensor.detach() for name, tensor in module.state_dict().items()}, ""

    def dense(self, module: nn.Module) -> Tensor:
        """The weight that the layer stands for, in its precision."""
        return module.weight.dequantize()  # type: ignore[operator]


class Quanto(Scheme):
    """optimum-quanto: int8 and fp8 per row; int4 and int2 in groups of up to 128 with a shift."""

    library, module = "optimum-quanto", "optimum.quanto"

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def qtype(self) -> Any:
        import optimum.quanto

        return getattr(optimum.quanto, self.name)

    def quantise(self, layer: nn.Linear) -> nn.Module:
        from optimum.quanto.nn import quantize_module

        module = quantize_module(layer, weights=self.qtype)
        module.freeze()
        return module.requires_grad_(False)

    def restore(self, layer: nn.Linear, tensors: dict[str, Tensor], notes: str) -> nn.Module:
        from optimum.quanto.nn import QLinear

        module = QLinear.qcreate(layer, self.qtype, device="meta")
        module.load_state_dict(tensors, strict=True, assign=True)
        return module.requires_grad_(False)

    def owns(self, module: nn.Module) -> bool:
        from optimum.quanto.nn import QModuleMixin

        return isinstance(module, QModuleMixin)


class TorchAo(Scheme):
    """torchao: weight-only int8 or float8 (e4m3), per row."""

    library, module = "torchao", "torchao"

    def __init__(self, name: str) -> None:
        self.name = name

    def quantise(self, layer: nn.Linear) -> nn.Module:
        import torchao.quantization

        torchao.quantization.quantize_(layer, getattr(torchao.quantization, self.name)())
        return layer.requires_grad_(False)

    def save(self, module: nn.Module) -> Saved:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        # torchao names a tensor after its module; inside one layer there is none.
        tensors, notes = flatten_tensor_state_dict({f"_.{k}": v for k, v in module.state_dict().items()})
        return {name.removeprefix("_."): tensor for name, tensor in tensors.items()}, json.dumps(notes)

    def restore(self, layer: nn.Linear, tensors: dict[str, Tensor], notes: str) -> nn.Module:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        whole, left = unflatten_tensor_state_dict({f"_.{k}": v for k, v in tensors.items()}, json.loads(notes))
        assert not left, f"torchao left {sorted(left)}"
        for name, tensor in whole.items():
            layer.register_parameter(name.removeprefix("_."), nn.Parameter(tensor, requires_grad=False))
        return layer

    def owns(self, module: nn.Module) -> bool:
        from torchao.utils import TorchAOBaseTensor

        return isinstance(getattr(module, "weight", None), TorchAOBaseTensor)


class Nf4(Scheme):
    """bitsandbytes' 4-bit NormalFloat in blocks of 64, their scales in 8 bits."""

    library, module = "bitsandbytes", "bitsandbytes"

    def _empty(self, layer: nn.Linear) -> Any:
        from bitsandbytes.nn import Linear4bit

        dtype = layer.weight.dtype
        # The storage has the dtype of the dense weight, because models ask a weight's dtype before they cast to it.
        module = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype,
                            quant_type="nf4", quant_storage=dtype, device="meta")  # fmt: skip
        # Else the first forward in eval mode on such a CPU packs the weight for a kernel without a backward, for good.
        module.support_avx512bf16_for_cpu = False
        return module

    def quantise(self, layer: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Params4bit

        module, weight = self._empty(layer), layer.weight.data
        parameter = Params4bit(weight, quant_type="nf4", quant_storage=weight.dtype, module=module)
        module.weight, module.bias = parameter.to(weight.device), layer.bias
        return module.requires_grad_(False)

    def restore(self, layer: nn.Linear, tensors: dict[str, Tensor], notes: str) -> nn.Module:
        from bitsandbytes.nn import Params4bit

        module = self._empty(layer)
        statistics = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
        device = tensors["weight"].device
        module.weight = Params4bit.from_prequantized(tensors["weight"], statistics, device=device, module=module)
        module.bias = None if layer.bias is None else nn.Parameter(tensors["bias"], requires_grad=False)
        return module.requires_grad_(False)

    def owns(self, module: nn.Module) -> bool:
        from bitsandbytes.nn import Linear4bit

        return isinstance(module, Linear4bit)

    def dense(self, module: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = module.weight
        return dequantize_4bit(weight.data, weight.quant_state)


class LlmInt8(Scheme):
    """bitsandbytes' LLM.int8(): rows in int8, and the input as well but for its outliers."""

    library, module = "bitsandbytes", "bitsandbytes"

    def _filled(self, layer: nn.Linear, weight: Any) -> nn.Module:
        from bitsandbytes.nn import Linear8bitLt

        module = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False,
                              threshold=6.0, device="meta")  # fmt: skip
        module.weight, module.bias = weight, layer.bias
        return module.requires_grad_(False)

    def quantise(self, layer: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Int8Params

        weight = layer.weight.data
        return self._filled(layer, Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device))

    def restore(self, layer: nn.Linear, tensors: dict[str, Tensor], notes: str) -> nn.Module:
        from bitsandbytes.nn import Int8Params

        rows, scales = tensors["weight"], tensors["SCB"]
        weight = Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
        if layer.bias is not None:
            layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
        return self._filled(layer, weight)

    def owns(self, module: nn.Module) -> bool:
        from bitsandbytes.nn import Linear8bitLt

        return isinstance(module, Linear8bitLt)

    def dense(self, module: nn.Module) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        linear: Any = module
        scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return int8_vectorwise_dequant(linear.weight.data, scales)


SCHEMES: dict[str, Scheme] = {
    "int8-quanto": Quanto("qint8"),
    "int4-quanto": Quanto("qint4"),
    "int2-quanto": Quanto("qint2"),
    "fp8-quanto": Quanto("qfloat8"),
    "int8-torchao": TorchAo("Int8WeightOnlyConfig"),
    "fp8-torchao": TorchAo("Float8WeightOnlyConfig"),
    "nf4-bnb": Nf4(),
    "int8-bnb": LlmInt8(),
}

EXTRA = {"torchao", "bitsandbytes"}
"""Libraries that are installed by the extra `quantisation`."""


def scheme_problem(precision: str, device: torch.device, key: str) -> Problem | None:
    """Why layers in this precision cannot train here, found by trying one layer; None where they can.

    Takes seconds, no weights, and for int4-quanto on a CPU the minute in which quanto compiles its kernel once.
    """
    if precision == "no_change":
        return None
    scheme = SCHEMES[precision]
    if importlib.util.find_spec(scheme.module) is None:
        return Problem("", key, f"{precision} needs {scheme.library}, which is not installed",
                       'pip install "simpletuner-dmd[quantisation]", or choose int8-quanto'
                       if scheme.library in EXTRA else f"pip install {scheme.library}")  # fmt: skip
    try:
        _try_one_layer(scheme, device)
    except (ImportError, OSError, RuntimeError, NotImplementedError, AttributeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = device.type.upper()
        return Problem("", key, f"{precision} cannot run on this {where}: {scheme.library} says {reason!r}",
                       "install a C++ compiler and `pip install ninja`, or choose int8-quanto"
                       if precision in ("int4-quanto", "int2-quanto") else "choose another one")  # fmt: skip
    return None


@torch.enable_grad()
def _try_one_layer(scheme: Scheme, device: torch.device) -> None:
    """Forward and backward of a small layer. RuntimeError where the result has nothing to do with the dense one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(128, 128).to(device, torch.bfloat16).requires_grad_(False)
        x = torch.randn(2, 128).to(device, torch.bfloat16).requires_grad_(True)
    expected = functional.linear(x.detach(), layer.weight, layer.bias)
    y = scheme.quantise(layer)(x)
    y.float().square().sum().backward()
    if x.grad is None or not bool(x.grad.any()):
        raise RuntimeError("no gradient passes such a layer")
    if not float((y.detach() - expected).float().norm()) < 0.7 * float(expected.float().norm()):
        raise RuntimeError("such a layer computes something else than the dense one")
