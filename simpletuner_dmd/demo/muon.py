"""Muon for the two networks that the demo trains from nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


class FlatMuon:
    """`torch.optim.Muon`, which takes matrices only, on views of the convolutions as [out, in * kernel] matrices.

    Reached a quarter of AdamW's error after 200 steps of the VAE (documentation/LAB_NOTES.md). Vectors, and matrices
    whose name holds one of `to_adamw`, go to AdamW.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        matrix_lr: float,
        vector_lr: float,
        to_adamw: tuple[str, ...] = (),
    ) -> None:
        named = list(named_parameters)
        self.matrices = [
            p for name, p in named if p.ndim >= 2 and p.numel() > 500 and not any(word in name for word in to_adamw)
        ]
        taken = {id(p) for p in self.matrices}
        self.flat = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self.matrices]
        muon = torch.optim.Muon(self.flat, lr=matrix_lr, weight_decay=0.0, momentum=0.95)
        adamw = torch.optim.AdamW(
            [p for _, p in named if id(p) not in taken], lr=vector_lr, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.optimizers = (muon, adamw)
        self.schedules: list[torch.optim.lr_scheduler.LRScheduler] = []

    def schedule(self, factor: Callable[[int], float]) -> None:
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self.optimizers]

    def step(self) -> None:
        for flat, parameter in zip(self.flat, self.matrices, strict=True):
            # The temporal convolutions see no single frame, so they have no gradient in the first phase.
            flat.grad = None if parameter.grad is None else parameter.grad.view_as(flat)
            parameter.grad = None
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()
