"""Puts a run together from its configuration: model parts, data, roles, method. Shared by train, sample and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from simpletuner_dmd.cli.starting import merge_adapter, open_teacher_lora
from simpletuner_dmd.config import LoadedConfig, UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.prepare import prepare
from simpletuner_dmd.distill.dmd import DMD, DMDSettings
from simpletuner_dmd.distill.rollout import RolloutSettings
from simpletuner_dmd.distill.supervised import Supervised, SupervisedSettings
from simpletuner_dmd.flow import TIMESTEPS, Schedule, TextEmbedding
from simpletuner_dmd.publish.read_adapter import AdapterFile
from simpletuner_dmd.validation.render import Scene
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.encoders import TextEncoder, VideoCodec
from simpletuner_dmd.wan.loading import DTYPES, ModelSource, choose_attention, load_transformer, transformer_config
from simpletuner_dmd.wan.lycoris import LycorisSpec
from simpletuner_dmd.wan.quantisation import quantise
from simpletuner_dmd.wan.roles import Roles, build_roles

SUPERVISED_SAMPLING_SHIFT = 5.0  # of Wan's own sampler, where a supervised run sets no shift


@dataclass
class Assembly:
    """The parts of a run, each made at first use on `device`."""

    loaded: LoadedConfig
    device: torch.device

    @property
    def config(self) -> TrainConfig:
        return self.loaded.config

    # --- the model --------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> ModelSource:
        return ModelSource.of(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.mixed_precision]

    @cached_property
    def network(self) -> dict[str, Any]:
        """The transformer's own configuration."""
        return transformer_config(self.source)

    @cached_property
    def codec(self) -> VideoCodec:
        return VideoCodec(self.source, device=self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return TextEncoder(
            self.source,
            dtype=self.dtype,
            precision=self.config.text_encoder_1_precision,
            max_length=self.config.tokenizer_max_length,
            device=self.device,
        )

    @cached_property
    def geometry(self) -> LatentGeometry:
        vae = self.codec.config
        return LatentGeometry(
            channels=self.network["in_channels"],
            spatial=vae["scale_factor_spatial"],
            temporal=vae["scale_factor_temporal"],
            patch=self.network["patch_size"][1],
        )

    def base_transformer(self, *, quantised: bool = True) -> nn.Module:
        """A fresh frozen base, its fine-tune merged in, in the precision of the run, on the device."""
        config = self.config
        transformer = self._with_teacher_lora(load_transformer(self.source, self.dtype))
        if quantised and config.base_model_precision != "no_change":
            quantise(
                transformer, config.base_model_precision, self.device if config.quantize_via == "accelerator" else None
            )
        return transformer.to(self.device)

    def roles(self) -> tuple[Roles, list[str]]:
        """Teacher, student and (in distillation) critic, and lines worth printing."""
        config = self.config
        lora = config.model_type == "lora"
        distilling = config.distillation_method is not None
        full_critic = distilling and config.dmd.fake_score_type == "full"
        base = self.base_transformer()
        notice = choose_attention(base, config.attention_mechanism)
        roles = build_roles(
            base,
            student_adapter=self.student_adapter if lora else None,
            critic_adapter=self.critic_adapter if distilling and not full_critic else None,
            full_student=None if lora else self._full_network(),
            full_critic=self._full_network() if full_critic else None,
            with_critic=distilling,
            gradient_checkpointing=config.gradient_checkpointing,
            autocast=self.dtype if self.dtype != torch.float32 else None,
            seed=config.seed,
        )
        return roles, [notice] if notice else []

    def _full_network(self) -> nn.Module:
        """A network of its own: fp32 master weights, computed in the run's precision by autocast."""
        network = self._with_teacher_lora(load_transformer(self.source, torch.float32)).to(self.device)
        choose_attention(network, self.config.attention_mechanism)
        return network

    @cached_property
    def teacher_lora(self) -> tuple[AdapterFile, float] | None:
        """The fine-tune that is part of the base, and its strength."""
        if self.config.teacher_lora is None:
            return None
        return open_teacher_lora(self.config.teacher_lora)

    def _with_teacher_lora(self, transformer: nn.Module) -> nn.Module:
        if self.teacher_lora is not None:
            merge_adapter(transformer, *self.teacher_lora)
        return transformer

    @property
    def student_adapter(self) -> AdapterSpec | LycorisSpec:
        config = self.config
        if config.lora_type == "lycoris":
            assert config.lycoris_config is not None, "filled in by default"
            return LycorisSpec(config.lycoris_config, config.init_lokr_norm)
        return AdapterSpec(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            init=True if config.lora_init_type == "default" else config.lora_init_type,
            dropout=config.lora_dropout,
            targets=tuple(config.peft_lora_target_modules) if config.peft_lora_target_modules else None,
            dora=config.use_dora,
        )

    @property
    def critic_adapter(self) -> AdapterSpec | LycorisSpec:
        student, dmd = self.student_adapter, self.config.dmd
        rank, alpha = dmd.fake_score_lora_rank, dmd.fake_score_lora_alpha
        if isinstance(student, LycorisSpec):
            return LycorisSpec(student.options.model_copy(update={"linear_dim": rank, "linear_alpha": alpha}))
        return AdapterSpec(rank, alpha, student.init, 0.0, student.targets, student.dora)

    # --- noise levels and samplers ----------------------------------------------------------------------------------

    @cached_property
    def schedule(self) -> Schedule:
        """The student's shift and ladder; no ladder in supervised training."""
        config = self.config
        shift = config.flow_schedule_shift or SUPERVISED_SAMPLING_SHIFT
        return Schedule(shift, tuple(timestep / TIMESTEPS for timestep in config.student_timesteps()))

    @property
    def student_sampler(self) -> Sampler:
        config = self.config
        if not self.schedule.ladder:
            return Sampler(self.schedule, "ode", config.validation_num_inference_steps, config.validation_guidance)
        return Sampler(self.schedule, config.dmd.renoise, guidance=1.0)

    @property
    def teacher_sampler(self) -> Sampler:
        """The teacher's own many steps."""
        config = self.config
        return Sampler(
            Schedule(self.schedule.shift), "ode", config.benchmark_num_inference_steps, config.benchmark_guidance
        )

    # --- the method -------------------------------------------------------------------------------------------------

    def method(self, roles: Roles) -> DMD | Supervised:
        config = self.config
        if config.distillation_method is None:
            settings = SupervisedSettings(config.flow_schedule_shift, config.caption_dropout_probability)
            return Supervised(roles.student, settings, self.device)
        assert roles.critic is not None, "DMD has a critic"
        try:
            return DMD(roles.teacher, roles.student, roles.critic, self._dmd_settings(), self.device)
        except ValueError as error:  # a noise window that is empty for one of the ladder's rungs
            raise UserError(
                str(error),
                file=str(self.loaded.path),
                key="distillation_config",
                fix="widen min_timestep_ratio … max_timestep_ratio, or set ts_schedule to false",
            ) from error

    def _dmd_settings(self) -> DMDSettings:
        config, dmd = self.config, self.config.dmd
        return DMDSettings(
            rollout=RolloutSettings(self.schedule, dmd.renoise, dmd.rollout, dmd.last_step_only),
            generator_update_interval=dmd.generator_update_interval,
            critic_warmup_steps=dmd.critic_warmup_steps,
            real_score_guidance_scale=dmd.real_score_guidance_scale,
            fake_score_guidance_scale=dmd.fake_score_guidance_scale,
            min_timestep_ratio=dmd.min_timestep_ratio,
            max_timestep_ratio=dmd.max_timestep_ratio,
            timestep_shift=dmd.timestep_shift,
            min_score_timestep=dmd.min_score_timestep,
            ts_schedule=dmd.ts_schedule,
            ts_schedule_max=dmd.ts_schedule_max,
            critic_noise_repeats=dmd.critic_noise_repeats,
            caption_dropout_probability=config.caption_dropout_probability,
        )

    # --- data -------------------------------------------------------------------------------------------------------

    @property
    def negative_prompt(self) -> str:
        config = self.config
        return config.validation_negative_prompt if config.distillation_method is None else config.dmd.negative_prompt

    @property
    def needs_latents(self) -> bool:
        config = self.config
        return config.distillation_method is None or config.dmd.rollout == "data_latent"

    def embed(self, prompts: list[str]) -> dict[str, TextEmbedding]:
        """Prompts outside any dataset, padded as the transformer takes them; not cached."""
        embeddings = {}
        for prompt, rows_LD in zip(prompts, self.text_encoder(prompts), strict=True):
            padded = torch.zeros(1, self.config.tokenizer_max_length, rows_LD.shape[1])
            padded[0, : len(rows_LD)] = rows_LD
            embeddings[prompt] = TextEmbedding(padded)
        self.text_encoder.unload()
        return embeddings

    def data(self, extra_prompts: list[str], *, progress: bool = True) -> PreparedData:
        """Caches filled, batches planned. Encoders are loaded only if something is missing, and dropped afterwards."""
        config = self.config
        prepared = prepare(
            [*self.loaded.datasets, self.loaded.text_embeds],
            config,
            encode_text=self.text_encoder,
            encode_video=self.codec.encode if self.needs_latents else None,
            text_fingerprint=self.text_encoder.fingerprint,
            vae_fingerprint=self.codec.fingerprint,
            latent_geometry=self.geometry,
            needs_latents=self.needs_latents,
            negative_prompt=self.negative_prompt,
            extra_prompts=extra_prompts,
            max_latent_frames=None if config.distillation_method is None else config.dmd.num_training_frames,
            progress=progress,
        )
        self.text_encoder.unload()
        self.codec.unload()
        return prepared

    # --- validation -------------------------------------------------------------------------------------------------

    def scenes(self, embedding: Callable[[str], TextEmbedding]) -> list[Scene]:
        """Every validation prompt at every size with every seed; `embedding` gives a prompt's."""
        config, geometry = self.config, self.geometry
        return [
            Scene(
                name=name,
                prompt=prompt,
                text=embedding(prompt),
                size=(width, height, config.validation_num_video_frames),
                latent_shape=geometry.latent_shape(
                    *self.fitting(width, height), geometry.round_frames(config.validation_num_video_frames)
                ),
                seed=config.validation_seed + number,
            )
            for name, prompt in self.loaded.validation_prompts.items()
            for width, height in config.validation_resolution
            for number in range(config.num_validation_images)
        ]

    def fitting(self, width: int, height: int) -> tuple[int, int]:
        """The size, or a UserError where the model cannot make it."""
        multiple = self.geometry.multiple
        if width % multiple or height % multiple:
            nearest = f"{max(1, round(width / multiple)) * multiple}x{max(1, round(height / multiple)) * multiple}"
            raise UserError(
                f"{width}x{height} cannot be made: this model's sizes are multiples of {multiple}",
                file=str(self.loaded.path),
                key="validation_resolution",
                fix=f"write {nearest}",
            )
        return width, height
