"""The one training loop. It knows turns, losses and parameters; no formula and no model's name.

for step: for turn of the method: for micro-batch: backward each named loss into the moving role's parameters,
          average over ranks, clip, update; then EMA, log, checkpoint, validation.
"""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.distill.method import Method
from simpletuner_dmd.flow import Batch
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.training.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.out_of_memory import OutOfMemory, first_line, is_out_of_memory
from simpletuner_dmd.training.progress import Progress, peak_bytes
from simpletuner_dmd.training.tracking import Tracking

CHECKPOINTS = "checkpoints"
MODULES = {"attn": "attention", "ffn": "feed_forward"}
"""Part of a parameter's name → the module its gradient is logged under; what has neither is "other"."""


class Batches(Protocol):
    """Data as a pure function of the step, so that a resumed run sees the same."""

    def micro_batch(
        self, step: int, micro: int, rank: int, *, micro_batch_size: int, accumulation: int, world: int
    ) -> Batch: ...


@dataclass
class RoleOptimizer:
    """The parameters of one moving role and what moves them.

    clip: threshold of the gradient, 0 is off. clip_method: "norm" (of all parameters together) or "value" (of each
    element).
    """

    parameters: list[tuple[str, nn.Parameter]]
    optimizer: Optimizer
    schedule: LRScheduler
    clip: float
    clip_method: str = "norm"
    updates: int = 0

    @property
    def tensors(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.parameters]

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self, accelerator: Any) -> dict[str, float]:
        """Averages the gradients over ranks, clips, steps.

        Returns the gradient's norm before clipping as "grad_norm", and that of each kind of module as
        "grad_norm_attention", "grad_norm_feed_forward" and "grad_norm_other", those that there are.
        """
        _average(self.tensors, accelerator)
        norms = _norms(self.parameters)
        norm = norms["grad_norm"]
        if not math.isfinite(norm):
            raise FloatingPointError("a gradient is not finite")
        if self.clip > 0:
            if self.clip_method == "value":
                torch.nn.utils.clip_grad_value_(self.tensors, self.clip)
            else:
                torch.nn.utils.clip_grads_with_norm_(self.tensors, self.clip, torch.tensor(norm))
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norms


