"""The lights of a run: which there are, and the bands that a value must keep to be green."""

from __future__ import annotations

from typing import Any

Bound = float | None
Band = tuple[Bound, Bound, Bound, Bound]
"""(red below, yellow below, yellow above, red above); None where there is no such bound."""

BANDS: dict[str, Band] = {
    "guidance": (None, None, 1.25, 1.6),
    "saturation": (0.55, 0.75, 1.35, 1.7),
    "contrast": (0.65, 0.8, 1.25, 1.5),
    "clipping": (None, None, 0.03, 0.1),
    "detail": (0.4, 0.6, 1.5, 2.2),
    "motion": (0.4, 0.6, 1.7, 2.5),
    "diversity": (0.5, 0.7, 1.4, 1.8),
    "latents": (0.75, 0.85, 1.15, 1.3),
    "critic": (0.1, 0.3, None, None),
    "stability": (None, None, 0.5, 0.8),
    "steps": (0.0, 0.99, None, None),
}
"""Each light and its default band. What the values are: documentation/VALIDATION.md."""


def read_bands(value: Any) -> Any:
    """`health_bands` as written: {light: [red below, yellow below, yellow above, red above]}, filled up by the
    defaults. Raises ValueError for a light that there is not, or bounds that do not rise."""
    if value in (None, ""):
        value = {}
    if not isinstance(value, dict):
        raise ValueError('must be an object of lights and four bounds, for example {"motion": [0.4, 0.6, null, null]}')
    unknown = sorted(set(value) - set(BANDS))
    if unknown:
        raise ValueError(f"there is no light {unknown[0]!r}; there are {', '.join(BANDS)}")
    return {**BANDS, **{light: _band(light, written) for light, written in value.items()}}


def _band(light: str, written: Any) -> Band:
    numbers = isinstance(written, list | tuple) and all(
        bound is None or (isinstance(bound, int | float) and not isinstance(bound, bool)) for bound in written
    )
    if not numbers or len(written) != 4:
        raise ValueError(
            f"{light} takes four bounds, [red below, yellow below, yellow above, red above], null for none, "
            f"not {written!r}"
        )
    given = [float(bound) for bound in written if bound is not None]
    if given != sorted(given):
        raise ValueError(f"the bounds of {light} must rise, not {written!r}")
    low, below, above, high = (None if bound is None else float(bound) for bound in written)
    return low, below, above, high
