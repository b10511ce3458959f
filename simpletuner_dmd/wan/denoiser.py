"""A Wan transformer, and the adapter it sees, as a Denoiser; and its blocks' outputs as features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner_dmd.flow import TIMESTEPS, Routing, TextEmbedding
from simpletuner_dmd.wan.adapters import AdapterSwitch
from simpletuner_dmd.wan.attention import kernel_of_pass
from simpletuner_dmd.wan.runner import BlockRunner, Taps
from simpletuner_dmd.wan.tread import Route, Router


class WanDenoiser:
    """One role: a transformer, the adapter it sees, and the precision of its forward. Implements flow.Denoiser.

    scale: strength of the adapter; 1 is as trained, 0 the bare base.
    routes: TREAD, for passes that ask for it; set where the role is trained with plain denoising losses.
    """

    def __init__(
        self,
        transformer: nn.Module,
        switch: AdapterSwitch | None,
        adapter: str | None,
        autocast: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        routes: tuple[Route, ...] = (),
    ) -> None:
        self.transformer, self.switch, self.adapter, self.autocast = transformer, switch, adapter, autocast
        self.scale, self.routes = scale, routes
        # The patch embedding is never quantised and never kept back in fp32: its dtype is that of the activations.
        self.weight: Tensor = transformer.get_parameter("patch_embedding.weight")

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return int(self._network.config.num_layers)

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return int(self.weight.shape[0])

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Video tokens along (frames, height, width) of latents (C, F, H, W), in the order of a feature's N."""
        frames, height, width = (
            size // patch for size, patch in zip(latent_shape[-3:], self._network.config.patch_size, strict=True)
        )
        return frames, height, width

    def velocity(
        self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, routed: Routing | None = None
    ) -> Tensor:
        """e - x0 in fp32. sigma: [B], or [B, F] for a noise level per latent frame.

        `routed` takes effect in train mode with gradients on, where the role has routes; nowhere else.
        """
        if routed is None or not (self.routes and self.transformer.training and torch.is_grad_enabled()):
            return self._forward(x_t_BCFHW, sigma, text, gradients=torch.is_grad_enabled()).float()
        with BlockRunner.of(self.transformer).asked(router=Router(self.routes, routed)):
            return self._forward(x_t_BCFHW, sigma, text, gradients=True).float()

    @torch.no_grad()
    def velocity_without(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]) -> Tensor:
        """As `velocity`, with these blocks (counted from 0) left out: what skip-layer guidance pushes away from."""
        assert all(0 <= block < self.depth for block in blocks), f"blocks {blocks} of {self.depth}"
        # The model calls the runner only while gradients are on.
        with BlockRunner.of(self.transformer).asked(skipped=blocks, without_graph=True), torch.enable_grad():
            return self._forward(x_t_BCFHW, sigma, text, gradients=False).detach().float()

    def features(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, blocks: Sequence[int]) -> list[Tensor]:
        """The outputs of the given blocks (counted from 0), [B, N, D] fp32 each; blocks after the last do not run.

        With gradients on the graph reaches the input and whatever trains; without, the features have none. Raises
        ValueError for a block that the model does not have.
        """
        beyond = [block for block in blocks if not 0 <= block < self.depth]
        if beyond or not blocks:
            raise ValueError(f"features of blocks {list(blocks)}: choose from 0 to {self.depth - 1}")
        taps, graph = Taps(blocks), torch.is_grad_enabled()
        # The model calls the runner only while gradients are on.
        asked = BlockRunner.of(self.transformer).asked(taps=taps, without_graph=not graph)
        with asked, torch.enable_grad():
            self._forward(x_t_BCFHW, sigma, text, gradients=graph)
        return [(feature if graph else feature.detach()).float() for feature in taps.features()]

    @property
    def _network(self) -> Any:
        return self.transformer  # a stock WanTransformer3DModel

    @property
    def _picture_channels(self) -> int:
        """Input channels that describe a first picture, of a model made for that; 0 of a text-to-video model."""
        return int(self._network.config.in_channels - self._network.config.out_channels)

    def _forward(self, x_t_BCFHW: Tensor, sigma: Tensor, text: TextEmbedding, *, gradients: bool) -> Tensor:
        dtype = self.weight.dtype
        timestep = TIMESTEPS * sigma.float()  # a float in fp32: bf16 would round 981 to 980
        if timestep.ndim == 2:
            _, height, width = self.token_grid(x_t_BCFHW.shape[1:])
            timestep = timestep.repeat_interleave(height * width, dim=1)  # Wan takes one per token
        with self._selected(), kernel_of_pass(self.transformer, gradients):
            (velocity,) = self._network(
                hidden_states=self._without_picture(x_t_BCFHW.to(dtype)),
                timestep=timestep,
                encoder_hidden_states=text.expand(len(x_t_BCFHW)).rows_BLD.to(dtype),
                return_dict=False,
            )
        return velocity

    def _without_picture(self, x_t_BCFHW: Tensor) -> Tensor:
        """As the network takes it: the mask says that no frame is given, and the picture's latents are 0."""
        if not self._picture_channels:
            return x_t_BCFHW
        batch, _, *size = x_t_BCFHW.shape
        return torch.cat([x_t_BCFHW, x_t_BCFHW.new_zeros(batch, self._picture_channels, *size)], dim=1)

    @contextmanager
    def _selected(self) -> Iterator[None]:
        """The role's adapter and precision."""
        adapter: AbstractContextManager[None] = (
            nullcontext() if self.switch is None else self.switch.use(self.adapter, self.scale)
        )
        cast: AbstractContextManager[object] = (
            nullcontext() if self.autocast is None else torch.autocast(self.weight.device.type, dtype=self.autocast)
        )
        with adapter, cast:
            yield
