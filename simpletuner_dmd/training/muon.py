"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan 2024) replaces a matrix's momentum by its nearest orthogonal matrix, which means something for the weights
of hidden layers only. So the matrices of the blocks go to it: of a LoRA both factors, each on its own, of a full model
the projections. Norms, biases, modulation tables, embedders, the head and adapters on those, and all that is not a
matrix, go to AdamW. `match_rms_adamw` (Moonshot, arXiv 2502.16982) scales Muon's steps to the size of AdamW's, so both
take the same learning rate and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

INSIDE_BLOCKS = ("blocks.", "lycoris_blocks_")


def is_hidden_matrix(name: str, parameter: Parameter) -> bool:
    """Whether a parameter of a role goes to Muon."""
    return parameter.ndim == 2 and name.startswith(INSIDE_BLOCKS)


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` side by side; their groups are this optimizer's."""

    def __init__(
        self,
        matrices: Sequence[Parameter],
        others: Sequence[Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
        **settings: Any,
    ) -> None:
        self.parts: list[Optimizer] = [
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **settings
            )
        ]  # fmt: skip
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # loading makes new ones
