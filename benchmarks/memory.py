"""Planned memory of every flavour, method, role layout and precision; and the plan held against what runs here.

    python -m benchmarks.memory            # the table of plans, nothing is loaded
    python -m benchmarks.memory --measure  # small Wans, each trained in a process of its own: planned and measured

The plans are of 832x480, 81 frames, batch 1, rank 64 and gradient checkpointing, of the training steps alone. Measured
is the most resident memory of a process while it trains, less what it held with its libraries loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_weights import DMD, RandomAssembly, configured, train
from simpletuner_dmd.cli.blueprint import known_config
from simpletuner_dmd.cli.capacity import Machine, host_now
from simpletuner_dmd.cli.planning import TRAINING, make_plan, sizes_of
from simpletuner_dmd.config import LoadedConfig
from simpletuner_dmd.training.progress import forget_peak, peak_bytes

FLAVOURS = ("t2v-480p-1.3b-2.1", "t2v-480p-14b-2.1", "ti2v-5b-2.2")
"""Both experts of 2.2 A14B, and the I2V hosts, are 14B networks; a run has one of them."""
METHODS: dict[str, dict[str, Any]] = {
    "dmd": {"distillation_method": "dmd", "distillation_config": DMD},
    "lcm": {"distillation_method": "lcm", "distillation_config": {}},
    "fine-tuning": {"distillation_method": None, "distillation_config": {}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "LoRA, bf16 base": {"lora_rank": 64},
    "LoRA, int8 base": {"lora_rank": 64, "base_model_precision": "int8-quanto"},
    "full": {"model_type": "full"},
}
GPU = Machine("cuda", 0, 1e12, "")
HEAD = 64
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # of malloc.h

# Width in heads, blocks, latent frames, latent height and width, and what differs from a LoRA DMD in fp32.
CASES: dict[str, tuple[int, int, tuple[int, int, int], dict[str, Any]]] = {
    "LoRA": (4, 3, (5, 24, 24), {}),
    "LoRA, wider": (8, 2, (3, 24, 24), {}),
    "LoRA, more tokens": (4, 3, (5, 32, 32), {}),
    "LoRA, deeper": (4, 8, (3, 24, 24), {}),
    "LoRA, no checkpointing": (4, 3, (3, 24, 24), {"gradient_checkpointing": False}),
    "LoRA, bf16": (4, 3, (5, 24, 24), {"mixed_precision": "bf16"}),
    "LoRA, int8": (4, 3, (5, 24, 24), {"mixed_precision": "bf16", "base_model_precision": "int8-quanto"}),
    "full": (8, 6, (2, 24, 24), {"model_type": "full"}),
    "fine-tuning": (4, 3, (5, 24, 24), {"distillation_method": None}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train small Wans and compare")
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    rows = (measured if arguments.measure else planned)(arguments.only or "")
    for row in rows:
        print(row, flush=True)
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s)")


# --- plans ------------------------------------------------------------------------------------------------------------


def planned(only: str) -> Iterator[str]:
    """A row of the table for each combination."""
    yield "| flavour | method | roles | base and roles | step | GPU, training | measured |"
    yield "|---|---|---|---|---|---|---|"
    for method, chosen in METHODS.items():
        for flavour in FLAVOURS:
            for layout, roles in LAYOUTS.items():
                name = f"| {flavour} | {method} | {layout} |"
                if only in name and (method == "dmd" or layout != "full"):
                    yield name + _plan_row({"model_flavour": flavour, **chosen, **roles})


def _plan_row(options: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(configured(Path(folder), "832x480", 81, **options), GPU)
    coming = sum(part.gpu for part in plan.components if part.part in ("gradients", "activations"))
    peak = plan.training_peak
    return f" {(peak - coming) / 1e9:.1f} GB | {coming / 1e9:.1f} GB | {peak / 1e9:.1f} GB | not measured |"


# --- measurements -----------------------------------------------------------------------------------------------------


def measured(only: str) -> Iterator[str]:
    """Each case in a process of its own, forked with the libraries loaded."""
    yield "| case | width x blocks | tokens | planned | measured | planned / measured |"
    yield "|---|---|---|---|---|---|"
    for name, case in CASES.items():
        if only in name:
            yield _row(name, case, *compare(*case))


def _row(name: str, case: tuple[int, int, tuple[int, int, int], Any], plan: int, held: int) -> str:
    heads, depth, (frames, height, width), _ = case
    return (f"| {name} | {heads * HEAD} x {depth} | {frames * height * width // 4} | {plan / 1e6:.0f} MB | "
            f"{held / 1e6:.0f} MB | {plan / held:.3f} |")  # fmt: skip


def compare(heads: int, depth: int, grid: tuple[int, int, int], options: dict[str, Any]) -> tuple[int, int]:
    """Bytes beyond the libraries: (planned, measured) of the training steps."""
    with tempfile.TemporaryDirectory() as name:
        loaded = _configured(Path(name), heads, depth, grid, options)
        return _in_a_process(lambda: _planned(loaded)), _in_a_process(lambda: _held(loaded))


def _configured(
    folder: Path, heads: int, depth: int, grid: tuple[int, int, int], options: dict[str, Any]
) -> LoadedConfig:
    frames, height, width = grid
    chosen = {"mixed_precision": "no", "lora_rank": 16, "tokenizer_max_length": 64, **options}
    if chosen.get("distillation_method", "dmd") is not None:
        chosen["distillation_config"] = {**DMD, "generator_update_interval": 1}
    network = small_network(heads, depth)
    return configured(folder, f"{8 * width}x{8 * height}", 4 * (frames - 1) + 1, network, **chosen)


def _planned(loaded: LoadedConfig) -> int:
    plan = make_plan(loaded, Machine("cpu", 0, 1e9, ""))
    (training,) = [phase for phase in plan.phases if phase.name == TRAINING]
    return training.host - plan.components[-1].host


def _held(loaded: LoadedConfig) -> int:
    """The most this process holds while it takes two steps, less what it held before.

    glibc keeps what was freed in the middle of its heap, which can double what a process holds. The plan counts
    tensors, so here every block of 64 kB and more goes back to the system at once.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_MMAP_MAX, 1 << 20)
    with tempfile.TemporaryDirectory() as name:  # what is imported and set up at first use is no part of the run
        options = {key: getattr(loaded.config, key) for key in ("mixed_precision", "base_model_precision")}
        _train(_configured(Path(name), 1, 1, (1, 4, 4), options))
    gc.collect()
    before = host_now()
    forget_peak("cpu")
    _train(loaded)
    return peak_bytes("cpu") - before


def _train(loaded: LoadedConfig) -> None:
    assembly = RandomAssembly(loaded, torch.device("cpu"), known_config(loaded, "transformer"))
    train(assembly, sizes_of(loaded).trained, 2, lambda values: None)


def _in_a_process(answer: Callable[[], int]) -> int:
    """The answer of a forked process, which has the libraries and nothing else."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        torch.set_num_threads(1)  # the threads of a pool do not survive a fork
        try:
            os.write(writer, str(answer()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        found = answers.read()
    os.waitpid(child, 0)
    return int(found)


def small_network(heads: int, depth: int) -> dict[str, Any]:
    """A Wan of this size."""
    return {
        "patch_size": [1, 2, 2], "num_attention_heads": heads, "attention_head_dim": HEAD, "in_channels": 16,
        "out_channels": 16, "text_dim": 256, "freq_dim": 64, "ffn_dim": 4 * heads * HEAD, "num_layers": depth,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 64,
        "added_kv_proj_dim": None, "image_dim": None, "pos_embed_seq_len": None, "_class_name": "WanTransformer3DModel",
    }  # fmt: skip


if __name__ == "__main__":
    main()
