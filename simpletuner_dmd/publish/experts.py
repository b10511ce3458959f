"""A student of two experts (dual-expert consistency, arXiv 2506.03123), switched by noise level.

Two adapters on one base: the pipeline stays the stock `WanPipeline` with one transformer, and its public step callback
activates the expert of the next step, so the base is in memory once. A full student is the high-noise expert as a
network of its own, beside the base with the low-noise expert's LoRA: the pipeline's `transformer` and `transformer_2`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simpletuner_dmd.publish.info import ExportInfo, ladder_text
from simpletuner_dmd.publish.snippets import LORA_FILE, teacher_lines

LOW_LORA_FILE = "pytorch_lora_weights_low_noise.safetensors"
HIGH, LOW = "high_noise", "low_noise"
LOW_NOISE_METADATA = {"simpletuner_dmd.expert": "low noise"}

_SAMPLER = '''\
"""The {steps}-step sampler of {name}, two experts. Run: python sampler.py "a prompt" video.mp4 [base]"""
import sys
from pathlib import Path
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline{imports}
from diffusers.utils import export_to_video

SIGMAS = [{sigmas}]  # timesteps {ladder}; already shifted
BOUNDARY = {boundary!r}  # the high-noise expert makes the steps from this sigma upwards

class Ladder(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        super().set_timesteps(sigmas=SIGMAS, device=device)

def few_step_scheduler():
    return Ladder(shift=1.0, stochastic_sampling={stochastic})  # {meaning}

{functions}
if __name__ == "__main__":
    export, base = Path(__file__).parent, (*sys.argv[3:], {base})[0]
    pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)
{teacher}    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    load_experts(pipe, export)
    pipe.scheduler = few_step_scheduler()
    torch.manual_seed(42)  # the first noise and the re-noising
    video = pipe(sys.argv[1], width={width}, height={height}, num_frames={frames}, num_inference_steps={steps},
                 guidance_scale=1.0, max_sequence_length={length}{callback}).frames[0]
    export_to_video(video, sys.argv[2], fps={fps:g})
'''

_LORAS = """\
def load_experts(pipe, folder):  # the export folder, or a Hub repository
    pipe.load_lora_weights(folder, subfolder="diffusers", weight_name="{high_file}", adapter_name="{high}")
    pipe.load_lora_weights(folder, subfolder="diffusers", weight_name="{low_file}", adapter_name="{low}")
    pipe.set_adapters("{high}")

def switch_expert(pipe, step, timestep, kwargs):  # for callback_on_step_end
    following = SIGMAS[(step + 1) % len(SIGMAS)]  # after the last step: where the next video begins
    pipe.set_adapters("{high}" if following >= BOUNDARY else "{low}")
    return kwargs

"""

_LYCORIS = '''\
FILES = {{"{high}": "{high_file}", "{low}": "{low_file}"}}
tensors, applied = {{}}, {{}}

def load_experts(pipe, folder):  # the export folder
    tensors.update({{expert: load_file(Path(folder) / "lycoris" / file) for expert, file in FILES.items()}})
    put_on(pipe, "{high}")

def put_on(pipe, expert):
    """Exactly one network acts; None: the bare base. Made anew each time: lycoris applies a `full` one only once."""
    if applied:
        applied.popitem()[1].restore()
        pipe.transformer.to(pipe.transformer.device)  # `full` gives the weights back on the CPU
    if expert is not None:
        network, _ = create_lycoris_from_weights(1.0, "", pipe.transformer, tensors[expert])
        assert len(network.loras) == len({{key.partition(".")[0] for key in tensors[expert]}}), "another base"
        for module in network.loras:
            module.to(pipe.transformer.device, pipe.transformer.dtype)
        network.apply_to()
        applied[expert] = network

def switch_expert(pipe, step, timestep, kwargs):  # for callback_on_step_end
    following = SIGMAS[(step + 1) % len(SIGMAS)]  # after the last step: where the next video begins
    expert = "{high}" if following >= BOUNDARY else "{low}"
    if expert not in applied:
        put_on(pipe, expert)
    return kwargs

'''

_FULL = '''\
def load_experts(pipe, folder):  # the export folder, or a Hub repository; into a pipeline of the base
    """The student makes the high-noise steps, the base with a LoRA the others; the pipeline switches by itself."""
    student = WanTransformer3DModel.from_pretrained(folder, subfolder="diffusers/transformer",
                                                    dtype=pipe.transformer.dtype)
    pipe.register_modules(transformer=student.to(pipe.transformer.device), transformer_2=pipe.transformer)
    pipe.register_to_config(boundary_ratio=BOUNDARY)
    pipe.load_lora_weights(folder, subfolder="diffusers", weight_name="{low_file}", adapter_name="{low}",
                           load_into_transformer_2=True)

'''


def experts_sampler_file(info: ExportInfo) -> str:
    """sampler.py of a two-expert student: few_step_scheduler, load_experts, and switch_expert but for a full one."""
    width, height, frames = info.size
    full, files = info.model_type == "full", low_noise_files(info)
    functions, imports = (_FULL, ", WanTransformer3DModel") if full else (_LORAS, "")
    high_file, low_file = LORA_FILE, LOW_LORA_FILE
    if info.lycoris:
        functions = _LYCORIS
        imports = "\nfrom lycoris import create_lycoris_from_weights\nfrom safetensors.torch import load_file"
        high_file, low_file = f"{info.file_name}.safetensors", files["lycoris"].name
    return _SAMPLER.format(
        name=info.file_name, steps=info.steps, sigmas=", ".join(repr(sigma) for sigma in info.schedule.ladder),
        ladder=ladder_text(info), boundary=info.boundary, stochastic=info.renoise == "sde",
        meaning="fresh noise at each step" if info.renoise == "sde" else "deterministic (Euler)",
        base=json.dumps(info.base_name), imports=imports,
        functions=functions.format(high_file=high_file, low_file=low_file, high=HIGH, low=LOW),
        teacher="".join(f"    {line}\n" for line in teacher_lines(info)),
        callback="" if full else ",\n                 callback_on_step_end=switch_expert",
        width=width, height=height, frames=frames, length=info.tokenizer_max_length, fps=info.framerate,
    )  # fmt: skip


def is_low_noise(file: Path) -> bool:
    """Whether an exported adapter is the low-noise expert's, by its name."""
    return file.stem.endswith(("-low-noise", "_low_noise"))


def low_noise_files(info: ExportInfo) -> dict[str, Path]:
    """Where the low-noise expert's adapter lies in the export folder, by dialect, beside the high-noise one's."""
    return {
        "lycoris": Path("lycoris") / f"{info.file_name}-low-noise.safetensors",
        "diffusers": Path("diffusers") / LOW_LORA_FILE,
        "comfyui": Path("comfyui") / f"{info.file_name}-low-noise.safetensors",
    }


def high_noise_steps(info: ExportInfo) -> int:
    """How many steps of the ladder the high-noise expert makes."""
    return sum(sigma >= info.boundary for sigma in info.schedule.ladder)


def experts_document(info: ExportInfo) -> dict[str, Any]:
    """The entry "experts" of distill.json."""
    return {"boundary": info.boundary, "high_noise_steps": high_noise_steps(info)}
