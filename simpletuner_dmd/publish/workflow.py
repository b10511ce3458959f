"""A ComfyUI graph in API format with the student's own sigmas; drop it on ComfyUI's window or POST it to /prompt."""

from __future__ import annotations

from typing import Any

from simpletuner_dmd.config.flavours import flavour_of
from simpletuner_dmd.publish.info import ExportInfo, NativeExpert, decimals

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
        **_vae_nodes(info, width, height, frames),
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


def _vae_nodes(info: ExportInfo, width: int, height: int, frames: int) -> dict[str, Node]:
    """The VAE, and empty latents in its shape: 2.2's own has 48 channels at a sixteenth of the size."""
    size = {"width": width, "height": height, "length": frames, "batch_size": 1}
    if flavour_of(info.flavour).parts["vae"] == "wan2.2/vae":
        return {"5": _node("VAELoader", vae_name="wan2.2_vae.safetensors"),
                "6": _node("Wan22ImageToVideoLatent", vae=["5", 0], **size)}  # fmt: skip
    return {"5": _node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
            "6": _node("EmptyHunyuanLatentVideo", **size)}  # fmt: skip


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


def two_expert_workflow(
    graph: dict[str, Node], info: ExportInfo, low_noise_file: str, first: int | None = None
) -> dict[str, Node]:
    """The graph of the high-noise expert, extended: after its steps those of the low-noise one, without new noise.

    first: how many steps the high-noise expert makes; None counts them from the student's own boundary."""
    first = sum(sigma >= info.boundary for sigma in info.schedule.ladder) if first is None else first
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


def native_workflow(graph: dict[str, Node], info: ExportInfo, native: NativeExpert, own_file: str) -> dict[str, Node]:
    """The graph over both networks of the base, each with its own student's LoRA; the other's file is a placeholder
    where its export is not kept beside."""
    high = sum(sigma >= native.boundary for sigma in info.schedule.ladder)
    files = {native.expert: own_file, native.partner: _other_file(native)}
    names = {expert: f"wan2.2_t2v_{expert}_noise_14B_fp8_scaled.safetensors" for expert in files}
    graph = {
        **graph,
        "1": _node("UNETLoader", unet_name=names["high"], weight_dtype="default"),
        "25": _node("UNETLoader", unet_name=names["low"], weight_dtype="default"),
    }
    # A fine-tune that was distilled is part of this run's network alone.
    first = {"high": "1", "low": "25"}
    if "17" in graph:
        graph["17"] = _node("LoraLoaderModelOnly", **graph["17"]["inputs"] | {"model": [first[native.expert], 0]})
        first[native.expert] = "17"
    graph["2"] = _node("LoraLoaderModelOnly", model=[first["high"], 0], lora_name=files["high"], strength_model=1.0)
    if not info.schedule.ladder:
        return graph
    return {
        **two_expert_workflow(graph, info, files["low"], high),
        "20": _node("LoraLoaderModelOnly", model=[first["low"], 0], lora_name=files["low"], strength_model=1.0),
    }


def _other_file(native: NativeExpert) -> str:
    """ComfyUI's file of the other expert, by the name that its own export gave it."""
    found = sorted((native.other / "comfyui").glob("*.safetensors")) if native.other is not None else []
    return found[0].name if found else f"your-{native.partner}-noise-lora.safetensors"


def base_file(info: ExportInfo) -> str:
    """The name that ComfyUI's own Wan guide gives the base, or a placeholder for a base it does not know."""
    known = {
        "ti2v-5b-2.2": "wan2.2_ti2v_5B_fp16.safetensors",
        "i2v-14b-2.1": "wan2.1_i2v_480p_14B_fp16.safetensors",
        "i2v-14b-2.1-720p": "wan2.1_i2v_720p_14B_fp16.safetensors",
    }
    if info.flavour in known:
        return known[info.flavour]
    size = info.base_size
    return f"wan2.1_t2v_{size}_fp16.safetensors" if size else "your-wan-base.safetensors"


def _node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}
