"""The published Wan models, as facts: where each is, what it was trained for, and how its makers sample it.

Plain data, free of torch, so that options, checks and plans read the same numbers as the code that loads the model. The
configs of the parts lie in `wan/published`, and `wan.flavours.published_config` reads them.

Sources: the configs of Wan's own repositories (Wan-Video/Wan2.1 and Wan2.2, `wan/configs`), and of the repositories on
the Hub that `hub_id` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

Part = Literal["transformer", "transformer_2", "vae", "text_encoder", "scheduler"]
PARTS: tuple[Part, ...] = get_args(Part)

ModelFlavour = Literal[
    "t2v-480p-1.3b-2.1", "t2v-480p-14b-2.1", "t2v-14b-2.2-high", "t2v-14b-2.2-low", "ti2v-5b-2.2",
    "i2v-14b-2.1", "i2v-14b-2.1-720p",
]  # fmt: skip
DEFAULT_FLAVOUR: ModelFlavour = "t2v-480p-1.3b-2.1"


@dataclass(frozen=True)
class Flavour:
    """One model that a person may name as `model_flavour`.

    parts: part -> the published config that describes it, below `wan/published` and without ".json".
    native_size: (width, height) in pixels. frames, framerate: of the clips it was trained on.
    size_multiple: widths and heights are multiples of this, what VAE and patches reduce to one token.
    shift, steps, guidance: of its makers' own sampler; guidance is that of this expert where there are two.
    transformer: the subfolder of the network that a run of this flavour trains.
    expert, boundary, partner: of a model made of two networks: which of the two a run trains, the sigma at which the
    high-noise one (which has it) hands over, and the flavour that trains the other.
    expand_timesteps: the pipeline gives the transformer one timestep per token.
    image_channels: channels of the transformer's input that describe a first picture, beside the latents.
    """

    name: ModelFlavour
    hub_id: str
    parts: Mapping[Part, str]
    native_size: tuple[int, int] = (832, 480)
    frames: int = 81
    framerate: float = 16.0
    size_multiple: int = 16
    shift: float = 5.0
    steps: int = 50
    guidance: float = 5.0
    transformer: Literal["transformer", "transformer_2"] = "transformer"
    expert: Literal["high", "low"] | None = None
    boundary: float | None = None
    partner: ModelFlavour | None = None
    expand_timesteps: bool = False
    image_channels: int = 0


def _parts(transformer: str, **others: str) -> Mapping[Part, str]:
    """The parts that all flavours share, a transformer, and what a flavour has of its own."""
    shared = {"vae": "wan2.1/vae", "text_encoder": "umt5-xxl/text_encoder", "scheduler": "wan2.1/scheduler"}
    found = {"transformer": transformer, **shared, **others}
    return MappingProxyType({part: found[part] for part in PARTS if part in found})


_A14B = _parts("wan-14b/transformer", transformer_2="wan-14b/transformer")
_A14B_ID = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"

FLAVOURS: Mapping[str, Flavour] = MappingProxyType({flavour.name: flavour for flavour in (
    Flavour("t2v-480p-1.3b-2.1", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _parts("wan2.1-1.3b/transformer")),
    Flavour("t2v-480p-14b-2.1", "Wan-AI/Wan2.1-T2V-14B-Diffusers", _parts("wan-14b/transformer")),
    Flavour("t2v-14b-2.2-high", _A14B_ID, _A14B, shift=12.0, steps=40, guidance=4.0,
            expert="high", boundary=0.875, partner="t2v-14b-2.2-low"),
    Flavour("t2v-14b-2.2-low", _A14B_ID, _A14B, shift=12.0, steps=40, guidance=3.0, transformer="transformer_2",
            expert="low", boundary=0.875, partner="t2v-14b-2.2-high"),
    Flavour("ti2v-5b-2.2", "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            _parts("wan2.2-5b/transformer", vae="wan2.2/vae", scheduler="wan2.2-5b/scheduler"),
            native_size=(1280, 704), frames=121, framerate=24.0, size_multiple=32, expand_timesteps=True),
    Flavour("i2v-14b-2.1", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", _parts("wan2.1-i2v-14b/transformer"),
            shift=3.0, steps=40, image_channels=20),
    Flavour("i2v-14b-2.1-720p", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", _parts("wan2.1-i2v-14b/transformer"),
            native_size=(1280, 720), steps=40, image_channels=20),
)})  # fmt: skip
assert tuple(FLAVOURS) == get_args(ModelFlavour), "every flavour that may be named is described"


def flavour_of(name: str) -> Flavour:
    """The flavour of that name; of a name that is not known (and is reported elsewhere) the default one."""
    return FLAVOURS.get(name, FLAVOURS[DEFAULT_FLAVOUR])
