"""A ComfyUI graph in API format with the student's own sigmas; drop it on ComfyUI's window or POST it to /prompt."""

from __future__ import annotations

from typing import Any

from simpletuner_dmd.publish.info import ExportInfo, decimals

Node = dict[str, Any]


def comfyui_workflow(info: ExportInfo, lora_file: str, sampler: str) -> dict[str, Node]:
    """The graph. sampler: "lcm" (fresh noise at each step), "euler", or "unipc" for a model without a ladder."""
    width, height, frames = info.size
    return {
        "1": _node("UNETLoader", unet_name=base_file(info), weight_dtype="default"),
        **_teacher_node(info),
        "2": _node("LoraLoaderModelOnly", model=["17" if info.teacher_lora else "1", 0], lora_name=lora_file,
                   strength_model=1.0),
        "3": _node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan"),
        "4": _node("CLIPTextEncode", text=info.prompt, clip=["3", 0]),
        "5": _node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "6": _node("EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=1),
        "7": _node("RandomNoise", noise_seed=42),
        "8": _node("KSamplerSelect", sampler_name="uni_pc" if sampler == "unipc" else sampler),
        **(_few_step_nodes(info) if info.schedule.ladder else _many_step_nodes(info)),
        "11": _node("SamplerCustomAdvanced", noise=["7", 0], guider=["10", 0], sampler=["8", 0], sigmas=["9", 0],
                    latent_image=["6", 0]),
        "12": _node("VAEDecode", samples=["11", 0], vae=["5", 0]),
        "13": _node("CreateVideo", images=["12", 0], fps=float(info.framerate)),
        # Newer servers nest the codec under dotted names, older ones read the plain one; each skips the other's.
        "14": _node("SaveVideo", video=["13", 0], filename_prefix=f"video/{info.file_name}",
                    **{"format": "auto", "format.codec": "auto", "codec": "auto"}),
    }  # fmt: skip


def _teacher_node(info: ExportInfo) -> dict[str, Node]:
    """The fine-tune that the base of the training had merged in; its file name is the one it was trained with."""
    if info.teacher_lora is None:
        return {}
    lora, strength = info.teacher_lora.file, info.teacher_lora.strength
    return {"17": _node("LoraLoaderModelOnly", model=["1", 0], lora_name=lora, strength_model=strength)}


def _few_step_nodes(info: ExportInfo) -> dict[str, Node]:
    """The sigmas as they are (no ModelSamplingSD3: it has no effect on them), guidance off: one forward per step."""
    sigmas = ", ".join(decimals(sigma) for sigma in (*info.schedule.ladder, 0.0))
    return {
        "9": _node("ManualSigmas", sigmas=sigmas),
        "10": _node("BasicGuider", model=["2", 0], conditioning=["4", 0]),
    }


def _many_step_nodes(info: ExportInfo) -> dict[str, Node]:
    return {
        "9": _node("BasicScheduler", model=["15", 0], scheduler="simple", steps=info.sampling_steps, denoise=1.0),
        "10": _node("CFGGuider", model=["15", 0], positive=["4", 0], negative=["16", 0], cfg=float(info.guidance)),
        "15": _node("ModelSamplingSD3", model=["2", 0], shift=float(info.schedule.shift)),
        "16": _node("CLIPTextEncode", text="", clip=["3", 0]),
    }


def two_expert_workflow(graph: dict[str, Node], info: ExportInfo, low_noise_file: str) -> dict[str, Node]:
    """The graph of the high-noise expert, extended: after its steps those of the low-noise one, without new noise."""
    first = sum(sigma >= info.boundary for sigma in info.schedule.ladder)
    return {
        **graph,
        "20": _node("LoraLoaderModelOnly", model=graph["2"]["inputs"]["model"], lora_name=low_noise_file,
                    strength_model=1.0),
        "21": _node("SplitSigmas", sigmas=["9", 0], step=first),
        "22": _node("BasicGuider", model=["20", 0], conditioning=["4", 0]),
        "23": _node("DisableNoise"),
        "11": _node("SamplerCustomAdvanced", noise=["7", 0], guider=["10", 0], sampler=["8", 0], sigmas=["21", 0],
                    latent_image=["6", 0]),
        "24": _node("SamplerCustomAdvanced", noise=["23", 0], guider=["22", 0], sampler=["8", 0], sigmas=["21", 1],
                    latent_image=["11", 0]),
        "12": _node("VAEDecode", samples=["24", 0], vae=["5", 0]),
    }  # fmt: skip


def base_file(info: ExportInfo) -> str:
    """The name that ComfyUI's own Wan guide gives the base, or a placeholder for a base it does not know."""
    size = info.base_size
    return f"wan2.1_t2v_{size}_fp16.safetensors" if size else "your-wan-base.safetensors"


def _node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}
