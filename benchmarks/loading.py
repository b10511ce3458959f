"""Host memory and seconds of loading a quantised base, from a checkpoint and from the cache, each in its own process.

    python benchmarks/loading.py
    python benchmarks/loading.py --precision fp8-quanto --width 1024 --layers 12

Makes a Wan of random bf16 weights in several shards. Printed: the peak of what each process holds above its imported
libraries, beside the limit of 1.2 times the quantised size plus one shard, and what `from_pretrained` and quantising
afterwards take. The peak is the highest resident size that a thread sees every few milliseconds, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

WAYS = ("streamed", "cached", "from_pretrained")


def make(folder: Path, width: int, layers: int, shard: str) -> None:
    """folder/transformer: config, index and shards of at most this size."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with init_empty_weights():
        model: Any = WanTransformer3DModel(
            num_attention_heads=width // 128, attention_head_dim=128, ffn_dim=4 * width, num_layers=layers,
            text_dim=512, freq_dim=256,
        )  # fmt: skip
    model = model.to_empty(device="cpu")
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder / "transformer", max_shard_size=shard)


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The highest resident size while the block runs."""

    def __enter__(self) -> Peak:
        self.highest, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.highest = max(self.highest, resident())

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.highest = max(self.highest, resident())


def load(way: str, model: Path, cache: Path, precision: str) -> dict[str, float]:
    """Loads once in this process; bytes above what the libraries and one tried layer take, and seconds."""
    from simpletuner_dmd.wan.loading import Storage, load_transformer
    from simpletuner_dmd.wan.quantisation import quantise
    from simpletuner_dmd.wan.schemes import scheme_problem
    from simpletuner_dmd.wan.sources import ModelSource

    from diffusers import WanTransformer3DModel  # isort: skip - imported now, so that the baseline has it

    assert scheme_problem(precision, torch.device("cpu"), "--precision") is None
    source = ModelSource(*[str(model)] * 4)
    before = resident()
    began = time.perf_counter()
    with Peak() as peak:
        if way == "from_pretrained":
            network: Any = WanTransformer3DModel.from_pretrained(model / "transformer", dtype=torch.bfloat16)
            quantise(network, precision)
        else:
            network = load_transformer(source, torch.bfloat16, Storage(precision, cache=cache))
    seconds = time.perf_counter() - began
    assert network is not None
    return {"peak": peak.highest - before, "kept": resident() - before, "seconds": seconds}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way in a process of its own."""
    model = folder / "model"
    make(model, arguments.width, arguments.layers, arguments.shard)
    shards = [file.stat().st_size for file in (model / "transformer").glob("*.safetensors")]
    results: dict[str, Any] = {"dense": sum(shards), "shards": len(shards), "shard": max(shards)}
    # What malloc is told to keep for itself would be counted as held.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--model", str(model), "--precision", arguments.precision]
        results[way] = json.loads(
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        )
    cached = next((folder / "model-cache").glob("*.safetensors"))
    results["quantised"] = cached.stat().st_size
    results["limit"] = 1.2 * results["quantised"] + results["shard"]
    return results


def main() -> int:
    """Exit code 1 where a way of ours holds more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8-quanto")
    parser.add_argument("--width", type=int, default=1024, help="width of the model, a multiple of 128")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--shard", default="60MB", help="largest size of a file of the checkpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        cache = arguments.model.with_name("model-cache")
        print(json.dumps(load(arguments.way, arguments.model, cache, arguments.precision)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, Path(folder))
    over = [way for way in ("streamed", "cached") if results[way]["peak"] > results["limit"]]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return 1 if over else 0
    size = {name: f"{results[name] / 1e6:.0f} MB" for name in ("dense", "quantised", "limit")}
    print(f"{arguments.precision}, width {arguments.width}, {arguments.layers} blocks: {size['dense']} in")
    print(f"{results['shards']} shards, {size['quantised']} quantised, limit {size['limit']}")
    for way in WAYS:
        peak, kept, seconds = (results[way][name] for name in ("peak", "kept", "seconds"))
        share = peak / results["quantised"]
        print(f"  {way:16} peak {peak / 1e6:5.0f} MB = {share:.2f} x, kept {kept / 1e6:5.0f} MB, {seconds:.1f} s")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
