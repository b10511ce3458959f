"""How good a few-step student of the demo is, by what its pixels show; distances are in `validation/measures.py`.

Obedience reads colour, direction and shape off rendered frames with plain image arithmetic, no network, and compares
them with the caption.

Frames are [T, H, W, 3] uint8, batches of clips [N, T, H, W, 3]; distances are in pixels, x to the right, y down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner_dmd.demo.shapes import COLOURS, DIRECTIONS, Combination


def gap_closed(student: float, undistilled: float, floor: float) -> float:
    """Share of the way from the undistilled model to the noise floor that the student has gone: 1 is all of it."""
    if not undistilled > floor:
        raise ValueError(f"the undistilled model ({undistilled:g}) is not above the floor ({floor:g}): no gap to close")
    return (undistilled - student) / (undistilled - floor)


# --- what a clip shows ----------------------------------------------------------------------------------------------

LEAST_CHROMA = 30.0  # length of a pixel's RGB without its grey part, of 255; noise stays below, objects are above 100
AREA = (0.01, 0.35)  # share of the picture that may be the object: the demo draws 4% to 10%
WIDEST_HUE = 45.0  # degrees between a hue and the colour it is called by; neighbours are 54 or more apart
SQUARE_BELOW = -0.15  # see _shape; between what the demo's VAE makes of squares (-0.39 to -0.15) and discs (-0.15 to 0)
LEAST_TRAVEL = 4.0  # pixels between the first and the last frame that count as motion; the demo moves by 12 to 26


@dataclass(frozen=True)
class Observation:
    """What a clip shows; None where nothing can be said.

    displacement: (x, y) of the object's centre from the first frame to the last, in pixels.
    saturation: mean HSV saturation of the object's pixels, 0 to 1; None without an object.
    """

    colour: str | None = None
    direction: str | None = None
    shape: str | None = None
    displacement: tuple[float, float] | None = None
    saturation: float | None = None


def read_clip(frames_THW3: np.ndarray) -> Observation:
    """Reads one clip [T, H, W, 3] uint8.

    The object is what has a hue, the background being grey; its colour is the nearest of the demo's hues, its direction
    the main axis of its centre's displacement, its shape by how far the outline reaches into four corners.
    """
    cover_THW, hue_vector = _object_cover(frames_THW3)
    inside_THW = cover_THW > 0.5
    if hue_vector is None or not AREA[0] <= inside_THW.mean() <= AREA[1]:
        return Observation()
    displacement = _displacement(cover_THW)
    return Observation(
        colour=_nearest_colour(hue_vector),
        direction=None if displacement is None else _direction(displacement),
        shape=_shape(cover_THW),
        displacement=displacement,
        saturation=float(_hsv_saturation(frames_THW3[inside_THW]).mean()),
    )


def obeys(observation: Observation, combination: Combination) -> bool:
    """Whether colour and direction are those of the caption."""
    return observation.colour == combination.colour and observation.direction == combination.direction


def obedience(frames_NTHW3: np.ndarray, combinations: Sequence[Combination]) -> dict[str, dict[str, float]]:
    """Shares of clips that show what their caption says.

    Groups "all", "seen" and "held_out" (the combinations kept out of the training set; a group without clips is left
    out), each with its count and the rates "colour", "direction", "both" (= obedience), "shape" and "all_three".
    """
    observations = [read_clip(frames) for frames in frames_NTHW3]
    return obedience_of(observations, combinations)


def obedience_of(
    observations: Sequence[Observation], combinations: Sequence[Combination]
) -> dict[str, dict[str, float]]:
    """`obedience` of clips that have been read already."""
    right = np.array([
        (seen.colour == said.colour, seen.direction == said.direction, obeys(seen, said), seen.shape == said.shape,
         obeys(seen, said) and seen.shape == said.shape)
        for seen, said in zip(observations, combinations, strict=True)
    ]).reshape(-1, 5)  # fmt: skip
    held_out = np.array([said.held_out for said in combinations], dtype=bool)
    groups = {"all": np.ones_like(held_out), "seen": ~held_out, "held_out": held_out}
    names = ("colour", "direction", "both", "shape", "all_three")
    return {
        group: {"count": float(chosen.sum()), **dict(zip(names, right[chosen].mean(axis=0).tolist(), strict=True))}
        for group, chosen in groups.items()
        if chosen.any()
    }


def saturation(frames_NTHW3: np.ndarray) -> float:
    """Mean HSV saturation (0 to 1) of the objects' pixels over all clips that show one; nan if none does."""
    return mean_saturation([read_clip(frames) for frames in frames_NTHW3])


