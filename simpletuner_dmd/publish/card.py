"""The model card: what the Hub reads at the top, and what a person needs to get the student's own result."""

from __future__ import annotations

import json
import re
from typing import Any

from simpletuner_dmd.publish.experts import high_noise_steps, low_noise_files
from simpletuner_dmd.publish.info import ExportInfo, decimals, ladder_text
from simpletuner_dmd.publish.native_experts import native_steps
from simpletuner_dmd.publish.schedulers import SchedulerChoice
from simpletuner_dmd.publish.snippets import load_snippet
from simpletuner_dmd.publish.workflow import base_file


def model_card(
    info: ExportInfo, choice: SchedulerChoice, *, weights_dtype: str, comfyui_file: str | None = None
) -> str:
    """Markdown with YAML front matter. comfyui_file: the name under comfyui/, None where it was not written."""
    sections = [
        f"---\n{_yaml(front_matter(info, comfyui=comfyui_file is not None))}---\n",
        f"# {info.run_name}\n",
        _summary(info),
        info.note and f"{info.note}\n",
        f"## Use it with diffusers\n\n```python\n{load_snippet(info, choice)}```\n",
        _settings(info, choice),
        comfyui_file and _comfyui(info, choice, comfyui_file),
        _extracted(info),
        _training(info, weights_dtype),
        _health(info),
        _validation(info),
        _configuration(info),
    ]
    return "\n".join(section for section in sections if section)


def front_matter(info: ExportInfo, *, comfyui: bool) -> dict[str, Any]:
    """What the Hub reads. One `base_model` in diffusers layout: its copied snippet breaks on a list.

    comfyui: there is a file for ComfyUI.
    """
    tags = ["text-to-video", "diffusers", "wan", *(["lora"] if info.model_type == "lora" else [])]
    tags += ["comfyui", "template:sd-lora"] if comfyui else []
    tags += ["lycoris"] if info.lycoris else []
    tags += ["distillation"] if info.schedule.ladder else []
    matter: dict[str, Any] = {"license": info.licence, "library_name": "diffusers", "pipeline_tag": "text-to-video"}
    if not info.base_is_local:
        matter["base_model"] = info.base
        matter["base_model_relation"] = "adapter" if info.model_type == "lora" else "finetune"
    matter["tags"] = tags
    if info.videos:
        matter["widget"] = [{"text": prompt, "output": {"url": file}} for prompt, file in info.videos]
    return matter


def _summary(info: ExportInfo) -> str:
    kind = (
        "LyCORIS network for"
        if info.lycoris
        else "LoRA for"
        if info.model_type == "lora"
        else "full copy, in few steps, of"
        if info.schedule.ladder
        else "fine-tune of"
    )
    text = f"A {kind} `{info.base_name}`"
    if info.native is not None:
        text += f" ({info.native.words}, one of two)"
    if not info.schedule.ladder:
        return f"{text}, trained with SimpleTuner-DMD.\n"
    steps = f"{info.steps} step" + ("s" if info.steps > 1 else "")
    if info.blocks is not None:
        return (f"{text} that makes a video block by block, each in **{steps}** without guidance, and yields blocks as "
                f"they are finished. Distilled with {info.method.upper() or 'SimpleTuner-DMD'}.\n")  # fmt: skip
    if info.boundary:
        adapters = "LyCORIS networks" if info.lycoris else "LoRAs"
        kind = f"A full network for high noise and a LoRA on `{info.base_name}` for low noise" \
            if info.model_type == "full" else f"Two {adapters} for `{info.base_name}`, one for high and one for low " \
            "noise,"  # fmt: skip
        text = f"{kind} (two experts)"
    return (f"{text} that makes a video in **{steps}** without guidance: one forward of the network per step. "
            f"Distilled with {info.method.upper() or 'SimpleTuner-DMD'}.\n")  # fmt: skip


