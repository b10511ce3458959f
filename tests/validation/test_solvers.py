"""Stock solvers as a stock pipeline calls them, and guidance that leaves out blocks, against plain references."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from simpletuner_dmd.flow import Schedule, TextEmbedding, euler_sigmas, sample_euler
from simpletuner_dmd.validation.sampling import Sampler, reference_noise
from simpletuner_dmd.validation.solvers import Guidance, SkipLayers, beta_sigmas, scheduler_of
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.runner import BlockRunner
from tests.wan.tiny import SHAPE, latents, prompts, tiny_wan

CPU = torch.device("cpu")
TEXT, NEGATIVE = prompts(1), prompts(1, seed=2)


def denoiser(layers: int = 4) -> WanDenoiser:
    network = tiny_wan(layers=layers)
    BlockRunner(network, None, checkpointing=False)
    return WanDenoiser(network.eval(), None, None)


def stock(network, scheduler, steps, guidance):
    """WanPipeline's own denoising loop: both passes, one timestep for all, fp32 latents."""
    scheduler.set_timesteps(steps)
    x, _ = reference_noise(5, (1, *SHAPE))
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = [network(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=text.rows_BLD,
                            return_dict=False)[0] for text in (TEXT, NEGATIVE)]  # fmt: skip
            x = scheduler.step(seen[1] + guidance * (seen[0] - seen[1]), t, x, return_dict=False)[0]
    return x


def test_unipc_is_what_a_stock_pipeline_makes():
    role = denoiser()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    expected = stock(role.transformer, scheduler, 6, guidance=4.0)
    sampler = Sampler(Schedule(3.0), "ode", 6, 4.0, solver="unipc")
    actual = sampler(role, TEXT, NEGATIVE, (1, *SHAPE), 5, CPU)
    assert torch.allclose(actual, expected, atol=1e-5)
    euler = Sampler(Schedule(3.0), "ode", 6, 4.0)(role, TEXT, NEGATIVE, (1, *SHAPE), 5, CPU)
    assert not torch.allclose(actual, euler, atol=1e-2)


def test_euler_is_the_plain_solver_on_the_recipes_grid():
    role = denoiser()
    first, _ = reference_noise(5, (1, *SHAPE))
    with torch.no_grad():
        expected = sample_euler(role, first, TEXT, NEGATIVE, euler_sigmas(5, 3.0), 4.0)
    actual = Sampler(Schedule(3.0), "ode", 5, 4.0)(role, TEXT, NEGATIVE, (1, *SHAPE), 5, CPU)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_beta_sigmas_are_the_quantiles_between_the_same_ends():
    sigmas = beta_sigmas(euler_sigmas(9, 1.0))
    assert sigmas[0] == 1.0 and sigmas[-1] == pytest.approx(1 / 9)
    # How much of u^-.4 (1 - u)^-.4 lies below each.
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1] + 2.5e-6
    below = torch.cumsum(u**-0.4 * (1 - u) ** -0.4, dim=0)
    for number, sigma in enumerate(sigmas[1:-1], 1):
        place = (sigma - 1 / 9) / (8 / 9)
        assert float(below[int(place * 200_000)] / below[-1]) == pytest.approx(1 - number / 8, abs=2e-3)
    assert beta_sigmas((1.0,)) == (1.0,)
    assert scheduler_of("euler-beta", 9, 1.0).sigmas.tolist() == pytest.approx([*sigmas, 0.0])


def test_beta_sigmas_are_diffusers():
    pytest.importorskip("scipy", reason="diffusers' own beta sigmas need it; the test above stands without")
    own = scheduler_of("euler-beta", 8, 5.0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True)
    theirs.set_timesteps(sigmas=list(euler_sigmas(8, 5.0)))
    assert torch.allclose(own.sigmas, theirs.sigmas, atol=1e-4)


# --- skip-layer guidance --------------------------------------------------------------------------------------------


def without_blocks(network, x: Tensor, sigma_B: Tensor, text: TextEmbedding, skipped: tuple[int, ...]) -> Tensor:
    """The same network with these blocks taken out of its list: the plainest meaning of a skipped layer."""
    blocks = network.blocks
    network.blocks = torch.nn.ModuleList(block for number, block in enumerate(blocks) if number not in skipped)
    try:
        with torch.no_grad():
            return network(hidden_states=x, timestep=1000 * sigma_B, encoder_hidden_states=text.rows_BLD,
                           return_dict=False)[0]  # fmt: skip
    finally:
        network.blocks = blocks


@pytest.mark.parametrize("skipped", [(9,), (0, 29), (3, 4, 5)])
def test_blocks_are_left_out_of_one_pass_of_a_model_of_30(skipped):
    role, x, sigma_B = denoiser(30), latents(1), torch.tensor([0.7])
    whole = role.velocity(x, sigma_B, TEXT)
    actual = role.velocity_without(x, sigma_B, TEXT, skipped)
    assert torch.equal(actual, without_blocks(role.transformer, x, sigma_B, TEXT, skipped))
    assert not torch.allclose(actual, whole, atol=1e-3)
    assert not actual.requires_grad
    assert torch.equal(role.velocity(x, sigma_B, TEXT), whole)  # the next pass is whole again


def test_skip_layer_guidance_by_hand():
    role, x, sigma_B = denoiser(), latents(1), torch.tensor([0.7])
    guidance = Guidance(3.0, skip=SkipLayers((1,), scale=2.0, start=0.0, stop=0.5))
    with torch.no_grad():
        cond, negative = role.velocity(x, sigma_B, TEXT), role.velocity(x, sigma_B, NEGATIVE)
        weaker = role.velocity_without(x, sigma_B, TEXT, (1,))
        plain = negative + 3 * (cond - negative)
        inside = guidance.velocity(role, x, sigma_B, TEXT, NEGATIVE, 0, 4)
        outside = guidance.velocity(role, x, sigma_B, TEXT, NEGATIVE, 2, 4)
    assert torch.allclose(inside, plain + 2 * (cond - weaker), atol=1e-5)
    assert torch.allclose(outside, plain, atol=1e-6)


def test_the_window_is_inside_not_outside():
    steps = range(10)
    assert [SkipLayers((9,), start=0.0, stop=1.0).acts(step, 10) for step in steps] == [True] * 10
    assert [step for step in steps if SkipLayers((9,), start=0.01, stop=0.2).acts(step, 10)] == [1]
    assert [step for step in steps if SkipLayers((9,), start=0.2, stop=0.6).acts(step, 10)] == [3, 4, 5]


def test_rescaled_guidance_has_the_spread_of_the_conditional():
    role, x, sigma_B = denoiser(), latents(2), torch.tensor([0.7, 0.2])
    with torch.no_grad():
        cond = role.velocity(x, sigma_B, prompts(2))
        plain, full = (
            Guidance(6.0, rescale).velocity(role, x, sigma_B, prompts(2), NEGATIVE, 0, 1) for rescale in (0.0, 1.0)
        )
    assert torch.allclose(full.flatten(1).std(dim=1), cond.flatten(1).std(dim=1), rtol=1e-4)
    assert torch.allclose(full / plain, (full / plain)[:, :1, :1, :1, :1].expand_as(full), rtol=1e-3)
