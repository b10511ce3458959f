"""The Python that a user of the student runs: sampler.py, and the few lines on the card."""

from __future__ import annotations

import json

from simpletuner_dmd.publish.info import ExportInfo, ladder_text
from simpletuner_dmd.publish.schedulers import SchedulerChoice

LORA_FILE = "pytorch_lora_weights.safetensors"

_SAMPLER = '''\
"""The exact {steps}-step sampler of {name} on stock diffusers. Run: python sampler.py "a prompt" video.mp4 [base]"""
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
{host}
if __name__ == "__main__":
    export, base = Path(__file__).parent / "diffusers", (*sys.argv[3:], {base})[0]
{load}
    pipe.scheduler = few_step_scheduler()
    pipe.to("cuda" if torch.cuda.is_available() else "cpu"){moved}
    torch.manual_seed(42)  # the first noise and the re-noising
    video = pipe(sys.argv[1], width={width}, height={height}, num_frames={frames}, num_inference_steps={steps},
                 guidance_scale=1.0, max_sequence_length={length}{latents}).frames[0]
    export_to_video(video, sys.argv[2], fps={fps:g})
'''


_HOST = """
def without_picture(pipe, width, height, frames):  # its picture channels get zeros; returns the first noise
    def pad(module, args, kwargs):
        noisy = kwargs["hidden_states"]
        empty = noisy.new_zeros(noisy.shape[0], module.config.in_channels - noisy.shape[1], *noisy.shape[2:])
        return args, {{**kwargs, "hidden_states": torch.cat([noisy, empty], dim=1)}}
    pipe.transformer.register_forward_pre_hook(pad, with_kwargs=True)
    return torch.randn(1, pipe.transformer.config.out_channels, (frames - 1) // {temporal} + 1, height // {spatial},
                       width // {spatial}, device=pipe.device)
"""


def host_function(info: ExportInfo) -> str:
    """`without_picture`, for a base that expects one; else nothing."""
    if not info.picture_channels:
        return ""
    spatial, temporal = info.vae_scale
    return _HOST.format(spatial=spatial, temporal=temporal)


def host_file(info: ExportInfo) -> str | None:
    """sampler.py of a student without a ladder: what its host needs."""
    return f"import torch\n\n{host_function(info)}" if info.picture_channels else None


def load_lines(info: ExportInfo) -> str:
    """The lines of a sampler.py that open the student from the export folder."""
    if info.model_type == "full":
        return ('    student = WanTransformer3DModel.from_pretrained(export / "transformer", dtype=torch.bfloat16)\n'
                "    pipe = WanPipeline.from_pretrained(base, transformer=student, dtype=torch.bfloat16)")  # fmt: skip
    base = ["pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)", *teacher_lines(info)]
    file = f'export.parent / "lycoris" / "{info.file_name}.safetensors"'
    student = [_lycoris_line(f"str({file})")] if info.lycoris else \
        [f'pipe.load_lora_weights(export, weight_name="{LORA_FILE}")']  # fmt: skip
    return "\n".join(f"    {line}" for line in [*base, *student])


def sampler_file(info: ExportInfo) -> str:
    """sampler.py, at most 30 lines: the ladder as sigmas inside a scheduler, so that no config has to express it."""
    width, height, frames = info.size
    return _SAMPLER.format(
        name=info.file_name, steps=info.steps, sigmas=", ".join(repr(sigma) for sigma in info.schedule.ladder),
        ladder=ladder_text(info), stochastic=info.renoise == "sde", base=json.dumps(info.base_name),
        load=load_lines(info), host=host_function(info),
        latents=f",\n                 latents=without_picture(pipe, {width}, {height}, {frames})"
        if info.picture_channels else "",
        meaning="fresh noise at each step" if info.renoise == "sde" else "deterministic (Euler)",
        imports=loading_imports(info),
        moved=f"\n    {MOVED}" if info.lycoris else "", width=width, height=height, frames=frames,
        length=info.tokenizer_max_length, fps=info.framerate,
    )  # fmt: skip


