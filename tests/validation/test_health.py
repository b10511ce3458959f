"""Each light on signs of its own, the way back from the undistilled model, and the score that `best` goes by."""

from __future__ import annotations

import math

import pytest

from simpletuner_dmd.config.health import BANDS, read_bands
from simpletuner_dmd.validation.health import GREEN, RED, YELLOW, Knobs, Light, Signs, colour_of, judge, score, worst

WELL = {"saturation": 1.02, "contrast": 0.97, "detail": 0.95, "motion": 0.9, "latent_std": 1.01,
        "prompt_diversity": 0.98, "clipped": 0.0}  # fmt: skip
START = dict.fromkeys(WELL, 1.0) | {"clipped": 0.0}
KNOBS = Knobs(guidance=6.0, interval=2, learning_rate=1e-4)


def lights(reach=1.0, change=0.1, rungs=(3, 3), spread=0.95, start=None, **student):
    signs = Signs({**WELL, **student}, START if start is None else start, reach, change, rungs, spread)
    return {light.name: light for light in judge(signs, BANDS, KNOBS)}


def raised(found):
    return {name for name, light in found.items() if light.colour != GREEN}


def test_a_healthy_student_raises_none_and_has_every_light():
    found = lights()
    assert set(found) == set(BANDS) and not raised(found)
    assert worst(list(found.values())) == GREEN


@pytest.mark.parametrize(
    ("signs", "light", "colour", "words"),
    [
        ({"spread": 1.4}, "guidance", YELLOW, "lower real_score_guidance_scale from 6 to 5"),
        ({"saturation": 1.5}, "saturation", YELLOW, "lower real_score_guidance_scale from 6 to 5"),
        ({"saturation": 2.0}, "saturation", RED, "200% of the teacher's"),
        ({"contrast": 1.6}, "contrast", RED, "guidance"),
        ({"clipped": 0.2}, "clipping", RED, "20.0% more pixels"),
        ({"detail": 0.5}, "detail", YELLOW, "blurred"),
        ({"motion": 0.48}, "motion", YELLOW, "motion is 48% of the teacher's: stop earlier or lower guidance"),
        ({"prompt_diversity": 0.3}, "diversity", RED, "collapses"),
        ({"latent_std": 1.2}, "latents", YELLOW, "over-exposure"),
        ({"reach": 0.0}, "critic", RED, "raise fake_score_lr"),
        ({"reach": 0.2}, "critic", YELLOW, "critic lags, it has gone 20% of the way to the student's score: raise "
                                           "generator_update_interval to 5"),
        ({"change": 0.6}, "stability", YELLOW, "lower learning_rate from 0.0001"),
        ({"rungs": (1, 3)}, "steps", YELLOW, "only 1 of the ladder's 3 steps is trained"),
    ],
)  # fmt: skip
def test_each_light_names_its_own_failure_and_no_other(signs, light, colour, words):
    found = lights(**signs)
    assert raised(found) == {light}
    assert found[light].colour == colour and words in found[light].sentence


def test_no_alarm_on_the_way_from_the_undistilled_model():
    early = {**START, "saturation": 0.5, "motion": 0.3}
    found = lights(start=early, saturation=0.52, motion=0.2)
    assert found["saturation"].colour == GREEN and "on its way" in found["saturation"].sentence
    assert found["motion"].colour == RED  # worse than where it began
    assert lights(start=early, saturation=0.49)["saturation"].colour == GREEN  # hardly moved
    assert lights(start=early, saturation=2.0)["saturation"].colour == RED  # past the teacher, out on the other side


def test_what_is_not_known_has_no_light():
    found = judge(Signs({"motion": 0.9}, {}), BANDS, KNOBS)
    assert [light.name for light in found] == ["motion"]


def test_bands_are_closed_towards_red():
    band = (0.4, 0.6, 1.5, 2.0)
    expected = {0.4: RED, 0.5: YELLOW, 0.6: GREEN, 1.5: GREEN, 1.6: YELLOW, 2.0: RED}
    assert {value: colour_of(value, band) for value in expected} == expected


def test_score_is_the_mean_log_quotient_and_a_penalty():
    student = dict.fromkeys(("saturation", "motion"), 2.0) | {"contrast": 0.5, "clipped": 0.3}
    assert score(student, []) == pytest.approx(math.log(2))
    yellow, red = (Light("motion", colour, 2.0, BANDS["motion"], "") for colour in (YELLOW, RED))
    assert score(student, [yellow, red]) == pytest.approx(math.log(2) + 1.25)
    assert score({"motion": 0.0}, []) == pytest.approx(math.log(8))  # finite


def test_bands_are_read_and_checked():
    assert read_bands({"motion": [0.3, 0.5, None, None]})["motion"] == (0.3, 0.5, None, None)
    assert read_bands(None) == BANDS
    for wrong, words in (
        ({"movement": [0, 1, 2, 3]}, "no light"),
        ({"motion": [0.5, 0.4, None, None]}, "must rise"),
        ({"motion": [0.5, 0.4]}, "four bounds"),
        ({"motion": "0.5"}, "four bounds"),
        ([1, 2], "must be an object"),
    ):
        with pytest.raises(ValueError, match=words):
            read_bands(wrong)