def _norms(parameters: list[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Every gradient is read once: the whole norm follows from those of the modules."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in parameters:
        if parameter.grad is not None:
            module = next((title for part, title in MODULES.items() if part in name), "other")
            groups[module].append(parameter.grad)
    if not groups:
        return {"grad_norm": 0.0}
    norms = torch.stack([torch.nn.utils.get_total_norm(gradients).float() for gradients in groups.values()]).tolist()
    return {"grad_norm": math.hypot(*norms)} | {
        f"grad_norm_{name}": norm for name, norm in zip(groups, norms, strict=True)
    }


def _average(parameters: list[nn.Parameter], accelerator: Any) -> None:
    """The mean of the gradients over all processes, in one collective.

    Once per update rather than DDP's hooks per backward: a role's parameters take part in several forwards and several
    backwards of a turn, and roles share one module, which DDP's reducer does not allow.
    """
    if accelerator.num_processes == 1:
        return
    # Every rank must bring the same tensors to the collective; a tensor that no rank has a gradient for (a
    # discriminator before its first step) is left out, as it is on one process.
    moved = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    flags = accelerator.reduce(moved, reduction="sum").tolist()
    parameters = [parameter for parameter, flag in zip(parameters, flags, strict=True) if flag]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    flat = accelerator.reduce(flat, reduction="mean")
    offset = 0
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()


@dataclass
class TrainerSettings:
    """The loop's own numbers; everything else belongs to what it is given."""

    output_dir: Path
    max_steps: int
    micro_batch_size: int
    accumulation: int
    seed: int
    checkpoint_interval: int
    checkpoints_kept: int | None
    validation_interval: int
    evaluation_interval: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Trainer:
    """Runs a method to its end.

    `stepped(metrics)`, after every step, and `checkpointed(path, step)` are called on the main process;
    `validate(step)` and `evaluate(step)` on every process.
    What `validate` returns is why the run must stop, the same on all of them, or None.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        method: Method,
        optimizers: dict[str, RoleOptimizer],
        batches: Batches,
        accelerator: Any,
        tracking: Tracking,
        *,
        ema: Ema | None = None,
        averaged: Sequence[str] = ("student",),
        meta: dict[str, Any] | None = None,
        validate: Callable[[int], str | None] | None = None,
        evaluate: Callable[[int], None] | None = None,
        checkpointed: Callable[[Path, int], None] | None = None,
    ) -> None:
        self.settings, self.method, self.optimizers, self.batches = settings, method, optimizers, batches
        self.accelerator, self.tracking, self.ema, self.meta = accelerator, tracking, ema, meta or {}
        self.validate, self.evaluate, self.checkpointed = validate, evaluate, checkpointed
        self.stepped: Callable[[dict[str, float]], None] | None = None
        self.averaged = averaged
        self.step = 0
        self._untouched = True  # no role has moved in the step that is being taken
        self.asked_to_stop = False  # set by a signal at any moment, on this rank
        self.interrupted = False  # what all ranks agreed on, between two steps
        self.halted: str | None = None  # why validation asked the run to stop

    @property
    def student_updates(self) -> int:
        """Updates of what is averaged and exported: of both experts where the student is two."""
        return sum(self.optimizers[role].updates for role in self.averaged if role in self.optimizers)

    # --- resume -----------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint: weights, optimizers, schedules, EMA, the method's state and the step."""
        state = load_checkpoint(checkpoint)
        if set(state.tensors) != set(self.optimizers):
            raise _another_run(checkpoint, f"it trains {_listed(state.tensors)}, this run {_listed(self.optimizers)}")
        for role, optimizer in self.optimizers.items():
            _check_fit(checkpoint, role, optimizer, state)
        for role, optimizer in self.optimizers.items():
            _copy_into(optimizer.parameters, state.tensors[role])
            optimizer.optimizer.load_state_dict(state.optimizers[role])
            optimizer.schedule.load_state_dict(state.schedulers[role])
            optimizer.updates = int(state.meta["updates"][role])
        if self.ema is not None and state.ema is not None:
            self.ema.load_state_dict(state.ema)
        elif self.ema is not None:
            # Averaging was switched on after this checkpoint. The average was made before the weights were loaded, so
            # it holds an untrained student, and a run that is already at its end would export that.
            self.ema.restart(self.student_updates)
        self.method.load_state_dict(state.method)
        self.step = state.step

    def save(self) -> Path | None:
        """Writes a checkpoint of the finished steps (main process only) and returns its folder."""
        path = None
        if self.accelerator.is_main_process:
            state = CheckpointState(
                step=self.step,
                tensors={role: _detached(optimizer.parameters) for role, optimizer in self.optimizers.items()},
                optimizers={role: optimizer.optimizer.state_dict() for role, optimizer in self.optimizers.items()},
                schedulers={role: optimizer.schedule.state_dict() for role, optimizer in self.optimizers.items()},
                ema=None if self.ema is None else self.ema.state_dict(),
                method=self.method.state_dict(),
                meta={
                    **self.meta,
                    "updates": {role: optimizer.updates for role, optimizer in self.optimizers.items()},
                    "optimizers": {role: _kind(optimizer) for role, optimizer in self.optimizers.items()},
                },
            )
            root = self.settings.output_dir / CHECKPOINTS
            path = save_checkpoint(root, self.step, state, self.settings.checkpoints_kept)
            self.tracking.event("checkpoint", step=self.step, path=str(path.relative_to(self.settings.output_dir)))
            if self.checkpointed is not None:
                self.checkpointed(path, self.step)
        self.accelerator.wait_for_everyone()
        return path

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from `self.step` to the end. Ctrl-C or SIGTERM saves and stops; a second one stops at once.

        Raises OutOfMemory, with the finished steps saved where that is possible.
        """
        settings = self.settings
        saved_at = self.step if self.step else -1
        progress = Progress(
            settings.max_steps, self.step, device=settings.device, enabled=self.accelerator.is_main_process
        )
        with progress, self._catching_signals():
            while self.step < settings.max_steps and not (self.interrupted or self.halted):
                values = self._step_or_out_of_memory(saved_at)
                self.step += 1
                progress.update(self.step, values)
                self.tracking.log(self.step, values)
                if self.stepped is not None and self.accelerator.is_main_process:
                    self.stepped(values)
                self._agree_on_interrupt()
                last = self.step == settings.max_steps
                if last or self.interrupted or self.step % settings.checkpoint_interval == 0:
                    self.save()
                    saved_at = self.step
                if not self.interrupted:
                    self._look(last)
            if saved_at != self.step and (self.interrupted or self.halted):
                self.save()

    def _look(self, last: bool) -> None:
        """Evaluation and validation, where this step has one."""
        settings = self.settings
        interval = settings.evaluation_interval
        if self.evaluate is not None and interval and (last or self.step % interval == 0):
            self.evaluate(self.step)
        if self.validate is not None and (last or self.step % settings.validation_interval == 0):
            self.halted = self.validate(self.step)
        self.accelerator.wait_for_everyone()

    def _step_or_out_of_memory(self, saved_at: int) -> dict[str, float]:
        """The next step's metrics. Where memory runs out: what the step held is let go, the steps before it are saved
        if none of the roles has moved in it yet, and OutOfMemory is raised."""
        self._untouched = True
        try:
            return self._train_step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
            traceback.clear_frames(error.__traceback__)  # they hold the step's graphs
        for role in self.optimizers.values():
            role.optimizer.zero_grad(set_to_none=True)
        self.method.end_step()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        saved = None
        # The other processes are in a collective or about to be: nothing can be agreed with them any more.
        if self._untouched and self.step > 0 and self.step != saved_at and self.accelerator.num_processes == 1:
            saved = self.save()
        raise OutOfMemory(self.step, reason, saved)

    def _train_step(self) -> dict[str, float]:
        """All turns of one step; returns its metrics, averaged over micro-batches and ranks."""
        settings, step = self.settings, self.step
        began = time.perf_counter()
        batches = [self._batch(step, micro) for micro in range(settings.accumulation)]
        values: dict[str, float] = defaultdict(float)
        norms: dict[str, float] = {}
        for turn in self.method.turns(step):
            role = self.optimizers[turn.role]
            for batch in batches:
                stream = RandomStream(settings.seed, step, batch.positions)
                for loss in turn.losses(batch, stream):
                    (loss.value / settings.accumulation).backward(inputs=role.tensors)
                    shown = float(loss.value.detach()) if loss.reported is None else loss.reported
                    values[loss.name] += shown / settings.accumulation
                    for name, value in loss.metrics.items():
                        values[name] += value / settings.accumulation
            values[f"{turn.role}_lr"] = role.lr
            self._untouched = False
            try:
                norms |= {f"{turn.role}_{name}": norm for name, norm in role.update(self.accelerator).items()}
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"step {step}: the {turn.role}'s gradient is not finite ({dict(values)}); the last checkpoint is "
                    "intact. Lower the learning rate or the guidance scale and resume."
                ) from error
            if turn.role in self.averaged and self.ema is not None:
                self.ema.update(self.student_updates)
        self.method.end_step()
        averaged = self._over_ranks(values) | norms
        averaged["step_seconds"] = time.perf_counter() - began
        averaged["peak_bytes"] = float(peak_bytes(settings.device))
        return averaged

    def _batch(self, step: int, micro: int) -> Batch:
        settings, accelerator = self.settings, self.accelerator
        batch = self.batches.micro_batch(
            step,
            micro,
            accelerator.process_index,
            micro_batch_size=settings.micro_batch_size,
            accumulation=settings.accumulation,
            world=accelerator.num_processes,
        )
        return batch.to(settings.device)

    def _over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1 or not values:
            return dict(values)
        names = sorted(values)
        packed = torch.tensor([values[name] for name in names], dtype=torch.float32, device=self.settings.device)
        mean = self.accelerator.reduce(packed, reduction="mean")
        return dict(zip(names, mean.tolist(), strict=True))

    # --- interruption -----------------------------------------------------------------------------------------------

    def _agree_on_interrupt(self) -> None:
        """Ranks stop at the same step: a signal may have reached one of them only. One that comes after this waits for
        the next step: a rank that left by itself would leave the others alone in their next collective."""
        self.interrupted = self.asked_to_stop
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([float(self.interrupted)], device=self.settings.device)
            self.interrupted = bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Ranks stop together, so one may be on its way out before its own copy of the signal arrives: that one is
        absorbed, whenever it comes. The next stops at once, as always."""
        received = 0

        def interrupt(number: int, frame: FrameType | None) -> None:
            nonlocal received
            received += 1
            if received > 1:
                raise KeyboardInterrupt
            self.asked_to_stop = True

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if received or not self.interrupted:
                for number, handler in before.items():
                    signal.signal(number, handler)


def _detached(parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters}


def _kind(role: RoleOptimizer) -> str:
    """The optimizer's class, and its library where torch or optimi have one of that name too."""
    kind = type(role.optimizer)
    library = kind.__module__.split(".")[0]
    return f"{library} {kind.__name__}" if library in ("bitsandbytes", "torchao") else kind.__name__


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


def _another_run(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"this checkpoint is of another kind of run: {reason}",
        file=str(checkpoint),
        key="resume_from_checkpoint",
        fix="put the settings back, or choose another output_dir to start afresh",
    )


def _check_fit(checkpoint: Path, role: str, optimizer: RoleOptimizer, state: CheckpointState) -> None:
    """Raises UserError, before anything is changed, where the checkpoint's tensors or optimizer are not this run's."""
    expected = {name: tuple(parameter.shape) for name, parameter in optimizer.parameters}
    found = {name: tuple(tensor.shape) for name, tensor in state.tensors[role].items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        there, here = found.get(name, "missing"), expected.get(name, "missing")
        raise _another_run(checkpoint, f"of the {role}, {name} is {there} there and {here} here")
    kind = state.meta.get("optimizers", {}).get(role, _kind(optimizer))
    if kind != _kind(optimizer):
        raise _another_run(checkpoint, f"its {role} was trained with {kind}, this run has {_kind(optimizer)}")


@torch.no_grad()
def _copy_into(parameters: list[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters:
        parameter.copy_(tensors[name])