def _settings(info: ExportInfo, choice: SchedulerChoice) -> str:
    if not info.schedule.ladder:
        rows = [("steps", str(info.steps)), ("guidance_scale", f"{info.guidance:g}"),
                ("shift", f"{info.schedule.shift:g}")]  # fmt: skip
        rows += [("experts", f"this is the {info.native.words} (`{info.native.transformer}`)")] if info.native else []
        return f"## Settings\n\n{_table(rows)}"
    if info.blocks is not None:
        return f"## Settings\n\n{_table(_block_rows(info))}"
    scheduler = f"`{type(choice.scheduler).__name__}` from `diffusers/scheduler`"
    if choice.needs_sampler_file:
        scheduler = (f"`few_step_scheduler()` from `sampler.py`. No stock config gives this ladder: the one in "
                     f"`diffusers/scheduler` is the nearest, off by up to {choice.max_error:.3g} in sigma "
                     f"({1000 * choice.max_error:.3g} timesteps)")  # fmt: skip
    meaning = {"lcm": "**lcm**: fresh noise before every further step",
               "euler": "**euler**: deterministic, no new noise"}[choice.name]  # fmt: skip
    rows = [
        ("num_inference_steps", f"{info.steps}; the scheduler is right for this number only"),
        ("guidance_scale", "1.0 (off). Higher values burn the colours; a negative prompt has no effect"),
        ("timesteps", ladder_text(info)),
        ("sigmas", ", ".join(decimals(sigma) for sigma in (*info.schedule.ladder, 0.0)) + " (already shifted)"),
        ("sampler", f"{meaning}. The sampler is part of the model: the other one gives different videos"),
        ("scheduler", scheduler),
        ("LoRA strength", "1.0") if info.model_type == "lora" else ("weights", "`diffusers/transformer`"),
        *([("experts", _experts(info))] if info.boundary else []),
        *([("experts", native_steps(info, info.native))] if info.native is not None else []),
        ("max_sequence_length", str(info.tokenizer_max_length)),
    ]
    seed = ("\nThe re-noising draws from torch's global generator: call `torch.manual_seed` for a repeatable result.\n"
            if choice.name == "lcm" else "")  # fmt: skip
    return f"## Settings\n\n{_table(rows)}{seed}"


def _experts(info: ExportInfo) -> str:
    """Which of the two works when, and who switches."""
    first, steps = high_noise_steps(info), info.steps
    switch = "the pipeline switches (`boundary_ratio`)" if info.model_type == "full" else \
        "`switch_expert` from `sampler.py` switches; without it the high-noise expert makes every step"  # fmt: skip
    return f"high noise: the first {first} of {steps} steps, from sigma {info.boundary:.6g} upwards; low noise: the " \
           f"others. {switch}"  # fmt: skip


def _block_rows(info: ExportInfo) -> list[tuple[str, str]]:
    """No pipeline arguments: its call denoises whole clips."""
    blocks = info.blocks
    assert blocks is not None
    noise = "fresh noise before every further step" if info.renoise == "sde" else "deterministic, no new noise"
    alone = ", the first of one frame" if blocks.independent_first_frame else ""
    return [
        ("sampler", f"`make_video` and `blocks_of` from `sampler.py`: {noise}. The call of `WanPipeline`, and graphs "
         "of other programs, denoise whole clips at once, which this student has not learned"),
        ("blocks", f"{blocks.num_frame_per_block} latent frames{alone}; {info.steps} forwards per block, and one more "
         "for what later blocks see of it"),
        ("guidance", "none; a negative prompt has no effect"),
        ("timesteps", ladder_text(info)),
        ("sigmas", ", ".join(decimals(sigma) for sigma in (*info.schedule.ladder, 0.0)) + " (already shifted)"),
        ("LoRA strength", "1.0") if info.model_type == "lora" else ("weights", "`diffusers/transformer`"),
        ("max_sequence_length", str(info.tokenizer_max_length)),
    ]  # fmt: skip


