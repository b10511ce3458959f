"""FastVideo's training scripts (`--key value`), its .yaml of sections, and its .yaml of `models` and `method`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpletuner_dmd.cli.convert.files import flat
from simpletuner_dmd.cli.convert.result import NESTED, STANDARD, Converted, number, truth, whole
from simpletuner_dmd.config.errors import UserError

# Their name, in a script or as the last part of a dotted key -> ours, with the same meaning.
SAME = {
    "max_train_steps": "max_train_steps",
    "train_batch_size": "train_batch_size",
    "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
    "max_grad_norm": "max_grad_norm",
    "mixed_precision": "mixed_precision",
    "seed": "seed",
    "output_dir": "output_dir",
    "checkpoints_total_limit": "checkpoints_total_limit",
    "training_state_checkpointing_steps": "checkpoint_step_interval",
    "tracker_project_name": "tracker_project_name",
    "project_name": "tracker_project_name",
    "run_name": "tracker_run_name",
    "wandb_run_name": "tracker_run_name",
    "validation_steps": "validation_step_interval",
    "every_steps": "validation_step_interval",
    "training_cfg_rate": "caption_dropout_probability",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "negative_prompt": "validation_negative_prompt",
    "generator_update_interval": NESTED + "generator_update_interval",
    "min_timestep_ratio": NESTED + "min_timestep_ratio",
    "max_timestep_ratio": NESTED + "max_timestep_ratio",
    "fake_score_learning_rate": NESTED + "fake_score_lr",
    "fake_score_betas": NESTED + "fake_score_betas",
    "fake_score_lr_scheduler": NESTED + "fake_score_lr_scheduler",
    "warp_denoising_step": NESTED + "warp_denoising_steps",
    "num_latent_t": NESTED + "num_training_frames",
    "same_step_across_blocks": NESTED + "same_step_across_blocks",
    "last_step_only": NESTED + "last_step_only",
    "num_frame_per_block": NESTED + "num_frame_per_block",
    "chunk_size": NESTED + "num_frame_per_block",
    "independent_first_frame": NESTED + "independent_first_frame",
    "context_noise": NESTED + "context_noise",
}
ONLY_BLOCKS = (
    "num_frame_per_block",
    "chunk_size",
    "independent_first_frame",
    "same_step_across_blocks",
    "context_noise",
)
PARALLEL = ("sp_size", "tp_size", "hsdp_replicate_dim", "hsdp_shard_dim", "train_sp_batch_size", "nnodes",
            "nproc_per_node", "node_rank", "rdzv_backend", "rdzv_endpoint", "dataloader_num_workers")  # fmt: skip
VALIDATION = ("validation_sampling_steps", "sampling_steps", "sampling_timesteps", "sampler_kind",
              "validation_guidance_scale", "guidance_scale")  # fmt: skip
LARGER = ("real_score_model_path", "fake_score_model_path", "teacher.init_from", "critic.init_from")
SILENT = ("script", "config", "num_height", "num_width", "num_frames", "use_ema", "ema_decay", "decay", "trainable",
          "_target_", "pipeline_target", "enabled", "log_validation", "inference_mode", "disable_custom_init_weights",
          "gradient_accumulation_steps", "num_gpus", "lora_training", "betas", "flow_shift", "model_path",
          "pretrained_model_name_or_path", "init_from", "simulate_generator_forward", "rollout_mode")  # fmt: skip


def convert(content: dict[str, Any], path: Path) -> Converted:
    found = Converted("FastVideo")
    options = flat(content)
    short = {key.rpartition(".")[2]: value for key, value in options.items()}
    modular = "method" in content and "models" in content
    target = str(content.get("method", {}).get("_target_", "")) if modular else str(short.get("script", ""))
    distilled = "dmd_denoising_steps" in short or "generator_update_interval" in short or modular
    causal = "self_forcing" in target.lower() or "causal" in target.lower()
    if distilled:
        method = "self_forcing" if causal else "dmd"
        found.add("distillation_method", method, target or "the options are those of distribution matching")
    _model(found, options, short)
    interval = number(short.get("generator_update_interval")) or 1
    for key, value in options.items():
        _take(found, key, value, causal, interval, modular)
    _what_follows(found, short, distilled, interval)
    return found


def _model(found: Converted, options: dict[str, Any], short: dict[str, Any]) -> None:
    model = next((options[key] for key in ("models.student.init_from", "pretrained_model_name_or_path", "model_path")
                  if options.get(key)), None)  # fmt: skip
    if model is not None:
        low = str(model).lower()
        if "wan" not in low or "i2v" in low.replace("ti2v", "") or "inp" in low:
            raise UserError(f"its model is {model}", fix="this tool distils and fine-tunes Wan text-to-video models")
        flavour = ("ti2v-5b-2.2" if "5b" in low else "t2v-14b-2.2-high" if "a14b" in low
                   else "t2v-480p-14b-2.1" if "14b" in low else "t2v-480p-1.3b-2.1")  # fmt: skip
        found.change("model_path", model, "model_flavour", flavour, "by its name")
        found.values["pretrained_model_name_or_path"] = str(model)
    lora = truth(short.get("lora_training", False)) or "lora_rank" in short
    found.add("model_type", "lora" if lora else "full", "lora_training" if lora else "without lora_training")
    for key in LARGER:
        other = next((value for one, value in options.items() if one.endswith(key)), None)
        if other is not None and model is not None and str(other) != str(model):
            found.leave(key, other, "teacher and critic start from the student's own base here")


def _take(found: Converted, key: str, value: Any, causal: bool, interval: float, modular: bool) -> None:
    last = key.rpartition(".")[2]
    ours, amount = SAME.get(last), number(value)
    if ours is not None and value is not None:
        if last in ONLY_BLOCKS and not causal:
            found.leave(key, value, "it rules students that work block by block; this one is not causal")
        elif key == ours.removeprefix(NESTED):
            found.keep(ours, value)
        else:
            found.change(key, value, ours, value)
    elif last == "real_score_guidance_scale" and amount is not None:
        if modular:
            found.change(key, value, NESTED + last, amount, "this trainer (`method`) has the ordinary notation; "
                         "in a file from before that change, 3.5 means 4.5")  # fmt: skip
        else:
            found.change(key, value, NESTED + last, amount + 1, STANDARD)
    elif last == "dmd_denoising_steps":
        steps = value if isinstance(value, str) else ",".join(f"{step:g}" for step in value)
        found.keep(NESTED + last, steps)
    elif last == "flow_shift" and amount is not None:
        found.change(key, value, "flow_schedule_shift", amount, "the ladder's shift, in sampling too: FastVideo's own "
                     "sampler always takes 8")  # fmt: skip
        found.change(key, value, NESTED + "timestep_shift", amount, "and that of the score noise, one key there")
    elif last == "ema_start_step":
        found.values["ema_start_step"] = whole((amount or 0) // interval)
    elif last == "enable_gradient_checkpointing_type":
        found.change(key, value, "gradient_checkpointing", bool(value) and str(value).lower() != "none")
    elif last in ("dit_precision", "dit"):
        found.leave(key, value, "what trains is kept in fp32 in any case")
    elif last == "data_path":
        found.leave(key, value, "latents of FastVideo's own preprocessing; name videos (instance_data_dir=...) or "
                    "prompts (prompts=...)")  # fmt: skip
    elif last in ("validation_dataset_file", "dataset_file"):
        found.leave(key, value, "their format; prompts go to validation_prompt_library, {name: prompt}")
    elif last in VALIDATION:
        found.leave(key, value, "a distilled student is rendered with its own ladder, without guidance")
    elif last == "weight_only_checkpointing_steps":
        found.leave(key, value, "every checkpoint here can be exported")
    elif last in PARALLEL:
        found.leave(key, value, "how their code spreads over devices; here num_processes")
    elif last.lower() == "vsa_sparsity":
        found.leave(key, value, "video-sparse attention is not available: full attention is used")
    elif last not in SILENT and not any(key.endswith(other) for other in LARGER):
        found.leave(key, value, "it has no counterpart here")


def _what_follows(found: Converted, short: dict[str, Any], distilled: bool, interval: float) -> None:
    """What one key here says and several say there, and what their tool takes for granted."""
    height, width, frames = (number(short.get(key)) for key in ("num_height", "num_width", "num_frames"))
    if height and width:
        size = f"{width:g}x{height:g}"
        found.change("num_width, num_height", size, "validation_resolution", size)
    if frames:
        found.change("num_frames", whole(frames), "validation_num_video_frames", whole(frames))
    accumulated, devices = (number(short.get(key)) or 1 for key in ("gradient_accumulation_steps", "num_gpus"))
    shared = number(short.get("sp_size")) or 1
    samples = max(1, int(accumulated * devices / shared))
    found.change("num_gpus x gradient_accumulation_steps", f"{devices:g} x {accumulated:g}",
                 "gradient_accumulation_steps", samples,
                 "the same samples per step on one device; divide by num_processes with several")  # fmt: skip
    betas = short.get("betas")
    if betas is not None:
        first, second = [float(part) for part in (betas.split(",") if isinstance(betas, str) else betas)]
        found.change("betas", [first, second], "adam_beta1", first)
        found.values["adam_beta2"] = second
    decay = number(short.get("ema_decay", short.get("decay")))
    if truth(short.get("use_ema", "ema_decay" in short)) and decay:
        found.values.update({"use_ema": True, "ema_validation": "ema_only"})
        found.change("ema_decay", decay, "ema_decay", round(decay**interval, 6),
                     f"per student update here, per step there: {decay:g} to the power of {interval:g}")  # fmt: skip
    if not distilled:
        return
    if NESTED + "fake_score_lr" not in found.values and "learning_rate" in found.values:
        found.add(NESTED + "fake_score_lr", found.values["learning_rate"], "their critic takes the student's rate")
    found.add(NESTED + "ts_schedule", False, "their score noise does not follow the exit step")
    mode = short.get("rollout_mode")
    simulated = truth(short.get("simulate_generator_forward", False)) or mode in ("simulate", None)
    why = "" if mode or "simulate_generator_forward" in short else "their script trains on its cached latents"
    if why:
        found.add(NESTED + "rollout", "simulate", f"{why}, which cannot be read here; write data_latent for videos")
    else:
        found.change("rollout", mode or "simulate", NESTED + "rollout", "simulate" if simulated else "data_latent")
