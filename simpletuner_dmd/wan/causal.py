"""A causal student: block-causal self-attention and a key/value cache on the stock Wan transformer.

Latent frames are made in blocks. A frame attends to its own block and to earlier ones, never to later ones; weights
and names are those of the stock model. All that is attached is the processor of every `attn1` and a forward hook on
`rope`. A forward that asks for nothing is the stock forward bit for bit: teacher and critic may share the network.

What a block needs in attention travels as its rotary argument (`Plan`), not as state of a module: gradient
checkpointing hands arguments to the recompute unchanged, whereas state would have moved on by then and the gradients
would be silently wrong.

No mask is ever made: each block's queries attend densely to the keys they may see. That is the arithmetic of the cached
pass, needs no quadratic mask, and runs on every attention backend.

Shapes: B batch, C channels, F latent frames, H W latent height and width, N tokens (patches) of a pass, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from simpletuner_dmd.flow import Routing, TextEmbedding
from simpletuner_dmd.wan.adapters import AdapterSwitch
from simpletuner_dmd.wan.denoiser import WanDenoiser

FrameRange = tuple[int, int]
"""[start, stop) in latent frames."""
Blocks = Callable[[int], Sequence[FrameRange]]
"""Number of frames -> its partition into blocks. The one rule that rollout, cache and full-sequence passes share."""


@dataclass(frozen=True)
class Chunk:
    """Keys and values of one finished block, per layer: [B, tokens, heads, D], after norm and rotation, no graph."""

    start: int
    stop: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class KVCache:
    """The finished blocks that later ones may see. Never written to: a commit makes a new one with the same chunks."""

    chunks: tuple[Chunk, ...] = ()
    stop: int = 0  # frames committed so far, seen or not


@dataclass(frozen=True)
class Window:
    """How far a block looks back.

    local_attn_frames: frames seen in all, own block included; 0 is all. sink_frames: of these, the first frames of the
    video, which stay visible for ever; the rest are the latest ones (StreamingLLM, arXiv 2309.17453).
    """

    sink_frames: int = 0
    local_attn_frames: int = 0

    def __post_init__(self) -> None:
        if self.sink_frames < 0 or self.local_attn_frames < 0:
            raise ValueError("sink_frames and local_attn_frames count frames: they cannot be negative")

    def past(self, start: int, stop: int) -> list[FrameRange]:
        """Earlier frames that the block [start, stop) sees, ascending. Raises ValueError if it does not fit itself."""
        if self.local_attn_frames == 0:
            return [(0, start)] if start else []
        recent = self.local_attn_frames - self.sink_frames
        if recent < stop - start:
            raise ValueError(
                f"local_attn_frames {self.local_attn_frames} less sink_frames {self.sink_frames} leaves {recent} "
                f"frames, too few for a block of {stop - start}; raise local_attn_frames or lower sink_frames"
            )
        first = stop - recent
        ranges = [(0, start)] if first <= self.sink_frames else [(0, self.sink_frames), (first, start)]
        return [(low, high) for low, high in ranges if high > low]


@dataclass
class Request:
    """What one forward asks of self-attention.

    attends: per block the tokens of its queries and the ranges of this pass's own tokens that they see.
    past: cached chunks with the tokens of them that are seen. kept: filled with each layer's own keys and values.
    """

    start_frame: int
    attends: list[tuple[slice, list[slice]]]
    past: list[tuple[Chunk, slice]] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensor] | None] | None = None


class Plan(tuple[Tensor, Tensor]):
    """(cos, sin), each [1, N, 1, D], with the request of the forward they belong to."""

    request: Request


class Attachment:
    """The forward hook on `rope`: the stock tables become those of the requested frames and carry the request."""

    def __init__(self) -> None:
        self.request: Request | None = None

    def __call__(self, rope: Any, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Plan | None:
        request, self.request = self.request, None
        if request is None:
            return None  # the stock output stands
        frames = arguments[0].shape[2]
        # The stock module reads only the shape of what it is given. Columns before t_dim are the temporal angles.
        timeline = rope.forward(torch.empty((1, 1, request.start_frame + frames, *rope.patch_size[1:]), device="meta"))
        tables = []
        for here, line in zip(output, timeline, strict=True):
            own_FND = here.view(frames, -1, here.shape[-1])
            angles_F1D = line[0, request.start_frame :, :, : rope.t_dim]
            shifted = torch.cat([angles_F1D.expand(-1, own_FND.shape[1], -1), own_FND[..., rope.t_dim :]], dim=-1)
            tables.append(shifted.view(here.shape))
        plan = Plan(tables)
        plan.request = request
        return plan


def _rotate(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The stock rotation: pairs of neighbouring channels, angles in fp32, result in the dtype of x."""
    first, second = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x_BNHD)


