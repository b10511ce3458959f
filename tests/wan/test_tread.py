"""TREAD on the stock transformer, against a reference in plain Python, and against what must follow from its idea."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from simpletuner_dmd.flow import Routing
from simpletuner_dmd.randomness import RandomStream, generator
from simpletuner_dmd.wan.adapters import AdapterSwitch
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.runner import BlockRunner
from simpletuner_dmd.wan.tread import Route, Router, draw_kept, put_back, routing_line, take, take_rotary

from .tiny import LORA, SHAPE, latents, prompts, tiny_wan

TOKENS, LAYERS = 2 * 2 * 3, 4
ONE = (Route(0.5, 1, 2),)
TWO = (Route(0.5, 0, 1), Route(0.25, 2, 3))
SIGMA_B = torch.tensor([0.3, 0.8])
SIGMA_BF = torch.tensor([[0.3, 0.6], [0.8, 0.1]])
STREAM = RandomStream(seed=7, step=3, positions=(4, 9))


@dataclass
class CountedDraws:
    """A RandomStream that keeps note of what is drawn."""

    inner: RandomStream = STREAM
    purposes: list[str] = field(default_factory=list)

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        self.purposes.append(purpose)
        return self.inner.normal(shape, purpose)


def denoiser(routes: tuple[Route, ...], *, lora: bool = False, checkpointing: bool = False) -> WanDenoiser:
    """A Wan of four blocks in train mode; with `lora` its adapter trains, and is not zero."""
    network = tiny_wan(layers=LAYERS)
    switch = None
    if lora:
        switch = AdapterSwitch(network, {"student": LORA}, seed=0)
        seeded = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in switch.named_parameters("student"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=seeded))
    BlockRunner(network, switch, checkpointing)
    return WanDenoiser(network.train(), switch, "student" if lora else None, routes=routes)


def reference_kept(number: int, route: Route) -> list[list[int]]:
    """The positions every sample keeps, by sorting Python lists."""
    kept = []
    for position in STREAM.positions:
        seeded = generator(STREAM.seed, STREAM.step, position, f"tread/route {number}")
        scores = torch.randn(TOKENS, generator=seeded).tolist()
        ranked = sorted(range(TOKENS), key=lambda token: scores[token], reverse=True)
        kept.append(sorted(ranked[: TOKENS - int(TOKENS * route.ratio)]))
    return kept


def pick(x: Tensor, kept: list[list[int]]) -> Tensor:
    return torch.stack([torch.stack([x[sample, token] for token in kept[sample]]) for sample in range(len(kept))])


def reference_velocity(role: WanDenoiser, x_t: Tensor, sigma: Tensor, routes: Sequence[Route]) -> Tensor:
    """The model's own modules called one after the other, tokens picked and put back by loops; no checkpointing."""
    model: Any = role.transformer
    batch = len(x_t)
    timestep = 1000 * sigma
    per_token = sigma.ndim == 2
    if per_token:
        timestep = torch.stack([timestep[:, token // 6] for token in range(TOKENS)], dim=1)  # 6 tokens per frame
    rope = model.rope(x_t)
    x = model.patch_embedding(x_t).flatten(2).transpose(1, 2).contiguous()
    temb, modulation, text, _ = model.condition_embedder(
        timestep.flatten(), prompts(batch).rows_BLD, None, timestep_seq_len=TOKENS if per_token else None
    )
    modulation = modulation.unflatten(-1, (6, -1))
    for index, block in enumerate(model.blocks):
        for number, route in enumerate(routes):
            if route.start == index:
                kept, before = reference_kept(number, route), x
                inner_rope = tuple(pick(part.repeat(batch, 1, 1, 1), kept) for part in rope)
                inner_modulation = pick(modulation, kept) if per_token else modulation
                x = pick(x, kept)
        inside = any(route.start <= index <= route.end for route in routes)
        x = block(x, text, inner_modulation if inside else modulation, inner_rope if inside else rope)
        if any(route.end == index for route in routes):
            places = [{token: place for place, token in enumerate(tokens)} for tokens in kept]
            x = torch.stack([
                torch.stack([x[s, places[s][t]] if t in places[s] else before[s, t] for t in range(TOKENS)])
                for s in range(batch)
            ])  # fmt: skip
    shift, scale = (model.scale_shift_table[None] + (temb if per_token else temb[:, None])[:, :, None]).chunk(2, dim=2)
    x = model.proj_out(model.norm_out(x) * (1 + scale[:, :, 0]) + shift[:, :, 0])
    x = x.reshape(batch, 2, 2, 3, 1, 2, 2, SHAPE[0]).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


Gradients = dict[str, Tensor]


def gradients_of(role: WanDenoiser, x_t: Tensor, velocity: Tensor) -> Gradients:
    """Of a loss that weighs every output element differently: the parameters' and the input's."""
    (velocity * latents(len(x_t), seed=11)).sum().backward()
    found = {name: p.grad for name, p in role.transformer.named_parameters() if p.grad is not None}
    assert x_t.grad is not None
    for parameter in role.transformer.parameters():
        parameter.grad = None
    return {**found, "input": x_t.grad}


def routed_pass(role: WanDenoiser, sigma: Tensor, draws: Any = STREAM) -> tuple[Tensor, Gradients]:
    x_t = latents().requires_grad_(True)
    velocity = role.velocity(x_t, sigma, prompts(), routed=Routing(draws, "tread"))
    return velocity.detach(), gradients_of(role, x_t, velocity)


def greatest_error(actual: Gradients, expected: Gradients) -> float:
    """The largest error of a tensor, relative to the largest gradient."""
    assert actual.keys() == expected.keys()
    scale = max(float(tensor.norm()) for tensor in expected.values())
    return max(float((actual[name] - expected[name]).norm()) for name in expected) / scale


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [SIGMA_B, SIGMA_BF], ids=["one-level", "level-per-frame"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("routes", [ONE, TWO], ids=["one-route", "two-routes"])
def test_output_and_gradients_are_those_of_the_reference(
    routes: tuple[Route, ...], checkpointing: bool, lora: bool, sigma: Tensor
) -> None:
    role = denoiser(routes, lora=lora, checkpointing=checkpointing)
    velocity, gradients = routed_pass(role, sigma)
    x_t = latents().requires_grad_(True)
    with role._selected():
        expected = reference_velocity(role, x_t, sigma, routes)
        expected_gradients = gradients_of(role, x_t, expected)
        expected = expected.detach()
    assert float((velocity - expected).norm() / expected.norm()) < 1e-6
    assert greatest_error(gradients, expected_gradients) < 1e-6
    with torch.no_grad():
        unrouted = role.velocity(latents(), sigma, prompts())
    assert float((velocity - unrouted).norm() / unrouted.norm()) > 1e-3, "routing changes nothing here"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_ratio_of_nothing_is_off_bit_for_bit(checkpointing: bool) -> None:
    role = denoiser((Route(0.0, 0, 1), Route(0.01, 2, 3)), checkpointing=checkpointing)  # 1 % of 12 tokens is none
    draws = CountedDraws()
    velocity, gradients = routed_pass(role, SIGMA_B, draws)
    assert len(draws.purposes) == 2, "the routes are really gone"
    x_t = latents().requires_grad_(True)
    off = role.velocity(x_t, SIGMA_B, prompts())
    expected = gradients_of(role, x_t, off)
    assert torch.equal(velocity, off)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


# --- what must follow from the idea (algorithm check 7.10) ------------------------------------------------------------


def silence(network: nn.Module, *parts: str) -> None:
    """Lets the named parts of every block add nothing."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if any(f".{part}." in name for part in parts):
                parameter.zero_()


def before_the_head(role: WanDenoiser, **changes: Any) -> Tensor:
    """[B, N, D]: the tokens after the last block."""
    seen: list[Tensor] = []
    handle = role.transformer.get_submodule("norm_out").register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    role.velocity(latents(), SIGMA_B, prompts(), **changes)
    handle.remove()
    return seen[0].detach()


def test_blocks_that_do_nothing_make_routing_do_nothing() -> None:
    role = denoiser(TWO)
    silence(role.transformer, "attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
    assert torch.equal(before_the_head(role, routed=Routing(STREAM, "tread")), before_the_head(role))


def test_with_blocks_that_mix_no_tokens_each_token_goes_its_own_way() -> None:
    """Kept tokens end as without routing; bypassed ones as if the span's blocks were not there."""
    role = denoiser(ONE)
    silence(role.transformer, "attn1.to_out.0")
    kept = reference_kept(0, ONE[0])
    routed = before_the_head(role, routed=Routing(STREAM, "tread"))
    everything = before_the_head(role)
    shorter = denoiser(())
    shorter.transformer.load_state_dict(role.transformer.state_dict())
    network: Any = shorter.transformer
    network.blocks = nn.ModuleList([network.blocks[0], network.blocks[3]])
    outside = before_the_head(shorter)
    for sample in range(2):
        for token in range(TOKENS):
            expected = everything if token in kept[sample] else outside
            torch.testing.assert_close(routed[sample, token], expected[sample, token], rtol=0, atol=2e-6)
    assert float((everything - outside).norm() / everything.norm()) > 0.1, "the span does something"


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring elements turned by their angle; cos and sin hold every value twice."""
    turned = torch.empty_like(x)
    turned[..., 0::2] = x[..., 0::2] * cos[..., 0::2] - x[..., 1::2] * sin[..., 0::2]
    turned[..., 1::2] = x[..., 0::2] * sin[..., 0::2] + x[..., 1::2] * cos[..., 0::2]
    return turned


def test_kept_tokens_attend_at_their_own_positions() -> None:
    model: Any = tiny_wan()
    attention, rope = model.blocks[0].attn1, model.rope(latents())
    x = torch.randn(2, TOKENS, 48, generator=torch.Generator().manual_seed(3))
    kept = draw_kept(Routing(STREAM, "tread"), 0, TOKENS, 5)
    with torch.no_grad():
        gathered = attention(take(x, kept), None, None, take_rotary(rope, kept))
        wrong = attention(take(x, kept), None, None, tuple(part[:, :5] for part in rope))
        for sample in range(2):
            tokens = x[sample, kept[sample]]
            cos, sin = (part[0, kept[sample]].double() for part in rope)  # [K, 1, D/heads], by advanced indexing
            q = rotated(attention.norm_q(attention.to_q(tokens)).view(5, 2, 24).double(), cos, sin)
            k = rotated(attention.norm_k(attention.to_k(tokens)).view(5, 2, 24).double(), cos, sin)
            v = attention.to_v(tokens).view(5, 2, 24).double()
            weights = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) / 24**0.5, dim=-1)
            expected = attention.to_out[0](torch.einsum("hij,jhd->ihd", weights, v).flatten(1).float())
            torch.testing.assert_close(gathered[sample], expected, rtol=0, atol=1e-6)
    assert float((wrong - gathered).norm() / gathered.norm()) > 1e-3, "the first K rotations are another result"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_token_has_a_gradient(checkpointing: bool) -> None:
    """Also those that bypass nearly every block. Self-attention is silent, so no other token lends them its own."""
    role = denoiser((Route(0.75, 0, LAYERS - 2),), checkpointing=checkpointing)
    silence(role.transformer, "attn1.to_out.0")
    _, gradients = routed_pass(role, SIGMA_B)
    per_token = gradients["input"].abs().unflatten(4, (3, 2)).unflatten(3, (2, 2)).sum(dim=(1, 4, 6))
    assert per_token.shape == (2, 2, 2, 3)
    assert float(per_token.min()) > 1e-3 * float(per_token.mean())


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_route_draws_once_in_a_forward_and_never_again_in_backward(checkpointing: bool) -> None:
    role, draws = denoiser(TWO, checkpointing=checkpointing), CountedDraws()
    runs = [0]
    role.transformer.get_submodule("blocks.1").register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    routed_pass(role, SIGMA_B, draws)
    assert draws.purposes == ["tread/route 0", "tread/route 1"]
    assert runs == [2 if checkpointing else 1], "the block is run again in backward where it is checkpointed"


@pytest.mark.parametrize("case", ["eval", "no_grad", "not asked", "no routes"])
def test_routing_is_off_wherever_nothing_is_trained_by_it(case: str) -> None:
    role, draws = denoiser(() if case == "no routes" else TWO), CountedDraws()
    expected = role.velocity(latents(), SIGMA_B, prompts()).detach()
    role.transformer.train(case != "eval")
    routed = None if case == "not asked" else Routing(draws, "tread")
    with torch.set_grad_enabled(case != "no_grad"):
        assert torch.equal(role.velocity(latents(), SIGMA_B, prompts(), routed=routed), expected)
    assert draws.purposes == []


def test_a_samples_tokens_do_not_depend_on_how_the_batch_is_split() -> None:
    together = draw_kept(Routing(RandomStream(7, 3, (0, 1, 2, 3)), "tread"), 0, 40, 30)
    for positions in [(0,), (1, 2), (3,), (3, 0)]:
        apart = draw_kept(Routing(RandomStream(7, 3, positions), "tread"), 0, 40, 30)
        assert torch.equal(apart, together[list(positions)])
    role = denoiser(ONE)
    whole = role.velocity(latents(), SIGMA_B, prompts(), routed=Routing(STREAM, "tread"))
    second = RandomStream(STREAM.seed, STREAM.step, STREAM.positions[1:])
    text = prompts()
    text = type(text)(text.rows_BLD[1:])
    alone = role.velocity(latents()[1:], SIGMA_B[1:], text, routed=Routing(second, "tread"))
    torch.testing.assert_close(alone, whole[1:], rtol=0, atol=1e-6)


def test_seed_step_sample_pass_and_route_draw_apart() -> None:
    def drawn(seed: int = 0, step: int = 0, position: int = 0, purpose: str = "a", number: int = 0) -> tuple[int, ...]:
        return tuple(draw_kept(Routing(RandomStream(seed, step, (position,)), purpose), number, 100, 50)[0].tolist())

    drawings = [drawn(), drawn(seed=1), drawn(step=1), drawn(position=1), drawn(purpose="b"), drawn(number=1)]
    assert len(set(drawings)) == 6
    assert drawn() == drawings[0]


def test_every_token_is_kept_equally_often() -> None:
    passes, tokens, kept = 400, 24, 18
    counts = torch.zeros(tokens)
    for step in range(passes):
        (indices,) = draw_kept(Routing(RandomStream(0, step, (0,)), "tread"), 0, tokens, kept)
        assert indices.tolist() == sorted(set(indices.tolist())) and len(indices) == kept
        counts[indices] += 1
    share = kept / tokens
    deviation = (passes * share * (1 - share)) ** 0.5
    assert float((counts - passes * share).abs().max()) < 4 * deviation


def test_the_number_of_kept_tokens_is_fixed() -> None:
    assert [Route(ratio, 0, 0).kept(40) for ratio in (0.0, 0.1, 0.25, 0.35, 0.75)] == [40, 36, 30, 26, 10]


# --- graphs and recomputes --------------------------------------------------------------------------------------------


def test_two_routed_forwards_then_one_backward_are_exact_when_recomputed() -> None:
    """The recompute of the first must not see the second's tokens."""
    found = []
    for checkpointing in (False, True):
        role = denoiser(TWO, lora=True, checkpointing=checkpointing)
        x_t = latents().requires_grad_(True)
        first = role.velocity(x_t, SIGMA_B, prompts(), routed=Routing(STREAM, "first"))
        second = role.velocity(x_t, SIGMA_B.flip(0), prompts(), routed=Routing(STREAM, "second"))
        found.append(gradients_of(role, x_t, first * second))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_graph_that_is_dropped_without_backward_is_freed(checkpointing: bool) -> None:
    """As in every step that is skipped: what stays would add up."""
    role = denoiser(TWO, checkpointing=checkpointing)
    x_t = latents().requires_grad_(True)
    still_there = weakref.ref(x_t)
    velocity = role.velocity(x_t, SIGMA_B, prompts(), routed=Routing(STREAM, "tread"))
    del x_t
    assert still_there() is not None, "the graph holds its input"
    del velocity
    gc.collect()
    assert still_there() is None


def test_a_forward_that_fails_on_a_route_leaves_nothing_behind() -> None:
    role = denoiser(ONE)
    expected, _ = routed_pass(role, SIGMA_B)

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    handle = role.transformer.get_submodule("blocks.2").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        routed_pass(role, SIGMA_B)
    handle.remove()
    assert torch.equal(routed_pass(role, SIGMA_B)[0], expected)
    plain = role.velocity(latents(), SIGMA_B, prompts())
    assert torch.equal(plain, denoiser(()).velocity(latents(), SIGMA_B, prompts()))


def test_a_copied_model_is_routed_by_its_own_runner() -> None:
    role = denoiser(ONE)
    expected, _ = routed_pass(role, SIGMA_B)
    copied = WanDenoiser(copy.deepcopy(role.transformer), None, None, routes=ONE)
    assert BlockRunner.of(copied.transformer) is not BlockRunner.of(role.transformer)
    assert torch.equal(routed_pass(copied, SIGMA_B)[0], expected)


def test_a_bf16_model_keeps_positions_in_fp32() -> None:
    network: Any = tiny_wan(dtype=torch.bfloat16, layers=LAYERS)
    network.rope.float()
    BlockRunner(network, None, True)
    seen: list[torch.dtype] = []
    network.blocks[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[3][0].dtype))
    role = WanDenoiser(network.train(), None, None, routes=ONE)
    velocity, gradients = routed_pass(role, SIGMA_B)
    assert seen[0] == torch.float32
    assert velocity.dtype == torch.float32 and bool(velocity.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


# --- mistakes and changed libraries -----------------------------------------------------------------------------------


def test_routes_that_cannot_be_are_refused() -> None:
    for wrong in ((1.0, 0, 1), (-0.1, 0, 1), (0.5, 2, 1), (0.5, -1, 1)):
        with pytest.raises(AssertionError):
            Route(*wrong)
    with pytest.raises(AssertionError, match="share a block"):
        Router((Route(0.5, 0, 2), Route(0.5, 2, 3)), Routing(STREAM, "tread"))


def test_the_stock_model_calls_its_blocks_as_the_runner_expects() -> None:
    """(block, tokens, text, modulation, rotary), rotary [1, N, 1, D]: a new diffusers that differs must be seen."""
    assert list(inspect.signature(WanTransformerBlock.forward).parameters) == [
        "self", "hidden_states", "encoder_hidden_states", "temb", "rotary_emb",
    ]  # fmt: skip
    network: Any = tiny_wan()
    calls: list[tuple[Any, ...]] = []

    def spy(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return arguments[1]

    network.enable_gradient_checkpointing(gradient_checkpointing_func=spy)
    for timestep in (1000 * SIGMA_B, torch.full((2, TOKENS), 500.0)):
        network(latents(), timestep, prompts().rows_BLD, return_dict=False)
    assert [call[0] for call in calls] == 2 * list(network.blocks)
    for call, modulation_shape in zip(calls[::2], [(2, 6, 48), (2, TOKENS, 6, 48)], strict=True):
        _, x, text, modulation, rotary = call
        assert x.shape == (2, TOKENS, 48) and text.shape == (2, 5, 48) and modulation.shape == modulation_shape
        assert isinstance(rotary, tuple) and [part.shape for part in rotary] == 2 * [(1, TOKENS, 1, 24)]


def test_another_rotary_layout_is_an_error_and_no_wrong_result() -> None:
    x, modulation = torch.zeros(2, TOKENS, 48), torch.zeros(2, 6, 48)
    for layout in ((1, 1, TOKENS, 24), (TOKENS, 24), (2, TOKENS, 1, 24)):
        router = Router(ONE, Routing(STREAM, "tread"))
        with pytest.raises(AssertionError, match="rotary"):
            router.enter(1, x, modulation, (torch.zeros(layout), torch.zeros(layout)))


def test_a_runner_that_was_replaced_is_noticed() -> None:
    role = denoiser(ONE)
    network: Any = role.transformer
    network.enable_gradient_checkpointing()
    with pytest.raises(AssertionError, match="no BlockRunner"):
        routed_pass(role, SIGMA_B)
    network.enable_gradient_checkpointing(gradient_checkpointing_func=BlockRunner.of(denoiser(ONE).transformer))
    with pytest.raises(AssertionError, match="belongs to another transformer"):
        routed_pass(role, SIGMA_B)


def test_draws_for_another_batch_are_an_error() -> None:
    role = denoiser(ONE)
    with pytest.raises(AssertionError, match="3 samples are drawn for, 2 are here"):
        routed_pass(role, SIGMA_B, RandomStream(0, 0, (0, 1, 2)))


def test_put_back_leaves_its_source_alone() -> None:
    full, kept = torch.zeros(1, 3, 2), torch.tensor([[2]])
    assert put_back(full, kept, torch.ones(1, 1, 2))[0].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert not full.any()


def test_the_line_at_start_says_what_is_saved() -> None:
    line = routing_line("critic", (Route(0.5, 2, 27),), 30)
    assert "critic" in line and "50% around blocks 2 to 27" in line and "43% of the work of 30 blocks" in line
