"""What the data side costs, each figure against its own limit: `python benchmarks/data.py` prints all of them.

- captions per second cached, against the text encoder's forward alone
- videos per second cached (decode, encode, write), against the VAE's forward alone, at two sizes
- the same in processor time, user and system of all threads, which neighbours on the machine disturb less
- from start to the first batch on a complete cache of 100,000 prompts, and memory above a process that has imported
- how long a training step of the demo waits for its batch
- disk per prompt against 512 x 4096 bf16, the size that Wan's padded embeddings have

Ratios are of neighbouring measurements, medians over rounds, so that a busy machine shifts both sides alike. Up to nine
minutes on two cores that ten others use as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CAPTIONS, CAPTION_ROUNDS = 48, 3
# Pictures of this many pixels on a side, clips per round, rounds: of the demo's own size, and where encoding is work.
VIDEOS = ((64, 192, 5), (192, 16, 5))
NAIVE = 512 * 4096 * 2
WORDS = ("a", "red", "blue", "cat", "dog", "robot", "river", "wave", "surfs", "dances", "slowly", "over", "fog")


Act = Callable[[int], object]
Spent = tuple[float, float]


@dataclass
class Compared:
    """Per round (seconds, seconds of the processors): of the forward alone, around each round, and of caching."""

    alone: list[Spent] = field(default_factory=list)
    cached: list[Spent] = field(default_factory=list)


def seconds(act: Callable[[], object]) -> Spent:
    began = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def compared(rounds: int, alone: Act, others: dict[str, Act]) -> dict[str, Compared]:
    """Each of `others` against the forward alone before and after them, in turns; the first round is a warm-up."""
    found: dict[str, Compared] = {name: Compared() for name in others}
    before = seconds(lambda: alone(0))
    for number in range(rounds + 1):
        order = list(others) if number % 2 else list(others)[::-1]
        spent = {name: seconds(lambda name=name, number=number: others[name](number)) for name in order}  # type: ignore[misc]
        after = seconds(lambda number=number: alone(number))  # type: ignore[misc]
        for name in others if number else []:
            found[name].alone.append(((before[0] + after[0]) / 2, (before[1] + after[1]) / 2))
            found[name].cached.append(spent[name])
        before = after
    return found


def report(name: str, per: str, count: int, result: Compared) -> dict[str, Any]:
    (alone, alone_cpu), (cached, cached_cpu) = (
        [statistics.median(spent) for spent in zip(*rounds, strict=True)] for rounds in (result.alone, result.cached)
    )
    ratios, cpu_ratios = (
        sorted(b[which] / a[which] for a, b in zip(result.alone, result.cached, strict=True)) for which in (0, 1)
    )
    overhead, cpu_overhead = statistics.median(ratios) - 1, statistics.median(cpu_ratios) - 1
    print(
        f"{name}: {count / cached:.2f} {per}/s cached, {count / alone:.2f} {per}/s forward alone, "
        f"overhead {100 * overhead:.1f} % (allowed 10 %; rounds {', '.join(f'{100 * r - 100:.1f}' for r in ratios)}); "
        f"processor time {1e3 * cached_cpu / count:.2f} ms against {1e3 * alone_cpu / count:.2f} ms each, "
        f"{100 * cpu_overhead:.1f} % (rounds {', '.join(f'{100 * r - 100:.1f}' for r in cpu_ratios)})",
        flush=True,
    )
    return {
        f"{name}_per_second": count / cached,
        f"{name}_overhead": overhead,
        f"{name}_processor_overhead": cpu_overhead,
    }


def sentence(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + k * (k + number)) % len(WORDS)] for k in range(words)) + f" {number}"


# --- caching ----------------------------------------------------------------------------------------------------------


def captions(folder: Path) -> dict[str, Any]:
    """An encoder of UMT5's class, as wide as Wan's and one layer deep: what is written per prompt is of real size."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    from simpletuner_dmd.data.encode import cache_text
    from simpletuner_dmd.data.text_store import TextStore

    torch.manual_seed(0)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=512, d_model=4096, d_kv=64, num_heads=8, d_ff=2048, num_layers=1, use_cache=False)
    ).eval()
    rows = 100  # of an ordinary detailed caption

    @torch.no_grad()
    def encode(prompts: list[str]) -> list[torch.Tensor]:
        tokens = torch.tensor([[(hash_of(prompt) + k * k) % 500 + 1 for k in range(rows)] for prompt in prompts])
        return [row.bfloat16() for row in encoder(tokens, torch.ones_like(tokens)).last_hidden_state]

    def hash_of(prompt: str) -> int:
        return sum(map(ord, prompt))

    def prompts(number: int) -> list[str]:
        return [sentence(CAPTIONS * number + k, 20) for k in range(CAPTIONS)]

    sizes: dict[bool, float] = {}

    def alone(number: int) -> None:
        asked = prompts(number)
        for start in range(0, CAPTIONS, 16):
            encode(asked[start : start + 16])

    def cached(compress: bool) -> Act:
        place = folder / f"text-{compress}"

        def act(number: int) -> None:
            store = TextStore(place, compress)
            cache_text(store, prompts(number), "bench", encode, write_batch=16, max_rows=512, progress=False)
            sizes[compress] = store.bytes_on_disk / len(store)

        return act

    both = {"captions": cached(False), "captions (zstd)": cached(True)}
    found: dict[str, Any] = {}
    for name, result in compared(CAPTION_ROUNDS, alone, both).items():
        found |= report(name, "captions", CAPTIONS, result)
    for compress, size in sizes.items():
        how = "zstd" if compress else "plain"
        print(f"disk per prompt of {rows} tokens, {how}: {size / 1e3:.0f} kB, naive {NAIVE / 1e3:.0f} kB: "
              f"{NAIVE / size:.1f} times smaller")  # fmt: skip
        found[f"bytes_per_prompt_{how}"] = size
    return found


