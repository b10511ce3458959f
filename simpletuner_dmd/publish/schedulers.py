"""A stock diffusers scheduler whose saved config walks the student's ladder in a plain `WanPipeline`.

`WanPipeline` only ever calls `scheduler.set_timesteps(n)` and `scheduler.step` without a generator, so the ladder has
to come out of the scheduler's config. Two classes can do it:

- FlowMapEuler(shift): exactly the uniform ladder warped by the shift, for any n; Euler only.
- FlowMatchEuler(shift, shift_terminal): two free numbers, so any 2- or 3-step ladder and every uniform warped one;
  `stochastic_sampling` makes it re-noise. The class's default grid without shift_terminal is not the student's ladder
  (shift 5, 4 steps: 1000, 909.7, 717.3, 24.4 instead of 1000, 937.5, 833.3, 625).

What neither reaches is sampled by `sampler.py`, whose scheduler carries the sigmas themselves.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from typing import Any

from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from simpletuner_dmd.flow import Schedule, uniform_ladder

EXACT = 1e-6
"""Largest difference of a sigma that counts as the same ladder: single precision, and a thousandth of a timestep."""


@dataclass(frozen=True)
class SchedulerChoice:
    """scheduler: a diffusers object, rebuilt from its saved config. max_error: largest difference of a sigma.

    name: "euler" (deterministic) or "lcm" (fresh noise at each rung), in ComfyUI's words; "unipc" without a ladder.
    """

    scheduler: Any
    exact: bool
    max_error: float
    needs_sampler_file: bool
    name: str


def scheduler_for(schedule: Schedule, renoise: str) -> SchedulerChoice:
    """The stock scheduler for a ladder; the nearest one, with its error, where none is exact.

    renoise: "sde" or "ode". A schedule without a ladder (supervised training) gets Wan's own UniPC with the shift.
    """
    if renoise not in ("sde", "ode"):
        raise ValueError(f"renoise must be 'sde' or 'ode', not {renoise!r}")
    if not schedule.ladder:
        solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                         num_train_timesteps=1000, flow_shift=schedule.shift)  # fmt: skip
        return SchedulerChoice(rebuilt(solver), exact=True, max_error=0.0, needs_sampler_file=False, name="unipc")
    name = "lcm" if renoise == "sde" else "euler"
    warp = uniform_shift(schedule)
    if renoise == "ode" and warp is not None:
        scheduler = rebuilt(FlowMapEulerDiscreteScheduler(shift=warp))
    else:
        scheduler = rebuilt(_fitted(schedule.ladder, stochastic=renoise == "sde"))
    error = ladder_error(scheduler, schedule.ladder)
    return SchedulerChoice(
        scheduler, exact=error <= EXACT, max_error=error, needs_sampler_file=error > EXACT, name=name
    )


def rebuilt(scheduler: Any) -> Any:
    """The scheduler as a user gets it: saved and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        return type(scheduler).from_pretrained(folder)


def ladder_error(scheduler: Any, ladder: tuple[float, ...]) -> float:
    """Largest difference between the scheduler's sigmas (and timesteps / 1000) and the ladder, rung by rung."""
    scheduler.set_timesteps(len(ladder), device="cpu")
    sigmas, timesteps = scheduler.sigmas.tolist(), scheduler.timesteps.tolist()
    if len(sigmas) != len(ladder) + 1 or len(timesteps) != len(ladder):
        return math.inf
    wanted = (*ladder, 0.0)
    errors = [abs(have - want) for have, want in zip(sigmas, wanted, strict=True)]
    errors += [abs(have / 1000 - want) for have, want in zip(timesteps, ladder, strict=True)]
    return max(errors) if all(math.isfinite(error) for error in errors) else math.inf


def uniform_shift(schedule: Schedule) -> float | None:
    """The shift that warps the uniform ladder into this one, or None for a literal ladder.

    From three rungs on it is found from the ladder itself (1000, 900, 750, 500 is shift 3). Any two rungs would fit
    some shift, so there only the run's own shift makes it a uniform ladder.
    """
    ladder = schedule.ladder
    candidates = [schedule.shift]
    if len(ladder) >= 3 and ladder[0] == 1.0:
        u = (len(ladder) - 1) / len(ladder)
        candidates.append(round(ladder[1] * (1 - u) / (u * (1 - ladder[1])), 9))
    for shift in candidates:
        if all(abs(a - b) <= 1e-9 for a, b in zip(ladder, uniform_ladder(len(ladder), shift), strict=True)):
            return shift
    return None


def _fitted(ladder: tuple[float, ...], *, stochastic: bool) -> Any:
    """FlowMatchEuler whose n-step grid is the ladder, or comes nearest to it."""
    if len(ladder) == 1:
        # shift_terminal with a single step divides 0 by 0
        return FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    if len(ladder) == 2:
        return _euler(1.0, ladder[-1], stochastic)
    best = _euler(_fit_shift(ladder), ladder[-1], stochastic)
    if ladder_error(best, ladder) <= EXACT:
        return best
    # No exact fit: the second rung has no claim to be the one that is met, so take the smallest worst difference.
    shifts = [0.1 * 1.1**k for k in range(60)]  # 0.1 to 28
    return min((best, *(_euler(shift, ladder[-1], stochastic) for shift in shifts)),
               key=lambda scheduler: ladder_error(scheduler, ladder))  # fmt: skip


def _euler(shift: float, shift_terminal: float, stochastic: bool) -> Any:
    # 1 as the terminal would divide by zero; it cannot occur because ladders decrease strictly
    return FlowMatchEulerDiscreteScheduler(
        shift=shift, shift_terminal=shift_terminal, stochastic_sampling=stochastic
    )  # fmt: skip


def _fit_shift(ladder: tuple[float, ...]) -> float:
    """Bisection for the shift that puts the second rung in its place; needs three rungs.

    With shift_terminal the class rescales 1 - sigma so that the last rung is met, which leaves the second rung's share
    of the way as the one condition; the share falls as the shift grows.
    """
    steps = len(ladder)
    wanted = (1 - ladder[1]) / (1 - ladder[-1])

    def share(shift: float) -> float:
        sigma_min = shift * 1e-3 / (1 + (shift - 1) * 1e-3)  # the class shifts its sigma_min once when it is built

        def travelled(u: float) -> float:
            return (1 - u) / (1 + (shift - 1) * u)

        return travelled(1 + (sigma_min - 1) / (steps - 1)) / travelled(sigma_min)

    low, high = 1e-2, 1e2
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if share(middle) > wanted else (low, middle)
    return low
