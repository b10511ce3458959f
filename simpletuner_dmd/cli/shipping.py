"""What leaves a run: the export, its load-back through stock diffusers, and the upload."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from simpletuner_dmd import __version__
from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.flow import Schedule, TextEmbedding, euler_sigmas
from simpletuner_dmd.publish.export import LowNoiseLora, export_full, export_lora
from simpletuner_dmd.publish.hub import HubUploader, check_access, push_command
from simpletuner_dmd.publish.info import ExportInfo
from simpletuner_dmd.publish.load_back import LoadBack, check_export
from simpletuner_dmd.publish.lycoris import export_lycoris
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.loading import load_pipeline
from simpletuner_dmd.wan.lycoris import LycorisSpec, LycorisSwitch
from simpletuner_dmd.wan.roles import Roles

log = logging.getLogger(__name__)

CHECK_STEPS = 4  # Euler steps of the comparison for a supervised student, which has no ladder of its own


@dataclass(frozen=True)
class Reference:
    """What training's own sampler makes of one prompt, to be reproduced from the exported files."""

    text: TextEmbedding
    shape: tuple[int, ...]
    seed: int
    schedule: Schedule
    renoise: str
    latents: Tensor


class Shipper:
    """Exports, checks and uploads the student of one run (main process only)."""

    def __init__(self, assembly: Assembly, output_dir: Path) -> None:
        self.assembly, self.output_dir = assembly, output_dir
        self.config = assembly.config
        self.uploader: HubUploader | None = None
        self.kept: list[str] = []
        config = self.config
        if config.push_to_hub or config.push_checkpoints_to_hub:
            warning = check_access(self.repository, output_dir / "export")
            if warning is None:
                self.uploader = HubUploader(self.repository, private=config.model_card_private)
            else:
                log.warning(warning)

    @property
    def repository(self) -> str:
        return self.config.hub_model_id or self.config.tracker_run_name

    def info(self, data: PreparedData | None, *, steps: int, averaged: bool) -> ExportInfo:
        config, assembly = self.config, self.assembly
        prompts = tuple(assembly.loaded.validation_prompts.values())
        sizes = tuple((w, h, config.validation_num_video_frames) for w, h in config.validation_resolution)
        return ExportInfo(
            run_name=config.tracker_run_name,
            method=config.distillation_method or "",
            schedule=self._schedule(config.validation_num_inference_steps),
            renoise=assembly.student_sampler.renoise,
            blocks=assembly.block_sampling,
            boundary=config.distillation_config.boundary if config.distillation_config else 0.0,
            vae_scale=(assembly.geometry.spatial, assembly.geometry.temporal),
            base=assembly.source.base,
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
            hub_repo=config.hub_model_id or "",
            adapter=config.lora_type,
            teacher_lora=assembly.teacher_lora.record() if assembly.teacher_lora else None,
        )

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

    def export(self, folder: Path, roles: Roles, data: PreparedData | None, *, steps: int, averaged: bool) -> None:
        """Writes the student as it stands (inside an EMA swap: the average)."""
        info = self.info(data, steps=steps, averaged=averaged)
        adapter = roles.adapters.get("student")
        if adapter is None:
            export_full(folder, roles.student.transformer, info, low_noise=self._detail_lora(roles))
            return
        formats = ("diffusers", "comfyui") if self.config.lora_format == "both" else (self.config.lora_format,)
        if isinstance(adapter, LycorisSpec):
            self._export_lycoris(folder, roles, adapter, info, formats)
            return
        if adapter.dora or info.blocks is not None:  # ComfyUI has no DoRA of this kind, and no block-wise sampling
            formats = ("diffusers",)
        low_noise = roles.tensors("detail") if "detail" in roles.parameters else None
        export_lora(
            folder, roles.tensors("student"), rank=adapter.rank, alpha=adapter.alpha, info=info, formats=formats,
            low_noise=low_noise,
        )  # fmt: skip

    def _detail_lora(self, roles: Roles) -> LowNoiseLora | None:
        """The second expert beside a full student."""
        adapter = roles.adapters.get("detail")
        if adapter is None:
            return None
        assert isinstance(adapter, AdapterSpec), "beside a full student the detail expert is a LoRA"
        return LowNoiseLora(roles.tensors("detail"), adapter.rank, adapter.alpha)

    def _export_lycoris(
        self, folder: Path, roles: Roles, adapter: LycorisSpec, info: ExportInfo, formats: tuple[str, ...]
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
        sampler = self.assembly.student_sampler
        schedule, renoise = self._schedule(self.config.validation_num_inference_steps), sampler.renoise
        if not schedule.ladder:
            schedule = Schedule(schedule.shift, euler_sigmas(CHECK_STEPS, schedule.shift))
        shape, seed, device = (1, *latent_shape), self.config.validation_seed, self.assembly.device
        autocast, roles.student.autocast = roles.student.autocast, None
        try:
            with roles.evaluating():
                text = text.to(device)
                student = self.assembly.sampled_student(roles)
                latents = Sampler(schedule, renoise, blocks=sampler.blocks)(student, text, text, shape, seed, device)
        finally:
            roles.student.autocast = autocast
        return Reference(text, shape, seed, schedule, renoise, latents)

    def load_back(self, folder: Path, reference: Reference) -> LoadBack:
        """Whether a fresh stock WanPipeline with the exported files samples what `reference` holds."""
        standard = self.config.lora_type == "standard"  # a LyCORIS file is always there
        if self.config.model_type == "lora" and standard and self.config.lora_format == "comfyui":
            return LoadBack(0.0, True, "not compared: only ComfyUI's file was asked for, which stock diffusers is not")
        # A full student replaces the base, but for the second expert, whose adapter sits on the base of training.
        on_base = self.config.model_type == "lora" or "detail" in self.assembly.adapters()
        transformer = self.assembly.base_transformer(quantised=on_base)
        pipeline = load_pipeline(self.assembly.source, transformer)
        return check_export(
            pipeline,
            folder,
            prompt_embeds=reference.text.rows_BLD,
            shape=reference.shape,
            seed=reference.seed,
            reference_latents=reference.latents,
            schedule=reference.schedule,
            renoise=reference.renoise,
            max_sequence_length=self.config.tokenizer_max_length,
        )

    def upload(self, folder: Path, path_in_repo: str | None = None) -> None:
        """Uploads in the background, or remembers the command that does it later."""
        if self.uploader is None:
            self.kept.append(f"not uploaded; push it later with: {push_command(self.repository, folder)}")
        else:
            self.uploader.upload(folder, path_in_repo=path_in_repo)

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
