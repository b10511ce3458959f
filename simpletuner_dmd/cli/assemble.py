"""Puts a run together from its configuration: model parts, data, roles, method. Shared by train, sample and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.cli.algorithm import method_of
from simpletuner_dmd.cli.other_expert import Partner, partner_of
from simpletuner_dmd.cli.starting import TeacherMerge
from simpletuner_dmd.config import CriticOptions, LoadedConfig, UserError
from simpletuner_dmd.config.memory_rules import depth_problems, offloads_teacher
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.tread import depth_of, routed_roles
from simpletuner_dmd.data.batches import PreparedData
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.doctor import Vae
from simpletuner_dmd.data.prepare import Caches, fill_caches, prepare
from simpletuner_dmd.distill.method import Method
from simpletuner_dmd.flow import TIMESTEPS, Denoiser, Experts, NoiseRange, Schedule, TextEmbedding
from simpletuner_dmd.publish.info import base_name
from simpletuner_dmd.validation.render import Scene
from simpletuner_dmd.validation.sampling import BlockSampling, Sampler
from simpletuner_dmd.validation.solvers import SkipLayers
from simpletuner_dmd.wan.adapters import CONDITIONING_TARGETS, DEFAULT_TARGETS, AdapterSpec
from simpletuner_dmd.wan.attention import choose_attention
from simpletuner_dmd.wan.causal import Window
from simpletuner_dmd.wan.compiling import compile_blocks, why_not_compiled
from simpletuner_dmd.wan.encoders import TextEncoder, VideoCodec
from simpletuner_dmd.wan.experts import known_noise
from simpletuner_dmd.wan.fit import ModelConfigs, check_fit
from simpletuner_dmd.wan.loading import DTYPES, Storage, load_transformer, model_configs
from simpletuner_dmd.wan.lycoris import LycorisSpec, with_layers
from simpletuner_dmd.wan.offload import offload_in_groups
from simpletuner_dmd.wan.parity import Probe
from simpletuner_dmd.wan.roles import CausalLayout, Roles, build_roles
from simpletuner_dmd.wan.runner import Recompute
from simpletuner_dmd.wan.sources import ModelSource, borrowed
from simpletuner_dmd.wan.swap import BlockSwap
from simpletuner_dmd.wan.tread import Route, routing_line


@dataclass
class Assembly:
    """The parts of a run, each made at first use on `device`."""

    loaded: LoadedConfig
    device: torch.device
    probe_texts: tuple[Tensor, ...] = ()
    """Rows of a prompt and of the negative one, for the comparison of the quantised base with the dense one."""

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
        return dict(self._described[0].transformer)

    @cached_property
    def _described(self) -> tuple[ModelConfigs, str | None]:
        """The configs of the model, and a line where it is a custom Wan. A UserError where it is another flavour."""
        described = model_configs(self.source)
        return described, check_fit(self.config.flavour, described)

    @cached_property
    def codec(self) -> VideoCodec:
        config = self.config
        return VideoCodec(
            self.source,
            device=self.device,
            tiling=config.vae_enable_tiling,
            slicing=config.vae_enable_slicing,
            make_room=lambda: self._make_room("codec"),
            group_offload=config.enable_group_offload,
        )

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return TextEncoder(
            self.source,
            dtype=self.dtype,
            storage=self.storage(self.config.text_encoder_1_precision),
            max_length=self.config.tokenizer_max_length,
            device=self.device,
            make_room=lambda: self._make_room("text_encoder"),
            group_offload=self.config.enable_group_offload and self.config.text_encoder_1_precision == "no_change",
        )

    def _make_room(self, coming: str) -> None:
        """Drops the encoder that is not needed now, where only one may be there at a time."""
        other = {"codec": "text_encoder", "text_encoder": "codec"}[coming]
        if self.config.offload_during_startup and other in self.__dict__:
            getattr(self, other).unload()

    @cached_property
    def geometry(self) -> LatentGeometry:
        vae = self.codec.config
        return LatentGeometry(
            channels=self.network["out_channels"],
            spatial=vae["scale_factor_spatial"],
            temporal=vae["scale_factor_temporal"],
            patch=self.network["patch_size"][1],
        )

    def storage(self, precision: str) -> Storage:
        """How a part in this precision is put together."""
        config = self.config
        via = self.device if precision != "no_change" and config.quantize_via == "accelerator" else None
        cache = config.cache_dir_models
        return Storage(precision, via, None if cache.lower() == "none" else Path(cache).expanduser())

    def base_transformer(
        self, *, quantised: bool = True, swapped: bool = False, lines: list[str] | None = None
    ) -> nn.Module:
        """A fresh frozen base, its fine-tune merged in, in the precision of the run, on the device; swapped: but for
        the blocks that the run keeps on the host. lines: takes what there is to say about it."""
        config = self.config
        storage = self.storage(config.base_model_precision) if quantised else Storage()
        if lines is not None:
            storage.probe = Probe.of(self.network, self.teacher_sampler.guidance, self.probe_texts)
        transformer = load_transformer(self.source, self.dtype, storage, self.teacher_lora)
        if lines is not None:
            lines += storage.lines
        if swapped and config.blocks_to_swap:
            BlockSwap(transformer, config.blocks_to_swap, self.device)
            return transformer
        return transformer.to(self.device)

    def roles(self) -> tuple[Roles, list[str]]:
        """Teacher, student and what else the method moves, and lines worth printing."""
        config = self.config
        routes = self.routes  # before any weight is loaded: they may not fit the model
        if config.distillation_config is not None:
            place = self.loaded.origins.get("distillation_config.gan_blocks", "")
            if problems := config.distillation_config.depth_problems(depth_of(self.network), place):
                raise UserError(problems)
        if problems := depth_problems(config, depth_of(self.network)):
            raise UserError([replace(problem, file=self.loaded.origins.get(problem.key, "")) for problem in problems])
        lines = borrowed(config)
        base = self.base_transformer(swapped=True, lines=lines)
        lines += self._attention(base)
        adapters = self.adapters()
        owned = [role for role in self._moving_networks() if role not in adapters]
        roles = build_roles(
            base,
            adapters=adapters,
            full={role: self._full_network() for role in owned},
            causal=self._causal_layout,
            gradient_checkpointing=config.gradient_checkpointing,
            recompute=Recompute(
                config.gradient_checkpointing_interval, config.gradient_checkpointing_backend == "offloaded"
            ),
            autocast=self.dtype if self.dtype != torch.float32 else None,
            seed=config.seed,
        )
        if offloads_teacher(config):
            offload_in_groups(base, self.device)
        lines += [*self._fit_lines(), *self._swap_lines(base), *self._compile(roles)]
        for name in routed_roles(config.distillation_config) if routes else ():
            roles.denoisers[name].routes = routes
            lines.append(routing_line(name, routes, depth_of(self.network)))
        return roles, lines

    def _fit_lines(self) -> list[str]:
        """What there is to say of a model that is no published one."""
        line = self._described[1]
        return [] if line is None else [line]

    @property
    def routes(self) -> tuple[Route, ...]:
        """TREAD's, with blocks counted from 0; a UserError where the model does not have them."""
        tread = self.config.tread_config
        if tread is None:
            return ()
        depth = depth_of(self.network)
        problems = tread.depth_problems(depth, self.loaded.origins.get("tread_config", ""))
        if problems:
            raise UserError(problems)
        return tuple(Route(*span) for span in tread.spans(depth))

    @property
    def _causal_layout(self) -> CausalLayout | None:
        blocks = self.block_sampling
        if blocks is None:
            return None
        window = Window(blocks.sink_frames, blocks.local_attn_frames)
        return CausalLayout(lambda frames: blocks.plan(frames).blocks, window)

    def _moving_networks(self) -> list[str]:
        return ["student", *(["critic"] if self.config.critic else [])]

    def _critic_adapter(self, critic: CriticOptions) -> AdapterSpec | LycorisSpec:
        """As the student's, with a rank of its own."""
        student, rank, alpha = self.student_adapter, critic.fake_score_lora_rank, critic.fake_score_lora_alpha
        if isinstance(student, LycorisSpec):
            return LycorisSpec(student.options.model_copy(update={"linear_dim": rank, "linear_alpha": alpha}))
        return AdapterSpec(rank, alpha, student.init, 0.0, student.targets, student.dora)

    def adapters(self) -> dict[str, AdapterSpec | LycorisSpec]:
        """The roles that are LoRAs on the shared base."""
        config = self.config
        found: dict[str, AdapterSpec | LycorisSpec] = {}
        if config.model_type == "lora":
            found["student"] = self.student_adapter
        if config.critic is not None and config.critic.fake_score_type == "lora":
            found["critic"] = self._critic_adapter(config.critic)
        if config.distillation_config is not None and config.distillation_config.has_detail_expert:
            found["detail"] = self.detail_adapter
        return found

    def _full_network(self) -> nn.Module:
        """A network of its own: fp32 master weights, computed in the run's precision by autocast."""
        network = load_transformer(self.source, torch.float32, merge=self.teacher_lora).to(self.device)
        choose_attention(network, self.config.attention_mechanism, self.device)  # said of the base already
        return network

    def _attention(self, base: nn.Module) -> list[str]:
        notice = choose_attention(base, self.config.attention_mechanism, self.device)
        return [notice] if notice else []

    def _swap_lines(self, base: nn.Module) -> list[str]:
        swap = BlockSwap.of(base)
        if swap is None:
            return []
        blocks = ", ".join(map(str, swap.indices))
        return [f"blocks_to_swap: blocks {blocks} live on the host ({swap.bytes / 1e9:.2f} GB) and visit the device"]

    def _compile(self, roles: Roles) -> list[str]:
        if not self.config.compile:
            return []
        if reason := why_not_compiled(self.device):
            return [f"compile cannot run here ({reason}); the blocks run as they are"]
        for network in roles.transformers():
            compile_blocks(network)
        return ["compile: each block compiles at its first call in each role and size"]

    @cached_property
    def teacher_lora(self) -> TeacherMerge | None:
        """The fine-tune that is part of the base."""
        return None if self.config.teacher_lora is None else TeacherMerge(self.config.teacher_lora)

    @property
    def student_adapter(self) -> AdapterSpec | LycorisSpec:
        config = self.config
        if config.lora_type == "lycoris":
            assert config.lycoris_config is not None, "filled in by default"
            return LycorisSpec(config.lycoris_config, config.init_lokr_norm)
        return self._lora

    @property
    def _lora(self) -> AdapterSpec:
        config = self.config
        return AdapterSpec(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            init=True if config.lora_init_type == "default" else config.lora_init_type,
            dropout=config.lora_dropout,
            targets=tuple(config.peft_lora_target_modules) if config.peft_lora_target_modules else None,
            dora=config.use_dora,
        )

    @property
    def detail_adapter(self) -> AdapterSpec | LycorisSpec:
        """The low-noise expert: an adapter on the conditioning layers and the head as well, which alone fit each expert
        to its noise levels in the parameter-efficient form of the dual-expert paper (arXiv 2506.03123). It is a LoRA
        beside a full student too, and starts at the teacher."""
        student = self._lora if self.config.model_type == "full" else self.student_adapter
        if isinstance(student, LycorisSpec):
            return LycorisSpec(with_layers(student.options, CONDITIONING_TARGETS))
        targets = (*(student.targets or DEFAULT_TARGETS), *CONDITIONING_TARGETS)
        return AdapterSpec(student.rank, student.alpha, student.init, 0.0, targets)

    # --- noise levels and samplers ----------------------------------------------------------------------------------

    @cached_property
    def schedule(self) -> Schedule:
        """The student's shift and ladder; no ladder in supervised training."""
        config = self.config
        shift = self._shift if config.distillation_config is None else config.distillation.ladder_shift(self._shift)
        return Schedule(shift, tuple(timestep / TIMESTEPS for timestep in config.student_timesteps()))

    @property
    def known_noise(self) -> NoiseRange:
        """The noise levels that the network of this run was made for."""
        return known_noise(self.config.flavour)

    @property
    def _shift(self) -> float:
        return self.config.flow_schedule_shift or self.config.flavour.shift

    @property
    def student_sampler(self) -> Sampler:
        config = self.config
        if not self.schedule.ladder:
            return self._solver(config.validation_num_inference_steps, config.validation_guidance, self.block_sampling)
        return Sampler(self.schedule, config.distillation.transition, guidance=1.0, blocks=self.block_sampling)

    @property
    def validation_sampler(self) -> Sampler:
        """How validation renders the student: as it is trained to be sampled, unless the options ask for a solver."""
        config = self.config
        if config.validation_noise_scheduler == "few-step" or not self.schedule.ladder:
            return self.student_sampler
        return self._solver(config.validation_num_inference_steps, config.validation_guidance, None)

    def _solver(self, steps: int, guidance: float, blocks: BlockSampling | None) -> Sampler:
        """A stock solver with the guidance of the validation options."""
        config = self.config
        return Sampler(
            Schedule(self.schedule.shift), "ode", steps, guidance, blocks,
            solver=config.validation_noise_scheduler, rescale=config.validation_guidance_rescale,
            skip=self._skip if config.distillation_config is None else None,
        )  # fmt: skip

    @property
    def _skip(self) -> SkipLayers | None:
        """Skip-layer guidance with blocks counted from 0; a UserError where the model does not have them."""
        config, depth = self.config, depth_of(self.network)
        if not config.validation_guidance_skip_layers:
            return None
        blocks = [block + depth if block < 0 else block for block in config.validation_guidance_skip_layers]
        if any(not 0 <= block < depth for block in blocks):
            key = "validation_guidance_skip_layers"
            raise UserError(
                f"found {config.validation_guidance_skip_layers}, but this model has {depth} blocks, 0 to {depth - 1}",
                file=self.loaded.origins.get(key, str(self.loaded.path)),
                key=key,
                fix=f"choose from 0 to {depth - 1}, or from -{depth} to -1, which count from the end",
            )
        return SkipLayers(
            tuple(sorted(set(blocks))),
            config.validation_guidance_skip_scale,
            config.validation_guidance_skip_layers_start,
            config.validation_guidance_skip_layers_stop,
        )

    @property
    def block_sampling(self) -> BlockSampling | None:
        """How a causal student makes a clip; None for one that makes it at once."""
        settings: Any = self.config.distillation_config
        if settings is None or not settings.blockwise:
            return None
        return BlockSampling(
            num_frame_per_block=settings.num_frame_per_block,
            independent_first_frame=settings.independent_first_frame,
            context_noise=getattr(settings, "context_noise", 0.0),
            sink_frames=settings.sink_frames,
            local_attn_frames=settings.local_attn_frames,
        )

    def sampled_student(self, roles: Roles) -> Denoiser:
        """The student as it is sampled: both experts, where there are two."""
        settings = self.config.distillation_config
        if settings is None or not settings.has_detail_expert:
            return roles.student
        return Experts(roles.student, roles.denoisers["detail"], settings.boundary)

    @cached_property
    def partner(self) -> Partner | None:
        """The finished run of the other expert, where one is named; a UserError where the two do not go together."""
        return partner_of(self.config, base_name(self.source.base))

    @property
    def teacher_sampler(self) -> Sampler:
        """The teacher's own many steps."""
        config = self.config
        return Sampler(Schedule(self._shift), "ode", config.benchmark_num_inference_steps, config.benchmark_guidance)

    @property
    def benchmark_sampler(self) -> Sampler:
        """Of the reference videos. In fine-tuning they show the model before training, sampled as the student is."""
        if self.config.distillation_config is not None:
            return self.teacher_sampler
        return self._solver(self.config.benchmark_num_inference_steps, self.config.benchmark_guidance, None)

    # --- the method -------------------------------------------------------------------------------------------------

    def method(self, roles: Roles, target: Denoiser | None = None) -> Method:
        """The algorithm of the run. target: the student under its running average."""
        return method_of(self, roles, target)

    # --- data -------------------------------------------------------------------------------------------------------

    @property
    def negative_prompt(self) -> str:
        config = self.config
        settings = config.distillation_config
        return config.validation_negative_prompt if settings is None else settings.negative_prompt

    @property
    def needs_latents(self) -> bool:
        config = self.config
        return config.distillation_config is None or config.distillation_config.needs_latents

    def embed(self, prompts: list[str]) -> dict[str, TextEmbedding]:
        """Prompts outside any dataset, padded as the transformer takes them; not cached."""
        embeddings = {}
        for prompt, rows_LD in zip(prompts, self.text_encoder(prompts), strict=True):
            padded = torch.zeros(1, self.config.tokenizer_max_length, rows_LD.shape[1])
            padded[0, : len(rows_LD)] = rows_LD
            embeddings[prompt] = TextEmbedding(padded)
        self.text_encoder.unload()
        return embeddings

    def data(self, extra_prompts: list[str], *, main: bool = True, progress: bool = True) -> PreparedData:
        """Caches filled, batches planned. Encoders are loaded only if something is missing, and dropped afterwards.

        Every process of the run may call this at once; they share the work. main: see `prepare`.
        """
        config = self.config
        limit = None if config.distillation_config is None else config.distillation.num_training_frames
        prepared = prepare(
            **self._data_arguments(extra_prompts, self.needs_latents, main, progress), max_latent_frames=limit
        )
        self._drop_encoders()
        return prepared

    def caches(self, extra_prompts: list[str], *, latents: bool, main: bool = True, progress: bool = True) -> Caches:
        """Caches filled, and nothing else. latents: of every video dataset, whether a loss reads them or not."""
        filled = fill_caches(**self._data_arguments(extra_prompts, latents, main, progress))
        self._drop_encoders()
        return filled

    def _data_arguments(self, prompts: list[str], latents: bool, main: bool, progress: bool) -> dict[str, Any]:
        codec = self.codec
        statistics = codec.config
        return {
            "datasets": [*self.loaded.datasets, self.loaded.text_embeds],
            "config": self.config,
            "encode_text": self.text_encoder,
            "encode_video": codec.encode if latents or self.config.eval_dataset_id else None,
            "text_fingerprint": self.text_encoder.fingerprint,
            "vae_fingerprint": codec.fingerprint,
            "latent_geometry": self.geometry,
            "needs_latents": latents,
            "negative_prompt": self.negative_prompt,
            "extra_prompts": prompts,
            "vae": Vae(
                codec.fingerprint, codec.encode, codec.decode, statistics["latents_mean"], statistics["latents_std"]
            ),
            "main": main,
            "progress": progress,
        }

    def _drop_encoders(self) -> None:
        self.text_encoder.unload()
        self.codec.unload()

    # --- validation -------------------------------------------------------------------------------------------------

    def scenes(self, embedding: Callable[[str], TextEmbedding]) -> list[Scene]:
        """Every validation prompt at every size with every seed; `embedding` gives a prompt's."""
        config, geometry = self.config, self.geometry
        return [
            Scene(
                name=name,
                prompt=prompt,
                text=embedding(prompt),
                size=(width, height, frames),
                latent_shape=geometry.latent_shape(*self.fitting(width, height), geometry.round_frames(frames)),
                seed=config.validation_seed + number,
            )
            for name, prompt in self.loaded.validation_prompts.items()
            for width, height in config.validation_resolution
            for frames in config.validation_num_video_frames
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
