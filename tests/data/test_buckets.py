"""Bucket arithmetic against numbers worked out by hand."""

from __future__ import annotations

import pytest

from simpletuner_dmd.data.buckets import (
    LatentGeometry,
    SizeRules,
    crop_plan,
    frames_at,
    parse_resolution,
    size_in,
    target_size,
)

WAN = LatentGeometry()


@pytest.mark.parametrize(("frames", "rounded"), [(75, 73), (121, 121), (81, 81), (9, 9), (8, 5), (1, 1), (0, 1)])
def test_frames_go_down_to_4n_plus_1(frames: int, rounded: int) -> None:
    assert WAN.round_frames(frames) == rounded


def test_latent_shape_of_wans_native_clip() -> None:
    assert WAN.latent_shape(832, 480, 81) == (16, 21, 60, 104)


@pytest.mark.parametrize(
    ("source", "resolution", "kind", "expected"),
    [
        # 1920/1080 rounds to 1.78: 480 sqrt(1.78) = 640.4 -> 640, 480 / sqrt(1.78) = 359.8 -> 22.5 multiples -> 352
        ((1920, 1080), 480.0, "pixel_area", (640, 352)),
        ((480, 480), 480.0, "pixel_area", (480, 480)),
        # the shorter edge is 480, the other 480 * 1.78 = 854.4 -> 53.4 multiples -> 848
        ((1920, 1080), 480.0, "pixel", (848, 480)),
        ((1080, 1920), 480.0, "pixel", (480, 864)),  # .56: 480 / .56 = 857.1 -> 53.57 -> 864
        # 0.25 megapixels is an edge of 500: 500 sqrt(1.33) = 576.6 -> 576, 500 / sqrt(1.33) = 433.6 -> 27.1 -> 432
        ((640, 480), 0.25, "area", (576, 432)),
        ((640, 480), (832, 480), "pixel", (832, 480)),
    ],
)
def test_target_sizes(source: tuple[int, int], resolution: float, kind: str, expected: tuple[int, int]) -> None:
    plan = crop_plan(*source, SizeRules(resolution, kind), "x")
    assert (plan.width, plan.height) == expected


def test_sources_of_one_rounded_aspect_share_a_bucket() -> None:
    rules = SizeRules(480.0, rounding=1)
    sizes = {(p.width, p.height) for w in (1900, 1910, 1920, 1960) for p in [crop_plan(w, 1080, rules, "x")]}
    assert len(sizes) == 1


def test_resize_covers_the_bucket_and_keeps_the_aspect() -> None:
    plan = crop_plan(1920, 1080, SizeRules(480.0), "x")
    # 640/1920 = .3333, 352/1080 = .3259: the larger one, so 640 x 360, and 8 rows are cut, 4 above
    assert (plan.resize_width, plan.resize_height, plan.left, plan.top) == (640, 360, 0, 4)
    assert plan.cropped == pytest.approx(8 / 360)


@pytest.mark.parametrize("source", [(7, 4000), (4000, 7), (1, 1), (33, 31)])
def test_extreme_shapes_still_give_a_whole_crop(source: tuple[int, int]) -> None:
    plan = crop_plan(*source, SizeRules(64.0), "x")
    assert plan.width % 16 == plan.height % 16 == 0 and min(plan.width, plan.height) >= 16
    assert plan.left + plan.width <= plan.resize_width and plan.top + plan.height <= plan.resize_height


def test_crop_aspects_and_styles() -> None:
    square = SizeRules(64.0, crop=True, crop_aspect="square")
    assert crop_plan(200, 100, square, "x") == crop_plan(200, 100, square, "y")
    plan = crop_plan(200, 100, square, "x")
    assert (plan.width, plan.height, plan.resize_width, plan.resize_height, plan.left) == (64, 64, 128, 64, 32)
    corner = crop_plan(200, 100, SizeRules(64.0, crop=True, crop_aspect="square", crop_style="corner"), "x")
    assert (corner.left, corner.top) == (0, 0)
    closest = crop_plan(190, 100, SizeRules(480.0, "pixel", crop=True, crop_aspect="closest"), "x")
    assert (closest.width, closest.height) == (848, 480)  # 1.9 is nearest to 16:9; 853.3 -> 53.3 -> 848


def test_random_crops_are_seeded_by_the_sample() -> None:
    rules = SizeRules(64.0, crop=True, crop_aspect="square", crop_style="random")
    plans = {name: crop_plan(640, 100, rules, name) for name in map(str, range(20))}
    assert all(crop_plan(640, 100, rules, name) == plan for name, plan in plans.items())
    assert len({plan.left for plan in plans.values()}) > 10
    aspects = SizeRules(480.0, crop=True, crop_aspect="random")
    assert len({(p.width, p.height) for n in range(30) for p in [crop_plan(99, 100, aspects, str(n))]}) > 3


def test_maximum_size_brings_down_before_the_crop() -> None:
    rules = SizeRules(64.0, "pixel", crop=True, crop_aspect="square", maximum_image_size=100, target_downsample_size=80)
    assert crop_plan(400, 200, rules, "x").resize_height == 80
    assert crop_plan(100, 90, rules, "x").resize_height == 64, "not above the maximum: it just covers"


def test_units() -> None:
    assert size_in(200, 50, "pixel") == 50
    assert size_in(200, 50, "pixel_area") == 100
    assert size_in(2000, 500, "area") == 1.0


def test_resolution_words() -> None:
    assert parse_resolution("832x480") == (832, 480)
    assert parse_resolution("480") == parse_resolution(480) == 480.0
    for wrong in ("0x4", "-3", "wide"):
        with pytest.raises(ValueError):
            parse_resolution(wrong)
    assert target_size(1.0, SizeRules(3.0)) == (16, 16)


@pytest.mark.parametrize(
    ("seconds", "interval", "expected"),
    [(9 / 16, 1, 9), (0.5624, 1, 9), (5.0, 1, 80), (121 / 24, 1, 81), (1.0, 2, 8), (17 / 16, 2, 9), (0.0, 1, 0)],
)
def test_frames_after_resampling(seconds: float, interval: int, expected: int) -> None:
    assert frames_at(seconds, 16, interval) == expected
