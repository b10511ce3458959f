"""A Wan of few layers with random weights: the stock class, small enough for a test."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from simpletuner_dmd.flow import Batch, TextEmbedding
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.roles import Roles

CHANNELS, TEXT_ROWS, TEXT_WIDTH = 4, 5, 32
SHAPE = (CHANNELS, 2, 4, 6)
LORA = AdapterSpec(rank=4, alpha=8.0)


def tiny_wan(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """The same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
            rope_max_seq_len=32,
        )
        # Stock initialisation gates the blocks by almost nothing; a trained Wan does not.
        for name, parameter in network.named_parameters():
            if "scale_shift_table" in name:
                nn.init.normal_(parameter, std=0.5)
    return network.to(dtype)


def latents(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def prompts(count: int = 2, seed: int = 1) -> TextEmbedding:
    return TextEmbedding(torch.randn(count, TEXT_ROWS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed)))


def batch_of(count: int = 2) -> Batch:
    return Batch(tuple(range(count)), prompts(count), prompts(1, seed=2), SHAPE, latents(count, seed=3))


@torch.no_grad()
def wake(roles: Roles, std: float = 0.1) -> None:
    """Gives every zero-initialised LoRA factor a value of its own, so that the roles differ."""
    for number, role in enumerate(roles.adapters):
        seeded = torch.Generator().manual_seed(100 + number)
        for name, parameter in roles.parameters[role]:
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=seeded))


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
