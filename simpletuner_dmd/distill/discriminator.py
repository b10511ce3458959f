"""DMD2's adversarial term (arXiv 2405.14867, section 4.3): a head on the critic's features tells videos from samples.

    D(x_s, s, text) = head(features of the critic)     one logit per video
    L_D = softplus(D(fake)) + softplus(-D(real))       in the critic's turn: moves the head and the critic under it
    L_G = softplus(-D(fake))                           in the student's turn: reaches x0 and nothing else

The head is one of learned queries over all tokens, because a judgement of the whole clip keeps motion better than one
per frame. It reads the noised input at the noise level it is told.

Shapes: B batch, N tokens, D width of a token, d width of the head, h heads, q queries, C channels, F latent frames,
H W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner_dmd.distill.losses import adversarial_loss, discriminator_loss
from simpletuner_dmd.distill.method import Features, NamedLoss
from simpletuner_dmd.flow import TIMESTEPS, Batch, SigmaWindow, TextEmbedding, add_noise
from simpletuner_dmd.randomness import RandomStream, derive_seed

HEAD_WIDTH, WIDTH_PER_HEAD = 512, 64
SIGMA_FREQUENCIES = 128


def default_blocks(depth: int) -> tuple[int, ...]:
    """The middle block, the one at three quarters, the last: layout, texture, and what is about to be said."""
    return tuple(sorted({depth // 2, 3 * depth // 4, depth - 1}))


class QueryPool(nn.Module):
    """Learned queries that read all tokens by one cross-attention: [B, N, D] to [B, q d], fp32."""

    def __init__(self, width: int, heads: int, queries: int) -> None:
        super().__init__()
        dim = heads * WIDTH_PER_HEAD
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(queries, dim))
        self.key = nn.Linear(width, dim, bias=False)
        self.value = nn.Linear(width, dim, bias=False)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens = self.norm(tokens_BND.float())
        # q (K x) = (q K) x and V (sum of a x) = sum of a (V x): with a few queries and tens of thousands of tokens it
        # is cheaper by the width of the head to move the queries to the tokens than to project every token.
        query_qhd = self.query.unflatten(1, (self.heads, -1))
        key_hdD, value_hdD = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (self.key, self.value))
        probe_qhD = torch.einsum("qhd,hdD->qhD", query_qhd, key_hdD) / math.sqrt(WIDTH_PER_HEAD)
        weight_BqhN = torch.einsum("BND,qhD->BqhN", tokens, probe_qhD).softmax(dim=-1)
        read_BqhD = torch.einsum("BqhN,BND->BqhD", weight_BqhN, tokens)
        pooled_Bqhd = torch.einsum("BqhD,hdD->Bqhd", read_BqhD, value_hdD)
        return self.norm_out(pooled_Bqhd.flatten(2)).flatten(1)


class SigmaEmbedding(nn.Module):
    """[B] noise levels to [B, d]: sines and cosines of 1000 sigma, and an MLP. What is real depends on the level."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * SIGMA_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, sigma_B: Tensor) -> Tensor:
        octave = torch.arange(SIGMA_FREQUENCIES, device=sigma_B.device) / SIGMA_FREQUENCIES
        phase = TIMESTEPS * sigma_B.float()[:, None] * torch.exp(-math.log(10000.0) * octave)
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1))


class VideoHead(nn.Module):
    """One logit per video from the features of some blocks, [B, N, D] each. Computes in fp32 whatever comes in.

    blocks: the transformer blocks it reads, counted from 0. The last layer starts at zero: the first logits are 0, and
    the gradient that reaches the features is exactly 0 until the head has learned something.
    """

    def __init__(self, width: int, blocks: Sequence[int], queries: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        heads = max(1, min(HEAD_WIDTH, width) // WIDTH_PER_HEAD)
        dim = heads * WIDTH_PER_HEAD
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "discriminator"))
            self.pools = nn.ModuleList([QueryPool(width, heads, queries) for _ in self.blocks])
            self.sigma = SigmaEmbedding(dim)
            self.mix = nn.Linear((len(self.blocks) * queries + 1) * dim, dim)
            self.logit = nn.Linear(dim, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: Sequence[Tensor], sigma_B: Tensor) -> Tensor:
        """[B]"""
        pooled = [pool(tokens) for pool, tokens in zip(self.pools, features, strict=True)]
        mixed = self.mix(torch.cat([*pooled, self.sigma(sigma_B)], dim=1))
        return self.logit(nn.functional.silu(mixed))[:, 0]


@dataclass(frozen=True)
class AdversarySettings:
    """What the term reads of `distillation_config` (the keys of the same names, with "gan_" before them).

    weight: of the student's term itself, or in ratio mode the norm of its gradient at x0 relative to that of
    distribution matching, for each sample. Distribution matching is a mean over the elements of a latent and its
    gradient shrinks with their number, so an absolute weight does not carry over from one size to another.
    start_step: trainer step from which the student hears the head; the head learns for discriminator_warmup steps
    before. last_step_only: head and student look at rollouts that left at the ladder's last step and at no others.
    r1_weight: of (D(x) - D(x + r1_sigma e))^2 on real videos, relative to the head's own loss.
    """

    weight: float
    weight_mode: str = "absolute"  # or "ratio"
    critic_weight: float = 1e-2
    start_step: int = 0
    discriminator_warmup: int = 0
    detach_backbone: bool = False
    last_step_only: bool = False
    r1_weight: float = 0.0
    r1_sigma: float = 0.1