def _joined(parts: list[Tensor]) -> Tensor:
    """Along the tokens; a single part is not copied, or a full pass would keep a copy of its keys for every block."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class CausalProcessor(WanAttnProcessor):
    """Self-attention of one layer: as its plan says, or stock where there is none."""

    def __init__(self, layer: int, attachment: Attachment) -> None:
        super().__init__()
        self.layer, self.attachment = layer, attachment

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, rotary_emb: Any = None) -> Tensor:  # fmt: skip
        if not isinstance(rotary_emb, Plan):
            stock: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return stock
        assert self._parallel_config is None, "context parallelism shards tokens; a causal pass cannot be sharded"
        request, heads = rotary_emb.request, (attn.heads, -1)
        query = _rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads), *rotary_emb)
        key = _rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads), *rotary_emb)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        if request.kept is not None:
            # Autocast may leave keys in fp32 after the norm; attention rounds them anyway, so they are kept rounded.
            request.kept[self.layer] = (key.detach().to(value.dtype), value.detach())
        past_keys = [chunk.keys[self.layer][:, tokens] for chunk, tokens in request.past]
        past_values = [chunk.values[self.layer][:, tokens] for chunk, tokens in request.past]
        outputs = []
        for asking, seen in request.attends:
            keys = _joined([*past_keys, *(key[:, tokens] for tokens in seen)])
            values = _joined([*past_values, *(value[:, tokens] for tokens in seen)])
            outputs.append(dispatch_attention_fn(query[:, asking], keys, values, attn_mask=None, dropout_p=0.0,
                                                 is_causal=False, backend=self._attention_backend,
                                                 parallel_config=None))  # fmt: skip
        attended = torch.cat(outputs, dim=1).flatten(2, 3).type_as(query)
        projected: Tensor = attn.to_out[1](attn.to_out[0](attended))
        return projected


def attach(transformer: nn.Module) -> Attachment:
    """Puts causal attention on a stock transformer, once; returns what carries requests to it."""
    network: Any = transformer
    present = network.blocks[0].attn1.processor
    if isinstance(present, CausalProcessor):
        return present.attachment
    if network.config.patch_size[0] != 1:
        raise ValueError(f"a causal student needs patches of one latent frame, not {network.config.patch_size}")
    attachment = Attachment()
    for layer, block in enumerate(network.blocks):
        assert not block.attn1.fused_projections, "a causal student reads to_q, to_k and to_v on their own"
        processor = CausalProcessor(layer, attachment)
        processor._attention_backend = block.attn1.processor._attention_backend  # chosen before or after: kept
        block.attn1.set_processor(processor)
    network.rope.register_forward_hook(attachment)
    return attachment


class CausalWanDenoiser(WanDenoiser):
    """One role that works block by block. Implements flow.Denoiser and distill.blocks.CausalDenoiser.

    blocks: partition of a clip. window: how far blocks look back. The other arguments are WanDenoiser's.
    """

    def __init__(
        self,
        transformer: nn.Module,
        switch: AdapterSwitch | None,
        adapter: str | None,
        autocast: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        blocks: Blocks,
        window: Window = Window(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(transformer, switch, adapter, autocast, scale=scale)
        self.blocks, self.window = blocks, window
        self.attachment = attach(transformer)
        self.longest: int = self._network.rope.max_seq_len

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        """A whole clip through block-causal attention, earlier blocks as noisy as given. sigma [B] or [B, F]."""
        assert routed is None, "TREAD drops tokens and their plan with them: not for a causal pass"
        per_frame = self._tokens_per_frame(x_t_BCFHW)

        def tokens(frames: FrameRange) -> slice:
            return slice(frames[0] * per_frame, frames[1] * per_frame)

        attends = []
        for start, stop in self.blocks(x_t_BCFHW.shape[2]):
            ranges = self.window.past(start, stop)
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)  # one slice where the past runs up to the block
            else:
                ranges.append((start, stop))
            attends.append((tokens((start, stop)), [tokens(frames) for frames in ranges]))
        assert attends[-1][0].stop == x_t_BCFHW.shape[2] * per_frame, "the blocks do not cover the clip"
        return self._attending(x_t_BCFHW, sigma, text, Request(0, attends))

    def block_velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: KVCache | None, start_frame: int
    ) -> Tensor:
        """One block that starts at `start_frame` and sees the cached blocks; no gradient reaches these."""
        return self._attending(x_t_BCFHW, sigma, text, self._block_request(x_t_BCFHW, cache, start_frame))

    @torch.no_grad()
    def commit(
        self, x_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, cache: KVCache | None, start_frame: int
    ) -> KVCache:
        """Runs a finished block once more, at the noise level of the context, and returns the cache that has it too."""
        request = self._block_request(x_BCFHW, cache, start_frame)
        kept: list[tuple[Tensor, Tensor] | None] = [None] * self.depth
        request.kept = kept
        self._attending(x_BCFHW, sigma, text, request)
        pairs = [pair for pair in kept if pair is not None]
        assert len(pairs) == self.depth, "a layer kept no keys: something took the plan out of the rotary argument"
        stop = start_frame + x_BCFHW.shape[2]
        new = Chunk(start_frame, stop, tuple(key for key, _ in pairs), tuple(value for _, value in pairs))
        chunks = (*(cache.chunks if cache else ()), new)
        if self.window.local_attn_frames:
            oldest = stop + 1 - (self.window.local_attn_frames - self.window.sink_frames)
            chunks = tuple(chunk for chunk in chunks if chunk.stop > oldest or chunk.start < self.window.sink_frames)
        return KVCache(chunks, stop)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _tokens_per_frame(self, x_BCFHW: Tensor) -> int:
        _, height, width = self.token_grid(x_BCFHW.shape[1:])
        return height * width

    def _block_request(self, x_BCFHW: Tensor, cache: KVCache | None, start_frame: int) -> Request:
        cache = cache or KVCache()
        assert cache.stop == start_frame, f"the cache ends at frame {cache.stop}, the block starts at {start_frame}"
        per_frame = self._tokens_per_frame(x_BCFHW)
        past = []
        for low, high in self.window.past(start_frame, start_frame + x_BCFHW.shape[2]):
            for chunk in cache.chunks:
                first, last = max(low, chunk.start), min(high, chunk.stop)
                if first < last:
                    tokens = slice((first - chunk.start) * per_frame, (last - chunk.start) * per_frame)
                    past.append((chunk, tokens))
        own = slice(0, x_BCFHW.shape[2] * per_frame)
        return Request(start_frame, [(own, [own])], past)

    def _attending(self, x: Tensor, sigma: Tensor, text: TextEmbedding, request: Request) -> Tensor:
        stop = request.start_frame + x.shape[2]
        if stop > self.longest:
            raise ValueError(f"a video of {stop} latent frames is longer than this model's {self.longest} positions")
        self.attachment.request = request
        try:
            velocity = super().velocity(x, sigma, text)
            assert self.attachment.request is None, "the model did not ask its rope: causal attention did not happen"
        finally:
            self.attachment.request = None
        return velocity
