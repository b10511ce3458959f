"""TREAD (arXiv 2501.04765): training passes in which a random part of the video tokens goes around a span of blocks.

Before the first block of a route K = N - int(N ratio) tokens per sample are drawn; the blocks of the span see those
alone, with the rotary embedding and (where there is one per token) the timestep modulation of their own positions.
After the last block they are put back among the others, which come in with the value they had before the span. All
blocks after that see all N tokens, so every token has a loss and a gradient.

Shapes: B batch, N video tokens, K kept tokens, D width (in rotary embeddings: of a head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from simpletuner_dmd.flow import Routing

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Route:
    """Blocks `start` to `end` (inclusive, counted from 0) are bypassed by the fraction `ratio` of the tokens."""

    ratio: float
    start: int
    end: int

    def __post_init__(self) -> None:
        assert 0.0 <= self.ratio < 1.0, f"a route bypasses a fraction of the tokens, not {self.ratio}"
        assert 0 <= self.start <= self.end, f"a route goes forward, not from block {self.start} to {self.end}"

    def kept(self, tokens: int) -> int:
        """K: the same for every sample and pass, so that shapes never change."""
        return tokens - int(tokens * self.ratio)


def routing_line(role: str, routes: Sequence[Route], depth: int) -> str:
    """What routing will do to a role of a model of `depth` blocks, in one line."""
    spans = ", ".join(f"{route.ratio:.0%} around blocks {route.start} to {route.end}" for route in routes)
    skipped = sum(route.ratio * (route.end - route.start + 1) for route in routes) / depth
    return (
        f"tread: in the {role}'s training passes tokens go {spans}; {skipped:.0%} of the work of {depth} blocks saved"
    )


def check_disjoint(routes: Sequence[Route]) -> None:
    """Raises AssertionError where two routes share a block."""
    covered = [index for route in routes for index in range(route.start, route.end + 1)]
    assert len(covered) == len(set(covered)), "two routes share a block"


def draw_kept(routing: Routing, number: int, tokens: int, kept: int) -> Tensor:
    """[B, K] positions in rising order: those with the K largest of N independent draws, a uniformly random subset.

    A pure function of the run's (seed, step, sample), the pass and the number of the route.
    """
    scores_BN = routing.draws.normal((tokens,), f"{routing.purpose}/route {number}")
    return scores_BN.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def take(x: Tensor, kept_BK: Tensor) -> Tensor:
    """x [B, N, ...] -> [B, K, ...]."""
    index = kept_BK.view(*kept_BK.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def put_back(full_BND: Tensor, kept_BK: Tensor, x_BKD: Tensor) -> Tensor:
    """A new [B, N, D]: x at the kept positions, the old values elsewhere."""
    return full_BND.scatter(1, kept_BK[..., None].expand(-1, -1, full_BND.shape[-1]), x_BKD)


def take_rotary(rotary: Rotary, kept_BK: Tensor) -> Rotary:
    """cos and sin, each [1, N, 1, D], -> those of the kept positions, each [B, K, 1, D]."""
    cos, sin = (take(part.expand(len(kept_BK), -1, -1, -1), kept_BK) for part in rotary)
    return cos, sin


@dataclass
class _Open:
    """The route that a forward is on: what its blocks are given, and what its end needs."""

    route: Route
    full_BND: Tensor
    kept_BK: Tensor
    modulation: Tensor
    rotary: Rotary


class Router:
    """The routing of one forward; made for it and dropped with it.

    Indices are drawn here, outside the region that gradient checkpointing runs again, and reach the blocks only as
    gathered arguments: a recompute can neither redraw them nor find them changed.
    """

    def __init__(self, routes: Sequence[Route], routing: Routing) -> None:
        check_disjoint(routes)
        self._starts = {route.start: (number, route) for number, route in enumerate(routes)}
        self._routing = routing
        self._open: _Open | None = None

    def enter(self, block: int, x: Tensor, modulation: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Rotary]:
        """Before a block: (tokens, timestep modulation, rotary embedding) as it should see them.

        modulation: [B, 6, D], or [B, N, 6, D] with a timestep per token.
        """
        if block in self._starts:
            assert self._open is None, f"block {block} starts a route inside another"
            number, route = self._starts[block]
            tokens = x.shape[1]
            cos, sin = rotary
            layout = (1, tokens, 1, cos.shape[-1])
            assert cos.shape == sin.shape == layout, f"rotary embeddings are {tuple(cos.shape)}, expected {layout}"
            kept_BK = draw_kept(self._routing, number, tokens, route.kept(tokens)).to(x.device)
            assert len(kept_BK) == len(x), f"{len(kept_BK)} samples are drawn for, {len(x)} are here"
            if modulation.ndim == 4:
                modulation = take(modulation, kept_BK)
            self._open = _Open(route, x, kept_BK, modulation, take_rotary(rotary, kept_BK))
            x = take(x, kept_BK)
        if self._open is None:
            return x, modulation, rotary
        return x, self._open.modulation, self._open.rotary

    def leave(self, block: int, x: Tensor) -> Tensor:
        """After a block: the full sequence again where its route ends."""
        if self._open is None or block != self._open.route.end:
            return x
        opened, self._open = self._open, None
        return put_back(opened.full_BND, opened.kept_BK, x)
