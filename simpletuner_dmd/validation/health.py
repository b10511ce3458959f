"""Traffic lights: what a run's measures mean, in one sentence each, with the knob to turn.

A light compares the student with its teacher on the same prompts and seeds. Training starts from the undistilled model
at few steps, which is off in most ways, so a value outside its band that is on its way back from there is no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from simpletuner_dmd.config.health import Band

GREEN, YELLOW, RED = "green", "yellow", "red"
COLOURS = (GREEN, YELLOW, RED)
SCORED = ("saturation", "contrast", "detail", "motion", "latent_std", "prompt_diversity")
WORST_QUOTIENT = 8.0  # a quotient beyond this, or its inverse, says no more than "very far"
NO_WORSE = 0.05  # of ln quotient: a student that has hardly moved is not worse than where it began
PENALTY = {GREEN: 0.0, YELLOW: 0.25, RED: 1.0}


@dataclass(frozen=True)
class Light:
    """name: a key of config.health.BANDS. value: what the band is about. sentence: for a person, with what to do."""

    name: str
    colour: str
    value: float
    band: Band
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Knobs:
    """The settings that sentences name. guidance, interval: None where the method has none."""

    guidance: float | None = None
    interval: int | None = None
    learning_rate: float = 0.0


@dataclass(frozen=True)
class Signs:
    """What is known at one validation; None or missing where it could not be measured.

    student: relative to the teacher (`measures.against`). start: the same of the undistilled model. reach: of the
    critic (`CriticCheck.reach`). change: how far the trained student's samples moved since the validation before, root
    mean square, in their standard deviations. rungs: (steps of the ladder that had a gradient since then, all).
    reference_spread: standard deviation of the latents of the teacher's own videos, which the VAE's normalisation makes
    about 1 for real ones.
    """

    student: Mapping[str, float]
    start: Mapping[str, float]
    reach: float | None = None
    change: float | None = None
    rungs: tuple[int, int] | None = None
    reference_spread: float | None = None


def judge(signs: Signs, bands: Mapping[str, Band], knobs: Knobs) -> list[Light]:
    """The lights that can be judged, in the order of the bands."""
    found = {}
    if signs.reference_spread is not None:
        spread = signs.reference_spread
        found["guidance"] = _light("guidance", spread, bands["guidance"], _say_guidance(spread, knobs))
    for name, key, say in _RELATIVE:
        value = signs.student.get(key)
        if value is not None:
            found[name] = _relative(name, value, signs.start.get(key), bands[name], say(value, knobs))
    if "clipped" in signs.student:
        value, start = signs.student["clipped"], signs.start.get("clipped")
        found["clipping"] = _light("clipping", value, bands["clipping"], _say_clipping(value, knobs),
                                   no_worse=start is not None and value <= start)  # fmt: skip
    if signs.reach is not None:
        found["critic"] = _light("critic", signs.reach, bands["critic"], _say_critic(signs.reach, knobs))
    if signs.change is not None:
        found["stability"] = _light("stability", signs.change, bands["stability"], _say_change(signs.change, knobs))
    if signs.rungs is not None and signs.rungs[1] > 1:
        moved, rungs = signs.rungs
        found["steps"] = _light("steps", moved / rungs, bands["steps"], _say_rungs(moved, rungs))
    return [found[name] for name in bands if name in found]


def score(student: Mapping[str, float], lights: Sequence[Light]) -> float:
    """How far a student is from its teacher; lower is better, 0 the teacher itself.

    The mean of |ln quotient| over saturation, contrast, detail, motion, the latents' standard deviation and the
    diversity of prompts, those that were measured; plus .25 for a yellow light and 1 for a red one.
    """
    logs = [abs(_log(student[key])) for key in SCORED if key in student]
    return sum(logs) / max(len(logs), 1) + sum(PENALTY[light.colour] for light in lights)


def worst(lights: Sequence[Light]) -> str:
    return max((light.colour for light in lights), key=COLOURS.index, default=GREEN)


def _log(quotient: float) -> float:
    return math.log(min(max(quotient, 1 / WORST_QUOTIENT), WORST_QUOTIENT))


def colour_of(value: float, band: Band) -> str:
    red_below, yellow_below, yellow_above, red_above = band
    if (red_below is not None and value <= red_below) or (red_above is not None and value >= red_above):
        return RED
    if (yellow_below is not None and value < yellow_below) or (yellow_above is not None and value > yellow_above):
        return YELLOW
    return GREEN


def _light(name: str, value: float, band: Band, sentence: str, *, no_worse: bool = False) -> Light:
    colour = colour_of(value, band)
    return Light(name, GREEN if no_worse else colour, value, band, sentence if colour != GREEN else _fine(name, value))


def _relative(name: str, value: float, start: float | None, band: Band, sentence: str) -> Light:
    """A quotient. It is no alarm where the undistilled model was off to the same side at least as far."""
    colour = colour_of(value, band)
    if colour == GREEN:
        return Light(name, GREEN, value, band, _fine(name, value))
    off, off_before = _log(value), 0.0 if start is None else _log(start)
    if off * off_before > 0 and abs(off) <= abs(off_before) + NO_WORSE:
        said = f"{name} is {value:.0%} of the teacher's, and was {start:.0%} before training: on its way"
        return Light(name, GREEN, value, band, said)
    return Light(name, colour, value, band, sentence)


def _fine(name: str, value: float) -> str:
    words = {
        "guidance": f"the teacher's own videos spread {value:.2f} as wide as real ones",
        "clipping": f"clipped values are {100 * value:+.1f} points from the teacher's",
        "critic": f"the critic has gone {value:.0%} of the way to the student's score",
        "stability": f"the student's samples moved by {value:.0%} of their spread since the validation before",
        "steps": "every step of the ladder is trained",
    }
    return words.get(name, f"{name} is {value:.0%} of the teacher's")


# --- sentences ------------------------------------------------------------------------------------------------------


def _less_guidance(knobs: Knobs) -> str:
    if knobs.guidance is None or knobs.guidance <= 1:
        return "stop earlier, or lower learning_rate"
    lower = max(1.0, knobs.guidance - 1)
    return f"lower real_score_guidance_scale from {knobs.guidance:g} to {lower:g}, or stop earlier"


def _say_guidance(value: float, knobs: Knobs) -> str:
    return (
        f"the teacher's own videos are over-exposed, their latents spread {value:.2f} as wide as real ones: "
        f"{_less_guidance(knobs)}"
    )


def _say_saturation(value: float, knobs: Knobs) -> str:
    if value > 1:
        return f"saturation is {value:.0%} of the teacher's: {_less_guidance(knobs)}"
    return f"saturation is {value:.0%} of the teacher's: colours fade, train longer or lower learning_rate"


def _say_contrast(value: float, knobs: Knobs) -> str:
    if value > 1:
        return f"contrast is {value:.0%} of the teacher's: {_less_guidance(knobs)}"
    return f"contrast is {value:.0%} of the teacher's: the picture turns grey, lower learning_rate"


def _say_clipping(value: float, knobs: Knobs) -> str:
    return f"{value:.1%} more pixels are clipped than in the teacher's videos: {_less_guidance(knobs)}"


def _say_detail(value: float, knobs: Knobs) -> str:
    if value > 1:
        return f"high frequencies are {value:.0%} of the teacher's: grain or over-sharpening, lower learning_rate"
    return f"high frequencies are {value:.0%} of the teacher's: blurred, train longer or give the student more steps"


def _say_motion(value: float, knobs: Knobs) -> str:
    if value > 1:
        return f"motion is {value:.0%} of the teacher's: it flickers or jumps, lower learning_rate"
    return f"motion is {value:.0%} of the teacher's: stop earlier or lower guidance"


def _say_diversity(value: float, knobs: Knobs) -> str:
    if value > 1:
        return f"videos differ {value:.0%} as much as the teacher's: they fall apart, lower learning_rate"
    return f"videos differ {value:.0%} as much as the teacher's: the student collapses, lower learning_rate"


def _say_latents(value: float, knobs: Knobs) -> str:
    spread = f"latents spread {value:.0%} as wide as the teacher's"
    if value > 1:
        return f"{spread}, the first sign of over-exposure: {_less_guidance(knobs)}"
    return f"{spread}: washed out, train longer or lower learning_rate"


def _say_critic(value: float, knobs: Knobs) -> str:
    interval = 5 if knobs.interval is None or knobs.interval < 5 else 2 * knobs.interval
    if value <= 0.01:
        return "the critic has not moved from the teacher: raise fake_score_lr, it learns nothing"
    return (
        f"critic lags, it has gone {value:.0%} of the way to the student's score: "
        f"raise generator_update_interval to {interval}, or fake_score_lr"
    )


def _say_change(value: float, knobs: Knobs) -> str:
    lower = f" from {knobs.learning_rate:g}" if knobs.learning_rate else ""
    return (
        f"the student's samples moved by {value:.0%} of their spread since the validation before: "
        f"lower learning_rate{lower}, by a factor of 3 to 10"
    )


def _say_rungs(moved: int, rungs: int) -> str:
    return (
        f"only {moved} of the ladder's {rungs} steps {'is' if moved == 1 else 'are'} trained, which drags the others "
        "down to it: set last_step_only to false"
    )


_RELATIVE: tuple[tuple[str, str, Callable[[float, Knobs], str]], ...] = (
    ("saturation", "saturation", _say_saturation),
    ("contrast", "contrast", _say_contrast),
    ("detail", "detail", _say_detail),
    ("motion", "motion", _say_motion),
    ("diversity", "prompt_diversity", _say_diversity),
    ("latents", "latent_std", _say_latents),
)
"""Light, the key of `measures.against` that it is about, and its sentence."""
