"""Learning-rate schedules in closed form, each a curve over one optimizer's own updates.

Why not `get_scheduler` of diffusers or transformers: importing either costs 4 to 5 seconds, diffusers has no minimum
for cosine, neither has a sine, and both spend the first warmed-up update at a learning rate of exactly 0. The curves
after the warm-up are theirs (the tests compare).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from simpletuner_dmd.config.errors import UserError

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "sine",
)


def build_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    updates: int,
    warmup: int = 0,
    num_cycles: float = 1,
    power: float = 1.0,
    lr_end: float | None = None,
) -> LRScheduler:
    """The schedule called `name`. Call `.step()` once after each `optimizer.step()`.

    updates, warmup: in updates of this optimizer. The rate rises as (u + 1) / (warmup + 1), so no update is spent at
    0 and update `warmup` has the full rate; then the curve falls over the rest and would reach its floor at `updates`.
    "constant" has no warm-up. num_cycles: of cosine_with_restarts and sine. power: of polynomial.
    lr_end: the floor of every curve that falls; unset it is 0, 10% of the rate for cosine_with_min_lr, and 1e-7 (at
    most 10% of the rate) for polynomial.
    """
    if name not in SCHEDULES:
        raise UserError(
            f'no learning-rate schedule is called "{name}"',
            key="lr_scheduler",
            fix=f"use one of {', '.join(SCHEDULES)}",
        )
    curve = _curve(name, num_cycles, power)
    falls = name not in ("constant", "constant_with_warmup")

    def multiplier(floor: float) -> Callable[[int], float]:
        def at(update: int) -> float:
            if name != "constant" and update < warmup:
                return (update + 1) / (warmup + 1)
            if not falls:
                return 1.0
            progress = min(1.0, (update - warmup) / max(1, updates - warmup))
            return floor + (1 - floor) * curve(progress)

        return at

    rates = [float(group["lr"]) for group in optimizer.param_groups]
    floors = [_floor(name, rate, lr_end) if falls else 0.0 for rate in rates]
    return LambdaLR(optimizer, [multiplier(floor) for floor in floors])


def _curve(name: str, num_cycles: float, power: float) -> Callable[[float], float]:
    """From progress in [0, 1] to the share of the way from the floor to the full rate."""
    if name == "linear":
        return lambda progress: 1 - progress
    if name == "polynomial":
        return lambda progress: (1 - progress) ** power
    if name == "cosine_with_restarts":
        # A restart at the very end would jump back to the full rate, hence the 0 at progress 1.
        return lambda progress: 0.0 if progress >= 1 else _half_cosine((num_cycles * progress) % 1.0)
    if name == "sine":
        # Starts at the full rate, dips to the floor and comes back, num_cycles times.
        return lambda progress: 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))
    return _half_cosine


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _floor(name: str, rate: float, lr_end: float | None) -> float:
    """The floor as a share of the full rate."""
    if rate == 0:
        return 0.0
    if lr_end is None:
        return {"cosine_with_min_lr": 0.1, "polynomial": min(1e-7 / rate, 0.1)}.get(name, 0.0)
    if not 0 <= lr_end <= rate:
        raise UserError(
            f"the learning rate {rate:g} cannot fall to {lr_end:g}",
            key="lr_end",
            fix=f"use a value between 0 and {rate:g}",
        )
    return lr_end / rate
