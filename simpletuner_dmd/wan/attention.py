"""Attention kernels through diffusers' dispatcher, under the names users know.

A kernel with a backward pass is set on the transformer once. SageAttention has none: it is the active kernel of single
passes, those of training in which no gradient flows (the teacher, the critic in the student's turn, the rollout's
steps before its last). Videos are rendered with PyTorch's own, which is what a stock pipeline has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Names that users know -> names of diffusers' attention dispatcher. None: PyTorch's own, the default.
KERNELS = {
    "diffusers": None,
    "native": None,
    "cudnn": "_native_cudnn",
    "flash-attn-2": "flash",
    "flash-attn-3": "_flash_3",
    "flex": "flex",
    "xformers": "xformers",
}
WITHOUT_BACKWARD = {
    "sageattention": "sage",
    "sageattention-int8-fp16-triton": "_sage_qk_int8_pv_fp16_triton",
    "sageattention-int8-fp16-cuda": "_sage_qk_int8_pv_fp16_cuda",
    "sageattention-int8-fp8-cuda": "_sage_qk_int8_pv_fp8_cuda",
}


def choose_attention(transformer: nn.Module, mechanism: str, device: torch.device) -> str | None:
    """Sets the attention kernel; where it cannot run here, keeps PyTorch's own and returns a line that says so."""
    network: Any = transformer  # a stock WanTransformer3DModel
    without_backward = mechanism in WITHOUT_BACKWARD
    kernel = WITHOUT_BACKWARD[mechanism] if without_backward else KERNELS[mechanism]
    if kernel is None:
        return None
    if reason := _cannot_run(kernel, transformer, device, backward=not without_backward):
        return f"attention_mechanism {mechanism} cannot run here ({reason}); PyTorch's attention is used"
    if without_backward:
        network._kernel_without_gradients = kernel
    else:
        from diffusers.models.attention_dispatch import attention_backend

        with attention_backend(kernel):  # setting it also makes it the active one of all models, which this undoes
            network.set_attention_backend(kernel)
    return None


@contextmanager
def kernel_of_pass(transformer: nn.Module, gradients: bool) -> Iterator[None]:
    """The kernel that is for passes without gradients, in such passes of training; else the transformer's own."""
    from diffusers.models.attention_dispatch import attention_backend

    kernel = getattr(transformer, "_kernel_without_gradients", None)
    if kernel is None or gradients or not transformer.training:
        yield
        return
    with attention_backend(kernel):
        yield


def _cannot_run(kernel: str, transformer: nn.Module, device: torch.device, *, backward: bool) -> str | None:
    """Why a kernel does not work on this machine: it is tried, because some say so only when they are called."""
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    dtype = transformer.get_parameter("patch_embedding.weight").dtype
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim  # type: ignore[union-attr]
    query = torch.ones((1, 16, heads, width), dtype=dtype, device=device, requires_grad=backward)  # type: ignore[arg-type]
    try:
        with attention_backend(kernel), torch.set_grad_enabled(backward):
            attended = dispatch_attention_fn(query, query, query)
            if backward:
                attended.float().sum().backward()
    except (ImportError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None
