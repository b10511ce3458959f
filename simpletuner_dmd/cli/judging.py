"""How a run is judged: renders on all processes, records on the main one, measures, turns lights, marks the best."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.other_expert import whole_student, whole_teacher
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.durable import write_json
from simpletuner_dmd.training.checkpoint import checkpoint_name, mark_best
from simpletuner_dmd.training.tracking import Tracking
from simpletuner_dmd.training.trainer import CHECKPOINTS, Trainer
from simpletuner_dmd.validation.evaluation import CriticCheck, check_critic, denoising_losses, evaluation_row
from simpletuner_dmd.validation.health import GREEN, RED, Knobs, Light, Signs, judge, score, worst
from simpletuner_dmd.validation.measures import Specimen, against, rms_difference, summary
from simpletuner_dmd.validation.render import FOLDER, Renderer, Rendering, Scene
from simpletuner_dmd.validation.report_data import recorded
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.roles import Roles

log = logging.getLogger(__name__)

REFERENCES = "references.json"
"""In validation/: what the teacher's and the undistilled model's videos measured, for the steps to come."""


@dataclass
class Judge:
    """What `simpletuner train` asks about its student. Every process calls every method, at the same steps."""

    assembly: Assembly
    accelerator: Any
    output_dir: Path
    roles: Roles
    trainer: Trainer
    data: PreparedData
    tracking: Tracking
    scenes: list[Scene]
    say: Callable[[str], None]
    references: dict[str, dict[str, Any]] = field(default_factory=dict)
    _before: dict[int, Tensor] = field(default_factory=dict)  # the trained student's samples, one validation ago
    _judged_at: int = 0
    _colours: dict[str, str] = field(default_factory=dict)
    _best: float = float("inf")
    _eval_loss: float | None = None
    _eval_at: int = -1

    def __post_init__(self) -> None:
        config, rank, world = self.assembly.config, self.accelerator.process_index, self.accelerator.num_processes
        codec = self.assembly.codec
        self.renderer = Renderer(
            self.output_dir, self.scenes, self.data.negative_text, codec.decode, config.framerate,
            self.assembly.device, unload=codec.unload, share=range(rank, len(self.scenes), world),
        )  # fmt: skip
        if self.trainer.step and self.accelerator.is_main_process:
            self._recall()

    # --- rendering --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Before the first step: the reference videos, where they are not there yet, and the student if asked."""
        if not self.assembly.config.disable_benchmark:
            self._render_references()
        teacher = self.references.get("teacher")
        if teacher is not None and self.assembly.config.distillation_config is not None:
            # Known before the first step: a reference that is over-exposed makes a student that is.
            signs = Signs({}, {}, reference_spread=float(teacher["latent_std"]))
            self._say_changes(self.trainer.step, judge(signs, self.assembly.config.health_bands, self._knobs()))
        if self.assembly.config.validation_on_startup and self.trainer.step == 0:
            self.validate(0)

    def validate(self, step: int) -> str | None:
        """Renders and measures the student. Returns why the run must stop, the same on every process, or None."""
        wanted = self.assembly.config.ema_validation if self.trainer.ema is not None else "none"
        summaries = {}
        with (
            self.roles.evaluating(),
            whole_student(self.assembly, self.roles, self.assembly.validation_sampler) as (student, sampler),
        ):
            trained: dict[int, Tensor] = {}
            # In distillation the trained student is looked at even where its average is what is rendered: the critic
            # follows it, and the lights ask how far it moves. A ladder is cheap to walk.
            if wanted != "ema_only" or self.assembly.schedule.ladder:
                trained, failures = self.renderer.sample(student, sampler)
                self._report(step, failures)
            if wanted in ("none", "comparison"):
                rendering = self.renderer.write(trained, "student", step, sampler.forwards)
                summaries["student"] = self._record(rendering, "student", step)
            if wanted in ("ema_only", "comparison"):
                with self._average():
                    rendering = self.renderer.render(student, sampler, "student-ema", step)
                summaries["student-ema"] = self._record(rendering, "student-ema", step)
            critic = self._check_critic(trained)
        change = self._change(trained)
        shipped = summaries.get("student-ema") or summaries.get("student")
        reason: list[str | None] = [None]
        if self.accelerator.is_main_process:
            reason = [self._judge(step, shipped, critic, change)]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(reason, src=0)
        return reason[0]

    def _render_references(self) -> None:
        """Once: the teacher at its own steps and, in distillation, the undistilled model at the student's.

        Again where prompts, sizes or settings are others than those of the videos that are there.
        """
        key = self._reference_key()
        kept: list[Any] = [_read(self.output_dir / FOLDER / REFERENCES)]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(kept, src=0)
        if self.trainer.step and kept[0].get("of") == key:
            self.references = kept[0]["measures"]
            return
        self.say("Rendering the teacher's reference videos …")
        samplers: dict[str, Sampler] = {"teacher": self.assembly.benchmark_sampler}
        if self.assembly.schedule.ladder:
            samplers["undistilled"] = self.assembly.validation_sampler
        step = self.trainer.step
        with self.roles.evaluating(), whole_teacher(self.assembly, self.roles.teacher) as teacher:
            for kind, sampler in samplers.items():
                rendering = self.renderer.render(teacher, sampler, kind, step)
                found = self._record(rendering, kind, step)
                if found is not None:
                    self.references[kind] = found
        if self.accelerator.is_main_process and set(self.references) == set(samplers):
            write_json(self.output_dir / FOLDER / REFERENCES, {"of": key, "measures": self.references})

    def _reference_key(self) -> dict[str, Any]:
        teacher = self.assembly.benchmark_sampler
        return {
            "model": self.assembly.source.fingerprint("transformer"),
            "scenes": [[scene.file_stem, scene.prompt] for scene in self.scenes],
            "steps": teacher.steps,
            "guidance": teacher.guidance,
            "solver": teacher.solver,
            "shift": teacher.schedule.shift,
            "ladder": list(self.assembly.schedule.ladder),
        }

    @contextmanager
    def _average(self) -> Iterator[None]:
        with nullcontext() if self.trainer.ema is None else self.trainer.ema.swap():
            yield

    # --- recording --------------------------------------------------------------------------------------------------

    def _record(self, mine: Rendering, kind: str, step: int) -> dict[str, Any] | None:
        """Rows of all processes' videos, and of what they measured together; None on other processes or without any."""
        whole = Rendering()
        for part in self._gathered(mine):
            whole.merge(part)
        self._report(step, whole.failures, gathered=True)
        if not self.accelerator.is_main_process or not whole.specimens:
            return None
        for row in whole.rows:
            self.tracking.event("validation", **row)
            path = self.output_dir / row["file"]  # trackers keep one video per name and step; a prompt may have several
            self.tracking.video(step, f"{kind}/{path.stem.removesuffix('-ema')}", path)
        specimens: list[Specimen] = [whole.specimens[number] for number in sorted(whole.specimens)]
        found = summary(specimens)
        teacher = self.references.get("teacher")
        relative = {} if teacher is None or kind == "teacher" else {"of_teacher": against(found, teacher)}
        self.tracking.measured("measures", step, kind=kind, videos=len(specimens), **found, **relative)
        return found

    def _report(self, step: int, failures: list[str], *, gathered: bool = False) -> None:
        """A failed video is a warning and an event; the weights are what they were, and the run goes on."""
        everyones = failures if gathered else [line for part in self._gathered(failures) for line in part]
        if not self.accelerator.is_main_process:
            return
        for line in everyones:
            log.warning("validation at step %d: %s; the run goes on.", step, line)
            self.tracking.event("validation_failed", step=step, message=line)

    def _gathered(self, mine: Any) -> list[Any]:
        return gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]

    # --- losses -----------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> None:
        """The stable evaluation loss on the held-out videos."""
        config = self.assembly.config
        assert config.eval_dataset_id is not None
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = self.data.held_out(config.eval_dataset_id, config.num_eval_images)[rank::world]
        with self.roles.evaluating():
            totals = denoising_losses(
                self.assembly.sampled_student(self.roles), mine, config.eval_timesteps, self.assembly.schedule.shift,
                self.assembly.device,
            )  # fmt: skip
        totals = torch.stack([torch.as_tensor(part) for part in self._gathered(totals)]).sum(dim=0)
        if self.accelerator.is_main_process:
            row = evaluation_row(totals)
            self._eval_loss, self._eval_at = row["eval_loss"], step
            self.tracking.measured("evaluation", step, **row)

    def _check_critic(self, samples: Mapping[int, Tensor]) -> CriticCheck | None:
        critic, options = self.roles.critic, self.assembly.config.critic
        if critic is None or options is None:
            return None
        found = CriticCheck()
        chosen = [(number, latents, self.scenes[number].text) for number, latents in samples.items()]
        shift = float(getattr(options, "timestep_shift", 1.0))
        mine = check_critic(critic, self.roles.teacher, chosen, shift, self.assembly.device)
        for part in self._gathered(mine):
            found.merge(part)
        return found if found.count else None

    def _change(self, samples: Mapping[int, Tensor]) -> float | None:
        """How far the samples moved since the validation before, in their standard deviations."""
        pairs = [(latents, self._before[number]) for number, latents in samples.items() if number in self._before]
        mine = [rms_difference(now, before) / max(float(before.std()), 1e-6) for now, before in pairs]
        self._before = dict(samples)
        everyones = [value for part in self._gathered(mine) for value in part]
        return sum(everyones) / len(everyones) if everyones else None

    # --- lights -----------------------------------------------------------------------------------------------------

    def _judge(self, step: int, shipped: dict[str, Any] | None, critic: CriticCheck | None, change: float | None
               ) -> str | None:  # fmt: skip
        config, teacher = self.assembly.config, self.references.get("teacher")
        if critic is not None:
            self.tracking.measured("critic", step, **critic.row())
        rungs = self._rungs()
        if rungs is not None:
            self._judged_at = step
        if shipped is None or config.distillation_config is None:
            self._fine_tuned(step)
            return None
        relative = {} if teacher is None else against(shipped, teacher)
        undistilled = self.references.get("undistilled")
        start = {} if teacher is None or undistilled is None else against(undistilled, teacher)
        spread = None if teacher is None else float(teacher["latent_std"])
        signs = Signs(relative, start, None if critic is None else critic.reach, change, rungs, spread)
        lights = judge(signs, config.health_bands, self._knobs()) if step >= self._grace else []
        value = score(relative, lights) if relative and lights else None
        best = value is not None and self._mark_best(step, value)
        self.tracking.event("health", step=step, colour=worst(lights), score=value, best=best,
                            lights=[light.as_dict() for light in lights])  # fmt: skip
        self._say_changes(step, lights)
        red = [light for light in lights if light.colour == RED]
        if not red or config.health_on_red != "stop":
            return None
        return "; ".join(light.sentence for light in red)

    @property
    def _grace(self) -> int:
        wanted = self.assembly.config.health_grace_steps
        return max(1, self.trainer.settings.max_steps // 10) if wanted is None else wanted

    def _fine_tuned(self, step: int) -> None:
        """A fine-tune is meant to leave its base, so no light compares them; the best is by the evaluation loss."""
        if self._eval_loss is not None and self._eval_at == step:
            best = self._mark_best(step, self._eval_loss)
            self.tracking.event("health", step=step, colour=GREEN, score=self._eval_loss, best=best, lights=[])

    def _knobs(self) -> Knobs:
        options: Any = self.assembly.config.distillation_config
        return Knobs(
            guidance=getattr(options, "real_score_guidance_scale", None),
            interval=getattr(options, "generator_update_interval", None),
            learning_rate=self.assembly.config.learning_rate,
        )

    def _say_changes(self, step: int, lights: list[Light]) -> None:
        """Prints a light when its colour is another than before; the first time, only where it is not green."""
        for light in lights:
            if light.colour != self._colours.get(light.name, "green"):
                self.say(f"step {step}: health {light.colour}, {light.name}: {light.sentence}")
            self._colours[light.name] = light.colour

    def _rungs(self) -> tuple[int, int] | None:
        """(steps of the ladder that carried a gradient since this was last asked, all of them), from the log; None
        while there are too few updates to tell."""
        rows = [row for row in recorded(self.output_dir, "step") if row["step"] > self._judged_at]
        exits = [row["exit_rung"] for row in rows if row.get("exit_rung") is not None]
        rungs = len(self.assembly.schedule.ladder)
        # Of few updates some steps may be missing by chance: of 18 updates one of three is, in 0.2% of all cases.
        if not rungs or len(exits) < 6 * rungs:
            return None
        # Blocks of a causal student leave at steps of their own: a mean that is no whole number is several of them.
        seen = {round(value) for value in exits} if all(float(value).is_integer() for value in exits) else range(rungs)
        return len(seen), rungs

    def _mark_best(self, step: int, value: float) -> bool:
        """Names the checkpoint of this step the best, if there is one and none before scored lower."""
        root = self.output_dir / CHECKPOINTS
        checkpoint = root / checkpoint_name(step)
        if value >= self._best or not checkpoint.is_dir():
            return False
        self._best = value
        mark_best(root, checkpoint)
        return True

    def _recall(self) -> None:
        """What the log of the steps before a resume says."""
        for row in recorded(self.output_dir, "health"):
            self._judged_at = row["step"]
            self._colours = {light["name"]: light["colour"] for light in row["lights"]}
            if row.get("best"):
                self._best = row["score"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
