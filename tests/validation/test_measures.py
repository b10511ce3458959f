"""Measures against closed forms, and against pictures whose content is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from simpletuner_dmd.validation import measures
from simpletuner_dmd.validation.measures import (
    Specimen,
    against,
    clip_measures,
    energy_distance,
    optical_flow,
    summary,
)

# --- one clip -------------------------------------------------------------------------------------------------------


def clip(value, frames=3):
    """A flat clip of one colour, 24 x 32 pixels."""
    return np.broadcast_to(np.array(value, dtype=np.uint8), (frames, 24, 32, 3)).copy()


def test_flat_colours_have_the_numbers_they_say():
    grey = clip_measures(clip((100, 100, 100)))
    assert grey == pytest.approx({"saturation": 0, "contrast": 0, "clipped": 0, "detail": 0, "motion": 0, "flow": 0})
    assert clip_measures(clip((200, 98, 149)))["saturation"] == pytest.approx(102 / 255)
    assert clip_measures(clip((255, 128, 0)))["clipped"] == pytest.approx(2 / 3)


def test_contrast_and_detail_of_a_checkerboard():
    frames = clip((60, 60, 60), frames=20)  # more frames than are looked at at once
    frames[:, ::2, ::2] = frames[:, 1::2, 1::2] = 160
    found = clip_measures(frames)
    assert found["contrast"] == pytest.approx(50 / 255, rel=1e-5)
    # Inside, a 3 x 3 window holds 5 pixels of its own kind and 4 of the other.
    assert found["detail"] == pytest.approx(100 / 255 * 4 / 9, rel=0.05)
    assert found["motion"] == pytest.approx(0) and found["flow"] == pytest.approx(0, abs=1e-6)


def test_motion_is_the_mean_step_of_luma():
    frames = clip((0, 0, 0), frames=4)
    for number in range(4):
        frames[number] = 50 + 10 * number
    assert clip_measures(frames)["motion"] == pytest.approx(10 / 255, rel=1e-5)


def texture(seed=0):
    rough = torch.rand(1, 1, 14, 14, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rough, size=(140, 140), mode="bicubic")


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (3, -2), (-5, 4), (9, 0)])
def test_optical_flow_finds_a_translation(shift):
    whole = texture()

    def seen(dx, dy):
        return whole[:, :, 40 - dy : 104 - dy, 40 - dx : 104 - dx]

    flow = optical_flow(seen(0, 0), seen(*shift))
    middle = flow[0, :, 16:48, 16:48].flatten(1).median(dim=1).values
    assert middle.tolist() == pytest.approx(shift, abs=0.15)


def test_flow_is_in_percent_of_the_shorter_side_at_any_size():
    large = torch.nn.functional.interpolate(texture(), size=(560, 560), mode="bicubic")
    frames = torch.cat([large[:, :, 100:420, 100 - 16 * n : 420 - 16 * n] for n in range(3)])
    small = torch.cat([texture()[:, :, 25:105, 25 - 4 * n : 105 - 4 * n] for n in range(3)])
    assert measures.mean_flow(frames) == pytest.approx(5.0, rel=0.15)  # 16 of 320 pixels, measured at 128
    assert measures.mean_flow(small) == pytest.approx(5.0, rel=0.15)


# --- a whole validation ---------------------------------------------------------------------------------------------


def specimen(prompt, seed, latents, **picture):
    return Specimen(prompt, seed, (64, 64, 9), latents, {**dict.fromkeys(measures.PICTURE, 1.0), **picture})


def test_summary_of_known_latents():
    ones = torch.ones(2, 1, 2, 2)
    found = summary([
        specimen("a", 1, 0 * ones, motion=0.2),
        specimen("a", 2, 2 * ones, motion=0.4),
        specimen("b", 1, 3 * ones, motion=0.6),
    ])  # fmt: skip
    assert found["motion"] == pytest.approx(0.4)
    assert found["latent_mean"] == pytest.approx(5 / 3) and found["channel_mean"] == pytest.approx([5 / 3, 5 / 3])
    assert found["latent_std"] == pytest.approx(float(np.std([0, 2, 3])))
    assert found["seed_diversity"] == pytest.approx(2) and found["prompt_diversity"] == pytest.approx(3)
    alone = summary([specimen("a", 1, ones)])
    assert not {"seed_diversity", "prompt_diversity"} & set(alone)


def test_a_student_against_its_teacher():
    torch.manual_seed(0)
    latents = torch.randn(3, 2, 4, 4)
    teacher = summary([specimen("a", 1, latents, motion=0.5, clipped=0.01)])
    student = summary([specimen("a", 1, 1.5 * latents, motion=0.25, clipped=0.06)])
    ratio = against(student, teacher)
    assert ratio["motion"] == pytest.approx(0.5) and ratio["saturation"] == pytest.approx(1)
    assert ratio["clipped"] == pytest.approx(0.05) and ratio["latent_std"] == pytest.approx(1.5)
    still = summary([specimen("a", 1, latents, motion=0.0)])
    assert "motion" not in against(student, still)  # nothing to divide by


# --- energy distance ------------------------------------------------------------------------------------------------


def normal(count, dimension, seed, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def mean_absolute_normal(mean, spread):
    """E|z| of z ~ N(mean, spread^2), the folded normal's mean."""
    z = mean / spread
    return spread * math.sqrt(2 / math.pi) * math.exp(-(z**2) / 2) + mean * math.erf(z / math.sqrt(2))


