"""How much of a training pass TREAD saves: forward and backward of a small Wan, with and without routing.

    python benchmarks/tread.py
    python benchmarks/tread.py --ratio 0.25 --tokens 1024 4096

CPU seconds of one thread, so other work on the machine counts little. Routed and unrouted passes alternate; printed are
the medians and the ratio of the medians, after one pair that is not counted.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers import WanTransformer3DModel

from simpletuner_dmd.flow import Routing, TextEmbedding
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.runner import BlockRunner
from simpletuner_dmd.wan.tread import Route

WIDTH_OF_A_HEAD, HEADS, TEXT_ROWS, TEXT_WIDTH = 32, 4, 64, 64


def build(layers: int, route: Route, checkpointing: bool) -> WanDenoiser:
    """A Wan of width 128 with random weights, every one of them trained."""
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH_OF_A_HEAD,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=4 * HEADS * WIDTH_OF_A_HEAD,
        num_layers=layers,
        rope_max_seq_len=128,
    )
    BlockRunner(network, None, checkpointing)
    return WanDenoiser(network.train(), None, None, routes=(route,))


def seconds(denoiser: WanDenoiser, x_t: torch.Tensor, step: int, routed: bool) -> float:
    """CPU time of one forward and backward, the draw of the tokens included."""
    text = TextEmbedding(torch.zeros(1, TEXT_ROWS, TEXT_WIDTH))
    routing = Routing(RandomStream(0, step, (0,)), "benchmark") if routed else None
    denoiser.transformer.zero_grad()
    began = time.process_time()
    denoiser.velocity(x_t, torch.tensor([0.5]), text, routed=routing).square().mean().backward()
    return time.process_time() - began


def latents_of(tokens: int) -> torch.Tensor:
    """Latents of four frames with so many tokens in all, as square as they get: patches are 2 x 2."""
    per_frame = tokens // 4
    height = next(side for side in range(int(per_frame**0.5), 0, -1) if per_frame % side == 0)
    return torch.randn(1, 16, 4, 2 * height, 2 * per_frame // height)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="video tokens, multiples of 4")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the tokens that bypasses the span (0.5)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (8)")
    parser.add_argument("--start", type=int, default=1, help="first block of the span (1)")
    parser.add_argument("--end", type=int, default=6, help="last block of the span (6)")
    parser.add_argument("--runs", type=int, default=3, help="pairs of passes that are counted (3)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the blocks in backward")
    options = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = build(options.layers, Route(options.ratio, options.start, options.end), options.checkpointing)
    print(f"{options.layers} blocks of width {HEADS * WIDTH_OF_A_HEAD}, {options.ratio:.0%} of the tokens around "
          f"blocks {options.start} to {options.end}, batch 1, fp32, {platform.machine()} CPU, one thread, torch "
          f"{torch.__version__}, checkpointing {'on' if options.checkpointing else 'off'}")  # fmt: skip
    print("| tokens | all tokens, s | routed, s | routed / all |")
    print("|---:|---:|---:|---:|")
    for tokens in options.tokens:
        x_t = latents_of(tokens)
        pairs = [
            (seconds(denoiser, x_t, step, routed=False), seconds(denoiser, x_t, step, routed=True))
            for step in range(options.runs + 1)
        ][1:]
        whole, routed = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {tokens} | {whole:.3f} | {routed:.3f} | {routed / whole:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
