"""The demo's video world: one coloured shape that moves across a plain background.

Every clip is a function of a seed, so the data set is made on first use and never shipped.
Arrays are [T, H, W, 3] uint8: T frames, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

SHAPES = ("circle", "square")
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

SIZE = 64
FRAMES = 9
FRAMERATE = 16

# Kept out of the training set: the model must compose them from their parts.
HELD_OUT = frozenset(
    {
        ("circle", "red", "up"),
        ("square", "green", "left"),
        ("circle", "blue", "right"),
        ("square", "yellow", "down"),
    }
)


@dataclass(frozen=True)
class Combination:
    """What a caption says: shape, colour and direction of motion."""

    shape: str
    colour: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour, self.direction) in HELD_OUT


ALL_COMBINATIONS = tuple(Combination(*parts) for parts in product(SHAPES, COLOURS, DIRECTIONS))
TRAINING_COMBINATIONS = tuple(c for c in ALL_COMBINATIONS if not c.held_out)


def draw_clip(combination: Combination, rng: np.random.Generator, frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
    """One clip of `combination` with random start, speed, size and background.

    Returns [frames, size, size, 3] uint8. The whole path lies inside the picture.
    """
    radius = rng.uniform(8.0, 11.0) * size / SIZE
    step = np.array(DIRECTIONS[combination.direction], dtype=np.float64)
    travel = rng.uniform(12.0, 26.0) * size / SIZE
    low = radius + 1 + np.maximum(-step, 0) * travel
    high = size - radius - 1 - np.maximum(step, 0) * travel
    start = rng.uniform(low, high)
    # A grey background with a gentle slope; grey keeps hue a property of the shape alone.
    level, slope = rng.uniform(30, 200), rng.uniform(-20, 20, size=2)
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    background = level + slope[0] * (x / size - 0.5) + slope[1] * (y / size - 0.5)
    colour = np.clip(np.array(COLOURS[combination.colour]) + rng.uniform(-15, 15, size=3), 0, 255)
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for index in range(frames):
        centre = start + step * travel * (index / max(frames - 1, 1))
        dx, dy = x - centre[0], y - centre[1]
        if combination.shape == "circle":
            distance = np.hypot(dx, dy) - radius
        else:
            distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.9
        cover = np.clip(0.5 - distance, 0, 1)[..., None]  # one pixel of anti-aliasing
        clip[index] = np.clip(background[..., None] * (1 - cover) + colour * cover + 0.5, 0, 255).astype(np.uint8)
    return clip


def draw_many(count: int, seed: int, held_out: bool = False) -> tuple[np.ndarray, list[Combination]]:
    """`count` clips, combinations in turn: ([count, T, H, W, 3] uint8, their combinations)."""
    choices = ALL_COMBINATIONS if held_out else TRAINING_COMBINATIONS
    rng = np.random.default_rng(seed)
    chosen = [choices[index % len(choices)] for index in range(count)]
    return np.stack([draw_clip(combination, rng) for combination in chosen]), chosen
