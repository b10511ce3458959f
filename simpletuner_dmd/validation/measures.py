"""What videos and latents show, in plain arithmetic: no network is downloaded to judge another.

Absolute numbers mean little, so everything here is made to be divided by the teacher's on the same prompts and seeds.

Frames are [T, H, W, 3] uint8, T frames of pixels. Latents are normalised: B batch, C channels, F latent frames, H W
latent height and width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

CHUNK = 256
FRAMES_AT_ONCE = 16
LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709
CLIPPED = 2  # levels from black or white that count as clipped: H.264 and rounding move them by one
FLOW_SIDE = 128  # the shorter side, in pixels, that optical flow is computed at, at most
FLOW_PAIRS = 24  # of neighbouring frames that it is computed for, at most, spread over the clip
FLOW_LEVELS, FLOW_WINDOW, FLOW_ROUNDS = 4, 9, 3

PICTURE = ("saturation", "contrast", "clipped", "detail", "motion", "flow")
"""The keys of `clip_measures`."""

# --- one clip -------------------------------------------------------------------------------------------------------


def clip_measures(frames_THW3: np.ndarray) -> dict[str, float]:
    """What one clip shows.

    saturation: mean of max - min over the three colours, 0 to 1 (not HSV's quotient, which is noise in the dark).
    contrast: standard deviation of luma over all pixels, of 1. clipped: share of colour values at black or white.
    detail: root mean square of luma less its 3 x 3 mean, the energy of the highest frequencies. motion: mean absolute
    difference of luma between neighbouring frames. flow: mean length of the optical flow between them, in percent of
    the shorter side. A single frame has motion and flow 0.
    """
    lumas, sums = [], torch.zeros(3, dtype=torch.float64)
    for part in np.array_split(frames_THW3, range(FRAMES_AT_ONCE, len(frames_THW3), FRAMES_AT_ONCE)):
        levels = torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2)
        luma = (levels.float() / 255 * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        smooth = avg_pool2d(luma, 3, stride=1, padding=1, count_include_pad=False)
        clipped = (levels <= CLIPPED) | (levels >= 255 - CLIPPED)
        sums += torch.stack([
            (levels.amax(dim=1) - levels.amin(dim=1)).sum(dtype=torch.float64) / 255,
            clipped.sum() / 3,
            (luma - smooth).pow(2).sum(dtype=torch.float64),
        ])  # fmt: skip
        lumas.append(luma)
    luma_T1HW = torch.cat(lumas)
    saturation, clipped_share, high = (sums / luma_T1HW.numel()).tolist()
    moves = len(luma_T1HW) > 1
    return {
        "saturation": saturation,
        "contrast": float(luma_T1HW.std(correction=0)),
        "clipped": clipped_share,
        "detail": math.sqrt(high),
        "motion": float(luma_T1HW.diff(dim=0).abs().mean()) if moves else 0.0,
        "flow": mean_flow(luma_T1HW) if moves else 0.0,
    }


def mean_flow(luma_T1HW: Tensor) -> float:
    """Mean length of the optical flow between neighbouring frames (some of them, in a long clip), in percent of the
    shorter side."""
    firsts = torch.linspace(0, len(luma_T1HW) - 2, min(len(luma_T1HW) - 1, FLOW_PAIRS)).round().long()
    short = min(luma_T1HW.shape[-2:])
    if short > FLOW_SIDE:
        luma_T1HW = interpolate(luma_T1HW, scale_factor=FLOW_SIDE / short, mode="area", recompute_scale_factor=True)
    flow = optical_flow(luma_T1HW[firsts], luma_T1HW[firsts + 1])
    return float(flow.norm(dim=1).mean()) / min(luma_T1HW.shape[-2:]) * 100


@torch.no_grad()
def optical_flow(first_B1HW: Tensor, second_B1HW: Tensor) -> Tensor:
    """Dense pyramidal Lucas-Kanade (1981; Bouguet's pyramid): [B, 2, H, W], pixels to the right and down.

    Where a window has no texture the flow stays what the coarser level said; 0 in a flat picture. Good to a few
    percent for displacements up to about an eighth of the picture.
    """
    pyramid = [(first_B1HW.float(), second_B1HW.float())]
    while len(pyramid) < FLOW_LEVELS and min(pyramid[-1][0].shape[-2:]) >= 2 * FLOW_WINDOW:
        pyramid.append((avg_pool2d(pyramid[-1][0], 2), avg_pool2d(pyramid[-1][1], 2)))
    flow = torch.zeros(len(first_B1HW), 2, *pyramid[-1][0].shape[-2:])
    for first, second in reversed(pyramid):
        if flow.shape[-2:] != first.shape[-2:]:
            flow = 2 * interpolate(flow, size=first.shape[-2:], mode="bilinear", align_corners=False)
        flow = _refined(first, second, flow)
    return flow


def _refined(first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
    """A few Gauss-Newton rounds at one level; the normal equations are summed over a window around every pixel."""

    def window(values: Tensor) -> Tensor:
        return avg_pool2d(values, FLOW_WINDOW, stride=1, padding=FLOW_WINDOW // 2, count_include_pad=False)

    height, width = first.shape[-2:]
    across = torch.gradient(first, dim=3)[0]
    down = torch.gradient(first, dim=2)[0]
    xx, xy, yy = window(across * across), window(across * down), window(down * down)
    damping = 1e-5  # of squared luma per pixel: below it there is no texture to follow
    determinant = (xx + damping) * (yy + damping) - xy * xy
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(FLOW_ROUNDS):
        places = torch.stack([(x + flow[:, 0]) / max(width - 1, 1), (y + flow[:, 1]) / max(height - 1, 1)], dim=-1)
        moved = grid_sample(second, 2 * places - 1, mode="bilinear", padding_mode="border", align_corners=True)
        error = first - moved
        bx, by = window(across * error), window(down * error)
        step = torch.cat([(yy + damping) * bx - xy * by, (xx + damping) * by - xy * bx], dim=1) / determinant
        flow = flow + step.clamp(-1.0, 1.0)  # a linearisation is not believed for more than a pixel
    return flow


# --- sets of latents ------------------------------------------------------------------------------------------------


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| between two sets of samples [N, ...] and [M, ...].

    A U-statistic (a sample never meets itself), so its mean is the true distance, 0 for equal distributions, and a
    single figure may lie below 0. Samples are flattened and distances divided by the square root of their dimension,
    which makes |x - y| the root mean square difference per element. fp64. N and M at least 2.
    Székely and Rizzo, Energy statistics (2013), section 6.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared")
    if min(len(x), len(y)) < 2:
        raise ValueError("the energy distance needs two samples of each set at least")
    between = _sum_of_distances(x, y) / (len(x) * len(y))
    within_x = _sum_of_distances(x, None) / (len(x) * (len(x) - 1))
    within_y = _sum_of_distances(y, None) / (len(y) * (len(y) - 1))
    return (2 * between - within_x - within_y) / math.sqrt(x.shape[1])


def _sum_of_distances(x: Tensor, y: Tensor | None) -> float:
    """Sum of |x_i - y_j| over all pairs; with y None over the pairs i != j of x."""
    other = x if y is None else y
    total = 0.0
    for start in range(0, len(x), CHUNK):
        distances = torch.cdist(x[start : start + CHUNK], other)
        if y is None:  # the distance of a sample to itself is 0 by definition, not by rounding
            distances.diagonal(offset=start).zero_()
        total += float(distances.sum())
    return total


def rms_difference(x: Tensor, y: Tensor) -> float:
    """Root mean square difference per element."""
    return float((x.double() - y.double()).pow(2).mean().sqrt())


# --- a whole validation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specimen:
    """One rendered scene as it is measured. size: width, height, frames. latents: [C, F, H, W], on the CPU."""

    prompt: str
    seed: int
    size: tuple[int, int, int]
    latents: Tensor
    picture: Mapping[str, float]


def summary(specimens: Sequence[Specimen]) -> dict[str, Any]:
    """The means over a validation's videos, and what can only be seen across them.

    The keys of `clip_measures`; latent_mean and latent_std over everything, and channel_mean, channel_std per channel;
    seed_diversity: root mean square difference of latents between seeds of one prompt and size; prompt_diversity:
    between prompts of one seed and size. A diversity that no pair can show is left out.
    """
    assert specimens, "nothing was rendered"
    found: dict[str, Any] = {
        key: sum(specimen.picture[key] for specimen in specimens) / len(specimens) for key in PICTURE
    }
    # [C, everything]: sizes may differ between scenes.
    values = torch.cat([specimen.latents.double().flatten(1) for specimen in specimens], dim=1)
    found["latent_mean"], found["latent_std"] = float(values.mean()), float(values.std(correction=0))
    found["channel_mean"] = values.mean(dim=1).tolist()
    found["channel_std"] = values.std(dim=1, correction=0).tolist()
    found |= {
        "seed_diversity": _diversity(specimens, lambda one: (one.prompt, one.size)),
        "prompt_diversity": _diversity(specimens, lambda one: (one.seed, one.size)),
    }
    return {key: value for key, value in found.items() if value is not None}


def _diversity(specimens: Sequence[Specimen], alike: Any) -> float | None:
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for specimen in specimens:
        groups[alike(specimen)].append(specimen.latents)
    distances = [rms_difference(x, y) for group in groups.values() for x, y in combinations(group, 2)]
    return sum(distances) / len(distances) if distances else None


RATIOS = ("saturation", "contrast", "detail", "motion", "flow", "latent_std", "seed_diversity", "prompt_diversity")


def against(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, float]:
    """A student's summary relative to the teacher's: quotients, and for what may be 0 differences.

    The keys of RATIOS (a quotient whose teacher is 0 is left out); clipped and latent_mean: the student's less the
    teacher's; channel_drift: the largest difference of a channel's mean, in the teacher's standard deviations.
    """
    found = {key: student[key] / teacher[key] for key in RATIOS if key in student and teacher.get(key, 0) > 1e-6}
    found["clipped"] = student["clipped"] - teacher["clipped"]
    found["latent_mean"] = student["latent_mean"] - teacher["latent_mean"]
    channels: Iterable[tuple[float, float, float]] = zip(
        student["channel_mean"], teacher["channel_mean"], teacher["channel_std"], strict=True
    )
    found["channel_drift"] = max(abs(own - other) / max(spread, 1e-6) for own, other, spread in channels)
    return found
