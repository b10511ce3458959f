"""The published configs: every part can be built from them, and is as large as the model is known to be."""

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from simpletuner_dmd.wan.flavours import FLAVOURS, PARTS, Flavour, published_config

# Numbers in the transformer: Wan's 1.3B, 14B, 5B, and the 14B with what reads a picture's embedding.
SIZES = {
    "t2v-480p-1.3b-2.1": 1_418_996_800,
    "t2v-480p-14b-2.1": 14_288_491_584,
    "t2v-14b-2.2-high": 14_288_491_584,
    "t2v-14b-2.2-low": 14_288_491_584,
    "ti2v-5b-2.2": 4_999_787_712,
    "i2v-14b-2.1": 16_394_878_784,
    "i2v-14b-2.1-720p": 16_394_878_784,
}
UMT5_XXL = 5_680_910_336  # its published files hold 11,361,820,672 bytes of bf16
VAE = {16: 126_892_531, 48: 704_688_668}  # by latent channels; the second's file is 2,818,777,808 bytes of fp32


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_every_part_is_built_from_its_published_config(flavour: Flavour) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(published_config(flavour, "vae"))
        for part in ("transformer", "transformer_2"):
            if part in flavour.parts:
                transformer = WanTransformer3DModel.from_config(published_config(flavour, part))
                assert count(transformer) == SIZES[flavour.name]
    assert flavour.transformer in flavour.parts
    config = transformer.config
    assert config.in_channels == vae.config.z_dim + flavour.image_channels
    assert config.out_channels == vae.config.z_dim == len(vae.config.latents_mean) == len(vae.config.latents_std)
    assert count(vae) == VAE[vae.config.z_dim]
    assert flavour.size_multiple == vae.config.scale_factor_spatial * config.patch_size[1]
    assert all(side % flavour.size_multiple == 0 for side in flavour.native_size)
    assert (flavour.frames - 1) % vae.config.scale_factor_temporal == 0
    scheduler = UniPCMultistepScheduler.from_config(published_config(flavour, "scheduler"))
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas


def test_the_text_encoder_is_umt5_xxl() -> None:
    configs = [published_config(flavour, "text_encoder") for flavour in FLAVOURS.values()]
    assert all(config == configs[0] for config in configs)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_dict(configs[0]))
    assert count(encoder) == UMT5_XXL
    text_dims = {published_config(flavour, "transformer")["text_dim"] for flavour in FLAVOURS.values()}
    assert text_dims == {configs[0]["d_model"]}


def test_two_experts_are_partners() -> None:
    experts = [flavour for flavour in FLAVOURS.values() if flavour.expert]
    assert {flavour.expert for flavour in experts} == {"high", "low"}
    for flavour in experts:
        other = FLAVOURS[str(flavour.partner)]
        assert other.partner == flavour.name and other.expert != flavour.expert
        assert (other.hub_id, other.boundary, other.parts) == (flavour.hub_id, flavour.boundary, flavour.parts)
        assert {flavour.transformer, other.transformer} == {"transformer", "transformer_2"}
        # The pipeline's first transformer is the one that starts from noise.
        assert (flavour.transformer == "transformer") == (flavour.expert == "high")
    for flavour in FLAVOURS.values():
        assert (flavour.boundary is None) == (flavour.partner is None) == (flavour.expert is None)
        assert ("transformer_2" in flavour.parts) == (flavour.expert is not None)


def test_a_config_belongs_to_whoever_asked() -> None:
    flavour = FLAVOURS["ti2v-5b-2.2"]
    published_config(flavour, "vae")["z_dim"] = 1
    assert published_config(flavour, "vae")["z_dim"] == 48
    with pytest.raises(KeyError):
        published_config(flavour, "transformer_2")
    assert set(flavour.parts) <= set(PARTS)
