"""Pictures as videos of one frame: reading their size and their pixels, through Pillow.

Arrays are [1, H, W, 3] uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from simpletuner_dmd.data.buckets import CropPlan
from simpletuner_dmd.data.findings import WRONG_KIND, UnusableFile
from simpletuner_dmd.data.kinds import kind_of_file

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)


def is_picture(path: Path) -> bool:
    """By content, not by name."""
    return kind_of_file(path).endswith(" picture")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        if path.stat().st_size == 0:
            raise UnusableFile(path, "the file is empty (0 bytes)")
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        kind = kind_of_file(path)
        if kind.endswith(" picture"):
            raise UnusableFile(path, f"cannot be decoded: {kind} that Pillow does not know, or damaged") from error
        # A video may belong to a dataset of videos in the same folder: nothing is wrong with the file.
        raise UnusableFile(path, f"not a picture: it is {kind}", not kind.endswith("video"), WRONG_KIND) from error
    except Image.DecompressionBombError as error:
        raise UnusableFile(path, f"too large to be decoded safely: {error}") from error
    except (PermissionError, FileNotFoundError) as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}", damaged=False) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for cut off and for broken chunks
        raise UnusableFile(path, f"the file is cut off or damaged: {error}") from error


def probe_picture(path: Path) -> tuple[int, int]:
    """(width, height) as shown, after decoding all of it. Raises UnusableFile."""
    if (kind := kind_of_file(path)) == "a GIF video":
        raise UnusableFile(path, f"not a picture: it is {kind}", damaged=False, kind=WRONG_KIND)
    with _opened(path) as image:
        image.load()
        width, height = image.size
        return (height, width) if image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS else (width, height)


def read_picture(path: Path, crop: CropPlan | None = None) -> np.ndarray:
    """[1, H, W, 3] uint8: turned as its camera says, transparent parts on black, resized (bicubic) and cut."""
    with _opened(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb = _rgb(upright)
        if crop is not None:
            if rgb.size != (crop.resize_width, crop.resize_height):
                rgb = rgb.resize((crop.resize_width, crop.resize_height), Image.Resampling.BICUBIC)
            rgb = rgb.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        return np.asarray(rgb)[None].copy()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255 instead of scaling
        grey = (np.asarray(image).astype(np.float64) / 257 + 0.5).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear).convert("RGB")
    return image.convert("RGB")
