"""What an export says about itself: one record that the card, the metadata, the workflow and distill.json read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.flavours import DEFAULT_FLAVOUR, flavour_of
from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.validation.sampling import BlockSampling


@dataclass(frozen=True)
class TeacherLora:
    """A fine-tune that was merged into the base before anything was trained. file: its name; sha256: of the file."""

    file: str
    strength: float
    sha256: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NativeExpert:
    """expert: "high" or "low", which of the base's two networks the student is. boundary: the sigma from which on,
    upwards, the high-noise one works. other: the export of the other one's student, where it is kept beside."""

    expert: str
    boundary: float
    other: Path | None = None

    @property
    def transformer(self) -> str:
        """The network's name in the pipeline."""
        return "transformer" if self.expert == "high" else "transformer_2"

    @property
    def partner(self) -> str:
        """The other of the two."""
        return "low" if self.expert == "high" else "high"

    @property
    def words(self) -> str:
        return f"{self.expert}-noise expert"


@dataclass(frozen=True)
class ExportInfo:
    """The facts of a finished student.

    flavour: the model_flavour of the run.
    method: "dmd", … or "" for supervised training. schedule: its ladder is the student's steps; empty for supervised
    training, which then samples with `sampling_steps` steps of Wan's own solver at `guidance`.
    renoise: "sde" or "ode". base: a Hub name or a folder. base_hash: of the base's weights, "" where unknown.
    model_type: "lora" or "full". weights: "ema" or "raw". trained_sizes: (width, height, frames) in pixels.
    adapter: "standard" (PEFT's LoRA) or "lycoris", where model_type is "lora". teacher_lora: part of the base.
    train_steps: updates of the student. validation_sizes as trained_sizes. hub_repo: where it is published, if it is.
    raw_beside: the export holds the weights as trained as well, in raw/. extracted: how a LoRA was taken from a full
    student (see `extract.Extraction`). health: (colour, name, sentence) of each light. videos: (prompt, file within
    the export). config: the options of the run that are nobody's secret.
    """

    run_name: str
    method: str
    schedule: Schedule
    renoise: str
    base: str
    flavour: str = DEFAULT_FLAVOUR
    model_type: str = "lora"
    base_hash: str = ""
    guidance: float = 1.0
    sampling_steps: int = 50
    teacher: str = ""
    trained_sizes: tuple[tuple[int, int, int], ...] = ()
    tokenizer_max_length: int = 512
    train_steps: int = 0
    weights: str = "raw"
    framerate: float = 16
    blocks: BlockSampling | None = None  # of a causal student, which makes a clip block by block
    boundary: float = 0.0  # sigma from which upwards the high-noise expert of a two-expert student works; 0: one expert
    native: NativeExpert | None = None  # which of the base's own two networks the student is, where it has two
    vae_scale: tuple[int, int] = (8, 4)  # pixels per latent in space, frames per latent in time
    licence: str = "apache-2.0"
    prompt: str = "a cat walks through tall grass"
    validation_prompts: tuple[str, ...] = ()
    validation_seed: int | None = None
    validation_sizes: tuple[tuple[int, int, int], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    tool_version: str = ""
    note: str = ""
    hub_repo: str = ""
    adapter: str = "standard"
    teacher_lora: TeacherLora | None = None
    raw_beside: bool = False
    extracted: Mapping[str, Any] | None = None
    health: tuple[tuple[str, str, str], ...] = ()
    videos: tuple[tuple[str, str], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lycoris(self) -> bool:
        """A LyCORIS network: read by the library of that name, not by diffusers alone."""
        return self.model_type == "lora" and self.adapter == "lycoris"

    @property
    def file_name(self) -> str:
        """The run's name as a file name; of one of two experts, which one."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.run_name).strip("-.") or "student"
        return name if self.native is None else f"{name}-{self.native.expert}-noise"

    @property
    def picture_channels(self) -> int:
        """Input channels that describe a picture, of a model that hosts a text-to-video adapter."""
        return flavour_of(self.flavour).image_channels

    @property
    def steps(self) -> int:
        """Forwards of the network per video."""
        return len(self.schedule.ladder) or self.sampling_steps

    @property
    def size(self) -> tuple[int, int, int]:
        """(width, height, frames) for examples: the first trained size, else the flavour's own."""
        flavour = flavour_of(self.flavour)
        return self.trained_sizes[0] if self.trained_sizes else (*flavour.native_size, flavour.frames)

    @property
    def base_is_local(self) -> bool:
        """A folder rather than a Hub name "owner/name"."""
        return is_local(self.base)

    @property
    def base_name(self) -> str:
        """The base without the folders of the machine it was trained on."""
        return base_name(self.base)

    @property
    def base_size(self) -> str:
        """ "1.3B", "14B" or "" as the name tells."""
        found = re.search(r"(1\.3|14)b", self.base_name, re.IGNORECASE)
        return f"{found[1]}B" if found else ""


def is_local(base: str) -> bool:
    """A folder rather than a Hub name "owner/name"."""
    return not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or Path(base).exists()


def base_name(base: str) -> str:
    """A base as exports name it."""
    return Path(base).name if is_local(base) else base


def decimals(sigma: float) -> str:
    """A plain decimal: ComfyUI's ManualSigmas reads 1e-3 as two numbers, 1 and -3."""
    text = f"{sigma:.9f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def ladder_text(info: ExportInfo) -> str:
    """ "1000, 757, 522"."""
    return ", ".join(f"{timestep:.6g}" for timestep in info.schedule.timesteps)
