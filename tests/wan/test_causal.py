"""Causal attention on the stock Wan: cache against full sequence, windows, positions, gradients under checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from simpletuner_dmd.config.methods.blockwise import SelfForcingConfig
from simpletuner_dmd.distill.blocks import (
    BlockPlan,
    BlockRolloutSettings,
    Exit,
    roll_out_blocks,
    sample_blocks,
    sample_blocks_euler,
    stream_blocks,
)
from simpletuner_dmd.distill.method import Ingredients
from simpletuner_dmd.distill.self_forcing import build
from simpletuner_dmd.flow import (
    TIMESTEPS,
    Batch,
    Schedule,
    TextEmbedding,
    sample_euler,
    uniform_ladder,
    x0_from_velocity,
)
from simpletuner_dmd.randomness import RandomStream
from simpletuner_dmd.wan.adapters import AdapterSwitch
from simpletuner_dmd.wan.causal import CausalProcessor, CausalWanDenoiser, KVCache, Window, attach
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.runner import BlockRunner

from .tiny import CHANNELS, LORA, TEXT_ROWS, prompts, tiny_wan

HEIGHT, WIDTH = 4, 6
TOKENS = (HEIGHT // 2) * (WIDTH // 2)
LADDER = Schedule(ladder=(1.0, 0.757, 0.522))


def clip(frames: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, CHANNELS, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def causal(network: nn.Module, frames_per_block: int = 2, first: bool = False, window: Window | None = None,
           switch: AdapterSwitch | None = None, adapter: str | None = None) -> CausalWanDenoiser:  # fmt: skip
    return CausalWanDenoiser(
        network,
        switch,
        adapter,
        blocks=lambda frames: BlockPlan(frames, frames_per_block, first).blocks,
        window=window or Window(),
    )


def masked_reference(network: nn.Module, x: Tensor, sigma_BF: Tensor, text: TextEmbedding,
                     blocks: Sequence[tuple[int, int]], window: Window, positions: Sequence[int],
                     ) -> Tensor:  # fmt: skip
    """The same forward written out over the stock modules, with a boolean mask made pair by pair of frames."""
    net = copy.deepcopy(network)
    for block in net.blocks:
        block.attn1.processor = None  # never called: the reference multiplies by hand
    frames = x.shape[2]
    block_of = {frame: block for block in blocks for frame in range(*block)}
    seen_FF = torch.zeros(frames, frames, dtype=torch.bool)
    for asking in range(frames):
        start, stop = block_of[asking]
        for other in range(stop):
            recent = window.local_attn_frames - window.sink_frames
            near = window.local_attn_frames == 0 or other >= stop - recent or other < window.sink_frames
            seen_FF[asking, other] = near or other >= start
    mask_NN = seen_FF.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    long = clip(max(positions) + 1, 1)
    cos, sin = (table.unflatten(1, (-1, TOKENS))[:, list(positions)].flatten(1, 2) for table in net.rope(long))

    def rotate(z: Tensor) -> Tensor:
        turned = torch.empty_like(z)
        turned[..., 0::2] = z[..., 0::2] * cos[..., 0::2] - z[..., 1::2] * sin[..., 1::2]
        turned[..., 1::2] = z[..., 0::2] * sin[..., 1::2] + z[..., 1::2] * cos[..., 0::2]
        return turned

    def attention(attn: nn.Module, h: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)) for part in
                   (attn.norm_q(attn.to_q(h)), attn.norm_k(attn.to_k(h)), attn.to_v(h)))  # fmt: skip
        logits = torch.einsum("bnhd,bmhd->bhnm", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
        weights = logits.masked_fill(~mask_NN, float("-inf")).softmax(-1)
        return attn.to_out[0](torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))

    h = net.patch_embedding(x).flatten(2).transpose(1, 2)
    per_token = (TIMESTEPS * sigma_BF).repeat_interleave(TOKENS, 1)
    temb, projected, rows, _ = net.condition_embedder(
        per_token.flatten(), text.rows_BLD, None, timestep_seq_len=per_token.shape[1]
    )
    projected = projected.unflatten(2, (6, -1))
    for block in net.blocks:
        table = (block.scale_shift_table[None] + projected).unbind(2)
        h = h + attention(block.attn1, block.norm1(h) * (1 + table[1]) + table[0]) * table[2]
        h = h + block.attn2(block.norm2(h), rows, None, None)
        h = h + block.ffn(block.norm3(h) * (1 + table[4]) + table[3]) * table[5]
    shift, scale = (net.scale_shift_table[None] + temb[:, :, None]).unbind(2)
    h = net.proj_out(net.norm_out(h) * (1 + scale) + shift)
    h = h.unflatten(1, (frames, HEIGHT // 2, WIDTH // 2)).unflatten(-1, (1, 2, 2, -1))
    return h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def by_blocks(denoiser: CausalWanDenoiser, x: Tensor, sigma_BF: Tensor, text: TextEmbedding) -> Tensor:
    """Each block from the cache of the earlier ones, which are committed as noisy as they are."""
    cache, parts = None, []
    for start, stop in denoiser.blocks(x.shape[2]):
        part, sigma = x[:, :, start:stop], sigma_BF[:, start:stop]
        parts.append(denoiser.block_velocity(part, sigma[:, 0], text, cache=cache, start_frame=start))
        cache = denoiser.commit(part, sigma, text, cache=cache, start_frame=start)
    return torch.cat(parts, dim=2)


def levels(denoiser: CausalWanDenoiser, frames: int, count: int = 2) -> Tensor:
    """[B, F], another level in each block and sample."""
    drawn = torch.rand(count, frames, generator=torch.Generator().manual_seed(5))
    blocks = denoiser.blocks(frames)
    return torch.cat([drawn[:, start : start + 1].expand(-1, stop - start) for start, stop in blocks], dim=1)


# --- attached, nothing asked ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_request_the_network_is_stock_bit_for_bit() -> None:
    network, x, text = tiny_wan(), clip(5), prompts()
    arguments = {"hidden_states": x, "timestep": torch.tensor([757.0, 310.0]), "encoder_hidden_states": text.rows_BLD}
    stock = network(**arguments, return_dict=False)[0]
    student = causal(network)
    assert torch.equal(network(**arguments, return_dict=False)[0], stock)
    full = student.velocity(x, torch.tensor([0.757, 0.310]), text)
    assert float((full - stock).norm() / stock.norm()) > 1e-2  # the causal pass is another function,
    assert torch.equal(network(**arguments, return_dict=False)[0], stock)  # and leaves nothing behind


def test_attaching_twice_is_attaching_once_and_a_copy_stands_on_its_own() -> None:
    network = tiny_wan()
    assert attach(network) is attach(network)
    assert len(network.rope._forward_hooks) == 1
    twin = copy.deepcopy(network)
    assert attach(twin) is not attach(network)
    x, text, sigma = clip(4), prompts(), torch.tensor([0.5, 0.9])
    assert torch.equal(causal(twin).velocity(x, sigma, text), causal(network).velocity(x, sigma, text))


def test_the_attention_backend_that_was_chosen_stays_chosen() -> None:
    network = tiny_wan()
    network.set_attention_backend("_native_math")
    chosen = network.blocks[0].attn1.processor._attention_backend
    attach(network)
    assert isinstance(network.blocks[0].attn1.processor, CausalProcessor)
    assert network.blocks[0].attn1.processor._attention_backend == chosen is not None


# --- the full pass and the cached pass --------------------------------------------------------------------------------

CASES = [
    pytest.param(6, 2, False, Window(), id="plain"),
    pytest.param(7, 2, False, Window(), id="short last block"),
    pytest.param(7, 3, True, Window(), id="independent first frame"),
    pytest.param(8, 2, False, Window(0, 4), id="window"),
    pytest.param(9, 2, True, Window(0, 3), id="window across odd blocks"),
    pytest.param(10, 2, False, Window(1, 5), id="sink inside a block"),
    pytest.param(10, 2, False, Window(3, 6), id="sink across blocks"),
]


@pytest.mark.parametrize(("frames", "per_block", "first", "window"), CASES)
@torch.no_grad()
def test_the_cached_pass_and_the_full_pass_are_the_masked_reference(
    frames: int, per_block: int, first: bool, window: Window
) -> None:
    network = tiny_wan()
    student = causal(network, per_block, first, window)
    x, text, sigma_BF = clip(frames), prompts(), levels(student, frames)
    blocks = student.blocks(frames)
    expected = masked_reference(network, x, sigma_BF, text, blocks, window, range(frames))
    full = student.velocity(x, sigma_BF, text)
    cached = by_blocks(student, x, sigma_BF, text)
    assert float((full - expected).norm() / expected.norm()) < 1e-5
    assert float((cached - full).norm() / full.norm()) < 1e-5
    # The comparison can see: without the window, or with one more frame in it, the answer is another one.
    other = Window() if window.local_attn_frames else Window(0, per_block + 1)
    assert (
        float((causal(network, per_block, first, other).velocity(x, sigma_BF, text) - full).norm() / full.norm()) > 1e-3
    )


@torch.no_grad()
def test_frames_sit_at_their_absolute_position() -> None:
    """A block whose positions start anew is visibly wrong; so is one frame of offset."""
    network = tiny_wan()
    student, x, text = causal(network), clip(6), prompts()
    sigma_BF = levels(student, 6)
    full = student.velocity(x, sigma_BF, text)
    for wrong in ((0, 1, 0, 1, 0, 1), (0, 1, 3, 4, 5, 6)):
        shifted = masked_reference(network, x, sigma_BF, text, student.blocks(6), Window(), wrong)
        assert float((shifted - full).norm() / full.norm()) > 2e-3
    cache = student.commit(x[:, :, :2], sigma_BF[:, 0], text, cache=None, start_frame=0)
    with pytest.raises(AssertionError, match="the cache ends at frame 2, the block starts at 3"):
        student.block_velocity(x[:, :, 2:4], sigma_BF[:, 2], text, cache=cache, start_frame=3)
    lied = replace(cache, stop=3)  # the frame number reaches the rotation
    right = student.block_velocity(x[:, :, 2:4], sigma_BF[:, 2], text, cache=cache, start_frame=2)
    moved = student.block_velocity(x[:, :, 2:4], sigma_BF[:, 2], text, cache=lied, start_frame=3)
    assert float((moved - right).norm() / right.norm()) > 2e-3


@torch.no_grad()
def test_the_cache_holds_what_the_window_can_still_see_and_is_never_written_to() -> None:
    student, text = causal(tiny_wan(), window=Window(1, 5)), prompts()
    x, cache, sizes = clip(12), KVCache(), []
    sigma = torch.zeros(2)
    for start in range(0, 12, 2):
        before, copied = cache, [tensor.clone() for chunk in cache.chunks for tensor in chunk.keys]
        cache = student.commit(x[:, :, start : start + 2], sigma, text, cache=cache, start_frame=start)
        kept = [tensor for chunk in before.chunks for tensor in chunk.keys]
        assert all(torch.equal(now, then) for now, then in zip(kept, copied, strict=True))
        assert all(any(chunk is old for old in before.chunks) for chunk in cache.chunks[:-1])  # shared, not copied
        sizes.append(tuple(chunk.start for chunk in cache.chunks))
        assert not any(tensor.requires_grad for chunk in cache.chunks for tensor in (*chunk.keys, *chunk.values))
    assert sizes == [(0,), (0, 2), (0, 2, 4), (0, 4, 6), (0, 6, 8), (0, 8, 10)]


def test_a_video_longer_than_the_positions_of_the_model_is_a_clear_mistake() -> None:
    student, text = causal(tiny_wan()), prompts(1)
    with pytest.raises(ValueError, match="33 latent frames is longer than this model's 32 positions"):
        student.velocity(clip(33, 1), torch.tensor([0.5]), text)
    cache = KVCache(stop=31)
    with torch.no_grad():
        student.block_velocity(clip(1, 1), torch.tensor([0.5]), text, cache=cache, start_frame=31)
        with pytest.raises(ValueError, match="33 latent frames"):
            student.block_velocity(clip(2, 1), torch.tensor([0.5]), text, cache=cache, start_frame=31)


def test_a_window_too_small_for_a_block_is_a_clear_mistake() -> None:
    with pytest.raises(ValueError, match="leaves 1 frames, too few for a block of 2"):
        causal(tiny_wan(), window=Window(2, 3)).velocity(clip(6), torch.tensor([0.5, 0.5]), prompts())
    with pytest.raises(ValueError, match="cannot be negative"):
        Window(-1, 3)


@torch.no_grad()
def test_under_autocast_the_cache_is_as_narrow_as_the_computation() -> None:
    network, text = tiny_wan(), prompts()
    student = causal(network)
    student.autocast = torch.bfloat16
    x, sigma_BF = clip(6), levels(student, 6)
    cache = student.commit(x[:, :, :2], sigma_BF[:, 0], text, cache=None, start_frame=0)
    assert {tensor.dtype for chunk in cache.chunks for tensor in (*chunk.keys, *chunk.values)} == {torch.bfloat16}
    full, exact = student.velocity(x, sigma_BF, text), causal(network).velocity(x, sigma_BF, text)
    cached = by_blocks(student, x, sigma_BF, text)
    rounding = float((full - exact).norm() / exact.norm())
    assert 1e-4 < rounding < 2e-2
    assert float((cached - full).norm() / full.norm()) < 2 * rounding


# --- gradients --------------------------------------------------------------------------------------------------------


def lora_student(checkpointing: bool, window: Window | None = None) -> tuple[CausalWanDenoiser, AdapterSwitch]:
    network = tiny_wan()
    switch = AdapterSwitch(network, {"student": LORA, "critic": LORA}, seed=0)
    with torch.no_grad():
        for number, adapter in enumerate(("student", "critic")):
            seeded = torch.Generator().manual_seed(10 + number)
            for name, parameter in switch.named_parameters(adapter):
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=seeded))
    BlockRunner(network, switch, checkpointing)
    network.train()
    return causal(network, window=window, switch=switch, adapter="student"), switch


def rollout_gradients(checkpointing: bool, window: Window | None) -> list[Tensor]:
    """Four blocks with a graph each, one backward at the end, while another adapter is active."""
    student, switch = lora_student(checkpointing, window)
    text, noise = prompts(), clip(8)
    plan = BlockPlan(8, 2)
    renoise = {(block, rung): clip(2, seed=10 * block + rung) for block in range(4) for rung in range(4)}
    x0 = torch.cat(list(stream_blocks(student, noise, text, LADDER, "sde", lambda b, r, like: renoise[b, r], plan, 0.0,
                                      [Exit(rung, True) for rung in (1, 0, 2, 1)])), dim=2)  # fmt: skip
    with switch.use("critic"):
        (x0 * clip(8, seed=77)).sum().backward()
    return [parameter.grad for _, parameter in switch.named_parameters("student") if parameter.grad is not None]


@pytest.mark.parametrize("window", [None, Window(0, 4), Window(1, 5)], ids=["all", "constant window", "sink"])
def test_checkpointing_does_not_change_the_gradients_of_a_rollout(window: Window | None) -> None:
    """With the cache as state of a module they would be 9% wrong, in silence, where the window keeps its size."""
    plain, recomputed = rollout_gradients(False, window), rollout_gradients(True, window)
    assert len(plain) == len(recomputed) == 2 * 2 * 10  # layers x (A, B) x projections
    largest = max(float(gradient.norm()) for gradient in plain)
    error = max(float((a - b).norm()) for a, b in zip(plain, recomputed, strict=True)) / largest
    assert error < 1e-6


def test_no_gradient_reaches_an_earlier_block() -> None:
    student, _ = lora_student(True)
    text, past, block = prompts(), clip(2).requires_grad_(), clip(2, seed=1).requires_grad_()
    sigma = torch.tensor([0.5, 0.5])
    with torch.enable_grad():
        cache = student.commit(past, sigma, text, cache=None, start_frame=0)
        velocity = student.block_velocity(block, sigma, text, cache=cache, start_frame=2)
    velocity.square().sum().backward()
    assert past.grad is None
    assert block.grad is not None and float(block.grad.abs().sum()) > 0
    assert not torch.equal(velocity, student.block_velocity(block, sigma, text, cache=KVCache(stop=2), start_frame=2))


def test_a_full_pass_shows_later_blocks_nothing_and_earlier_blocks_everything() -> None:
    student, _ = lora_student(False)
    x = clip(6).requires_grad_()
    student.velocity(x, torch.tensor([0.5, 0.5]), prompts())[:, :, 2:4].square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum((0, 1, 3, 4))
    assert torch.equal(reached > 0, torch.tensor([True, True, True, True, False, False]))


# --- training is inference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_noise", [0.0, 120.0])
@pytest.mark.parametrize("renoise", ["sde", "ode"])
def test_a_training_rollout_to_the_last_rung_is_the_sampler_bit_for_bit(context_noise: float, renoise: str) -> None:
    student, _ = lora_student(True)
    shape = (CHANNELS, 7, HEIGHT, WIDTH)
    batch = Batch((0, 1), prompts(), TextEmbedding(torch.zeros(1, TEXT_ROWS, 32)), shape)
    stream = RandomStream(3, 4, (0, 1))
    settings = BlockRolloutSettings(LADDER, renoise, 2, True, context_noise, last_step_only=True)
    rollout = roll_out_blocks(student, batch, stream, settings, "rollout", torch.device("cpu"), True)
    assert rollout.x0.requires_grad

    def fresh(block: int, rung: int, like: Tensor) -> Tensor:
        return stream.normal(like.shape[1:], f"rollout/renoise {block} {rung}")

    noise = stream.normal(shape, "rollout/initial noise")
    sampled = sample_blocks(student, noise, batch.text, LADDER, renoise, fresh, settings.plan(7), context_noise)
    assert torch.equal(rollout.x0.detach(), sampled)
    assert not sampled.requires_grad
    other = sample_blocks(student, noise, batch.text, LADDER, renoise, fresh, settings.plan(7), context_noise + 50)
    assert not torch.equal(other, sampled)  # the context's noise is felt
    assert torch.equal(other[:, :, :1], sampled[:, :, :1])  # but not by the first block


@torch.no_grad()
def test_the_context_pass_is_a_full_pass_with_the_past_at_its_own_level() -> None:
    """A block's last call against [finished blocks at the context's level, the block at its rung] in one sequence."""
    student, text = causal(tiny_wan()), prompts()
    past, block = clip(4), clip(2, seed=9)
    cache = None
    context_B, sigma_B = torch.tensor([0.12, 0.12]), torch.tensor([0.522, 0.522])
    for start in (0, 2):
        cache = student.commit(past[:, :, start : start + 2], context_B, text, cache=cache, start_frame=start)
    cached = x0_from_velocity(block, student.block_velocity(block, sigma_B, text, cache=cache, start_frame=4), sigma_B)
    sequence = torch.cat([past, block], dim=2)
    sigma_BF = torch.cat([context_B[:, None].expand(-1, 4), sigma_B[:, None].expand(-1, 2)], dim=1)
    full = x0_from_velocity(sequence, student.velocity(sequence, sigma_BF, text), sigma_BF)[:, :, 4:]
    assert float((cached - full).norm() / full.norm()) < 1e-5


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_many_guided_steps_block_by_block_are_those_of_the_whole_sequence(guidance: float) -> None:
    """Every Euler step of a block against one full pass over [finished blocks at level 0, the block at its sigma]."""
    student, text, negative, noise = causal(tiny_wan()), prompts(), prompts(1, seed=8), clip(6)
    sigmas = uniform_ladder(3, 5.0)
    sampled = sample_blocks_euler(student, noise, text, negative, sigmas, guidance, BlockPlan(6, 2))
    done = torch.empty(2, CHANNELS, 0, HEIGHT, WIDTH)
    for start in (0, 2, 4):
        x = noise[:, :, start : start + 2]
        for sigma, to in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            sigma_BF = torch.cat([torch.zeros(2, start), torch.full((2, 2), sigma)], dim=1)
            sequence = torch.cat([done, x], dim=2)
            v = student.velocity(sequence, sigma_BF, text)
            u = student.velocity(sequence, sigma_BF, negative.expand(2))
            x = x + (to - sigma) * (u + guidance * (v - u))[:, :, start:]
        done = torch.cat([done, x], dim=2)
    assert float((sampled - done).norm() / done.norm()) < 1e-5
    whole = sample_blocks_euler(student, noise, text, negative, sigmas, guidance, BlockPlan(6, 6))
    everything = causal(tiny_wan(), 6)
    assert torch.equal(whole, sample_euler(everything, noise, text, negative, sigmas, guidance))


def self_forcing_gradients(checkpointing: bool) -> dict[str, dict[str, Tensor]]:
    """Both turns of one step, three roles on one base: gradients by turn and parameter."""
    student, switch = lora_student(checkpointing)
    base = student.transformer
    teacher, critic = WanDenoiser(base, switch, None), WanDenoiser(base, switch, "critic")
    options = SelfForcingConfig(num_frame_per_block=2, context_noise=50.0)
    method = build(Ingredients(teacher, student, LADDER, options, torch.device("cpu"), critic=critic))
    shape = (CHANNELS, 5, HEIGHT, WIDTH)
    batch, stream = Batch((0, 1), prompts(), prompts(1, seed=2), shape), RandomStream(0, 1, (0, 1))
    found = {}
    for turn in method.turns(0):
        for loss in turn.losses(batch, stream):
            loss.value.backward()
        found[turn.role] = {name: parameter.grad for name, parameter in base.named_parameters()
                            if parameter.grad is not None}  # fmt: skip
        base.zero_grad(set_to_none=True)
    return found


def test_both_turns_of_self_forcing_share_a_base_and_reach_their_own_role_only() -> None:
    plain, recomputed = self_forcing_gradients(False), self_forcing_gradients(True)
    for role in ("student", "critic"):
        assert len(plain[role]) == 2 * 2 * 10
        assert all(f".{role}." in name for name in plain[role])
        largest = max(float(gradient.norm()) for gradient in plain[role].values())
        assert largest > 0
        for name, gradient in plain[role].items():
            assert float((recomputed[role][name] - gradient).norm()) < 1e-6 * largest