def videos(folder: Path) -> dict[str, Any]:
    """The clips and the VAE that ship with the package."""
    import torch

    from simpletuner_dmd.config.databackend import DatasetEntry
    from simpletuner_dmd.config.schema import TrainConfig
    from simpletuner_dmd.data.buckets import LatentGeometry
    from simpletuner_dmd.data.encode import Clip, cache_latents, clip_of, clip_to_pixels, read_clip_of
    from simpletuner_dmd.data.scan import scan
    from simpletuner_dmd.data.store import LatentStore
    from simpletuner_dmd.demo import path as demo_path
    from simpletuner_dmd.wan.encoders import VideoCodec
    from simpletuner_dmd.wan.sources import ModelSource

    config = TrainConfig(pretrained_model_name_or_path=str(demo_path.model_path()))
    codec, geometry = VideoCodec(ModelSource.of(config), device=torch.device("cpu")), LatentGeometry()
    figures: dict[str, Any] = {}
    for side, count, rounds in VIDEOS:
        entry = DatasetEntry(id="demo", instance_data_dir=str(demo_path.data_path()), resolution=side,
                             max_num_samples=count, video={"num_frames": 9})  # fmt: skip
        found = scan(entry, config, geometry=geometry)
        store = LatentStore(folder / "hashes", True)
        clips = [clip_of(sample, found.settings, store, "bench") for sample in found.usable]  # type: ignore[arg-type]
        pixels = [clip_to_pixels(read_clip_of(clip))[None] for clip in clips]

        def alone(number: int, pixels: list[torch.Tensor] = pixels) -> None:
            for clip in pixels:
                codec.encode(clip)

        def cached(number: int, side: int = side, clips: list[Clip] = clips) -> None:
            place = LatentStore(folder / f"vae-{side}-{number}", True)
            cache_latents(place, clips, codec.encode, geometry, batch_size=1, progress=False)

        name = f"videos of {side} x {side} x 9"
        figures |= report(name, "videos", count, compared(rounds, alone, {"": cached})[""])
    return figures


# --- starting ---------------------------------------------------------------------------------------------------------

