"""The noise levels of a model that is made of two networks."""

from __future__ import annotations

from simpletuner_dmd.flow import ALL_NOISE, NoiseRange
from simpletuner_dmd.wan.flavours import Flavour


def known_noise(flavour: Flavour) -> NoiseRange:
    """What the network that a run of this flavour trains was made for."""
    if flavour.boundary is None:
        return ALL_NOISE
    return NoiseRange(flavour.boundary, 1.0) if flavour.expert == "high" else NoiseRange(0.0, flavour.boundary)
