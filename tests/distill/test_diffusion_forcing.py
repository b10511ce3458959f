"""Diffusion forcing: a noise level per block, and the loss's minimum in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simpletuner_dmd.config.methods.blockwise import DiffusionForcingConfig
from simpletuner_dmd.distill.diffusion_forcing import DiffusionForcing, DiffusionForcingSettings, build
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.flow import Routing, Schedule, SigmaWindow, TextEmbedding, unshifted
from simpletuner_dmd.randomness import RandomStream

from .causal_toys import autoregressive
from .oracles import CPU, FastStream, Spy, make_batch

FRAMES = 4
COVARIANCE = autoregressive(FRAMES, 0.8)
LEVELS = (0.3, 0.7)  # of the two blocks of the toy


def data(count: int, seed: int) -> Tensor:
    """[B, 1, F, 1, 2] with frames N(0, COVARIANCE)."""
    drawn = torch.randn(count, 1, FRAMES, 1, 2, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("fg,bcghw->bcfhw", torch.linalg.cholesky(COVARIANCE), drawn)


class LinearCausal(nn.Module):
    """v = G x with G zero above the blocks of two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(FRAMES, FRAMES))
        self.visible = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        return torch.einsum("fg,bcghw->bcfhw", self.gain * self.visible, x_t_BCFHW)


class TwoLevels(FastStream):
    """The two blocks always draw LEVELS."""

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.positions),), LEVELS[int(purpose[-1])], dtype=torch.float64)


def closed_form() -> Tensor:
    """Least squares, block by block: E[v x^T] E[x x^T]^-1 over the frames that the block sees."""
    sigma = torch.tensor([LEVELS[0]] * 2 + [LEVELS[1]] * 2)
    keep, noise = torch.diag(1 - sigma), torch.diag(sigma)
    inputs = keep @ COVARIANCE @ keep + noise @ noise
    crossed = noise - COVARIANCE @ keep  # E[(e - x0) x^T]
    gain = torch.zeros(FRAMES, FRAMES)
    gain[:2, :2] = crossed[:2, :2] @ torch.linalg.inv(inputs[:2, :2])
    gain[2:] = crossed[2:] @ torch.linalg.inv(inputs)
    return gain


def test_the_loss_has_its_minimum_where_least_squares_says() -> None:
    student = LinearCausal()
    method = DiffusionForcing(student, DiffusionForcingSettings(2), CPU)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for step in range(500):
        batch = make_batch(512, (1, FRAMES, 1, 2), data(512, step))
        optimizer.zero_grad()
        for turn in method.turns(step):
            for loss in turn.losses(batch, TwoLevels(0, step, batch.positions)):
                loss.value.backward()
        optimizer.step()
        decay.step()
    learned, expected = (student.gain * student.visible).detach(), closed_form()
    assert float((learned - expected).abs().max()) < 0.015
    # The past is used as noisy as it is: a clean past would ask for another gain.
    assert float(expected[2:, :2].abs().max()) > 0.1


def test_levels_are_constant_within_a_block_and_independent_between_blocks_and_samples() -> None:
    method = DiffusionForcing(LinearCausal(), DiffusionForcingSettings(3, True, SigmaWindow(0.1, 0.9, 5.0)), CPU)
    sigma_BF = torch.cat([method.draw_sigma(7, RandomStream(0, step, tuple(range(8)))) for step in range(150)])
    assert sigma_BF.shape == (1200, 7) and sigma_BF.dtype == torch.float32
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        assert torch.equal(sigma_BF[:, start:stop], sigma_BF[:, start : start + 1].expand(-1, stop - start))
    blocks = sigma_BF[:, [0, 1, 4]]
    assert float(blocks.min()) >= 0.1 and float(blocks.max()) <= 0.9
    correlation = torch.corrcoef(blocks.T) - torch.eye(3)
    assert float(correlation.abs().max()) < 0.1  # 3.5 standard deviations of independent draws
    # Uniform before the shift: quantiles of the unshifted levels on a straight line.
    low, high = unshifted(0.1, 5.0), unshifted(0.9, 5.0)
    ranks = (torch.tensor([unshifted(float(s), 5.0) for s in blocks.flatten()]) - low) / (high - low)
    straight = (torch.arange(len(ranks)) + 0.5) / len(ranks)
    assert float((ranks.sort().values - straight).abs().max()) < 0.033  # Kolmogorov-Smirnov, p = 0.001


def test_the_student_sees_each_block_at_its_own_level_with_the_captions_dropped_as_asked() -> None:
    spy = Spy(LinearCausal())
    options = DiffusionForcingConfig(num_frame_per_block=2, min_timestep_ratio=0.05, max_timestep_ratio=0.95)
    method = build(Ingredients(spy, spy, Schedule(3.0), options, CPU, caption_dropout_probability=0.5))
    assert method.settings.window == SigmaWindow(0.05, 0.95, 3.0)
    batch, stream = make_batch(64, (1, FRAMES, 1, 2), data(64, 1)), RandomStream(0, 0, tuple(range(64)))
    (loss,) = method.losses(batch, stream)
    (call,) = spy.calls
    sigma_BF = method.draw_sigma(FRAMES, stream)
    noise = stream.normal((1, FRAMES, 1, 2), "noise")
    assert torch.equal(call.sigma, sigma_BF) and not call.routed and call.with_grad
    assert batch.latents_BCFHW is not None
    s = sigma_BF[:, None, :, None, None]
    torch.testing.assert_close(call.x_t, (1 - s) * batch.latents_BCFHW + s * noise)
    predicted = spy.inner.velocity(call.x_t, sigma_BF, batch.text)
    torch.testing.assert_close(loss.value, (predicted - (noise - batch.latents_BCFHW)).pow(2).mean())
    assert 20 < int((call.said == 0).sum()) < 44