def mean_saturation(observations: Sequence[Observation]) -> float:
    """`saturation` of clips that have been read already."""
    found = [seen.saturation for seen in observations if seen.saturation is not None]
    return float(np.mean(found)) if found else math.nan


def mean_travel(observations: Sequence[Observation]) -> float:
    """Mean length of the displacements in pixels, nan if nothing moves: motion that shrinks shows here first."""
    found = [math.hypot(*seen.displacement) for seen in observations if seen.displacement is not None]
    return float(np.mean(found)) if found else math.nan


def _object_cover(frames_THW3: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(How much of each pixel is the object, [T, H, W] in 0..1; the object's mean colour without its grey part).

    Projecting on that one colour drops two thirds of the noise, and gives edges their part.
    """
    chroma = frames_THW3.astype(np.float64)
    chroma -= chroma.mean(axis=-1, keepdims=True)
    strength = np.linalg.norm(chroma, axis=-1)
    strong = strength > max(LEAST_CHROMA, 0.5 * float(np.quantile(strength, 0.98)))
    if not strong.any():
        return np.zeros(strength.shape), None
    hue_vector = chroma[strong].mean(axis=0)
    length = float(np.linalg.norm(hue_vector))
    if length < LEAST_CHROMA:  # all hues at once: there is no one object
        return np.zeros(strength.shape), None
    along = chroma @ (hue_vector / length)
    level = float(np.median(along[strong]))
    return np.clip(along / max(level, LEAST_CHROMA), 0.0, 1.0), hue_vector


def _hue(rgb: np.ndarray) -> float:
    """Degrees on the colour wheel: 0 red, 120 green, 240 blue."""
    red, green, blue = (float(value) for value in rgb)
    return math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def _nearest_colour(hue_vector: np.ndarray) -> str | None:
    hue = _hue(hue_vector)

    def apart(name: str) -> float:
        return abs((hue - _hue(np.array(COLOURS[name])) + 180) % 360 - 180)

    nearest = min(COLOURS, key=apart)
    return nearest if apart(nearest) <= WIDEST_HUE else None


def _centre(cover_HW: np.ndarray) -> tuple[float, float] | None:
    """(x, y) of the object in one frame; None if it is not in it."""
    inside = np.where(cover_HW > 0.5, cover_HW, 0.0)  # faint noise all over the picture would pull towards its middle
    if (inside > 0).mean() < AREA[0]:
        return None
    y, x = np.mgrid[0 : inside.shape[0], 0 : inside.shape[1]]
    return float((inside * x).sum() / inside.sum()), float((inside * y).sum() / inside.sum())


def _displacement(cover_THW: np.ndarray) -> tuple[float, float] | None:
    first, last = _centre(cover_THW[0]), _centre(cover_THW[-1])
    return None if first is None or last is None else (last[0] - first[0], last[1] - first[1])


def _direction(displacement: tuple[float, float]) -> str | None:
    dx, dy = displacement
    if max(abs(dx), abs(dy)) < LEAST_TRAVEL:
        return None
    step = (int(np.sign(dx)), 0) if abs(dx) >= abs(dy) else (0, int(np.sign(dy)))
    return next(name for name, unit in DIRECTIONS.items() if unit == step)


def _shape(cover_THW: np.ndarray) -> str | None:
    """By the fourfold part of the outline, sum(r^4 cos 4a) / sum(r^4) over the object, averaged over the frames.

    0 for a disc, -0.43 for an upright square. The fill of a bounding box (0.785 and 1) is spoilt by a few loose pixels,
    and the fit of an ideal disc or square of the same area by the round corners that the VAE leaves: it called 10 of
    128 encoded and decoded clips wrong, where this calls 1.
    """
    fourfold = []
    for cover in cover_THW:
        centre = _centre(cover)
        if centre is None:
            continue
        y, x = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]]
        dx, dy = x - centre[0], y - centre[1]
        weight = np.where(cover > 0.5, cover, 0.0)
        cosine = weight * (dx**4 - 6 * dx**2 * dy**2 + dy**4)
        fourfold.append(cosine.sum() / (weight * (dx**2 + dy**2) ** 2).sum())
    if not fourfold:
        return None
    return "square" if float(np.mean(fourfold)) < SQUARE_BELOW else "circle"


def _hsv_saturation(rgb_N3: np.ndarray) -> np.ndarray:
    most, least = rgb_N3.max(axis=-1).astype(np.float64), rgb_N3.min(axis=-1).astype(np.float64)
    return (most - least) / np.maximum(most, 1.0)
