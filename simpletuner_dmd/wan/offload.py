"""Models that do not train, kept in host memory: each layer is on the device for its own turn."""

from __future__ import annotations

import torch
from torch import nn


def offload_in_groups(module: nn.Module, device: torch.device) -> None:
    """diffusers' group offloading, layer by layer; on a GPU the next layer comes while one works.

    Only for what no gradient passes through: a layer's weights have left the device when backward would ask for them.
    """
    from diffusers.hooks import apply_group_offloading

    assert not any(parameter.requires_grad for parameter in module.parameters()), "what trains is not offloaded"
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
    )
