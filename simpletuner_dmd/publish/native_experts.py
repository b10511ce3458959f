"""A student that is one of a base's own two networks (Wan 2.2 A14B), alone or beside the student of the other one.

The pipeline stays the stock `WanPipeline` with both transformers, which switches by itself at its `boundary_ratio`.
Every export's sampler.py can put its own student on its own transformer, whatever it is (LoRA, LyCORIS, full network);
so a pair is the other export in a folder of its own, and `load_experts` asks each for its student.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from simpletuner_dmd.durable import write_folder
from simpletuner_dmd.publish.info import ExportInfo, NativeExpert, ladder_text
from simpletuner_dmd.publish.snippets import LORA_FILE, teacher_lines

OTHER = "other_expert"
"""Folder of the other expert's export within this one."""
_KEPT = ("diffusers", "lycoris", "sampler.py", "distill.json")

_SAMPLER = '''\
"""The {steps}-step sampler of {name}, the {expert}-noise expert. Run: python sampler.py "a prompt" video.mp4 {usage}"""
import runpy
import sys
from pathlib import Path
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline{imports}
from diffusers.utils import export_to_video

SIGMAS = [{sigmas}]  # timesteps {ladder}; already shifted

class Ladder(FlowMatchEulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        super().set_timesteps(sigmas=SIGMAS, device=device)

def few_step_scheduler():
    return Ladder(shift=1.0, stochastic_sampling={stochastic})  # {meaning}

def load_own(pipe, folder):  # this student, on its own transformer
{load}

def load_experts(pipe, folder, other=None):  # both students; the pipeline switches at sigma {boundary:g} by itself
    load_own(pipe, folder)
    other = str(other or Path(folder) / "{other}")  # the export folder of the other expert's student
    runpy.run_path(other + "/sampler.py")["load_own"](pipe, other)

if __name__ == "__main__":
    base, other = (*sys.argv[3:4], {base})[0], (*sys.argv[4:], None)[0]
    pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)
{teacher}    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    load_experts(pipe, Path(__file__).parent, other)
    pipe.scheduler = few_step_scheduler()
    torch.manual_seed(42)  # the first noise and the re-noising
    video = pipe(sys.argv[1], width={width}, height={height}, num_frames={frames}, num_inference_steps={steps},
                 guidance_scale=1.0, max_sequence_length={length}).frames[0]
    export_to_video(video, sys.argv[2], fps={fps:g})
'''


def native_sampler_file(info: ExportInfo, native: NativeExpert) -> str:
    """sampler.py: few_step_scheduler, load_own, load_experts."""
    width, height, frames = info.size
    imports = ", WanTransformer3DModel" if info.model_type == "full" else ""
    if info.lycoris:
        imports += "\nfrom lycoris import create_lycoris_from_weights"
    return _SAMPLER.format(
        name=info.file_name, steps=info.steps, expert=native.expert, imports=imports,
        usage="[base]" if native.other is not None else "BASE EXPORT_OF_THE_OTHER_EXPERT",
        sigmas=", ".join(repr(sigma) for sigma in info.schedule.ladder), ladder=ladder_text(info),
        stochastic=info.renoise == "sde", boundary=native.boundary, other=OTHER, load=_load_own(info, native),
        meaning="fresh noise at each step" if info.renoise == "sde" else "deterministic (Euler)",
        teacher="".join(f"    {line}\n" for line in _merged_before(info)),
        base=json.dumps(info.base_name), width=width, height=height, frames=frames, length=info.tokenizer_max_length,
        fps=info.framerate,
    )  # fmt: skip


def _load_own(info: ExportInfo, native: NativeExpert) -> str:
    network, adapter = native.transformer, f"{native.expert}_noise"
    if info.model_type == "full":
        lines = [
            f"former = pipe.{network}",
            'student = WanTransformer3DModel.from_pretrained(folder, subfolder="diffusers/transformer",',
            "                                                dtype=former.dtype)",
            f"pipe.register_modules({network}=student.to(former.device))",
        ]
    elif info.lycoris:
        lines = [
            f'file = str(Path(folder) / "lycoris" / "{info.file_name}.safetensors")',
            f"network, _ = create_lycoris_from_weights(1.0, file, pipe.{network})",
            "for module in network.loras:",
            f"    module.to(pipe.{network}.device, pipe.{network}.dtype)",
            "network.apply_to()",
        ]
    else:
        lines = [
            f'pipe.load_lora_weights(folder, subfolder="diffusers", weight_name="{LORA_FILE}",',
            f'                       adapter_name="{adapter}", load_into_transformer_2={native.expert == "low"})',
        ]
    return "\n".join(f"    {line}" for line in lines)


def _merged_before(info: ExportInfo) -> list[str]:
    """The fine-tune that was part of the base; a full student holds it already."""
    return [] if info.model_type == "full" else teacher_lines(info)


def keep_other(directory: Path, native: NativeExpert) -> list[Path]:
    """The other expert's export, copied into this one; nothing where there is none."""
    other = native.other
    if other is None:
        return []

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _KEPT:
            source = other / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            elif source.is_file():
                shutil.copy2(source, folder / name)

    return [write_folder(directory / OTHER, write)]


def native_document(info: ExportInfo, native: NativeExpert) -> dict[str, Any]:
    """The entry "experts" of distill.json."""
    high = sum(sigma >= native.boundary for sigma in info.schedule.ladder)
    return {
        "expert": native.expert,
        "transformer": native.transformer,
        "boundary": native.boundary,
        "high_noise_steps": high if info.schedule.ladder else None,
        "other": OTHER if native.other is not None else None,
    }


def native_steps(info: ExportInfo, native: NativeExpert) -> str:
    """A row of the card: which steps are this student's, and who makes the others."""
    ladder = info.schedule.timesteps
    high = sum(sigma >= native.boundary for sigma in info.schedule.ladder)
    own = ladder[:high] if native.expert == "high" else ladder[high:]
    side = "and above" if native.expert == "high" else "and below"
    steps = ", ".join(f"{step:.6g}" for step in own)
    beside = f"the other expert's student is in `{OTHER}/`" if native.other is not None else \
        "the other steps need a student of the other expert: `load_experts(pipe, folder, other)`"  # fmt: skip
    return (f"this is the {native.words} (`{native.transformer}`), sigma {native.boundary:g} {side}: it makes {steps}; "
            f"{beside}")  # fmt: skip