RESTART = """
import json, sys, time
from pathlib import Path
import torch
import simpletuner_dmd.cli.run
from benchmarks.data import memory, start_on
before = memory("VmRSS")
began = time.perf_counter()
start_on(Path(sys.argv[1]))
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": memory("VmHWM") - before}))
"""


def memory(name: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (the most it had)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def start_on(folder: Path, encode: Any = None) -> Any:
    """Prepares the prompts of `folder` and loads the first batch."""
    from simpletuner_dmd.config.databackend import DatasetEntry
    from simpletuner_dmd.config.schema import TrainConfig
    from simpletuner_dmd.data.buckets import LatentGeometry
    from simpletuner_dmd.data.prepare import prepare

    config = TrainConfig(
        pretrained_model_name_or_path="none-needed",
        cache_dir_text=str(folder / "text"),
        write_batch_size=1024,
        tokenizer_max_length=512,
        train_batch_size=8,
        seed=1,
    )
    entry = DatasetEntry(id="many", dataset_type="prompts", instance_data_dir=str(folder / "prompts.txt"))
    data = prepare(
        [entry], config, encode_text=encode, encode_video=None, text_fingerprint="bench", vae_fingerprint="",
        latent_geometry=LatentGeometry(), needs_latents=False, negative_prompt="ugly", progress=False,
    )  # fmt: skip
    batch = data.micro_batch(0, 0, 0, micro_batch_size=8, accumulation=1, world=1)
    data.close()
    return batch


def restart(folder: Path, prompts: int) -> dict[str, Any]:
    import torch

    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(sentence(k, 18) for k in range(prompts)), encoding="utf-8")
    rows = torch.randn(256, 64).bfloat16()  # small: the start reads places, not embeddings
    start_on(folder, lambda asked: [rows[(at := sum(map(ord, prompt)) % 250) : at + 4] for prompt in asked])
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", RESTART, str(folder)], capture_output=True, text=True, check=True,
                              cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    took, more = (statistics.median(row[name] for row in found) for name in ("seconds", "bytes"))
    print(f"restart on {prompts:,} cached prompts: first batch after {took:.2f} s (allowed 2 s), "
          f"{more / 1e6:.0f} MB above the imports (allowed 80 MB)")  # fmt: skip
    return {"restart_seconds": took, "restart_bytes": more}


def waiting(folder: Path) -> dict[str, Any]:
    """The share of a step of the demo in which it waits for its batch."""
    from simpletuner_dmd.cli.main import main
    from simpletuner_dmd.data.batches import PreparedData

    waits: list[float] = []
    genuine = PreparedData.micro_batch

    def timed(self: PreparedData, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        batch = genuine(self, *arguments, **options)
        waits.append(time.perf_counter() - began)
        return batch

    PreparedData.micro_batch = timed  # type: ignore[method-assign]
    options = [f"output_dir={folder / 'run'}", f"cache_dir_text={folder / 'text'}", f"cache_dir_vae={folder / 'vae'}"]
    options += ["max_train_steps=25", "checkpoint_step_interval=1000", "validation_disable=true", "report_to=none"]
    assert main(["train", "--example", "demo", *options]) == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step_seconds"] for row in rows if row["event"] == "step"]
    # The first steps fill memory and load the first batch with nothing to hide behind.
    share = statistics.median(waits[5 : len(steps)]) / statistics.median(steps[5:])
    wait, step = 1e3 * statistics.median(waits), 1e3 * statistics.median(steps)
    print(f"the demo waits {100 * share:.2f} % of its step for data (allowed 2 %): {wait:.2f} ms of {step:.0f} ms")
    return {"loader_wait_share": share}


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000, help="size of the cache that is started on")
    parser.add_argument("--only", choices=["captions", "videos", "restart", "waiting"], help="one of the figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "captions": lambda: captions(folder / "captions"),
            "videos": lambda: videos(folder / "videos"),
            "restart": lambda: restart(folder / "restart", options.prompts),
            "waiting": lambda: waiting(folder / "waiting"),
        }
        for part, act in parts.items():
            if options.only in (None, part):
                found |= act()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_()
