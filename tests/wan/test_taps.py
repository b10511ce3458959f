"""Features of the stock transformer's blocks, against a loop over its modules; an adapter at part of its strength."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner_dmd.wan.adapters import AdapterSwitch
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.runner import BlockRunner

from .tiny import LORA, SHAPE, latents, prompts, tiny_wan

LAYERS, TOKENS = 4, 12
TAPS = (1, 2)
SIGMA_B = torch.tensor([0.3, 0.8])
SIGMA_BF = torch.tensor([[0.3, 0.6], [0.8, 0.1]])


def denoiser(host: str = "full", *, checkpointing: bool = False, scale: float = 1.0) -> WanDenoiser:
    """host: "full" (everything trains), "lora" (an awake adapter trains), or "frozen" (nothing does)."""
    network = tiny_wan(layers=LAYERS)
    switch = None
    if host == "lora":
        switch = AdapterSwitch(network, {"critic": LORA}, seed=0)
        seeded = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in switch.named_parameters("critic"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=seeded))
    network.requires_grad_(host == "full") if switch is None else None
    BlockRunner(network, switch, checkpointing)
    return WanDenoiser(network.train(), switch, "critic" if switch else None, scale=scale)


def reference_features(role: WanDenoiser, x_t: Tensor, sigma: Tensor, last: int) -> list[Tensor]:
    """Every block's output, by the model's own modules one after the other, without the model's forward."""
    model: Any = role.transformer
    timestep, tokens = 1000 * sigma, None
    if sigma.ndim == 2:
        timestep, tokens = timestep.repeat_interleave(6, 1).flatten(), TOKENS
    x = model.patch_embedding(x_t).flatten(2).transpose(1, 2).contiguous()
    _, modulation, text, _ = model.condition_embedder(timestep, prompts().rows_BLD, None, timestep_seq_len=tokens)
    found = []
    with role._selected():
        for block in model.blocks[: last + 1]:
            x = block(x, text, modulation.unflatten(-1, (6, -1)), model.rope(x_t))
            found.append(x)
    return found


def loss_of(features: list[Tensor]) -> Tensor:
    """Weighs every element of every tap differently."""
    seeded = torch.Generator().manual_seed(2)
    return sum((f * torch.randn(f.shape, generator=seeded)).sum() for f in features)  # type: ignore[return-value]


