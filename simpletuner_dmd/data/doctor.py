"""Looks at what the caches hold before a run spends money on it: the mistakes that cost others most raise no error.

- pixels given to the VAE in the wrong range, or its mean and standard deviation applied twice, inversely or not at all
  (diffusers applies them outside the VAE): the cached latents are decoded and compared with the file they came from,
  and their spread per channel is held against what each mistake would leave
- a text encoder whose embedding table was loaded as zeros: every prompt embeds alike
- padding kept as if it were text

Shapes: B batch, C channels, F latent frames, T video frames, H W height and width, L text rows, D text width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.disk import write_whole
from simpletuner_dmd.data.encode import Clip, EncodeVideo, clip_to_pixels, read_clip_of
from simpletuner_dmd.data.store import LatentStore
from simpletuner_dmd.data.text_store import TextStore, text_key
from simpletuner_dmd.data.video import UnusableFile

SAMPLES = 4
DECODED = 2
RECORD = "doctor.json"
HEALTHY_DB = 20.0  # Wan's VAE reaches 30 and more on ordinary videos
BETTER_DB = 6.0
COMPARED_CHARACTERS = 400  # longer prompts may differ only beyond what the tokenizer reads

# What each mistake multiplies the log of a channel's spread by: log(std of the cache) = power * log(std of the VAE).
MISTAKES = {
    1: "the VAE's mean and std were not applied",
    -1: "the VAE's mean and std were applied twice",
    2: "the VAE's std was multiplied instead of divided by",
}


@dataclass(frozen=True)
class Vae:
    """What the doctor needs of a VAE. mean, std: [C], of its raw latents, as its config.json has them."""

    fingerprint: str
    encode: EncodeVideo
    decode: Callable[[Tensor], Tensor]
    mean: Sequence[float]
    std: Sequence[float]


# --- text -------------------------------------------------------------------------------------------------------------


def examine_text(store: TextStore, prompts: Sequence[str], fingerprint: str, max_rows: int) -> list[str]:
    """Looks at the first prompts that differ. Returns warnings; raises UserError where they are no use."""
    chosen = list(dict.fromkeys(" ".join(p.split())[:COMPARED_CHARACTERS] for p in prompts))[:SAMPLES]
    of = {" ".join(p.split())[:COMPARED_CHARACTERS]: p for p in reversed(prompts)}
    rows = {of[short]: store.load(text_key(of[short], fingerprint)).float() for short in chosen}
    remedy = (
        f"delete {store.folder} after updating transformers, or after correcting the text encoder's files "
        "(`shared.weight` is its embedding table)"
    )
    for prompt, rows_LD in rows.items():
        if not torch.isfinite(rows_LD).all() or not rows_LD.any():
            raise UserError(f"the cached embedding of {_short(prompt)} is zero or not finite", fix=remedy)
    warnings = [
        f"the cached embedding of {_short(prompt)} ends in {int(_trailing_zeros(rows_LD))} rows of zeros: padding was "
        f"kept as text; delete {store.folder}"
        for prompt, rows_LD in rows.items()
        if _trailing_zeros(rows_LD)
    ]
    alike = [
        (one, other)
        for one, other in combinations([prompt for prompt in rows if prompt.strip()], 2)
        if _equal(rows[one], rows[other])
    ]
    for one, other in alike:
        # Prompts that share most words may differ only in one that the tokenizer does not know, or beyond its length.
        told = f"the cached embeddings of {_short(one)} and {_short(other)} are the same"
        if _words_in_common(one, other) < 0.5:
            raise UserError(f"{told}: the text encoder does not see the words", fix=remedy)
        warnings.append(told)
    longest = max((len(rows_LD) for rows_LD in rows.values()), default=0)
    if longest > max_rows:
        raise UserError(f"a cached embedding has {longest} rows, tokenizer_max_length is {max_rows}", fix=remedy)
    return warnings


def _words_in_common(one: str, other: str) -> float:
    """Of all words of two prompts, the share that both have."""
    left, right = set(one.lower().split()), set(other.lower().split())
    return len(left & right) / max(1, len(left | right))


def _trailing_zeros(rows_LD: Tensor) -> int:
    used = rows_LD.any(dim=1).nonzero()
    return len(rows_LD) - 1 - int(used[-1]) if len(used) else len(rows_LD)


def _equal(one_LD: Tensor, other_LD: Tensor) -> bool:
    """Whether two embeddings are the same but for rounding, in the rows that both have."""
    rows = min(len(one_LD), len(other_LD))
    difference = (one_LD[:rows] - other_LD[:rows]).norm() / one_LD[:rows].norm().clamp_min(1e-12)
    return bool(difference < 1e-3)


def padding_is_zero(rows_BLD: Tensor, lengths: Sequence[int]) -> bool:
    """Whether what the transformer is given past each prompt's own rows is exactly zero."""
    return all(not rows_LD[length:].any() for rows_LD, length in zip(rows_BLD, lengths, strict=True))