LYCORIS_IMPORT = "from lycoris import create_lycoris_from_weights"


def full_import(info: ExportInfo) -> str:
    return ", WanTransformer3DModel" if info.model_type == "full" else ""


def loading_imports(info: ExportInfo) -> str:
    """What `load_lines` need, after "from diffusers import WanPipeline"."""
    return full_import(info) + (f"\n{LYCORIS_IMPORT}" if info.lycoris else "")


def teacher_lines(info: ExportInfo) -> list[str]:
    """The fine-tune that was part of the base, merged in as it was in training."""
    if info.teacher_lora is None:
        return []
    file, strength = json.dumps(info.teacher_lora.file), info.teacher_lora.strength
    if info.native is not None:  # into its own network alone
        network = info.native.transformer
        into = f", load_into_transformer_2={network == 'transformer_2'}"
        return [
            f"pipe.load_lora_weights({file}{into})  # the fine-tune that was distilled",
            f'pipe.fuse_lora(components=["{network}"], lora_scale={strength:g}); pipe.{network}.unload_lora()',
        ]
    return [f"pipe.load_lora_weights({file})  # the fine-tune that was distilled",
            f"pipe.fuse_lora(lora_scale={strength:g}); pipe.unload_lora_weights()"]  # fmt: skip


# lycoris' modules are no part of the pipeline: `pipe.to` leaves them where they were.
MOVED = "network.to(pipe.device, pipe.dtype)"


def _lycoris_line(file: str, network: str = "transformer") -> str:
    return f"network, _ = create_lycoris_from_weights(1.0, {file}, pipe.{network}); network.apply_to()"


def _network(info: ExportInfo) -> str:
    """The pipeline's network that the student belongs to."""
    return "transformer" if info.native is None else info.native.transformer


