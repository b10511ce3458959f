"""High dynamic range to the standard one: PQ and HLG pictures as a model sees all others, display-referred BT.709.

Without it, PQ footage reaches the model grey and washed out, because its code values mean other light levels.
Sources: SMPTE ST 2084 (PQ), ITU-R BT.2100-2 (HLG, its OOTF), BT.2087 (primaries), BT.2408 (203 cd/m² is white),
BT.1886 (display gamma).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics of ITU-T H.273
WHITE_NITS = 203.0
HLG_PEAK_NITS = 1000.0
KNEE = 0.7  # of white; light above it is compressed, and never clips

BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
LUMINANCE_BT2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def pq_to_nits(code: np.ndarray) -> np.ndarray:
    """The ST 2084 EOTF: code values in [0, 1] to cd/m²."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = np.power(np.clip(code, 0, 1), 1 / m2)
    return 10000 * np.power(np.maximum(root - c1, 0) / (c2 - c3 * root), 1 / m1)


def hlg_to_scene(code: np.ndarray) -> np.ndarray:
    """The inverse OETF of BT.2100: code values in [0, 1] to scene light in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code * code / 3, (np.exp((code - c) / a) + b) / 12)


@lru_cache(maxsize=2)
def _table(transfer: int) -> np.ndarray:
    """The curve at all 65536 code values: a power per pixel would cost seconds per clip."""
    code = np.linspace(0, 1, 65536)
    return (pq_to_nits(code) if transfer == PQ else hlg_to_scene(code)).astype(np.float32)


def to_sdr(picture_HWC: np.ndarray, transfer: int) -> np.ndarray:
    """[H, W, 3] uint16 R'G'B' with BT.2020 primaries to [H, W, 3] uint8 BT.709. transfer: PQ or HLG."""
    assert picture_HWC.dtype == np.uint16, "16 bits per channel"
    light = _table(transfer)[picture_HWC]
    if transfer == HLG:
        scene_luminance = light @ LUMINANCE_BT2020
        light = HLG_PEAK_NITS * np.power(scene_luminance, 0.2)[..., None] * light
    relative = np.maximum(light / WHITE_NITS @ BT2020_TO_BT709.T, 0)
    # The strongest channel decides for all three, so that hues stay.
    peak = relative.max(axis=-1, keepdims=True)
    over = np.maximum(peak - KNEE, 0) / (1 - KNEE)
    mapped = np.where(peak > KNEE, KNEE + (1 - KNEE) * over / (1 + over), peak)
    relative = relative * (mapped / np.maximum(peak, 1e-9))
    return (np.power(relative, 1 / 2.4) * 255 + 0.5).clip(0, 255).astype(np.uint8)
