"""Keys and values that SimpleTuner knows and this tool does not: what to say about each.

A key at its off value is harmless and gets a notice. A key that could never change what is trained (speed, memory,
logging) gets a notice at any value. Everything else is a problem that names what to use instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OFF = (None, False, 0, "", "none", "false", "0")
NOT_YET = "not available yet in this version"


@dataclass(frozen=True)
class Absent:
    """`use`: what to do instead. `off`: values at which it does nothing. `harmless`: no value changes the training."""

    use: str
    off: tuple[Any, ...] = OFF
    harmless: bool = False

    def is_off(self, value: Any) -> bool:
        if isinstance(value, str):
            value = value.strip().lower()
        return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in self.off) or value == []


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _each(names: str, absent: Absent) -> dict[str, Absent]:
    return dict.fromkeys(_words(names), absent)


LATER = Absent(f"{NOT_YET}; leave it out")
SPEED = Absent("it changes speed or memory only, and has no counterpart here yet", harmless=True)
LOGGING = Absent("this tool has no such switch", harmless=True)

ABSENT_KEYS: dict[str, Absent] = {
    # in the plan of this tool
    **_each("teacher_model_name_or_path gan_config", LATER),
    "disk_low_threshold": Absent(f"{NOT_YET}, and it does not touch the training", harmless=True),
    **_each("eval_epoch_interval eval_dataset_pooling eval_loss_disable pretrained_evaluation_model_name_or_path",
            Absent("eval_dataset_id and eval_steps_interval rule the evaluation loss here", harmless=True)),
    **_each("musubi_block_swap_device group_offload_type group_offload_blocks_per_group group_offload_use_stream "
            "ema_device ema_cpu_only ema_foreach_disable", SPEED),
    **_each("fsdp_enable context_parallel_size deepspeed_config", Absent(
        f"{NOT_YET}; several devices work with num_processes", off=(*OFF, 1))),
    "num_machines": Absent(f"{NOT_YET}; one machine with num_processes devices works", off=(None, 0, 1, "1")),
    "machine_rank": Absent(f"{NOT_YET}; one machine with num_processes devices works"),
    **_each("main_process_ip main_process_port same_network context_parallel_comm_strategy accelerate_config "
            "accelerate_extra_args dynamo_backend", Absent("one machine needs none of it", harmless=True)),
    "global_batch_size": Absent(f"{NOT_YET}; use train_batch_size x gradient_accumulation_steps x num_processes"),
    "base_model_default_dtype": Absent("what is not quantised is kept in bf16", off=(*OFF, "bf16")),
    **_each("text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision", Absent(
        "Wan has one text encoder: use text_encoder_1_precision", off=(*OFF, "no_change"))),
    # never here, or elsewhere under another name
    **_each("optimizer_beta1 optimizer_beta2", Absent("use adam_beta1 and adam_beta2")),
    **_each("train_text_encoder text_encoder_lr", Absent("the text encoder stays frozen")),
    **_each("lr_scale lr_scale_sqrt", Absent("write the learning rate you want in learning_rate")),
    **_each("controlnet controlnet_model_name_or_path control", Absent("ControlNet is not part of this tool")),
    "masked_loss_probability": Absent("masked loss is not part of this tool", off=(*OFF, 1, 1.0)),
    **_each("prediction_type", Absent("Wan predicts the flow", off=(*OFF, "flow_matching"))),
    **_each("snr_gamma use_soft_min_snr snr_weight timestep_bias_strategy rescale_betas_zero_snr",
            Absent("it belongs to noise-prediction models, Wan predicts a flow")),
    **_each("loss_type", Absent("supervised training here uses the squared error", off=(*OFF, "l2"))),
    **_each("huber_c huber_schedule", Absent("it acts with a Huber loss only", harmless=True)),
    **_each("noise_offset offset_noise input_perturbation input_perturbation_steps mixflow_enabled "
            "scheduled_sampling_max_step_offset twinflow_enabled crepa_enabled layersync_enabled "
            "flow_cubic_schedule_weights slider_lora_target assistant_lora_path singlora_ramp_up_steps "
            "diffusion_blocks_config",
            Absent("it has no counterpart here; leave it out")),
    **_each("noise_offset_probability mixflow_gamma flow_timesteps_mode", Absent(
        "what it belongs to is not part of this tool", harmless=True)),
    "peft_lora_mode": Absent("only standard LoRA is made here", off=(*OFF, "standard")),
    "t5_padding": Absent("text embeddings are padded as Wan was trained", off=(*OFF, "unmodified")),
    **_each("caption_strategy prepend_instance_prompt only_instance_prompt instance_data_dir",
            Absent("write it on the dataset entry, in multidatabackend.json")),
    "cache_dir": Absent("use cache_dir_vae and cache_dir_text here; the HF_HOME variable moves downloaded models",
                        harmless=True),
    "aspect_bucket_alignment": Absent("Wan's own alignment is used", harmless=True),
    "delete_unwanted_images": Absent("nothing is deleted here; unsuitable files are listed"),
    "quantize_activations": Absent("only weights are quantised here"),
    "validation_external_script": Absent("render with `simpletuner sample` instead", harmless=True),
    "seed_for_each_device": Absent("noise is private to every sample by construction", harmless=True),
    "sageattention_usage": Absent("SageAttention is used where no gradient flows", off=(*OFF, "inference")),
    "post_checkpoint_script": Absent("watch the output folder, or use webhook_config", harmless=True),
    **_each("offload_during_save delete_model_after_load keep_vae_loaded fully_unload_text_encoder vae_dtype ramtorch "
            "vae_enable_patch_conv vae_enable_temporal_roll disable_tf32 accelerator_cache_clear_interval "
            "enable_chunked_feed_forward feed_forward_chunk_size set_grads_to_none optimizer_release_gradients "
            "fuse_optimizer optimizer_offload_gradients optimizer_cpu_offload_method gradient_precision "
            "gradient_checkpointing_segment_stride gradient_checkpointing_offload_attention text_cache_ondemand "
            "text_cache_disable text_embed_full_cache vae_cache_ondemand vae_cache_disable vae_cache_scan_behaviour "
            "vae_cache_preprocess read_batch_size text_encoder_batch_size image_processing_batch_size max_workers "
            "aspect_bucket_worker_count enable_multiprocessing torch_num_threads dataloader_prefetch "
            "dataloader_prefetch_qlen preserve_data_backend_cache metadata_update_interval skip_file_discovery", SPEED),
    **_each("logging_dir print_filenames print_sampler_statistics webhook_reporting_interval tracker_image_layout "
            "validation_preview validation_preview_steps validation_disable_unconditional validation_multigpu "
            "validation_seed_source validation_image_format validation_image_quality enable_watermark "
            "trust_remote_code i_know_what_i_am_doing wan_validation_load_other_stage model_card_safe_for_work "
            "push_to_hub_background modelspec_comment checkpointing_use_tempdir delete_invalid_checkpoints "
            "disable_multiline_split override_dataset_config ignore_missing_files allow_dataset_oversubscription "
            "aspect_bucket_disable_rebuild validation_epoch_interval checkpoint_epoch_interval "
            "checkpointing_rolling_steps checkpoints_rolling_total_limit validation_lycoris_strength "
            "lora_initialisation_style", LOGGING),
}  # fmt: skip

METHOD_ABSENT_KEYS: dict[str, Absent] = {
    "enable_gradient_in_rollout": Absent("the exit step always carries the gradient; start_gradient_frame bounds it",
                                         off=(*OFF, True, "true")),
    "chunk_size": Absent("use num_frame_per_block"),
    "shift": Absent("use flow_schedule_shift, beside distillation_config"),
}  # fmt: skip

DATASET_ABSENT_KEYS: dict[str, Absent] = {
    **_each("vae_cache_clear_each_epoch preserve_data_backend_cache skip_file_discovery metadata_update_interval "
            "text_encoder_batch_size text_cache_ondemand text_cache_disable vae_cache_ondemand vae_cache_disable "
            "hash_filenames disable_validation text_embeds image_embeds", SPEED),
    **_each("only_instance_prompt", Absent("use caption_strategy instanceprompt")),
    **_each("train_batch_size", Absent("use train_batch_size in config.json, for all datasets")),
    **_each("caption_shuffle caption_filter_list minimum_aspect_ratio maximum_aspect_ratio "
            "crop_aspect_buckets max_upscale_threshold start_epoch start_step end_epoch end_step", LATER),
    **_each("timestep_sampling_offset is_regularisation_data is_regularization_data slider_strength conditioning "
            "conditioning_data conditioning_type source_dataset_id grounding",
            Absent("it has no counterpart here; leave it out")),
    **_each("delete_unwanted_images delete_problematic_images delete_nsfw_images",
            Absent("use delete_problematic_images in config.json")),
    **_each("streaming num_proc auto_load aws_max_pool_connections", SPEED),
    **_each("filter_func composite_image_config", LATER),
}  # fmt: skip

TABLE_ABSENT_KEYS: dict[str, Absent] = {
    **_each("width_column height_column", Absent("sizes are read from the files themselves", harmless=True)),
    "bbox_column": Absent("it has no counterpart here; leave it out"),
}  # fmt: skip

VIDEO_ABSENT_KEYS: dict[str, Absent] = {
    "is_i2v": Absent("image-to-video training is not part of this tool"),
    "bucket_strategy": Absent("videos are grouped by aspect ratio", off=(*OFF, "aspect_ratio")),
}

# Values that SimpleTuner, or this tool's plan, knows for an option.
LATER_VALUES: dict[str, frozenset[str]] = {
    "lora_init_type": _words("loftq olora pissa"),
}