def test_energy_distance_of_two_gaussians_is_the_closed_form():
    # In one dimension x - y ~ N(d, 2): 2 E|x - y| - E|x - x'| - E|y - y'| in terms of the folded normal.
    shift = 1.5
    expected = 2 * mean_absolute_normal(shift, math.sqrt(2)) - 2 * mean_absolute_normal(0.0, math.sqrt(2))
    actual = energy_distance(normal(4000, 1, 0), normal(3000, 1, 1, mean=shift))
    assert actual == pytest.approx(expected, rel=0.05)


def test_energy_distance_equals_plain_sums():
    x, y = normal(7, 5, 0), normal(4, 5, 1, mean=0.3)

    def mean_distance(pairs):
        distances = [float((a - b).norm()) for a, b in pairs]
        return sum(distances) / len(distances)

    expected = (
        2 * mean_distance([(a, b) for a in x for b in y])
        - mean_distance([(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        - mean_distance([(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    ) / math.sqrt(5)
    assert energy_distance(x, y) == pytest.approx(expected, abs=1e-12)


def test_energy_distance_is_unbiased_where_the_distributions_are_equal():
    # The biased form (a sample meets itself) would average to about 2 * sqrt(2) / 20 = 0.14.
    values = [energy_distance(normal(20, 8, 2 * seed), normal(20, 8, 2 * seed + 1)) for seed in range(200)]
    standard_error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error
    assert standard_error < 0.003
    assert min(values) < 0 < max(values)


def test_energy_distance_knows_neither_order_nor_side_nor_chunks(monkeypatch):
    x, y = normal(33, 6, 0).reshape(33, 2, 3), normal(17, 6, 1, mean=0.5).reshape(17, 2, 3)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    whole = energy_distance(x, y)
    assert energy_distance(x[order], y) == pytest.approx(whole, abs=1e-12)
    assert energy_distance(y, x) == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(measures, "CHUNK", 5)
    assert energy_distance(x, y) == pytest.approx(whole, abs=1e-12)


def test_energy_distance_does_not_grow_with_the_dimension():
    """Divided by sqrt(dimension), a shift of every element by 1 costs about as much in 100 dimensions as in 400."""
    figures = [energy_distance(normal(200, d, 0), normal(200, d, 1, mean=1.0)) for d in (100, 400)]
    assert figures[0] == pytest.approx(figures[1], rel=0.05)


def test_energy_distance_in_fp64_survives_a_large_common_offset():
    x, y = normal(30, 4, 0).float(), normal(30, 4, 1, mean=0.5).float()
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.double() + 1000, y.double() + 1000), abs=1e-6)


def test_energy_distance_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="two samples"):
        energy_distance(normal(1, 3, 0), normal(5, 3, 1))
    with pytest.raises(ValueError, match="cannot be compared"):
        energy_distance(normal(5, 3, 0), normal(5, 4, 1))
