"""What a role's update logs of its gradient: the whole, and each kind of module."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from simpletuner_dmd.training.trainer import RoleOptimizer

ONE_PROCESS = SimpleNamespace(num_processes=1)


def role_of(gradients, clip=0.0):
    """A role with one parameter per name; None: it has no gradient."""
    parameters = []
    for name, gradient in gradients.items():
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        parameters.append((name, parameter))
    optimizer = torch.optim.SGD([parameter for _, parameter in parameters], lr=1.0)
    return RoleOptimizer(parameters, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), clip)


def test_norms_of_modules_make_the_whole():
    role = role_of({
        "blocks.0.attn1.to_q.lora_A.weight": [3.0, 4.0], "blocks.0.attn2.to_k.weight": [12.0, 0.0],
        "blocks.0.ffn.net.0.proj.weight": [0.0, 84.0], "patch_embedding.weight": [1.0, 0.0], "idle.weight": None,
    })  # fmt: skip
    norms = role.update(ONE_PROCESS)
    assert norms == pytest.approx({
        "grad_norm_attention": 13.0, "grad_norm_feed_forward": 84.0, "grad_norm_other": 1.0,
        "grad_norm": math.sqrt(13**2 + 84**2 + 1),
    })  # fmt: skip


def test_the_norms_are_of_before_clipping_and_the_step_of_after():
    role = role_of({"attn.weight": [3.0, 0.0], "ffn.weight": [0.0, 4.0]}, clip=1.0)
    assert role.update(ONE_PROCESS) == pytest.approx(
        {"grad_norm": 5.0, "grad_norm_attention": 3.0, "grad_norm_feed_forward": 4.0}
    )
    moved = torch.cat([parameter.detach() for parameter in role.tensors])
    torch.testing.assert_close(moved, torch.tensor([-0.6, 0.0, 0.0, -0.8]), rtol=1e-5, atol=1e-6)


def test_no_gradient_is_zero_and_a_broken_one_an_error():
    assert role_of({"attn.weight": None}).update(ONE_PROCESS) == {"grad_norm": 0.0}
    for broken in (math.nan, math.inf):
        with pytest.raises(FloatingPointError):
            role_of({"attn.weight": [1.0, 2.0], "ffn.weight": [broken, 0.0]}).update(ONE_PROCESS)