# --- latents ----------------------------------------------------------------------------------------------------------


def examine_spread(latents: Sequence[Tensor], vae_std: Sequence[float]) -> list[str]:
    """Whether latents [C, F, H, W] are near mean 0 and standard deviation 1 per channel, as normalised ones are."""
    channels = torch.cat([latents_CFHW.float().flatten(1) for latents_CFHW in latents], dim=1)
    mean_C, std_C = channels.mean(dim=1), channels.std(dim=1)
    warnings = []
    off = [c for c in range(len(mean_C)) if abs(mean_C[c]) > 5 or not 0.01 < std_C[c] < 10]
    if off:
        c = off[0]
        warnings.append(
            f"{len(off)} of {len(mean_C)} channels of the cached latents are far from mean 0 and std 1, "
            f"for example channel {c}: mean {mean_C[c]:.2f}, std {std_C[c]:.2f}"
        )
    found, expected = std_C.clamp_min(1e-6).log(), torch.tensor(list(vae_std)).log()
    misfit = {power: float((found - power * expected).square().mean()) for power in (0, *MISTAKES)}
    likely = min(misfit, key=misfit.__getitem__)
    # Where the VAE's own std is 1 in every channel nothing can go wrong, and nothing can be told.
    if likely in MISTAKES and misfit[likely] < misfit[0] / 2 and float(expected.abs().mean()) > 0.2:
        warnings.append(f"the cached latents look as if {MISTAKES[likely]} (std per channel {_list(std_C)})")
    return warnings


def _list(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist()[:4]) + (" …" if len(values) > 4 else "")


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    error = float((one.float() - other.float()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def examine_clips(store: LatentStore, clips: Sequence[Clip], vae: Vae) -> list[str]:
    """Decodes the first cached clips and compares them with their files. Slow, so the result is remembered.

    Raises UserError where the VAE itself does better than the cache, so the cache holds something else.
    """
    record = store.folder / RECORD
    known = _recorded(record, vae.fingerprint)
    if known is not None:
        return known
    warnings, compared = [], 0
    for clip in clips[:DECODED]:
        try:
            pixels_3THW = clip_to_pixels(read_clip_of(clip))
        except UnusableFile:
            continue  # the file is gone: there is nothing to compare with
        compared += 1
        closeness = psnr(vae.decode(store.load(clip.key)[None])[0], pixels_3THW)
        if closeness >= HEALTHY_DB:
            continue
        best = psnr(vae.decode(vae.encode(pixels_3THW[None]))[0], pixels_3THW)
        if best > closeness + BETTER_DB:
            raise UserError(
                f"the cached latents of {clip.sample.path.name} decode to something else than the file shows: "
                f"{closeness:.1f} dB, where this VAE reaches {best:.1f} dB",
                fix=f"delete {store.folder}; the same command makes it anew",
            )
        warnings.append(
            f"{clip.sample.path.name} comes back from the VAE at {closeness:.1f} dB; {HEALTHY_DB:.0f} dB and more is "
            "usual. `simpletuner cache inspect` writes what the cache shows"
        )
    if compared:
        write_whole(record, json.dumps({"vae": vae.fingerprint, "warnings": warnings}).encode())
    return warnings


def _recorded(record: Path, fingerprint: str) -> list[str] | None:
    """What was found with this VAE before."""
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
        return [str(line) for line in document["warnings"]] if document["vae"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def examine_latents(store: LatentStore, clips: Sequence[Clip], vae: Vae, *, decode: bool) -> list[str]:
    """Warnings about one dataset's latents. decode: also what needs the VAE, where it was not found good before."""
    if not clips:
        return []
    spread = examine_spread([store.load(clip.key) for clip in clips[:SAMPLES]], vae.std)
    return spread + (examine_clips(store, clips, vae) if decode else [])


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
