"""Self-Forcing's configs/*.yaml (and Self-Forcing-Plus', of the same keys)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpletuner_dmd.cli.convert.result import NESTED, STANDARD, Converted, number, truth, whole

README_STEPS = 600
# Their name -> ours, with the same meaning.
SAME = {
    "lr": "learning_rate",
    "lr_critic": NESTED + "fake_score_lr",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "weight_decay": "adam_weight_decay",
    "seed": "seed",
    "gradient_checkpointing": "gradient_checkpointing",
    "negative_prompt": "validation_negative_prompt",
    "dfake_gen_update_ratio": NESTED + "generator_update_interval",
    "num_frame_per_block": NESTED + "num_frame_per_block",
    "independent_first_frame": NESTED + "independent_first_frame",
    "same_step_across_blocks": NESTED + "same_step_across_blocks",
    "last_step_only": NESTED + "last_step_only",
    "context_noise": NESTED + "context_noise",
    "ts_schedule": NESTED + "ts_schedule",
    "ts_schedule_max": NESTED + "ts_schedule_max",
    "min_score_timestep": NESTED + "min_score_timestep",
    "num_training_frames": NESTED + "num_training_frames",
    "warp_denoising_step": NESTED + "warp_denoising_steps",
    "max_grad_norm_generator": "max_grad_norm",
    "max_grad_norm_critic": NESTED + "fake_score_grad_clip",
    "log_iters": "checkpoint_step_interval",
}
BLOCKS = ("num_frame_per_block", "independent_first_frame", "same_step_across_blocks", "context_noise")
SILENT = {"num_train_timestep", "denoising_loss_type", "load_raw_video", "i2v", "test", "logdir", "trainer",
          "distribution_loss", "model_kwargs", "causal", "mixed_precision", "batch_size", "beta1_critic",
          "beta2_critic", "generator_name", "fake_name"}  # fmt: skip


def convert(content: dict[str, Any], path: Path) -> Converted:
    found = Converted("Self-Forcing")
    causal = truth(content.get("causal", True))
    ode = "ode" in str(content.get("trainer", ""))
    method = "ode_init" if ode else "self_forcing" if causal else "dmd"
    found.add("distillation_method", method, "the yaml's trainer and `causal`")
    _model(found, content)
    interval = number(content.get("dfake_gen_update_ratio")) or 1
    for key, value in content.items():
        ours = SAME.get(key)
        if ours is not None and value is not None:
            if method == "dmd" and key in BLOCKS:
                found.leave(key, value, "it rules students that work block by block; this one is not causal")
            elif key == ours.removeprefix(NESTED):
                found.keep(ours, value)
            else:
                found.change(key, value, ours, value)
        elif key not in SILENT:
            _special(found, key, value, content, interval)
    critic = [content.get("beta1_critic", content.get("beta1", 0.0)), content.get("beta2_critic", 0.999)]
    if not ode:
        found.change("beta1_critic, beta2_critic", critic, NESTED + "fake_score_betas", critic)
    for ours in ("max_grad_norm", NESTED + "fake_score_grad_clip"):
        if ours not in found.values and not (ode and ours.startswith(NESTED)):
            found.add(ours, 10.0, "the limit in their code")
    if not number(content.get("max_train_steps")):
        found.add("max_train_steps", README_STEPS, "their script runs until it is stopped; the README says 600")
    return found


def _model(found: Converted, content: dict[str, Any]) -> None:
    student = str(content.get("generator_name") or content.get("fake_name") or "Wan2.1-T2V-1.3B")
    flavour = "t2v-480p-14b-2.1" if "14B" in student else "t2v-480p-1.3b-2.1"
    found.change("generator_name", student, "model_flavour", flavour, "their default student is Wan2.1-T2V-1.3B")
    found.add("model_type", "full", "their student and critic train every weight; `lora` needs other rates")
    teacher = str(content.get("real_name", student))
    if ("14B" in teacher) != ("14B" in student):
        found.leave("real_name", teacher, "a teacher larger than the student is not available: the student's own base "
                    "is the teacher")  # fmt: skip


def _special(found: Converted, key: str, value: Any, content: dict[str, Any], interval: float) -> None:
    amount = number(value)
    if key == "denoising_step_list" and isinstance(value, list):
        steps = [step for step in value if step]
        warped = truth(content.get("warp_denoising_step", False))
        found.change(key, value, NESTED + "dmd_denoising_steps", ",".join(f"{step:g}" for step in steps),
                     "flow_schedule_shift warps it, as there" if warped else "timesteps as they are")  # fmt: skip
    elif key in ("guidance_scale", "real_guidance_scale") and amount is not None:
        found.change(key, value, NESTED + "real_score_guidance_scale", amount + 1, STANDARD)
    elif key == "fake_guidance_scale" and amount is not None:
        found.change(key, value, NESTED + "fake_score_guidance_scale", amount + 1 if amount else 0.0,
                     STANDARD if amount else "off")  # fmt: skip
    elif key == "timestep_shift" and amount is not None:
        found.change(key, value, "flow_schedule_shift", amount, "the ladder's shift")
        found.change(key, value, NESTED + "timestep_shift", amount, "and that of the score noise, one key there")
    elif key == "total_batch_size" and amount is not None:
        each = number(content.get("batch_size")) or 1
        found.values["train_batch_size"] = whole(each)
        found.change(key, value, "gradient_accumulation_steps", whole(max(1, amount // each)),
                     "the same samples per step on one device; divide by num_processes with several")  # fmt: skip
    elif key == "ema_weight" and amount is not None:
        found.values.update({"use_ema": amount > 0, "ema_validation": "ema_only"})
        found.change(key, value, "ema_decay", amount, "per student update, as there")
    elif key == "ema_start_step" and amount is not None:
        found.change(key, value, key, whole(amount // interval),
                     f"in student updates here, in trainer steps there (one update in {interval:g})")  # fmt: skip
    elif key == "image_or_video_shape" and isinstance(value, list) and len(value) == 5:
        _, frames, _, height, width = value
        found.change(key, value, "validation_resolution", f"{width * 8}x{height * 8}", "8 pixels to a latent cell")
        found.change(key, value, "validation_num_video_frames", 4 * (frames - 1) + 1, "4 frames to a latent one")
    elif key == "data_path":
        found.prompts = str(value)
        found.changed.append((f"{key} {value}", f"multidatabackend.json: prompts {value}", "a prompt per line"))
    elif key == "generator_ckpt":
        found.leave(key, value, "a checkpoint of their code; make a warm start with distillation_method ode_init, then "
                    'name its output in "init_lora"')  # fmt: skip
    elif key.startswith("wandb"):
        if key == "wandb_project":
            found.change(key, value, "tracker_project_name", value, 'add "report_to": "wandb" to use it')
        else:
            found.leave(key, "..." if "key" in key else value, "set WANDB_API_KEY, WANDB_BASE_URL in the environment")
    elif key.endswith("fsdp_wrap_strategy") or key == "sharding_strategy":
        found.leave(key, value, "how their code spreads over devices; here num_processes")
    elif key != "real_name":
        found.leave(key, value, "it has no counterpart here")
