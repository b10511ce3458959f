"""Per-token timesteps and picture channels: our one call per step is what the stock classes compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

from simpletuner_dmd.flow import Schedule, TextEmbedding, uniform_ladder
from simpletuner_dmd.validation.sampling import Sampler
from simpletuner_dmd.wan.denoiser import WanDenoiser
from tests.support.pipelines import build_small_transformer, save_small_ti2v

SHAPE = (1, 8, 2, 4, 6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sampler_is_the_pipeline_with_expanded_timesteps(tmp_path: Path, guidance: float) -> None:
    pipeline = WanPipeline.from_pretrained(save_small_ti2v(tmp_path), dtype=torch.float32)
    assert pipeline.config.expand_timesteps
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    width = pipeline.transformer.config.text_dim
    text, negative = torch.randn(2, 1, 16, width, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Size] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].shape), with_kwargs=True
    )
    torch.manual_seed(3)
    latents = pipeline(
        prompt_embeds=text, negative_prompt_embeds=negative, width=96, height=64, num_frames=5, num_inference_steps=3,
        guidance_scale=guidance, max_sequence_length=16, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    assert set(seen) == {torch.Size([1, 2 * 2 * 3])}  # one per token of 2 frames of 2 x 3
    seen.clear()
    denoiser = WanDenoiser(pipeline.transformer, None, None)
    sampler = Sampler(Schedule(5.0, () if guidance > 1 else uniform_ladder(3, 5.0)), "ode", 3, guidance)
    ours = sampler(denoiser, TextEmbedding(text), TextEmbedding(negative), SHAPE, 3, torch.device("cpu"))
    assert set(seen) == {torch.Size([1])}
    torch.testing.assert_close(ours, latents.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [16, 512])
def test_a_host_sees_no_picture(rows: int) -> None:
    """Zeros in the picture channels, and no embedding: the layers that read one add nothing."""
    host = build_small_transformer(in_channels=36, image_dim=24, added_kv_proj_dim=32).eval()
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 2, 4, 4, generator=generator), torch.randn(2, rows, 64, generator=generator)
    sigma = torch.tensor([0.9, 0.2])
    with torch.no_grad():
        ours = WanDenoiser(host, None, None).velocity(x, sigma, TextEmbedding(text))
        padded = torch.cat([x, torch.zeros(2, 20, 2, 4, 4)], dim=1)
        expected = host(padded, 1000 * sigma, text, return_dict=False)[0]
        other = build_small_transformer(in_channels=36).eval()  # the same weights, without the picture's layers
        other.load_state_dict({key: host.state_dict()[key] for key in other.state_dict()})
        bare = other(padded, 1000 * sigma, text, return_dict=False)[0]
    assert torch.equal(ours, expected)
    torch.testing.assert_close(ours, bare)
