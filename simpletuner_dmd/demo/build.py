"""Makes the embedded tiny Wan from nothing: `python -m simpletuner_dmd.demo.build --out FOLDER`.

On two cores the VAE takes 7 minutes and the transformer 18 with one thread (documentation/LAB_NOTES.md).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from simpletuner_dmd.demo import shapes
from simpletuner_dmd.demo.skeleton import SHIFT, TEXT_ROWS, save_text_parts
from simpletuner_dmd.demo.train_transformer import encode_clips, train_transformer
from simpletuner_dmd.demo.train_vae import train_vae


@dataclass(frozen=True)
class Effort:
    """How much is trained; the defaults are those of the model that ships."""

    vae_steps: tuple[int, int, int] = (450, 450, 120)
    vae_clips: int = 768
    clips: int = 4096
    transformer_steps: int = 4000


def save_index(folder: Path) -> None:
    """Writes model_index.json, so that the folder opens as a WanPipeline. The parts are there already."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.save_config(folder)


def build(out: Path, seed: int, effort: Effort = Effort()) -> None:  # noqa: B008 - frozen
    """Trains everything and writes the pipeline folder `out`, with built.json beside the parts."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    psnr = train_vae(out / "vae", seed=seed, steps=effort.vae_steps, clips=effort.vae_clips)
    vae_seconds = time.perf_counter() - began
    print(f"VAE: {psnr:.1f} dB on clips it has not seen, {vae_seconds:.0f} s")
    save_text_parts(out, seed)
    data = encode_clips(out, effort.clips, seed=seed + 1)
    began = time.perf_counter()
    loss = train_transformer(out, data, seed=seed, steps=effort.transformer_steps)
    seconds = time.perf_counter() - began
    print(f"transformer: loss {loss:.4f}, {seconds:.0f} s")
    save_index(out)
    facts = {
        "seed": seed,
        "vae_psnr_db": round(psnr, 2),
        "vae_seconds": round(vae_seconds),
        "transformer_loss": round(loss, 4),
        "transformer_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flow_schedule_shift": SHIFT,
        "tokenizer_max_length": TEXT_ROWS,
        "size": [shapes.SIZE, shapes.SIZE, shapes.FRAMES],
    }
    (out / "built.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tiny Wan that comes with the package, from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
