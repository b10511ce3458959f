"""Options of what is loaded and kept: model, data, output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simpletuner_dmd.config.coerce import Options, words
from simpletuner_dmd.config.flavours import DEFAULT_FLAVOUR, ModelFlavour, flavour_of

DEMO = "demo"
"""As `pretrained_model_name_or_path` or `instance_data_dir`: the tiny Wan, or the videos, that the package has."""

DistillationMethod = Literal[
    "dmd", "lcm", "pcm", "dcm", "rcm", "self_forcing", "diffusion_forcing", "ode_init"
]  # fmt: skip

DEFAULT_FRAMES = 81


def native_size(flavour: str) -> str:
    """The size a flavour was trained for, "WIDTHxHEIGHT"."""
    width, height = flavour_of(flavour).native_size
    return f"{width}x{height}"


def is_weight_file(path: str) -> bool:
    """Whether a model is given as one file of weights."""
    return path.endswith(".safetensors")


def _hub_id(data: dict[str, Any]) -> str:
    return flavour_of(data.get("model_flavour", "")).hub_id


class ModelOptions(Options):
    """Which Wan, what of it is trained, and by which method."""

    recipe: str | None = Field(
        None,
        description="The settings of a recipe, below everything that is written: `simpletuner recipes` lists them, "
        "`simpletuner recipes show NAME` says where each number is from.",
    )
    model_family: Literal["wan"] = Field("wan", description="The model family. This tool knows Wan and nothing else.")
    model_flavour: ModelFlavour = Field(
        DEFAULT_FLAVOUR,
        description="Which Wan: sets the default base model, the native video size and what a model's own config must "
        "say. The 2.2 14B models are two experts, `high` for the noisy part of the schedule and `low` for the clean "
        "part; one run trains one of them. An `i2v` model is a host for text-to-video adapters.",
    )
    model_type: Literal["lora", "full"] = Field(
        "lora",
        description="`lora` trains small adapters on a frozen base that teacher, student and critic share; "
        "`full` trains a copy of every weight.",
    )
    distillation_method: DistillationMethod | None = Field(
        None,
        description="How the base becomes a few-step student. `dmd`: distribution matching. `lcm`, `pcm`, `dcm`: "
        "consistency along the teacher's trajectory, in one piece, in phases, with two experts. `rcm`: matching beside "
        "continuous-time consistency. `self_forcing`: matching for a student that works block by block, which "
        "`ode_init` and `diffusion_forcing` warm up. "
        "Unset: ordinary supervised fine-tuning on your videos.",
    )
    pretrained_model_name_or_path: str = Field(
        default_factory=_hub_id,
        description="The base model: a Hub id, a diffusers pipeline folder, or a `.safetensors` file of a transformer, "
        "in diffusers' names or Wan's own; `demo` is the tiny Wan that comes with the package. What a folder or file "
        "lacks is taken from the default. Default: the flavour's own Hub repository.",
    )
    pretrained_transformer_model_name_or_path: str | None = Field(
        None,
        description="Takes the transformer from another Hub id, folder or `.safetensors` file than the base model; a "
        "file's config is the base model's.",
    )
    pretrained_transformer_subfolder: Literal["none"] | str = Field(
        default_factory=lambda data: flavour_of(data.get("model_flavour", "")).transformer,
        description="Folder of the transformer inside its model; `none` where it lies in the model's folder itself. "
        "Default: `transformer`, and `transformer_2` for the `-low` expert.",
    )
    pretrained_vae_model_name_or_path: str | None = Field(
        None, description="Takes the VAE from another Hub id, folder or `.safetensors` file than the base model."
    )
    pretrained_t5_model_name_or_path: str | None = Field(
        None,
        description="Takes text encoder and tokenizer from another Hub id or folder than the base model; "
        "a `.safetensors` file gives the text encoder alone.",
    )
    other_expert_run: str | None = Field(
        None,
        description="For one of two experts: a finished run of the other one (its output or export folder). Validation "
        "then renders with both students and the export holds both; without it the other expert is the teacher's own, "
        "with its many steps. Also where `simpletuner synthesise --handover` takes the high-noise expert from.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the base model on the Hub.")
    variant: str | None = Field(None, description="Weight variant of the base model on the Hub, for example `fp16`.")


class DataOptions(Options):
    """Where the data is and how it is cut; a dataset entry may override the sizes for itself."""

    data_backend_config: str | None = Field(
        None,
        description="The file that lists the datasets. Default: `multidatabackend.json` beside the config file.",
    )
    caption_dropout_probability: float = Field(
        default_factory=lambda data: 0.0 if data.get("distillation_method") else 0.1,
        ge=0, le=1,
        description="Share of samples whose caption is replaced by the negative prompt: in supervised losses, on "
        "the critic's turn, and where a consistency method learns without guidance. DMD's student never drops. "
        "Default: 0.1 for fine-tuning, 0 for distillation.",
    )  # fmt: skip
    resolution: float = Field(
        480.0, gt=0,
        description="Size of the training videos, in the unit of `resolution_type`.",
    )  # fmt: skip
    resolution_type: Literal["pixel", "pixel_area", "area"] = Field(
        "pixel_area",
        description="`pixel`: `resolution` is the shorter side. `pixel_area`: the side of a square of equal area. "
        "`area`: megapixels.",
    )
    minimum_image_size: float = Field(
        0.0, ge=0, description="Videos smaller than this (in the unit of `resolution_type`) are left out, and listed."
    )
    maximum_image_size: float | None = Field(
        None, gt=0, description="Videos larger than this are first reduced to `target_downsample_size`, then cropped."
    )
    target_downsample_size: float | None = Field(
        None,
        gt=0,
        description="Size that videos above `maximum_image_size` are reduced to before the crop. Default: that size.",
    )
    instance_prompt: str | None = Field(
        None, description="The `instance_prompt` of every dataset entry that has none of its own."
    )
    aspect_bucket_rounding: int = Field(
        2, ge=1, le=9, description="Decimals to which aspect ratios are rounded when videos are grouped into buckets."
    )
    disable_bucket_pruning: bool = Field(
        False, description="Keeps buckets that hold fewer samples than a batch; their samples are then repeated."
    )
    compress_disk_cache: bool = Field(True, description="Compresses the cached latents and text embeddings on disk.")
    vae_batch_size: int = Field(1, ge=1, description="Videos that the VAE encodes at once while caching.")
    write_batch_size: int = Field(128, ge=1, description="Text embeddings that are encoded before they are written.")
    delete_problematic_images: bool = Field(
        False,
        description="Moves files that cannot be decoded to a `rejected` folder beside them, with the reason. "
        "Nothing is ever deleted.",
    )
    framerate: float = Field(
        default_factory=lambda data: flavour_of(data.get("model_flavour", "")).framerate,
        gt=0, le=240,
        description="Frames per second the model works in; videos are resampled to it in time. Default: the flavour's, "
        "16, or 24 for ti2v-5b-2.2.",
    )  # fmt: skip
    cache_dir_models: Literal["none"] | str = Field(
        "cache/models",
        description="Folder in which quantised weights are kept, so that the next start reads only them: as large as "
        "what they take in memory. `none` keeps nothing. Each is of one model, precision, `teacher_lora` and library "
        "version; delete the folder at will.",
    )
    cache_dir_text: str = Field("cache/text", description="Folder of the cached text embeddings.")
    cache_dir_vae: str = Field("cache/vae", description="Folder of the cached latents; each dataset has its own below.")
    tokenizer_max_length: int = Field(
        512, ge=8, le=512, description="Rows the text embedding is padded to. Wan was trained with 512; leave it there."
    )


Tracker = Literal["wandb", "tensorboard", "trackio"]
TRACKERS: tuple[Tracker, ...] = ("wandb", "tensorboard", "trackio")


def _trackers(value: Any) -> Any:
    names = [value] if isinstance(value, str) and "," not in value else words(value)
    if names in (["none"], ["None"], [""], [None]):
        return []
    return list(TRACKERS) if names == ["all"] else names


class OutputOptions(Options):
    """What is kept, where it goes, who is told."""

    output_dir: str = Field("output/run", description="Folder for everything a run makes.")
    checkpoint_step_interval: int = Field(500, ge=1, description="A checkpoint every so many steps.")
    checkpoints_total_limit: int = Field(
        5, ge=0, description="Checkpoints that are kept; older ones are removed after a newer one is safe. 0 keeps all."
    )
    resume_from_checkpoint: str | None = Field(
        "latest",
        description="`latest` goes on from the newest whole checkpoint in `output_dir`, or starts afresh if there is "
        "none; `best` from the healthiest; a checkpoint's folder or name goes on from there; `null` starts afresh.",
    )
    push_to_hub: bool = Field(False, description="Uploads the export to the Hub when the run has finished.")
    push_checkpoints_to_hub: bool = Field(False, description="Also uploads the export of every checkpoint.")
    hub_model_id: str | None = Field(
        None, description="Repository on the Hub, `name` or `owner/name`. Default: the run's name."
    )
    model_card_private: bool = Field(True, description="Makes the Hub repository private when it is created.")
    model_card_note: str = Field("", description="A note of yours for the model card.")
    report_to: Annotated[list[Tracker], BeforeValidator(_trackers)] = Field(
        default_factory=list,
        description="Experiment trackers: `none`, `wandb`, `tensorboard`, `trackio`, `all`, or a list. "
        "`metrics.jsonl` in the output folder is written in any case.",
    )
    tracker_project_name: str = Field("simpletuner-dmd", description="Project name in the trackers.")
    tracker_run_name: str = Field(
        default_factory=lambda data: Path(str(data.get("output_dir", "run"))).name or "run",
        description="The run's name in trackers, exports and on the Hub. Default: the name of `output_dir`.",
    )
    webhook_config: str | dict[str, Any] | list[dict[str, Any]] | None = Field(
        None, description="A webhook's settings, or the JSON file that holds them, to be told how the run goes."
    )
