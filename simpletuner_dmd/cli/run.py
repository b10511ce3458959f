"""One training run from prepared configuration to published result. The verb `train` is a thin shell around it."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from simpletuner_dmd import __version__
from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.common import INTERRUPTED, STOPPED, quiet_libraries
from simpletuner_dmd.cli.judging import Judge
from simpletuner_dmd.cli.machine import machine_problems
from simpletuner_dmd.cli.moving import STUDENT_ROLES, role_optimizers, student_average
from simpletuner_dmd.cli.saved import write_resolved
from simpletuner_dmd.cli.shipping import Shipper, check_text
from simpletuner_dmd.cli.starting import start_student
from simpletuner_dmd.cli.watching import PlanWatch
from simpletuner_dmd.config import LoadedConfig, UserError
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.publish.load_back import load_back
from simpletuner_dmd.publish.webhook import Webhook
from simpletuner_dmd.training.checkpoint import find_latest, resolve_checkpoint
from simpletuner_dmd.training.ema import AveragedDenoiser
from simpletuner_dmd.training.out_of_memory import EXIT_CODE as OUT_OF_MEMORY
from simpletuner_dmd.training.out_of_memory import OutOfMemory, first_line, is_out_of_memory
from simpletuner_dmd.training.progress import free_memory, peak_bytes
from simpletuner_dmd.training.tracking import Tracking
from simpletuner_dmd.training.trainer import CHECKPOINTS, Trainer, TrainerSettings
from simpletuner_dmd.validation.render import Scene
from simpletuner_dmd.validation.report import build_report
from simpletuner_dmd.wan.roles import Roles, self_test

# How long processes wait for the main one, which caches, renders and exports alone; the default is 10 minutes on GPUs.
WAITING = timedelta(days=2)


@dataclass
class Parts:
    """What a run is made of once it is put together."""

    data: PreparedData
    scenes: list[Scene]
    roles: Roles
    tracking: Tracking
    webhook: Webhook
    shipper: Shipper
    trainer: Trainer

    @contextmanager
    def best_student(self) -> Iterator[bool]:
        """The student as it would be used: its average, where there is one. Yields whether it is the average."""
        if self.trainer.ema is None:
            yield False
            return
        with self.trainer.ema.swap():
            yield True

    def free_training(self) -> None:
        """Gives back the memory of networks, optimizers and average: what loads the export next needs room for a base.

        `roles` and `trainer` are gone afterwards.
        """
        del self.roles, self.trainer
        free_memory()


class TrainingRun:
    """Everything `simpletuner train` does after the configuration is known to be sound."""

    def __init__(self, loaded: LoadedConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        quiet_libraries()
        patience = InitProcessGroupKwargs(timeout=WAITING)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
        self.assembly = Assembly(loaded, self.accelerator.device)
        self.config = loaded.config
        self.output_dir = Path(self.config.output_dir).expanduser()
        self.watch = PlanWatch(loaded, self.accelerator.device, self.output_dir, self.say)
        self.began = time.perf_counter()

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    # --- the whole of it --------------------------------------------------------------------------------------------

    def go(self) -> int:
        """Exit code 0 when trained, exported and loaded back; 130 when interrupted, 3 when memory ran out or a red
        light stopped the run."""
        try:
            return self._go()
        except OutOfMemory as stopped:
            return self._out_of_memory(stopped.reason, stopped.step, stopped.saved)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return self._out_of_memory(first_line(error), None, None)

    def _out_of_memory(self, reason: str, step: int | None, saved: Path | None) -> int:
        for line in self.watch.out_of_memory(reason, step, saved):
            print(line, file=sys.stderr, flush=True)
        return OUT_OF_MEMORY

    def _go(self) -> int:
        if self.main:
            self.watch.announce()
        parts = self._put_together()
        try:
            self._train(parts)
            if parts.trainer.halted is not None:
                return self._halted(parts, parts.trainer.halted)
            if parts.trainer.interrupted:
                self.say(f"Interrupted at step {parts.trainer.step}; the same command goes on from there.")
                parts.tracking.event("interrupted", step=parts.trainer.step)
                return INTERRUPTED
            if self.main:
                self._finish(parts)
            self.accelerator.wait_for_everyone()
        except BaseException as error:
            parts.tracking.event("error", message=f"{type(error).__name__}: {error}")
            parts.webhook.send(f"the run stopped: {type(error).__name__}", event="error")
            raise
        finally:
            parts.data.close()
            parts.tracking.close()
            parts.webhook.close()
            if self.main:
                build_report(self.output_dir)
        return 0

    def _put_together(self) -> Parts:
        """Everything built, resumed and tested; nothing of an earlier run is touched before that has worked."""
        loaded, config = self.assembly.loaded, self.config
        if problems := machine_problems(loaded):
            raise UserError(problems)
        shipper = Shipper(self.assembly, self.output_dir, publishing=self.main)
        _ = self.assembly.partner  # before hours of caching: it may not go together with this run
        data = self._prepare_data()
        scenes = [] if config.validation_disable else self.assembly.scenes(data.text)
        if scenes:
            self.assembly.probe_texts = (scenes[0].text.rows_BLD[0], data.negative_text.rows_BLD[0])
        steps = self._total_steps(data)
        if self.main:
            self.watch.know(data.latent_shapes(), steps)
        roles, lines = self.assembly.roles()
        checkpoint = self._checkpoint()
        if checkpoint is None and config.init_lora is not None and config.model_type == "lora":
            lines += start_student(roles, Path(config.init_lora))
        average = student_average(config, roles)
        method = self.assembly.method(roles, None if average is None else AveragedDenoiser(roles.student, average))
        tracking = self._tracking(checkpoint)
        trainer = Trainer(
            self._trainer_settings(steps),
            method,
            role_optimizers(config, roles, method, steps),
            data,
            self.accelerator,
            tracking,
            ema=average,
            averaged=STUDENT_ROLES,
            meta={"config": loaded.options(), "version": __version__},
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
            self.say(f"Resuming from {checkpoint} (step {trainer.step} of {steps})")
        if self.main:  # not before: what cannot go on must leave the settings of the run that is there
            write_resolved(loaded, self.output_dir)
            data.save_plan(self.output_dir)
        for line in [*lines, *self._self_test(roles, data, fresh=checkpoint is None), *data.notices]:
            self.say(line)
        self.say(data.report())
        webhook = Webhook.from_config(self._webhook_config(), config.tracker_run_name) if self.main else Webhook([])
        tracking.event("start", **self._start_facts(steps, trainer.step))
        return Parts(data, scenes, roles, tracking, webhook, shipper, trainer)

    def _train(self, parts: Parts) -> None:
        trainer, total = parts.trainer, parts.trainer.settings.max_steps
        judge = Judge(
            self.assembly, self.accelerator, self.output_dir, parts.roles, trainer, parts.data, parts.tracking,
            parts.scenes, self.say,
        )  # fmt: skip

        def validate(step: int) -> str | None:
            reason = judge.validate(step)
            if self.main:
                build_report(self.output_dir)
            parts.webhook.send(f"validation at step {step} of {total}", event="validation", step=step)
            return reason

        def stepped(values: dict[str, float]) -> None:
            if all(role.updates for role in trainer.optimizers.values()):
                facts = self.watch.compare(values["step_seconds"])
                if facts is not None:
                    parts.tracking.event("plan", step=trainer.step, **facts)

        trainer.stepped = stepped
        if parts.scenes:
            judge.start()
            trainer.validate = validate
        if self.config.eval_dataset_id is not None:
            trainer.evaluate = judge.evaluate
        trainer.checkpointed = lambda path, step: self._checkpointed(parts, step)
        self.accelerator.wait_for_everyone()
        self.watch.begin()
        parts.webhook.send(f"training starts at step {trainer.step} of {total}", event="start")
        trainer.run()

    # --- parts ------------------------------------------------------------------------------------------------------

    def _prepare_data(self) -> PreparedData:
        """All processes fill the caches together; each is done when everything is there."""
        prompts = [] if self.config.validation_disable else list(self.assembly.loaded.validation_prompts.values())
        data = self.assembly.data(prompts, main=self.main, progress=self.main)
        self.accelerator.wait_for_everyone()
        return data

    def _total_steps(self, data: PreparedData) -> int:
        config = self.config
        by_epochs = config.num_train_epochs * data.steps_per_epoch(config.global_batch_size)
        if not config.max_train_steps or not by_epochs:
            return config.max_train_steps or by_epochs
        return min(config.max_train_steps, by_epochs) if config.strict_epoch_limit else config.max_train_steps

    def _trainer_settings(self, steps: int) -> TrainerSettings:
        config = self.config
        return TrainerSettings(
            output_dir=self.output_dir,
            max_steps=steps,
            micro_batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            checkpoint_interval=config.checkpoint_step_interval,
            checkpoints_kept=config.checkpoints_total_limit or None,
            validation_interval=config.validation_step_interval,
            evaluation_interval=config.eval_steps_interval or config.validation_step_interval,
            device=self.accelerator.device,
        )

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from; decided by the main process, because looking also tidies up after a crash."""
        wanted, root = self.config.resume_from_checkpoint, self.output_dir / CHECKPOINTS
        found: list[Any] = [None]
        if self.main and wanted is not None:
            found = [find_latest(root) if wanted == "latest" else resolve_checkpoint(root, wanted)]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def _tracking(self, checkpoint: Path | None) -> Tracking:
        config = self.config
        return Tracking(
            self.output_dir,
            config.report_to or "none",
            config.tracker_project_name,
            config.tracker_run_name,
            self.assembly.loaded.options(),
            self.accelerator,
            resume_step=None if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1]),
        )

    def _webhook_config(self) -> Any:
        webhook = self.config.webhook_config
        if not isinstance(webhook, str):
            return webhook
        path = self.assembly.loaded.resolve_path(webhook)
        return path if path.exists() else None  # the missing file was named at start

    def _self_test(self, roles: Roles, data: PreparedData, *, fresh: bool) -> list[str]:
        """On one small clip: the invariants do not depend on the size."""
        config = self.config
        channels, frames, height, width = data.latent_shapes()[-1]
        shape = (1, channels, min(frames, 3), min(height, 16), min(width, 16))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.accelerator.device)
        text = data.negative_text.to(self.accelerator.device)
        shared = config.model_type == "lora" or config.base_model_precision == "no_change"
        elsewhere = config.init_lora is not None or config.init_lokr_norm is not None
        started = {"student"} if elsewhere or self.assembly.block_sampling is not None else set()
        return self_test(roles, noise, text, fresh=fresh, shared_numerics=shared, started_elsewhere=started)

    def _start_facts(self, steps: int, done: int) -> dict[str, Any]:
        config, device = self.config, self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        return {
            "run": config.tracker_run_name,
            "method": config.distillation_method or "supervised",
            "ladder": list(self.assembly.schedule.timesteps),
            "shift": self.assembly.schedule.shift,
            "steps": steps,
            "resumed_at": done,
            "environment": {
                "simpletuner-dmd": __version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "device": name,
                "processes": self.accelerator.num_processes,
                "threads": torch.get_num_threads(),
            },
        }

    def _halted(self, parts: Parts, reason: str) -> int:
        """A red light stopped the run: what is there is kept, nothing is exported; earlier uploads are waited for."""
        step = parts.trainer.step
        parts.tracking.event("stopped", step=step, reason=reason)
        parts.webhook.send(f"stopped at step {step}: {reason}", event="error", step=step)
        self.say(f"Stopped at step {step} by a red light: {reason}")
        self.say("  go on with health_on_red=continue, or from the healthiest checkpoint: resume_from_checkpoint=best;")
        self.say(f"  to ship that one: simpletuner export {self.output_dir} --checkpoint best")
        for line in parts.shipper.close():
            self.say(line)
        return STOPPED

    # --- results ----------------------------------------------------------------------------------------------------

    def _checkpointed(self, parts: Parts, step: int) -> None:
        parts.webhook.send(f"checkpoint at step {step}", event="checkpoint", step=step)
        if self.config.push_checkpoints_to_hub and parts.trainer.halted is None:
            folder = self.output_dir / "export-checkpoints" / f"checkpoint-{step:06d}"
            updates = parts.trainer.student_updates
            with parts.best_student() as averaged:
                parts.shipper.export(folder, parts.roles, parts.data, steps=updates, averaged=averaged)
            parts.shipper.upload(folder, folder.name, temporary=True)

    def _finish(self, parts: Parts) -> None:
        """Exports what would be used, frees the training, loads the export back, publishes, sums up."""
        folder, shipper, tracking, step = self.output_dir / "export", parts.shipper, parts.tracking, parts.trainer.step
        updates = parts.trainer.student_updates
        with parts.best_student() as averaged:
            shipper.export(folder, parts.roles, parts.data, steps=updates, averaged=averaged, raw_beside=averaged)
            reference = shipper.reference(parts.roles, *check_text(parts.data))
        if averaged:
            shipper.export_raw(folder, parts.roles, parts.data, steps=updates)
        peak = peak_bytes(self.accelerator.device) / 1e9
        parts.free_training()
        verdict = load_back(folder, reference)
        tracking.event("export", step=step, **asdict(verdict))
        if verdict.checked and not verdict.passed:
            raise RuntimeError(f"the export does not reproduce the training sampler: {verdict.message}")
        self.say(f"Export {'loaded back' if verdict.checked else 'not loaded back'}: {verdict.message}")
        if self.config.push_to_hub:
            shipper.upload(folder)
        for line in shipper.close():
            self.say(line)
        tracking.event("finish", step=step, seconds=time.perf_counter() - self.began)
        parts.webhook.send("training finished", event="finish", step=step)
        self.say(f"Finished in {time.perf_counter() - self.began:.0f} s, peak memory {peak:.1f} GB")
        self.say(f"  student  {folder}")
        self.say(f"  report   {build_report(self.output_dir)}")
