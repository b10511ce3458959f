"""An adversary that looks at a frozen teacher's features, for consistency training (arXiv 2506.03123, 2405.18407).

Fake: where the student's jump ended. Real: where the consistency target's did; no data enters. Both are brought from
the end e of their phase to one drawn level a within it by the same noise, so that the heads compare like with like, and
go through the teacher, whose features the heads judge token by token and the student is asked to match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from simpletuner_dmd.distill.method import Features, Ingredients, linearised
from simpletuner_dmd.distill.phases import ConsistencyPair, PhaseGrid, at_level
from simpletuner_dmd.flow import spread
from simpletuner_dmd.randomness import RandomStream, derive_seed

SLOPE = 0.2


def renoised(x: Tensor, noise: Tensor, from_B: Tensor, to_B: Tensor) -> Tensor:
    """A sample of level e = from at level a = to > e, exactly: k x + sqrt(a^2 - k^2 e^2) noise, k = (1 - a) / (1 - e).

    The signal comes out at 1 - a and the noise at a. Interpolating x and noise linearly, as PCM and DCM do, leaves too
    little noise: standard deviation .559 instead of .75 from .5 to .75.
    """
    kept_B = (1 - to_B) / (1 - from_B)
    added_B = (to_B**2 - (kept_B * from_B) ** 2).clamp_min(0).sqrt()
    kept, added = (spread(value.to(x.device, x.dtype), x) for value in (kept_B, added_B))
    return kept * x + added * noise


def normalised(features_BND: Tensor) -> Tensor:
    """Each token to mean 0 and variance 1 over its width, in fp32: blocks differ in scale by orders of magnitude."""
    return functional.layer_norm(features_BND.float(), features_BND.shape[-1:])


class TokenHead(nn.Module):
    """Features of one block to a verdict per token, [B, N, D] -> [B, N]: three layers and one residual.

    Normalised within each token. A GroupNorm over all tokens, as in the paper's code, takes the mean over the video out
    of narrow groups, and with it what may tell fake from real.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, hidden)
        self.think = nn.Sequential(nn.LayerNorm(hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, hidden))
        self.leave = nn.Sequential(nn.LayerNorm(hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, 1))

    def forward(self, features_BND: Tensor) -> Tensor:
        entered = self.enter(features_BND)
        verdict: Tensor = self.leave(entered + self.think(entered))
        return verdict[..., 0]


class FeatureHeads(nn.Module):
    """One head for each of the teacher's `blocks`. width: the teacher's; hidden: the heads' own.

    Starts from the same weights for the same seed, and leaves the global generator as it was.
    """

    def __init__(self, width: int, blocks: Sequence[int], hidden: int = 1024, seed: int = 0) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "feature heads"))
            self.heads = nn.ModuleList(TokenHead(width, hidden) for _ in self.blocks)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[B, N, D] of each block -> [B, N] of each block, fp32."""
        return [head(normalised(block)) for head, block in zip(self.heads, features, strict=True)]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def student_hinge(fake: Sequence[Tensor]) -> Tensor:
    """mean relu(1 - D(fake)), over tokens and then over heads: no pull on what already passes for real."""
    return _mean([functional.relu(1 - logits).mean() for logits in fake])


def heads_hinge(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """mean relu(1 + D(fake)) + mean relu(1 - D(real)), over tokens and then over heads."""
    return _mean([functional.relu(1 + logits).mean() for logits in fake]) + student_hinge(real)


def feature_distance(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of normalised features, over elements and then over blocks."""
    return _mean([(normalised(a) - normalised(b)).pow(2).mean() for a, b in zip(fake, real, strict=True)])


@dataclass(frozen=True)
class AdversaryTerm:
    """value: scalar whose gradient reaches the prediction only. metrics: its parts, without their weights."""

    value: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureAdversary:
    """The two losses. hinge_weight, feature_weight: what the parts of the student's term are multiplied by.

    Forwards of a micro-batch: two of the teacher's features in the student's turn, two in the heads' turn.
    """

    teacher: Features
    heads: FeatureHeads
    grid: PhaseGrid
    hinge_weight: float
    feature_weight: float

    def student_term(self, pair: ConsistencyPair, stream: RandomStream) -> AdversaryTerm:
        """Differentiated up to the prediction at once, so that the teacher's graph is gone before the student's."""
        fake_x0 = pair.prediction.detach().requires_grad_()
        with torch.enable_grad():
            fake = self._features(fake_x0, pair, stream)
            with torch.no_grad():
                real = self._features(pair.target, pair, stream)
            hinge, distance = student_hinge(self.heads(fake)), feature_distance(fake, real)
            value = self.hinge_weight * hinge + self.feature_weight * distance
            (gradient,) = torch.autograd.grad(value, fake_x0)
        metrics = {"adversarial_hinge": float(hinge.detach()), "feature_distance": float(distance.detach())}
        return AdversaryTerm(linearised(value, pair.prediction, gradient), metrics)

    def heads_term(self, pair: ConsistencyPair, stream: RandomStream) -> AdversaryTerm:
        """The heads' own loss, at the level and with the noise of the student's turn of the same step."""
        with torch.no_grad():
            fake = self._features(pair.prediction.detach(), pair, stream)
            real = self._features(pair.target, pair, stream)
        fake_logits, real_logits = self.heads(fake), self.heads(real)
        metrics = {
            "logit_fake": float(_mean([logits.detach().mean() for logits in fake_logits])),
            "logit_real": float(_mean([logits.detach().mean() for logits in real_logits])),
        }
        return AdversaryTerm(heads_hinge(fake_logits, real_logits), metrics)

    def _features(self, x: Tensor, pair: ConsistencyPair, stream: RandomStream) -> list[Tensor]:
        """Every call of a step draws the same level and the same noise: a stream has no state."""
        level_B = self.grid.level_within(pair.jumps, stream.uniform("adversary/level"))
        noise = stream.normal(x.shape[1:], "adversary/noise").to(x.device)
        x_a = renoised(x, noise, pair.jumps.end_B, level_B)
        return self.teacher.features(x_a, at_level(level_B, x), pair.text, self.heads.blocks)


def build_adversary(parts: Ingredients, grid: PhaseGrid) -> FeatureAdversary | None:
    """The adversary that the options ask for, if they do."""
    options = parts.options
    if not options.has_discriminator:
        return None
    assert isinstance(parts.discriminator, FeatureHeads), "an adversarial term needs heads on features"
    assert hasattr(parts.teacher, "features"), "an adversarial term needs the teacher's features"
    return FeatureAdversary(
        cast(Features, parts.teacher),
        parts.discriminator,
        grid,
        hinge_weight=options.adv_weight * options.adv_hinge_scale,
        feature_weight=options.adv_weight * options.adv_feature_scale,
    )
