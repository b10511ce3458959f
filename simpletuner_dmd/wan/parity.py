"""How far quantisation moves the velocity: the quantised base against the dense one, at five noise levels.

The same small clip and two texts for both, with guidance and without. What is compared is the model's own output, not
weights: errors of single layers partly cancel, and partly are amplified by guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.config.rules import BELOW_8_BITS
from simpletuner_dmd.flow import TIMESTEPS, add_noise

SIGMAS = (0.95, 0.8, 0.6, 0.35, 0.1)
VISIBLE = 0.1
"""Relative error without guidance from which on the report warns; below 8 bits it always does."""


@dataclass(frozen=True)
class ParityRow:
    """relative_error: |v_q - v| / |v|; cosine: between the two. guided: the same with guidance."""

    sigma: float
    relative_error: float
    cosine: float
    guided_relative_error: float
    guided_cosine: float


@dataclass(frozen=True)
class Parity:
    """The report of one scheme, by noise level."""

    precision: str
    guidance: float
    rows: tuple[ParityRow, ...]

    @property
    def worst(self) -> float:
        """The largest relative error without guidance."""
        return max(row.relative_error for row in self.rows)

    def lines(self) -> list[str]:
        """For a person; the last one is a warning where the error is visible."""
        lines = [f"{self.precision} against the unquantised base: relative error and cosine of the velocity"]
        for row in self.rows:
            lines.append(
                f"  sigma {row.sigma:.2f}: {row.relative_error:6.2%}, {row.cosine:.5f};"
                f" with guidance {self.guidance:g}: {row.guided_relative_error:6.2%}, {row.guided_cosine:.5f}"
            )
        if self.worst > VISIBLE or self.precision in BELOW_8_BITS:
            lines.append(
                f"warning: {self.precision} moves the velocity by up to {self.worst:.1%}, and the student learns from "
                "that; Wan loses visibly below 8 bits, int8-quanto is nearly free"
            )
        return lines

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any] | None) -> Parity | None:
        if document is None:
            return None
        return cls(document["precision"], document["guidance"], tuple(ParityRow(**row) for row in document["rows"]))


@dataclass(frozen=True)
class Probe:
    """What both models are shown. clip_BCFHW: one clip; text_BLD: two embeddings, with the prompt and without."""

    clip_BCFHW: Tensor
    text_BLD: Tensor
    guidance: float

    @classmethod
    def of(cls, config: Mapping[str, Any], guidance: float, texts: Sequence[Tensor] = ()) -> Probe:
        """A smooth random clip for a transformer with this config. texts: [L, D] rows of a prompt and of the negative
        prompt; random ones, of the size that UMT5's have, where none are given."""
        seeded = torch.Generator().manual_seed(0)
        channels, patch = config["in_channels"], config["patch_size"]
        coarse = torch.randn(1, channels, 2, 4, 4, generator=seeded)
        size = (2 * patch[0], 8 * patch[1], 8 * patch[2])
        clip = torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")
        if not texts:
            texts = [0.1 * torch.randn(rows, config["text_dim"], generator=seeded) for rows in (16, 4)]
        longest = max(len(rows) for rows in texts)
        padded = [torch.nn.functional.pad(rows.float().cpu(), (0, 0, 0, longest - len(rows))) for rows in texts]
        return cls(clip / clip.std(), torch.stack(padded), guidance)

    @torch.no_grad()
    def velocities(self, model: nn.Module) -> Tensor:
        """[sigma, text, C, F, H, W] in fp32 on the CPU, by one forward pass."""
        weight = model.get_parameter("patch_embedding.weight")
        sigmas = torch.tensor(SIGMAS)
        clips = self.clip_BCFHW.expand(len(SIGMAS), *self.clip_BCFHW.shape[1:])
        noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))
        x_t = add_noise(clips, noise, sigmas).repeat_interleave(2, dim=0)
        texts = self.text_BLD.repeat(len(SIGMAS), 1, 1)
        training = model.training
        model.eval()
        try:
            (velocity,) = model(
                x_t.to(weight.device, weight.dtype),
                timestep=(TIMESTEPS * sigmas.repeat_interleave(2)).to(weight.device),
                encoder_hidden_states=texts.to(weight.device, weight.dtype),
                return_dict=False,
            )
        finally:
            model.train(training)
        return velocity.float().cpu().unflatten(0, (len(SIGMAS), 2))

    def compare(self, precision: str, dense: Tensor, quantised: Tensor) -> Parity:
        """What became of the dense velocities; both as `velocities` gives them."""
        rows = []
        for sigma, expected, actual in zip(SIGMAS, dense, quantised, strict=True):
            plain = _difference(expected[0], actual[0])
            rows.append(ParityRow(sigma, *plain, *_difference(self._guided(expected), self._guided(actual))))
        return Parity(precision, self.guidance, tuple(rows))

    def _guided(self, pair: Tensor) -> Tensor:
        with_prompt, without = pair
        return without + self.guidance * (with_prompt - without)


def _difference(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Relative error and cosine, in fp64."""
    a, b = expected.double().flatten(), actual.double().flatten()
    return float((b - a).norm() / a.norm()), float(torch.dot(a, b) / (a.norm() * b.norm()))
