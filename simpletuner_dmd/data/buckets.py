"""Picture sizes and frame counts: which bucket a clip falls into, and how it is resized and cropped to fit.

Pure arithmetic on integers. W and H are pixels, F is latent frames, T is video frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from simpletuner_dmd.randomness import derive_seed

# What `crop_aspect` closest and random choose from.
CROP_ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)


@dataclass(frozen=True)
class LatentGeometry:
    """How a VAE and a transformer cut a video: latent channels, pixels and frames per latent, latents per patch."""

    channels: int = 16
    spatial: int = 8
    temporal: int = 4
    patch: int = 2

    @property
    def multiple(self) -> int:
        """Width and height of a clip are multiples of this many pixels."""
        return self.spatial * self.patch

    def round_frames(self, frames: int) -> int:
        """The largest count of the form temporal * n + 1 that is not above `frames` (at least 1)."""
        return (max(frames, 1) - 1) // self.temporal * self.temporal + 1

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip of `frames` frames of `width` x `height` pixels."""
        assert width % self.multiple == 0 and height % self.multiple == 0, f"{width}x{height} is no bucket size"
        assert (frames - 1) % self.temporal == 0, f"{frames} is not of the form {self.temporal}n + 1"
        return (self.channels, (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial)


@dataclass(frozen=True)
class CropPlan:
    """Resize to (resize_width, resize_height), then cut (width, height) at (left, top)."""

    width: int
    height: int
    resize_width: int
    resize_height: int
    left: int
    top: int

    @property
    def cropped(self) -> float:
        """The share of the picture's area that the crop removes, 0 to 1."""
        return 1.0 - (self.width * self.height) / (self.resize_width * self.resize_height)


@dataclass(frozen=True)
class SizeRules:
    """The options that decide a target size.

    resolution: a number in the unit of resolution_type, or (width, height).
    resolution_type: "pixel" the shorter edge in pixels; "pixel_area" the edge of a square of the same area in
    pixels; "area" megapixels.
    """

    resolution: float | tuple[int, int]
    resolution_type: str = "pixel_area"
    multiple: int = 16
    rounding: int = 2
    crop: bool = False
    crop_aspect: str = "square"
    crop_style: str = "center"
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None


def parse_resolution(value: float | int | str) -> float | tuple[int, int]:
    """480, 0.5, "480" or "832x480"; raises ValueError on anything else."""
    if isinstance(value, str):
        width, cross, height = value.lower().replace(" ", "").partition("x")
        if cross:
            size = (int(width), int(height))
            if min(size) <= 0:
                raise ValueError(f"a resolution must be positive, not {value!r}")
            return size
        value = float(value)
    if not value > 0:
        raise ValueError(f"a resolution must be positive, not {value!r}")
    return float(value)


def size_in(width: int, height: int, resolution_type: str) -> float:
    """The size of a picture in the unit of `resolution_type` (see SizeRules)."""
    if resolution_type == "pixel":
        return float(min(width, height))
    if resolution_type == "pixel_area":
        return math.sqrt(width * height)
    if resolution_type == "area":
        return width * height / 1e6
    raise ValueError(f"resolution_type must be pixel, pixel_area or area, not {resolution_type!r}")


def round_to(value: float, multiple: int) -> int:
    """The nearest positive multiple; halves go up."""
    return max(1, math.floor(value / multiple + 0.5)) * multiple


def scaled(aspect: float, size: float, resolution_type: str) -> tuple[float, float]:
    """The unrounded (width, height) of aspect `aspect` = width / height that has `size` in its unit."""
    if resolution_type == "pixel":
        return (size * aspect, size) if aspect >= 1 else (size, size / aspect)
    edge = size if resolution_type == "pixel_area" else math.sqrt(size * 1e6)
    return edge * math.sqrt(aspect), edge / math.sqrt(aspect)


def target_size(aspect: float, rules: SizeRules) -> tuple[int, int]:
    """The bucket's (width, height), in multiples, for an aspect that is already rounded or chosen."""
    if isinstance(rules.resolution, tuple):
        width, height = map(float, rules.resolution)
    else:
        width, height = scaled(aspect, rules.resolution, rules.resolution_type)
    return round_to(width, rules.multiple), round_to(height, rules.multiple)


def bucket_aspect(width: int, height: int, rules: SizeRules, name: str) -> float:
    """The aspect of the bucket of a width x height source. `name` seeds what is random about this sample."""
    aspect = width / height
    if not rules.crop or rules.crop_aspect == "preserve":
        # A very tall picture must not round to an aspect of 0.
        return max(round(aspect, rules.rounding), 10.0**-rules.rounding)
    if rules.crop_aspect == "square":
        return 1.0
    if rules.crop_aspect == "closest":
        return min(CROP_ASPECTS, key=lambda choice: abs(math.log(choice / aspect)))
    if rules.crop_aspect == "random":
        return CROP_ASPECTS[derive_seed("crop-aspect", name) % len(CROP_ASPECTS)]
    raise ValueError(f"crop_aspect must be square, preserve, closest or random, not {rules.crop_aspect!r}")


def crop_plan(width: int, height: int, rules: SizeRules, name: str) -> CropPlan:
    """How a width x height source reaches its bucket. The picture is never stretched by more than rounding.

    With `crop`, a source larger than maximum_image_size is first brought to target_downsample_size (default: that
    maximum) and then cut, so the cut shows less of the scene at more detail; else the resize just covers the bucket.
    """
    target_width, target_height = target_size(bucket_aspect(width, height, rules, name), rules)
    factor = max(target_width / width, target_height / height)
    if (
        rules.crop
        and rules.maximum_image_size
        and size_in(width, height, rules.resolution_type) > rules.maximum_image_size
    ):
        reduced = rules.target_downsample_size or rules.maximum_image_size
        wanted_width, _ = scaled(width / height, reduced, rules.resolution_type)
        factor = max(factor, min(1.0, wanted_width / width))
    resize_width = max(target_width, math.floor(width * factor + 0.5))
    resize_height = max(target_height, math.floor(height * factor + 0.5))
    spare_width, spare_height = resize_width - target_width, resize_height - target_height
    # Without `crop` the few spare pixels of rounding are cut evenly, whatever crop_style says.
    style = rules.crop_style if rules.crop else "center"
    if style in ("center", "centre"):
        left, top = spare_width // 2, spare_height // 2
    elif style == "corner":
        left, top = 0, 0
    elif style == "random":
        left = derive_seed("crop-left", name) % (spare_width + 1)
        top = derive_seed("crop-top", name) % (spare_height + 1)
    else:
        raise ValueError(f"crop_style must be center, corner or random, not {style!r}")
    return CropPlan(target_width, target_height, resize_width, resize_height, left, top)


def frames_at(seconds: float, framerate: float, interval: int) -> int:
    """How many frames a video of `seconds` gives when one is taken every interval / framerate seconds, from 0."""
    # Frame k is taken at k * interval / framerate, while the video is still showing; the slack absorbs time bases
    # that cannot express the rate exactly.
    return max(0, math.ceil(seconds * framerate / interval - 0.02))
