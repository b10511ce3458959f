"""One training run from prepared configuration to published result. The verb `train` is a thin shell around it."""

from __future__ import annotations

import logging
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from simpletuner_dmd import __version__
from simpletuner_dmd.cli.assemble import Assembly, with_demo_paths
from simpletuner_dmd.cli.shipping import Shipper, check_text
from simpletuner_dmd.cli.train import INTERRUPTED, write_resolved
from simpletuner_dmd.config import LoadedConfig
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.distill.dmd import DMD
from simpletuner_dmd.distill.supervised import Supervised
from simpletuner_dmd.publish.webhook import Webhook
from simpletuner_dmd.training.checkpoint import find_latest, resolve_checkpoint
from simpletuner_dmd.training.ema import Ema
from simpletuner_dmd.training.optimizers import build_optimizer
from simpletuner_dmd.training.progress import peak_bytes
from simpletuner_dmd.training.schedules import build_schedule
from simpletuner_dmd.training.tracking import Tracking
from simpletuner_dmd.training.trainer import CHECKPOINTS, RoleOptimizer, Trainer, TrainerSettings
from simpletuner_dmd.validation.render import Renderer, Scene
from simpletuner_dmd.validation.report import build_report
from simpletuner_dmd.wan.roles import Roles, self_test

# How long processes wait for the main one, which caches, renders and exports alone; the default is 10 minutes on GPUs.
WAITING = timedelta(days=2)