def gradients_of(role: WanDenoiser, x_t: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
    loss_of(features).backward()
    found = {name: p.grad for name, p in role.transformer.named_parameters() if p.grad is not None}
    for parameter in role.transformer.parameters():
        parameter.grad = None
    assert x_t.grad is not None and bool(x_t.grad.any())
    return {**found, "input": x_t.grad}


def count_runs(role: WanDenoiser) -> list[int]:
    network: Any = role.transformer
    runs = [0] * LAYERS

    def counted(index: int) -> Any:
        def note(*_: Any) -> None:
            runs[index] += 1

        return note

    for index, block in enumerate(network.blocks):
        block.register_forward_pre_hook(counted(index))
    return runs


@pytest.mark.parametrize("sigma", [SIGMA_B, SIGMA_BF], ids=["one-level", "level-per-frame"])
@pytest.mark.parametrize("host", ["full", "lora", "frozen"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_features_and_gradients_are_those_of_the_reference(host: str, checkpointing: bool, sigma: Tensor) -> None:
    role = denoiser(host, checkpointing=checkpointing)
    x_t = latents().requires_grad_(True)
    features = role.features(x_t, sigma, prompts(), TAPS)
    assert [tuple(feature.shape) for feature in features] == 2 * [(2, TOKENS, 48)]
    gradients = gradients_of(role, x_t, features)
    again = latents().requires_grad_(True)
    everything = reference_features(role, again, sigma, max(TAPS))
    expected = gradients_of(role, again, [everything[block] for block in TAPS])
    assert all(torch.equal(feature, everything[block]) for feature, block in zip(features, TAPS, strict=True))
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    reached = {name.split(".")[1] for name in gradients if name.startswith("blocks.")}
    assert reached == (set() if host == "frozen" else {"0", "1", "2"})


def test_an_input_without_gradient_gets_none_and_a_frozen_host_keeps_no_graph() -> None:
    (feature,) = denoiser("frozen", checkpointing=True).features(latents(), SIGMA_B, prompts(), [0])
    assert not feature.requires_grad


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no-graph"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_blocks_after_the_last_tap_do_not_run(checkpointing: bool, graph: bool) -> None:
    role = denoiser(checkpointing=checkpointing)
    runs = count_runs(role)
    with torch.set_grad_enabled(graph):
        features = role.features(latents(), SIGMA_B, prompts(), TAPS)
    assert runs == [1, 1, 1, 0]
    if graph:
        loss_of(features).backward()
        assert runs == ([2, 2, 2, 0] if checkpointing else [1, 1, 1, 0])


@pytest.mark.parametrize("host", ["full", "lora"])
def test_without_gradients_the_features_are_the_same_and_have_no_graph(host: str) -> None:
    role = denoiser(host, checkpointing=True)
    x_t = latents().requires_grad_(True)
    expected = role.features(x_t, SIGMA_B, prompts(), TAPS)
    with torch.no_grad():
        features = role.features(x_t, SIGMA_B, prompts(), TAPS)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(left, right) for left, right in zip(features, expected, strict=True))
    assert not any(feature.requires_grad for feature in features)
    assert all(feature.requires_grad for feature in expected)


@pytest.mark.parametrize("graph", [True, False])
def test_without_gradients_nothing_is_kept_for_a_backward(graph: bool) -> None:
    """While a block runs, what an earlier one was given must be gone already: else the memory is that of training."""
    role = denoiser()
    given: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    early, late = (role.transformer.get_submodule(f"blocks.{index}") for index in (1, 3))
    early.register_forward_pre_hook(lambda module, arguments: given.append(weakref.ref(arguments[0])))
    late.register_forward_pre_hook(lambda module, arguments: alive.append(given[0]() is not None))
    with torch.set_grad_enabled(graph):
        role.features(latents().requires_grad_(True), SIGMA_B, prompts(), [LAYERS - 1])
    assert alive == [graph]


def test_taps_come_in_the_order_they_were_asked_for() -> None:
    role = denoiser()
    every = reference_features(role, latents(), SIGMA_B, LAYERS - 1)
    features = role.features(latents(), SIGMA_B, prompts(), [3, 0, 3])
    assert all(torch.equal(feature, every[block]) for feature, block in zip(features, [3, 0, 3], strict=True))


@pytest.mark.parametrize("blocks", [[LAYERS], [-1], [0, 9], []])
def test_blocks_the_model_does_not_have_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="choose from 0 to 3"):
        denoiser().features(latents(), SIGMA_B, prompts(), blocks)


def test_a_later_forward_is_whole_again_even_after_an_error() -> None:
    role = denoiser(checkpointing=True)
    expected = denoiser().velocity(latents(), SIGMA_B, prompts())
    role.features(latents(), SIGMA_B, prompts(), [0])
    assert torch.equal(role.velocity(latents(), SIGMA_B, prompts()), expected)
    with pytest.raises(RuntimeError):
        role.features(latents()[:, :2], SIGMA_B, prompts(), [0])
    assert torch.equal(role.velocity(latents(), SIGMA_B, prompts()), expected)


def test_with_nothing_switched_on_the_runner_is_not_there() -> None:
    """Output and gradients of the model as it comes, bit for bit."""
    stock: Any = tiny_wan(layers=LAYERS)
    x_t = latents().requires_grad_(True)
    (expected,) = stock(x_t, 1000 * SIGMA_B, prompts().rows_BLD, return_dict=False)
    (expected * latents(seed=11)).sum().backward()
    role, again = denoiser(checkpointing=True), latents().requires_grad_(True)
    velocity = role.velocity(again, SIGMA_B, prompts())
    (velocity * latents(seed=11)).sum().backward()
    assert torch.equal(velocity, expected)
    assert x_t.grad is not None and again.grad is not None and torch.equal(again.grad, x_t.grad)
    ours = dict(role.transformer.named_parameters())
    for name, parameter in stock.named_parameters():
        assert parameter.grad is not None and torch.equal(ours[name].grad, parameter.grad), name  # type: ignore[arg-type]


def test_features_of_a_bf16_model_are_fp32_tensors() -> None:
    network: Any = tiny_wan(dtype=torch.bfloat16, layers=LAYERS)
    BlockRunner(network, None, False)
    (feature,) = WanDenoiser(network, None, None).features(latents(), SIGMA_B, prompts(), [1])
    assert feature.dtype == torch.float32


# --- what a head needs to know ----------------------------------------------------------------------------------------


def test_depth_and_width_are_the_models() -> None:
    role = denoiser()
    assert (role.depth, role.width) == (LAYERS, 48)


def test_the_grid_gives_every_feature_its_place() -> None:
    """With self-attention silent, a token at (f, h, w) can only know its own patch of the latents."""
    role = denoiser("frozen")
    with torch.no_grad():
        for name, parameter in role.transformer.named_parameters():
            if ".attn1.to_out.0." in name:
                parameter.zero_()
    frames, height, width = role.token_grid(SHAPE)
    assert (frames, height, width) == (2, 2, 3)
    x_t = latents().requires_grad_(True)
    (feature,) = role.features(x_t, SIGMA_B, prompts(), [1])
    place = feature.unflatten(1, (frames, height, width))[1, 1, 0, 2]
    (gradient,) = torch.autograd.grad(place.sum(), x_t)
    expected = torch.zeros(2, *SHAPE, dtype=torch.bool)
    expected[1, :, 1, 0:2, 4:6] = True
    assert torch.equal(gradient != 0, expected)


# --- part of an adapter's strength ------------------------------------------------------------------------------------


def scaled_by_hand(role: WanDenoiser, scale: float) -> Tensor:
    """The velocity with the adapter's second factors multiplied by `scale`."""
    assert role.switch is not None
    factors = [p for name, p in role.switch.named_parameters("critic") if "lora_B" in name]
    with torch.no_grad():
        for factor in factors:
            factor.mul_(scale)
        velocity = WanDenoiser(role.transformer, role.switch, "critic").velocity(latents(), SIGMA_B, prompts())
        for factor in factors:
            factor.div_(scale)
    return velocity


def test_an_adapter_acts_at_its_roles_strength() -> None:
    weak, strong = denoiser("lora", scale=0.25), denoiser("lora")
    with torch.no_grad():
        velocity = weak.velocity(latents(), SIGMA_B, prompts())
        teacher = WanDenoiser(weak.transformer, weak.switch, None).velocity(latents(), SIGMA_B, prompts())
        full = strong.velocity(latents(), SIGMA_B, prompts())
    torch.testing.assert_close(velocity, scaled_by_hand(weak, 0.25), rtol=0, atol=1e-6)
    assert float((velocity - full).norm() / full.norm()) > 1e-2
    assert float((velocity - teacher).norm() / teacher.norm()) > 1e-2
    silent = WanDenoiser(weak.transformer, weak.switch, "critic", scale=0.0)
    with torch.no_grad():
        torch.testing.assert_close(silent.velocity(latents(), SIGMA_B, prompts()), teacher, rtol=0, atol=1e-6)


def test_a_recompute_sees_the_strength_of_its_forward() -> None:
    """Weak and full pass of one adapter in one graph: backward runs when neither is selected any more."""
    found = []
    for checkpointing in (False, True):
        weak = denoiser("lora", checkpointing=checkpointing, scale=0.25)
        full = WanDenoiser(weak.transformer, weak.switch, "critic")
        x_t = latents().requires_grad_(True)
        (features,) = weak.features(x_t, SIGMA_B, prompts(), [2])
        product = features.mean() * full.velocity(x_t, SIGMA_B, prompts()) * weak.velocity(x_t, SIGMA_B, prompts())
        found.append(gradients_of(weak, x_t, [product]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
