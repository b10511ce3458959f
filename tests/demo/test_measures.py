"""The demo's measures against closed forms and against clips whose content is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from simpletuner_dmd.demo import measures, shapes
from simpletuner_dmd.demo.measures import Observation, gap_closed, obedience, obeys, read_clip


def test_gap_closed():
    assert gap_closed(student=0.030, undistilled=0.091, floor=-0.006) == pytest.approx(0.061 / 0.097)
    assert gap_closed(0.1, 0.1, 0.0) == 0.0
    assert gap_closed(0.0, 0.1, 0.0) == 1.0
    with pytest.raises(ValueError, match="no gap"):
        gap_closed(0.0, 0.1, 0.1)


# --- what a clip shows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips():
    """Six clips of each of the 32 combinations: ([192, T, H, W, 3], combinations)."""
    return shapes.draw_many(6 * len(shapes.ALL_COMBINATIONS), seed=5, held_out=True)


def blurred(frames, passes):
    """Binomial blur (1 2 1)/4 along rows and columns, `passes` times."""
    frames = frames.astype(np.float64)
    for _ in range(passes):
        for axis in (-3, -2):
            padded = np.concatenate(
                [frames.take([0], axis), frames, frames.take([-1], axis)],
                axis,
            )
            size = frames.shape[axis]
            low, middle, high = (padded.take(range(k, k + size), axis) for k in range(3))
            frames = (low + 2 * middle + high) / 4
    return frames


def to_uint8(frames):
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def test_drawn_clips_obey_their_captions(clips):
    rates = obedience(*clips)
    assert set(rates) == {"all", "seen", "held_out"}
    assert rates["all"]["count"] == 192
    assert rates["held_out"]["count"] == 24
    for group in rates.values():
        assert group["both"] >= 0.995
        assert group["all_three"] >= 0.995


@pytest.mark.parametrize("part", ["colour", "direction", "shape"])
def test_a_wrong_caption_is_noticed(clips, part):
    frames, said = clips
    choices = {
        "colour": dict(pairwise([*shapes.COLOURS, *shapes.COLOURS])),
        "direction": dict(pairwise([*shapes.DIRECTIONS, *shapes.DIRECTIONS])),
        "shape": dict(pairwise([*shapes.SHAPES, *shapes.SHAPES])),
    }[part]
    wrong = [replace(combination, **{part: choices[getattr(combination, part)]}) for combination in said]
    rates = obedience(frames[:96], wrong[:96])["all"]
    assert rates[part] == 0
    assert rates["all_three"] == 0
    assert rates["both"] == (pytest.approx(1, abs=0.005) if part == "shape" else 0)


@pytest.mark.parametrize(("passes", "noise"), [(2, 0), (0, 12), (2, 12), (4, 6)])
def test_blur_and_noise_do_not_change_the_reading(clips, passes, noise):
    frames, said = clips[0][:96], clips[1][:96]
    rng = np.random.default_rng(0)
    spoilt = blurred(frames, passes) + noise * rng.standard_normal(frames.shape)
    rates = obedience(to_uint8(spoilt), said)["all"]
    assert rates["both"] >= 0.99
    assert rates["shape"] >= 0.95


def test_paler_objects_are_still_read(clips):
    """Half the colour, as a few-step sample that averages over its choices may show it."""
    frames = clips[0][:96].astype(np.float64)
    grey = frames.mean(axis=-1, keepdims=True)
    assert obedience(to_uint8(grey + 0.5 * (frames - grey)), clips[1][:96])["all"]["both"] >= 0.99


def test_displacement_is_in_pixels():
    combination = shapes.Combination("circle", "red", "right")
    frames = shapes.draw_clip(combination, np.random.default_rng(0))
    seen = read_clip(np.concatenate([frames, np.roll(frames[-1:], 5, axis=2)]))
    still = read_clip(frames).displacement
    assert seen.displacement == pytest.approx((still[0] + 5, still[1]), abs=0.01)
    assert 12 <= still[0] <= 26
    assert abs(still[1]) < 0.5


def test_nothing_is_read_where_nothing_is():
    rng = np.random.default_rng(0)
    grey = np.broadcast_to(rng.integers(0, 256, (9, 64, 64, 1), dtype=np.uint8), (9, 64, 64, 3))
    assert read_clip(grey) == Observation()
    assert read_clip(to_uint8(128 + 60 * rng.standard_normal((9, 64, 64, 3)))) == Observation()  # noise of every hue
    all_red = np.broadcast_to(np.array([220, 40, 40], dtype=np.uint8), (9, 64, 64, 3))
    assert read_clip(all_red) == Observation()
    assert math.isnan(measures.saturation(grey[None]))
    assert not obeys(Observation(), shapes.ALL_COMBINATIONS[0])


def test_what_stands_still_has_no_direction_and_what_leaves_has_none_either():
    frames = shapes.draw_clip(shapes.Combination("square", "blue", "up"), np.random.default_rng(1))
    seen = read_clip(np.repeat(frames[:1], 9, axis=0))
    assert (seen.colour, seen.shape, seen.direction) == ("blue", "square", None)
    gone = frames.copy()
    gone[-1] = 90
    assert read_clip(gone).direction is None
    assert read_clip(gone).colour == "blue"


def test_saturation_is_that_of_the_object_alone():
    frames = np.full((1, 9, 64, 64, 3), 120, dtype=np.uint8)
    frames[:, :, 20:36, 20:36] = (200, 50, 50)
    assert measures.saturation(frames) == pytest.approx(0.75)


def test_summaries_of_observations(clips):
    observations = [read_clip(frames) for frames in clips[0][:64]]
    assert measures.obedience_of(observations, clips[1][:64]) == obedience(clips[0][:64], clips[1][:64])
    assert measures.mean_saturation(observations) == pytest.approx(measures.saturation(clips[0][:64]))
    assert 15 < measures.mean_travel(observations) < 23  # drawn uniformly from 12 to 26
    assert math.isnan(measures.mean_travel([Observation()]))
