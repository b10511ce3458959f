"""How fast and how large a DMD step is on a CUDA card: Wan of the published size, random weights, nothing to download.

    python -m benchmarks.gpu                          # 1.3B in bf16 and 14B in int8, 832x480, 81 frames
    python -m benchmarks.gpu --model 14b --precision int8-quanto --rank 32
    python -m benchmarks.gpu --tiny                   # the same code on a CPU, a Wan of two blocks

The run is `simpletuner train`'s own: roles on a shared base, adapters, DMD with K = 5 and n = 3, optimizers and the
Trainer. FLOPs are counted by running the same step on the meta device, attention included; the ceiling is what a
large bf16 matrix product reaches on this card right before. Time is that of whole cycles of K steps, so the student's
turn has its share; the first cycle is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import small_network
from benchmarks.random_weights import DMD, RandomAssembly, configured, train
from simpletuner_dmd.cli.blueprint import known_config, observe
from simpletuner_dmd.cli.capacity import matmul_rate, this_machine
from simpletuner_dmd.cli.planning import CUDA_CONTEXT, make_plan, sizes_of
from simpletuner_dmd.training.progress import forget_peak, peak_bytes

CYCLE = int(DMD["generator_update_interval"])
MODELS = {"1.3b": ("t2v-480p-1.3b-2.1", "no_change"), "14b": ("t2v-480p-14b-2.1", "int8-quanto")}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints a line per model, and JSON of all of them at the end; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--precision", help="of the base: no_change, int8-quanto, ...")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--cycles", type=int, default=2, help="counted cycles of 5 steps")
    parser.add_argument("--tiny", action="store_true", help="two small blocks, 64x64, 5 frames")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="any option of config.json")
    arguments = parser.parse_args(argv)
    options = dict(option.split("=", 1) for option in arguments.option)
    if arguments.tiny:
        found = [_measure("tiny", arguments.precision or "no_change", arguments.rank, "64x64", 5, arguments.cycles,
                          small_network(2, 2), options)]  # fmt: skip
    else:
        found = [
            _measure(name, arguments.precision or MODELS[name][1], arguments.rank, arguments.size, arguments.frames,
                     arguments.cycles, None, options)
            for name in arguments.model or MODELS
        ]  # fmt: skip
    print(json.dumps(found, indent=2))
    return found


def _measure(
    name: str, precision: str, rank: int, size: str, frames: int, cycles: int, network: dict[str, Any] | None,
    options: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = {"mixed_precision": "no", "tokenizer_max_length": 16} if network is not None else {}
    flavour = {} if network is not None else {"model_flavour": MODELS[name][0]}
    with tempfile.TemporaryDirectory() as folder:
        loaded = configured(
            Path(folder), size, frames, network, lora_rank=rank, base_model_precision=precision, **tiny, **flavour,
            **options,
        )  # fmt: skip
        plan, shape = make_plan(loaded, this_machine(loaded.config.mixed_precision)), sizes_of(loaded).trained
        flops = observe(loaded, shape, shape).flops * loaded.config.gradient_accumulation_steps
        ceiling = matmul_rate(device.type, "bfloat16")
        assembly = RandomAssembly(loaded, device, known_config(loaded, "transformer"))
        forget_peak(device)
        seconds: list[float] = []
        train(assembly, shape, CYCLE * (1 + cycles), lambda values: seconds.append(values["step_seconds"]))
        held = peak_bytes(device)
    counted = seconds[CYCLE:]
    per_step = sum(counted) / len(counted)
    batch = loaded.config.train_batch_size * loaded.config.gradient_accumulation_steps
    facts = {
        "model": name,
        "precision": precision,
        "rank": rank,
        "size": size,
        "frames": frames,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds_per_step": per_step,
        "seconds_of_a_student_step": sum(counted[::CYCLE]) / cycles,
        "tokens_per_sample": plan.tokens_per_sample,
        "tokens_per_second": plan.tokens_per_sample * batch / per_step,
        "peak_gb": held / 1e9,
        "planned_gb": (plan.training_peak - (CUDA_CONTEXT if plan.device == "cuda" else 0)) / 1e9,
        "model_tflop_per_step": flops / 1e12,
        "tflops": flops / per_step / 1e12,
        "matmul_tflops": ceiling / 1e12,
        "share_of_matmul": flops / per_step / ceiling,
    }
    print(
        f"{name} {precision} rank {rank}, {size}x{frames} on {facts['device']}: {per_step:.3g} s/step, "
        f"{facts['tokens_per_second']:.0f} tokens/s, peak {facts['peak_gb']:.1f} GB ({facts['planned_gb']:.1f} "
        f"planned), {facts['tflops']:.3g} TFLOP/s, {100 * facts['share_of_matmul']:.0f}% of matmul",
        flush=True,
    )
    return facts


if __name__ == "__main__":
    main()