@dataclass(frozen=True)
class Push:
    """The student's adversarial term: its weighted loss, and its gradient at x0, both without a graph."""

    loss: Tensor
    gradient: Tensor
    metrics: dict[str, float]


class Adversary:
    """The discriminator: `head` on the features of `host`, which is the critic.

    The window that both turns are handed holds the noise levels at which it looks at these samples.
    """

    def __init__(
        self, host: Features, head: nn.Module, blocks: Sequence[int], settings: AdversarySettings, device: torch.device
    ) -> None:
        self.host, self.head, self.blocks = host, head, tuple(blocks)
        self.settings, self.device = settings, device

    def learns(self, step: int) -> bool:
        return step >= self.settings.start_step - self.settings.discriminator_warmup

    def acts(self, step: int) -> bool:
        """Whether the student hears the discriminator at this step."""
        return step >= self.settings.start_step

    def logits(self, x_t_BCFHW: Tensor, sigma_B: Tensor, text: TextEmbedding, *, detached: bool = False) -> Tensor:
        """[B]. detached: without a graph through the critic."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            features = self.host.features(x_t_BCFHW, sigma_B, text, self.blocks)
        return self.head(features, sigma_B)

    def critic_losses(
        self, student_x0: Tensor, batch: Batch, stream: RandomStream, window: SigmaWindow
    ) -> Iterator[NamedLoss]:
        """The discriminator's own loss, one term for the student's samples and one for the videos of the batch.

        Both are seen with the same prompts and at the same noise levels, which leaves nothing else to tell them by.
        The terms are back-propagated one after the other, so peak memory is that of one (of two where R1 is on).
        """
        settings = self.settings
        assert batch.latents_BCFHW is not None, "the adversarial term needs latents in the batch"
        sigma_B = window.sigma(stream.uniform("gan/sigma")).to(self.device)

        def noised(x0: Tensor, purpose: str) -> Tensor:
            noise = stream.normal(batch.latent_shape, f"gan/noise of the {purpose}").to(self.device)
            return add_noise(x0.detach().float(), noise, sigma_B)

        for kind, x0 in (("student", student_x0), ("videos", batch.latents_BCFHW)):
            x_t = noised(x0, kind)
            logit_B = self.logits(x_t, sigma_B, batch.text, detached=settings.detach_backbone)
            loss = discriminator_loss(logit_B, real=kind == "videos")
            metrics = {f"gan_logit_{kind}": float(logit_B.detach().mean())}
            if kind == "videos" and settings.r1_weight > 0:
                nudge = settings.r1_sigma * stream.normal(batch.latent_shape, "gan/r1").to(self.device)
                nudged_B = self.logits(x_t + nudge, sigma_B, batch.text, detached=settings.detach_backbone)
                steepness = (logit_B - nudged_B).pow(2).mean()
                loss = loss + settings.r1_weight * steepness
                metrics["gan_r1"] = float(steepness.detach())
            yield NamedLoss("gan_critic_loss", settings.critic_weight * loss, metrics, reported=float(loss.detach()))

    def push(
        self, x0: Tensor, matching_gradient: Tensor, batch: Batch, stream: RandomStream, window: SigmaWindow
    ) -> Push:
        """The student's term at its clean samples x0, differentiated up to them and its graph freed.

        matching_gradient: that of distribution matching at x0, the measure in ratio mode. The graph goes through the
        critic's features to the input (no_grad would cut it), and no parameter gets a gradient.
        """
        settings = self.settings
        sigma_B = window.sigma(stream.uniform("gan/student sigma")).to(self.device)
        noise = stream.normal(batch.latent_shape, "gan/student noise").to(self.device)
        leaf = x0.detach().requires_grad_()
        with torch.enable_grad():
            logit_B = self.logits(add_noise(leaf, noise, sigma_B), sigma_B, batch.text)
            loss = adversarial_loss(logit_B)
            (raw,) = torch.autograd.grad(loss, leaf)
        norms_B, measure_B = (_norms(gradient) for gradient in (raw, matching_gradient))
        weight_B = torch.full_like(norms_B, settings.weight)
        if settings.weight_mode == "ratio":
            # Per sample, so that the update does not depend on how a step's batch is cut. A gradient of exactly zero
            # (a head that has learned nothing yet) stays zero.
            weight_B = torch.where(norms_B > 0, settings.weight * measure_B / norms_B, 0.0)
        gradient = weight_B.to(raw.dtype)[:, None, None, None, None] * raw
        whole, measure = float(gradient.norm()), float(matching_gradient.norm())
        metrics = {
            "gan_generator_loss": float(loss.detach()),
            "gan_logit_pushed": float(logit_B.detach().mean()),
            "gan_gradient_ratio": whole / measure if measure > 0 else 0.0,
            "gan_effective_weight": float(weight_B.mean()),
        }
        return Push(settings.weight * loss.detach(), gradient, metrics)


def _norms(gradient: Tensor) -> Tensor:
    """[B, ...] to [B], in double: the squares of a gradient that is a mean over millions underflow in single."""
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