def load_snippet(info: ExportInfo, choice: SchedulerChoice) -> str:
    """The lines to copy. They read a Hub repository and a local export folder alike."""
    if info.boundary or info.blocks is not None or (info.native is not None and info.schedule.ladder):
        return _own_sampler_snippet(info)
    scheduler = type(choice.scheduler).__name__
    helpers = [*(["few_step_scheduler"] if choice.needs_sampler_file else []),
               *(["without_picture"] if info.picture_channels else [])]  # fmt: skip
    names = ["WanPipeline"] if choice.needs_sampler_file else [scheduler, "WanPipeline"]
    names += ["WanTransformer3DModel"] if info.model_type == "full" else []
    width, height, frames = info.size
    guidance = 1.0 if info.schedule.ladder else info.guidance
    latents = f",\n             latents=without_picture(pipe, {width}, {height}, {frames})" if info.picture_channels \
        else ""  # fmt: skip
    lines = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        *([LYCORIS_IMPORT + "  # pip install lycoris-lora"] if info.lycoris else []),
        "from diffusers.utils import export_to_video",
        *(["from huggingface_hub import hf_hub_download"] if info.lycoris and info.hub_repo else []),
        *([f"from sampler import {', '.join(helpers)}  # sampler.py of this repository"] if helpers else []),
        "",
        f"source = {json.dumps(info.hub_repo or 'path/to/export')}  # a Hub repository or the export folder",
        f"base = {json.dumps(info.base_name)}",
    ]  # fmt: skip
    if info.model_type == "full":
        lines += [
            'student = WanTransformer3DModel.from_pretrained(source, subfolder="diffusers/transformer",',
            "                                                dtype=torch.bfloat16)",
            f"pipe = WanPipeline.from_pretrained(base, {_network(info)}=student, dtype=torch.bfloat16)",
        ]
    elif info.lycoris:
        lines += [
            "pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)",
            *teacher_lines(info),
            *(['file = hf_hub_download(source, "lycoris/' + info.file_name + '.safetensors")'] if info.hub_repo else
              ['file = source + "/lycoris/' + info.file_name + '.safetensors"']),
            _lycoris_line("file", _network(info)),
        ]  # fmt: skip
    else:
        lines += [
            "pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)",
            *teacher_lines(info),
            f'pipe.load_lora_weights(source, subfolder="diffusers", weight_name="{LORA_FILE}"'
            + (", load_into_transformer_2=True)" if _network(info) == "transformer_2" else ")"),
            "assert pipe.get_active_adapters()  # a file that does not fit loads without an error",
        ]
    lines += [
        "pipe.scheduler = few_step_scheduler()" if choice.needs_sampler_file else
        f'pipe.scheduler = {scheduler}.from_pretrained(source, subfolder="diffusers/scheduler")',
        'pipe.to("cuda")',
        *([MOVED] if info.lycoris else []),
        "torch.manual_seed(42)  # also the noise between the steps, which `generator=` does not reach"
        if choice.name == "lcm" else "torch.manual_seed(42)",
        f"video = pipe({json.dumps(info.prompt, ensure_ascii=False)}, width={width}, height={height}, "
        f"num_frames={frames},",
        f"             num_inference_steps={info.steps}, guidance_scale={guidance},"
        f" max_sequence_length={info.tokenizer_max_length}{latents}).frames[0]",
        f'export_to_video(video, "video.mp4", fps={info.framerate:g})',
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _own_sampler_snippet(info: ExportInfo) -> str:
    """The lines of a student that the plain pipeline call cannot sample: sampler.py's own functions do."""
    width, height, frames = info.size
    prompt, blockwise = json.dumps(info.prompt, ensure_ascii=False), info.blocks is not None
    switched = info.model_type == "lora" and info.native is None  # else the pipeline switches by itself
    names = ["few_step_scheduler", "load_experts", *(["switch_expert"] if switched else [])]
    lines = [
        "import sys",
        *(["from pathlib import Path"] if blockwise else []),
        "import torch",
        f"from diffusers import WanPipeline{full_import(info) if blockwise else ''}",
        *([LYCORIS_IMPORT + "  # pip install lycoris-lora"] if info.lycoris and blockwise else []),
        "from diffusers.utils import export_to_video",
        *(["from huggingface_hub import snapshot_download"] if info.hub_repo else []),
        "",
        f"source = snapshot_download({json.dumps(info.hub_repo)})" if info.hub_repo else
        'source = "path/to/export"  # the export folder',
        f"base = {json.dumps(info.base_name)}",
        "sys.path.insert(0, source)  # sampler.py is beside the weights",
    ]  # fmt: skip
    if blockwise:
        return "\n".join([
            *lines,
            "from sampler import make_video",
            "",
            'export = Path(source) / "diffusers"',
            *(line.removeprefix("    ") for line in load_lines(info).splitlines()),
            'pipe.to("cuda")',
            *([MOVED] if info.lycoris else []),
            "torch.manual_seed(42)",
            f"video = make_video(pipe, {prompt}, width={width}, height={height}, frames={frames})",
            f'export_to_video(video, "video.mp4", fps={info.framerate:g})',
        ]) + "\n"  # fmt: skip
    callback = ", callback_on_step_end=switch_expert" if switched else ""
    alone = info.native is not None and info.native.other is None
    return "\n".join([
        *lines,
        f"from sampler import {', '.join(names)}" + ("  # needs lycoris-lora" if info.lycoris else ""),
        "",
        "pipe = WanPipeline.from_pretrained(base, dtype=torch.bfloat16)",
        *teacher_lines(info),
        'pipe.to("cuda")',
        'load_experts(pipe, source, "path/to/the/other/experts/export")' if alone else "load_experts(pipe, source)",
        "pipe.scheduler = few_step_scheduler()",
        "torch.manual_seed(42)",
        f"video = pipe({prompt}, width={width}, height={height}, num_frames={frames},",
        f"             num_inference_steps={info.steps}, guidance_scale=1.0,"
        f" max_sequence_length={info.tokenizer_max_length}{callback}).frames[0]",
        f'export_to_video(video, "video.mp4", fps={info.framerate:g})',
    ]) + "\n"  # fmt: skip
