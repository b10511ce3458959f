"""A student of two experts (dual-expert consistency, arXiv 2506.03123): two LoRAs on one base, switched by noise level.

The pipeline stays the stock `WanPipeline` with one transformer; its public step callback activates the expert of the
next step, so the base is in memory once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simpletuner_dmd.publish.info import ExportInfo, ladder_text
from simpletuner_dmd.publish.snippets import LORA_FILE

LOW_LORA_FILE = "pytorch_lora_weights_low_noise.safetensors"
HIGH, LOW = "high_noise", "low_noise"

_SAMPLER = '''\
"""The {steps}-step sampler of {name}, two experts on one base. Run: python sampler.py "a prompt" video.mp4 [base]"""
import sys
from pathlib import Path
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.utils import export_to_video

SIGMAS = [{sigmas}]  # timesteps {ladder}; already shifted
BOUNDARY = {boundary!r}  # the high-noise expert makes the steps from this sigma upwards

class Ladder(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        super().set_timesteps(sigmas=SIGMAS, device=device)

def few_step_scheduler():
    return Ladder(shift=1.0, stochastic_sampling={stochastic})  # {meaning}

def load_experts(pipe, folder):
    pipe.load_lora_weights(folder, weight_name="{high_file}", adapter_name="{high}")
    pipe.load_lora_weights(folder, weight_name="{low_file}", adapter_name="{low}")
    pipe.set_adapters("{high}")

def switch_expert(pipe, step, timestep, kwargs):  # for callback_on_step_end
    if step + 1 < len(SIGMAS):
        pipe.set_adapters("{high}" if SIGMAS[step + 1] >= BOUNDARY else "{low}")
    else:
        pipe.set_adapters("{high}")  # where the next video begins
    return kwargs

if __name__ == "__main__":
    export, base = Path(__file__).parent / "diffusers", (*sys.argv[3:], {base})[0]
    pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)
    load_experts(pipe, export)
    pipe.scheduler = few_step_scheduler()
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(42)  # the first noise and the re-noising
    video = pipe(sys.argv[1], width={width}, height={height}, num_frames={frames}, num_inference_steps={steps},
                 guidance_scale=1.0, max_sequence_length={length}, callback_on_step_end=switch_expert).frames[0]
    export_to_video(video, sys.argv[2], fps={fps:g})
'''


def experts_sampler_file(info: ExportInfo) -> str:
    """sampler.py of a two-expert student."""
    width, height, frames = info.size
    return _SAMPLER.format(
        name=info.file_name, steps=info.steps, sigmas=", ".join(repr(sigma) for sigma in info.schedule.ladder),
        ladder=ladder_text(info), boundary=info.boundary, stochastic=info.renoise == "sde",
        meaning="fresh noise at each step" if info.renoise == "sde" else "deterministic (Euler)",
        base=json.dumps(info.base_name), high_file=LORA_FILE, low_file=LOW_LORA_FILE, high=HIGH, low=LOW,
        width=width, height=height, frames=frames, length=info.tokenizer_max_length, fps=info.framerate,
    )  # fmt: skip


def low_noise_files(info: ExportInfo) -> dict[str, Path]:
    """Where the low-noise expert's LoRA lies in the export folder, by dialect, beside the high-noise one's."""
    return {
        "diffusers": Path("diffusers") / LOW_LORA_FILE,
        "comfyui": Path("comfyui") / f"{info.file_name}-low-noise.safetensors",
    }


def high_noise_steps(info: ExportInfo) -> int:
    """How many steps of the ladder the high-noise expert makes."""
    return sum(sigma >= info.boundary for sigma in info.schedule.ladder)


def experts_document(info: ExportInfo) -> dict[str, Any]:
    """The entry "experts" of distill.json."""
    return {"boundary": info.boundary, "high_noise_steps": high_noise_steps(info)}