def _comfyui(info: ExportInfo, choice: SchedulerChoice, comfyui_file: str) -> str:
    sampler = "uni_pc" if choice.name == "unipc" else choice.name
    files = f"`comfyui/{comfyui_file}`"
    if info.boundary:
        files += f" and `{low_noise_files(info)['comfyui']}`"
    lines = [
        "## Use it with ComfyUI\n",
        f"Put {files} into `models/loras` and open `comfyui/workflow.json` (sampler `{sampler}`, "
        "strength 1.0" + (", cfg 1.0, the sigmas of the table)." if info.schedule.ladder else ")."),
        f"The base in the graph is called `{base_file(info)}`; choose your own name of it.",
    ]
    if info.schedule.ladder:
        lines.append("The graph uses the core node `ManualSigmas`, in ComfyUI since the end of 2025.")
    return "\n".join(lines) + "\n"


def _training(info: ExportInfo, weights_dtype: str) -> str:
    sizes = ", ".join(f"{width}x{height}, {frames} frames" for width, height, frames in info.trained_sizes)
    rows = [
        ("base", f"`{info.base_name}`"),
        ("teacher", info.teacher),
        ("merged into the base", _teacher_lora(info)),
        ("method", info.method or "supervised"),
        ("trained sizes", sizes),
        ("framerate", f"{info.framerate:g}"),
        ("updates of the student", str(info.train_steps) if info.train_steps else ""),
        (
            "weights",
            {"ema": "moving average (EMA)", "raw": "as trained (no EMA)"}.get(info.weights, info.weights)
            + ("; `raw/` holds them as trained" if info.raw_beside else ""),
        ),
        ("stored as", weights_dtype),
        ("licence", info.licence),
        ("tool", f"SimpleTuner-DMD {info.tool_version}".strip()),
        *((name, f"{value:.6g}") for name, value in info.metrics.items()),
    ]
    return f"## Training\n\n{_table([(name, value) for name, value in rows if value])}"


def _teacher_lora(info: ExportInfo) -> str:
    lora = info.teacher_lora
    if lora is None:
        return ""
    first = ": load it first, as above" if info.model_type == "lora" or info.boundary else ""
    return f"`{lora.file}` at strength {lora.strength:g}{first}"


def _extracted(info: ExportInfo) -> str:
    if info.extracted is None:
        return ""
    found = info.extracted
    return (f"## Extracted, so lossy\n\nThis LoRA of rank {found['rank']} was taken from a full student by a singular "
            f"value decomposition of its difference from the base. {100 * found['relative_error']:.2g}% of what the "
            f"student changed in these layers is missing, most in `{found['worst_layer']}` "
            f"({100 * found['worst_error']:.2g}%); what it changed elsewhere (norms, biases, modulation), "
            f"{100 * found['left_out']:.2g}% of all, is not in it. The full student is the better one.\n")  # fmt: skip


def _health(info: ExportInfo) -> str:
    if not info.health:
        return ""
    rows = [(f"{colour} {_inline(name)}", _inline(said)) for colour, name, said in info.health]
    return f"## Health at the last validation\n\n{_table(rows)}"


def _configuration(info: ExportInfo) -> str:
    if not info.config:
        return ""
    text = json.dumps(dict(info.config), indent=2, ensure_ascii=False)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 3)
    return (f"<details><summary>Configuration</summary>\n\n{fence}json\n{text}\n{fence}\n\n"
            "Folders are named without their place.\n</details>\n")  # fmt: skip


def _validation(info: ExportInfo) -> str:
    if not info.validation_prompts:
        return ""
    sizes = ", ".join(f"{width}x{height}x{frames}" for width, height, frames in info.validation_sizes)
    seed = "" if info.validation_seed is None else f", seed {info.validation_seed}"
    lines = "\n".join(f"- {_inline(prompt)}" for prompt in info.validation_prompts)
    lines += "\n\n<Gallery />" if info.videos else ""
    return f"## Validation prompts{f' ({sizes}{seed})' if sizes else ''}\n\n{lines}\n"


def _yaml(matter: dict[str, Any]) -> str:
    """A flat mapping: every JSON value is a YAML value."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in matter.items())


def _table(rows: list[tuple[str, str]]) -> str:
    body = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)
    return f"| | |\n|---|---|\n{body}\n"


def _inline(text: str) -> str:
    """User text on one line, without markup."""
    plain = " ".join(text.split())
    return "".join("\\" + c if c in "\\`*_[]<>#|" else c for c in plain)
