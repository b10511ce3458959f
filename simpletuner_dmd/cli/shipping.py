"""What leaves a run: the export, its load-back through stock diffusers, and the upload."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from simpletuner_dmd import __version__
from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.other_expert import load_other, paired
from simpletuner_dmd.config import UserError
from simpletuner_dmd.config.flavours import FLAVOURS
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.flow import Denoiser, Schedule, TextEmbedding, euler_sigmas
from simpletuner_dmd.publish.dialects import fold_alpha
from simpletuner_dmd.publish.export import FORMATS, LowNoiseLora, dtype_name, export_full, export_lora
from simpletuner_dmd.publish.extract import Extraction, extract_lora
from simpletuner_dmd.publish.hub import QUEUE, HubUploader, Queue, check_access, push_command
from simpletuner_dmd.publish.info import ExportInfo, NativeExpert
from simpletuner_dmd.publish.load_back import Base, Reference
from simpletuner_dmd.publish.lycoris import export_lycoris, folded
from simpletuner_dmd.publish.merged import MergedBase
from simpletuner_dmd.publish.read_adapter import AdapterFile
from simpletuner_dmd.publish.record import copy_videos, last_health, shown_config
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.lycoris import LycorisSpec, LycorisSwitch
from simpletuner_dmd.wan.roles import Roles

log = logging.getLogger(__name__)

RAW = "raw"  # in an export of the average: the folder of the weights as trained
CHECK_STEPS = 4  # Euler steps of the comparison for a supervised student, which has no ladder of its own


class Shipper:
    """Exports, checks and uploads the student of one run (main process only).

    step: of the checkpoint that is exported, where it may not be the newest: videos and health are those of that time.
    """

    def __init__(
        self, assembly: Assembly, output_dir: Path, *, publishing: bool = True, step: int | None = None
    ) -> None:
        self.assembly, self.output_dir, self.step = assembly, output_dir, step
        self.config = assembly.config
        self.uploader: HubUploader | None = None
        self.kept: list[str] = []
        if publishing and (self.config.push_to_hub or self.config.push_checkpoints_to_hub):
            self._reach_hub()

    def _reach_hub(self) -> None:
        """Token and write access are tried now: at the end of a run it is late to hear of them."""
        private = self.config.model_card_private
        access = check_access(self.repository, private=private)
        if not access.usable:
            log.warning("push_to_hub is on but %s. The result stays in %s; push it later with: %s", access.problem,
                        self.output_dir / "export", push_command(self.output_dir))  # fmt: skip
            return
        if access.problem:
            log.warning("push_to_hub: %s", access.problem)
        self.uploader = HubUploader(access.repo_id, self.output_dir, private=private)
        if left := self.uploader.resume():
            log.info("Uploading %d folder%s that an earlier run left", left, "s" if left > 1 else "")

    @property
    def repository(self) -> str:
        return self.config.hub_model_id or self.config.tracker_run_name

    def info(self, data: PreparedData | None, *, steps: int, averaged: bool) -> ExportInfo:
        config, assembly = self.config, self.assembly
        prompts = tuple(assembly.loaded.validation_prompts.values())
        sizes = tuple((w, h, f) for w, h in config.validation_resolution for f in config.validation_num_video_frames)
        return ExportInfo(
            run_name=config.tracker_run_name,
            method=config.distillation_method or "",
            schedule=self._schedule(config.validation_num_inference_steps),
            renoise=assembly.student_sampler.renoise,
            blocks=assembly.block_sampling,
            boundary=config.distillation_config.boundary if config.distillation_config else 0.0,
            native=self._native,
            vae_scale=(assembly.geometry.spatial, assembly.geometry.temporal),
            base=assembly.source.base,
            flavour=config.model_flavour,
            base_hash=assembly.source.fingerprint("transformer"),
            model_type=config.model_type,
            guidance=assembly.student_sampler.guidance,
            sampling_steps=config.validation_num_inference_steps,
            trained_sizes=self._trained_sizes(data),
            tokenizer_max_length=config.tokenizer_max_length,
            train_steps=steps,
            weights="ema" if averaged else "raw",
            framerate=config.framerate,
            prompt=prompts[0] if prompts else ExportInfo.prompt,
            validation_prompts=prompts,
            validation_seed=config.validation_seed,
            validation_sizes=sizes,
            tool_version=__version__,
            note=config.model_card_note,
            hub_repo=self.uploader.repo_id if self.uploader else config.hub_model_id or "",
            adapter=config.lora_type,
            teacher_lora=assembly.teacher_lora.record() if assembly.teacher_lora else None,
            teacher=self._teacher(),
            health=last_health(self.output_dir, self.step),
            config=shown_config(assembly.loaded.options()),
        )

    def _teacher(self) -> str:
        """The base under guidance, where a teacher was followed."""
        base, options = Path(self.assembly.source.base), self.config.distillation_config
        guidance = getattr(options, "real_score_guidance_scale", None)
        if options is None:
            return ""
        name = base.name if base.is_dir() else str(base)
        return name if guidance is None else f"{name}, guidance {guidance:g}"

    @property
    def _native(self) -> NativeExpert | None:
        flavour, partner = self.config.flavour, self.assembly.partner
        if flavour.expert is None or flavour.boundary is None:
            return None
        # Without a ladder there is no sampler.py that could put the other expert in its place.
        kept = partner is not None and bool(self.assembly.schedule.ladder)
        return NativeExpert(flavour.expert, flavour.boundary, partner.folder if partner and kept else None)

    def _schedule(self, steps: int) -> Schedule:
        """As trained. A causal student without a ladder ships with Euler steps: no stock solver works by blocks."""
        schedule = self.assembly.schedule
        if schedule.ladder or self.assembly.block_sampling is None:
            return schedule
        return Schedule(schedule.shift, euler_sigmas(steps, schedule.shift))

    def _trained_sizes(self, data: PreparedData | None) -> tuple[tuple[int, int, int], ...]:
        geometry = self.assembly.geometry
        shapes = data.latent_shapes() if data is not None else []
        return tuple(
            (width * geometry.spatial, height * geometry.spatial, (frames - 1) * geometry.temporal + 1)
            for _, frames, height, width in shapes
        )

    def export(
        self, folder: Path, roles: Roles, data: PreparedData | None, *, steps: int, averaged: bool,
        formats: Sequence[str] = (), raw_beside: bool = False,
    ) -> None:  # fmt: skip
        """Writes the student as it stands (inside an EMA swap: the average). formats: of an adapter; default: as the
        run's settings say. raw_beside: `export_raw` is called too.

        Raises UserError where ComfyUI's is asked for and there is none.
        """
        if "comfyui" in formats and (reason := self._not_for_comfyui(roles)):
            raise UserError(f"this student cannot be written for ComfyUI: {reason}", key="--to",
                            fix="export it without `--to comfyui`")  # fmt: skip
        info = self.info(data, steps=steps, averaged=averaged)
        info = replace(info, raw_beside=raw_beside, videos=copy_videos(self.output_dir, folder, self.step))
        self._write(folder, roles, info, formats)

    def export_raw(self, folder: Path, roles: Roles, data: PreparedData | None, *, steps: int) -> None:
        """Beside an exported average: the weights as trained, under a name that says so."""
        info = self.info(data, steps=steps, averaged=False)
        self._write(folder / RAW, roles, replace(info, run_name=f"{info.run_name}-{RAW}"), ())

    def _write(self, folder: Path, roles: Roles, info: ExportInfo, formats: Sequence[str]) -> None:
        adapter = roles.adapters.get("student")
        if adapter is None:
            export_full(folder, roles.student.transformer, info, low_noise=self._detail_lora(roles))
            return
        formats = formats or (FORMATS if self.config.lora_format == "both" else (self.config.lora_format,))
        if self._not_for_comfyui(roles):
            formats = ("diffusers",)
        if isinstance(adapter, LycorisSpec):
            self._export_lycoris(folder, roles, adapter, info, formats)
            return
        if info.boundary and "diffusers" not in formats:  # what switches the experts reads those
            formats = ("diffusers", *formats)
        low_noise = roles.tensors("detail") if "detail" in roles.parameters else None
        export_lora(
            folder, roles.tensors("student"), rank=adapter.rank, alpha=adapter.alpha, info=info, formats=formats,
            low_noise=low_noise,
        )  # fmt: skip

    def _not_for_comfyui(self, roles: Roles) -> str:
        """Why ComfyUI could not use the student's adapter; empty where it can."""
        adapter = roles.adapters.get("student")
        if adapter is None:
            return "it is a whole transformer; `simpletuner extract-lora` makes a LoRA of it"
        if isinstance(adapter, AdapterSpec) and adapter.dora:
            return "ComfyUI has no DoRA of this kind"
        return "ComfyUI does not sample block by block" if self.assembly.block_sampling is not None else ""

    def export_merged(
        self, folder: Path, roles: Roles, data: PreparedData | None, *, steps: int, averaged: bool
    ) -> bool:
        """Writes the student as a whole transformer: the unquantised base with its adapter merged in, streamed.

        Returns whether it can give what training samples: not where one of them rounds the weights.
        """
        adapter = roles.adapters.get("student")
        if adapter is None or "detail" in roles.parameters:
            kind = "it is a whole transformer already" if adapter is None else "two experts share one base"
            raise UserError(f"this student cannot be merged: {kind}", key="--to", fix="export it without `--to merged`")
        info = self.info(data, steps=steps, averaged=averaged)
        merged = MergedBase(self.assembly.source, [*self._fine_tune(), (self._adapter_file(roles, adapter), 1.0)])
        videos = copy_videos(self.output_dir, folder, self.step)
        info = replace(info, model_type="full", adapter="standard", videos=videos)
        export_full(folder, merged.write, info, dtype=merged.dtype)
        exact = self.assembly.dtype == merged.dtype == torch.float32
        return exact and self.config.base_model_precision == "no_change"

    def export_extracted(
        self, folder: Path, roles: Roles, data: PreparedData | None, rank: int, *, steps: int, averaged: bool
    ) -> Extraction:
        """Writes the LoRA that comes nearest to a full student, marked as lossy, with its error."""
        base = MergedBase(self.assembly.source, self._fine_tune())
        student = roles.student.transformer.state_dict()
        found = extract_lora(student, (entry for file in base.files for entry in base.tensors(file)), rank)
        info = self.info(data, steps=steps, averaged=averaged)
        info = replace(info, run_name=f"{info.run_name}-lora-rank{rank}", model_type="lora", adapter="standard",
                       extracted=found.as_dict())  # fmt: skip
        formats = FORMATS if info.blocks is None else ("diffusers",)
        export_lora(folder, found.tensors, rank=rank, alpha=rank, info=info, formats=formats)
        return found

    def _fine_tune(self) -> list[tuple[AdapterFile, float]]:
        merge = self.assembly.teacher_lora
        return [(merge.adapter, merge.strength)] if merge else []

    def _adapter_file(self, roles: Roles, adapter: AdapterSpec | LycorisSpec) -> AdapterFile:
        """The student's adapter at strength 1."""
        path = Path(self.config.tracker_run_name)
        if isinstance(adapter, AdapterSpec):
            tensors = fold_alpha(roles.tensors("student"), rank=adapter.rank, alpha=adapter.alpha)
            return AdapterFile(path, "lora", tensors)
        switch = roles.student.switch
        assert isinstance(switch, LycorisSwitch)
        tensors = folded(roles.tensors("student"), switch.constants("student"), adapter.options.multiplier)
        return AdapterFile(path, "lycoris", tensors)

    def _detail_lora(self, roles: Roles) -> LowNoiseLora | None:
        """The second expert beside a full student."""
        adapter = roles.adapters.get("detail")
        if adapter is None:
            return None
        assert isinstance(adapter, AdapterSpec), "beside a full student the detail expert is a LoRA"
        return LowNoiseLora(roles.tensors("detail"), adapter.rank, adapter.alpha)

    def _export_lycoris(
        self, folder: Path, roles: Roles, adapter: LycorisSpec, info: ExportInfo, formats: Sequence[str]
    ) -> None:
        switch = roles.student.switch
        assert isinstance(switch, LycorisSwitch)
        export_lycoris(
            folder,
            roles.tensors("student"),
            alphas=switch.constants("student"),
            multiplier=adapter.options.multiplier,
            rank=adapter.options.linear_dim,
            description=adapter.options.model_dump(mode="json", exclude_defaults=True) | {"algo": adapter.options.algo},
            info=info,
            formats=formats,
            low_noise=(roles.tensors("detail"), switch.constants("detail")) if "detail" in roles.parameters else None,
        )

    def reference(self, roles: Roles, text: TextEmbedding, latent_shape: tuple[int, int, int, int]) -> Reference:
        """Samples the student by training's own sampler, in the precision the export will be loaded in."""
        config, sampler = self.config, self.assembly.student_sampler
        schedule, renoise = self._schedule(config.validation_num_inference_steps), sampler.renoise
        if not schedule.ladder:
            schedule = Schedule(schedule.shift, euler_sigmas(CHECK_STEPS, schedule.shift))
        shape, seed, device = (1, *latent_shape), config.validation_seed, self.assembly.device
        autocast, roles.student.autocast = roles.student.autocast, None
        try:
            with roles.evaluating():
                text = text.to(device)
                student = self._student(roles)
                latents = Sampler(schedule, renoise, blocks=sampler.blocks)(student, text, text, shape, seed, device)
        finally:
            roles.student.autocast = autocast
        return Reference(
            prompt_embeds=text.rows_BLD,
            latents=latents,
            seed=seed,
            schedule=schedule,
            renoise=renoise,
            max_sequence_length=config.tokenizer_max_length,
            base=self._base(),
            vae_scale=(self.assembly.geometry.spatial, self.assembly.geometry.temporal),
            device=str(device),
            timestep_per_token=config.flavour.expand_timesteps,
        )

    def _student(self, roles: Roles) -> Denoiser:
        """What the export is compared with: both experts of a pair, else this run's own network for the whole way."""
        partner = self.assembly.partner
        if partner is None or not self.assembly.schedule.ladder:
            return self.assembly.sampled_student(roles)
        return paired(self.assembly, roles.student, load_other(self.assembly, partner))

    def _base(self) -> Base | None:
        """What the exported files go on: nothing for a full student, but the second expert's adapter has a base."""
        config, assembly, native = self.config, self.assembly, self._native
        pair = native is not None and native.other is not None
        if config.model_type == "full" and not pair and "detail" not in assembly.adapters():
            return None
        on = str(assembly.device) if config.quantize_via == "accelerator" else None
        base = replace(self.plain_base, precision=config.base_model_precision, quantised_on=on)
        if native is None or not pair:
            return base
        other = assembly.source.other_expert(FLAVOURS[str(config.flavour.partner)].transformer)
        return replace(base, other=other.stock_arguments(), expert=native.expert,
                       boundary=native.boundary)  # fmt: skip

    @property
    def plain_base(self) -> Base:
        """The base without quantisation."""
        merge = self.assembly.teacher_lora
        fine_tune = (merge.adapter, merge.strength) if merge else None
        return Base(self.assembly.source.stock_arguments(), dtype_name(self.assembly.dtype), teacher_lora=fine_tune)

    def upload(self, folder: Path, path_in_repo: str = "", *, temporary: bool = False) -> None:
        """Uploads in the background, or lists the folder for the command that does it later."""
        message = f"Upload {path_in_repo or 'export'}"
        if self.uploader is not None:
            self.uploader.upload(folder, path_in_repo=path_in_repo, message=message, temporary=temporary)
            return
        Queue(self.output_dir / QUEUE).enlist(folder, path_in_repo, message, temporary=temporary)
        self.kept = [f"not uploaded; push it later with: {push_command(self.output_dir)}"]

    def close(self) -> list[str]:
        """Waits for the uploads; lines worth printing."""
        if self.uploader is None:
            return self.kept
        self.uploader.close()
        return [*self.kept, *self.uploader.failures, *(f"uploaded {folder}" for folder in self.uploader.uploaded)]


def check_text(data: PreparedData) -> tuple[TextEmbedding, tuple[int, int, int, int]]:
    """What a load-back is compared on: the first sample of the data, at the smallest shape trained on."""
    batch = data.micro_batch(0, 0, 0, micro_batch_size=1, accumulation=1, world=1)
    return batch.text, data.latent_shapes()[-1]