class TrainingRun:
    """Everything `simpletuner train` does after the configuration is known to be sound."""

    def __init__(self, loaded: LoadedConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        patience = InitProcessGroupKwargs(timeout=WAITING)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
        self.assembly = Assembly(with_demo_paths(loaded), self.accelerator.device)
        self.config = loaded.config
        self.output_dir = Path(self.config.output_dir).expanduser()
        self.began = time.perf_counter()

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    # --- the whole of it --------------------------------------------------------------------------------------------

    def go(self) -> int:
        loaded, config = self.assembly.loaded, self.config
        data = self._prepare_data()
        scenes = [] if config.validation_disable else self.assembly.scenes(data.text)
        roles, lines = self.assembly.roles()
        method = self.assembly.method(roles)
        steps = self._total_steps(data)
        optimizers = self._optimizers(roles, method, steps)
        ema = self._ema(roles)
        checkpoint = self._checkpoint()
        tracking = self._tracking(checkpoint)
        webhook = Webhook.from_config(self._webhook_config(), config.tracker_run_name) if self.main else Webhook([])
        shipper = Shipper(self.assembly, self.output_dir)
        trainer = Trainer(
            TrainerSettings(
                output_dir=self.output_dir,
                max_steps=steps,
                micro_batch_size=config.train_batch_size,
                accumulation=config.gradient_accumulation_steps,
                seed=config.seed,
                checkpoint_interval=config.checkpoint_step_interval,
                checkpoints_kept=config.checkpoints_total_limit or None,
                validation_interval=config.validation_step_interval,
                device=self.accelerator.device,
            ),
            method,
            optimizers,
            data,
            self.accelerator,
            tracking,
            ema=ema,
            meta={"config": loaded.options(), "version": __version__},
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
            self.say(f"Resuming from {checkpoint} (step {trainer.step} of {steps})")
        if self.main:  # not before: what cannot go on must leave the settings of the run that is there
            write_resolved(loaded, self.output_dir)
        for line in [*lines, *self._self_test(roles, data, fresh=checkpoint is None), *data.notices]:
            self.say(line)
        self.say(data.report())
        tracking.event("start", **self._start_facts(steps, trainer.step))
        try:
            with self._rendering(scenes, data, tracking) as renderer:
                videos = partial(self._render_student, renderer, roles, ema, tracking)
                if self.main and renderer is not None and checkpoint is None:
                    self._render_references(renderer, roles)
                    if config.validation_on_startup:
                        videos(0)

                def validated(step: int) -> None:
                    videos(step)
                    build_report(self.output_dir)
                    webhook.send(f"validation at step {step} of {steps}", event="validation", step=step)

                trainer.validate = validated if renderer is not None else None
                trainer.checkpointed = lambda path, step: self._checkpointed(shipper, webhook, roles, ema, data, step)
                self.accelerator.wait_for_everyone()
                webhook.send(f"training starts at step {trainer.step} of {steps}", event="start")
                trainer.run()
            if trainer.interrupted:
                self.say(f"Interrupted at step {trainer.step}; the same command goes on from there.")
                tracking.event("interrupted", step=trainer.step)
                return INTERRUPTED
            if self.main:
                self._finish(shipper, webhook, roles, ema, data, scenes, tracking, trainer)
            self.accelerator.wait_for_everyone()
        except BaseException as error:
            tracking.event("error", message=f"{type(error).__name__}: {error}")
            webhook.send(f"the run stopped: {type(error).__name__}", event="error")
            raise
        finally:
            data.close()
            tracking.close()
            webhook.close()
            if self.main:
                build_report(self.output_dir)
        return 0

    # --- parts ------------------------------------------------------------------------------------------------------

    def _prepare_data(self) -> PreparedData:
        """The main process fills the caches, the others then find everything there."""
        prompts = [] if self.config.validation_disable else list(self.assembly.loaded.validation_prompts.values())
        with self.accelerator.main_process_first():
            return self.assembly.data(prompts, progress=self.main)

    def _total_steps(self, data: PreparedData) -> int:
        config = self.config
        by_epochs = config.num_train_epochs * data.steps_per_epoch(config.global_batch_size)
        if not config.max_train_steps or not by_epochs:
            return config.max_train_steps or by_epochs
        return min(config.max_train_steps, by_epochs) if config.strict_epoch_limit else config.max_train_steps

    def _optimizers(self, roles: Roles, method: DMD | Supervised, steps: int) -> dict[str, RoleOptimizer]:
        config = self.config
        interval = config.dmd.generator_update_interval if config.distillation_method else 1
        optimizer = build_optimizer(
            config.optimizer,
            roles.parameters["student"],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        schedule = build_schedule(
            config.lr_scheduler,
            optimizer,
            updates=max(1, method.updates("student", steps)),
            warmup=math.ceil(config.lr_warmup_steps / interval),
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
            lr_end=config.lr_end,
        )
        optimizers = {
            "student": RoleOptimizer(
                roles.parameters["student"], optimizer, schedule, config.max_grad_norm, config.grad_clip_method
            )
        }
        if config.distillation_method is not None:
            dmd = config.dmd
            critic = build_optimizer(
                config.optimizer,
                roles.parameters["critic"],
                lr=dmd.fake_score_lr,
                betas=dmd.fake_score_betas,
                weight_decay=dmd.fake_score_weight_decay,
                eps=dmd.fake_score_eps,
            )
            critic_schedule = build_schedule(
                dmd.fake_score_lr_scheduler,
                critic,
                updates=max(1, method.updates("critic", steps)),
                warmup=dmd.fake_score_lr_warmup_steps,
                num_cycles=config.lr_num_cycles,
                power=config.lr_power,
                lr_end=config.lr_end,
            )
            optimizers["critic"] = RoleOptimizer(
                roles.parameters["critic"], critic, critic_schedule, dmd.fake_score_grad_clip
            )
        return optimizers

    def _ema(self, roles: Roles) -> Ema | None:
        config = self.config
        if not config.use_ema:
            return None
        return Ema(roles.parameters["student"], config.ema_decay, config.ema_update_interval, config.ema_start_step)

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
        return self_test(roles, noise, text, fresh=fresh, shared_numerics=shared)

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

    # --- validation -------------------------------------------------------------------------------------------------

    @contextmanager
    def _rendering(self, scenes: list[Scene], data: PreparedData, tracking: Tracking) -> Iterator[Renderer | None]:
        if not scenes:
            yield None
            return

        def record(row: dict[str, Any]) -> None:
            tracking.event("validation", **row)
            tracking.video(row["step"], f"{row['kind']}/{row['name']}", self.output_dir / row["file"])

        def decode(latents: Tensor) -> Tensor:
            return self.assembly.codec.decode(latents)

        yield Renderer(
            self.output_dir, scenes, data.negative_text, decode, record, self.config.framerate, self.accelerator.device
        )
        self.assembly.codec.unload()

    def _render_references(self, renderer: Renderer, roles: Roles) -> None:
        """Once: the teacher at its own steps and, in distillation, the undistilled model at the student's."""
        if self.config.disable_benchmark:
            return
        with roles.evaluating():
            self.say("Rendering the teacher's reference videos …")
            renderer.render(roles.teacher, self.assembly.teacher_sampler, "teacher", 0)
            if self.assembly.schedule.ladder:
                renderer.render(roles.teacher, self.assembly.student_sampler, "undistilled", 0)

    def _render_student(
        self, renderer: Renderer | None, roles: Roles, ema: Ema | None, tracking: Tracking, step: int
    ) -> None:
        assert renderer is not None
        sampler = self.assembly.student_sampler
        wanted = self.config.ema_validation if ema is not None else "none"
        with roles.evaluating():
            if wanted in ("none", "comparison"):
                renderer.render(roles.student, sampler, "student", step)
            if wanted in ("ema_only", "comparison"):
                assert ema is not None
                with ema.swap():
                    renderer.render(roles.student, sampler, "student-ema", step)

    # --- results ----------------------------------------------------------------------------------------------------

    def _checkpointed(
        self, shipper: Shipper, webhook: Webhook, roles: Roles, ema: Ema | None, data: PreparedData, step: int
    ) -> None:
        webhook.send(f"checkpoint at step {step}", event="checkpoint", step=step)
        if self.config.push_checkpoints_to_hub:
            folder = self.output_dir / "export-checkpoints" / f"checkpoint-{step:06d}"
            with ema.swap() if ema is not None else nullcontext():
                shipper.export(folder, roles, data, steps=step, averaged=ema is not None)
            shipper.upload(folder, path_in_repo=folder.name)

    def _finish(
        self, shipper: Shipper, webhook: Webhook, roles: Roles, ema: Ema | None, data: PreparedData,
        scenes: list[Scene], tracking: Tracking, trainer: Trainer,
    ) -> None:  # fmt: skip
        """Exports what would be used (the average, where there is one), loads it back, publishes, sums up."""
        folder = self.output_dir / "export"
        with ema.swap() if ema is not None else nullcontext():
            shipper.export(folder, roles, data, steps=trainer.optimizers["student"].updates, averaged=ema is not None)
            reference = shipper.reference(roles, *check_text(data))
        verdict = shipper.load_back(folder, reference)
        tracking.event(
            "export", step=trainer.step, passed=verdict.passed, max_relative_error=verdict.max_relative_error
        )
        if not verdict.passed:
            raise RuntimeError(f"the export does not reproduce the training sampler: {verdict.message}")
        self.say(f"Export loaded back: {verdict.message}")
        if self.config.push_to_hub:
            shipper.upload(folder)
        for line in shipper.close():
            self.say(line)
        tracking.event("finish", step=trainer.step, seconds=time.perf_counter() - self.began)
        report = build_report(self.output_dir)
        webhook.send("training finished", event="finish", step=trainer.step)
        peak = peak_bytes(self.accelerator.device) / 1e9
        self.say(f"Finished in {time.perf_counter() - self.began:.0f} s, peak memory {peak:.1f} GB")
        self.say(f"  student  {folder}")
        self.say(f"  report   {report}")
