"""Entries of multidatabackend.json: where samples come from and how they are cut."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from simpletuner_dmd.config.coerce import Options, frame_size
from simpletuner_dmd.config.run_options import DEFAULT_FRAMES

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]*")


class VideoOptions(Options):
    """The `video` block of a dataset: which frames are taken."""

    num_frames: int = Field(
        DEFAULT_FRAMES, ge=1, description="Frames of a sample, at `framerate`. Rounded down to 4n+1."
    )
    min_frames: int | None = Field(
        None, ge=1, description="Shorter clips are left out, and listed. Default: `num_frames`."
    )
    max_frames: int | None = Field(None, ge=1, description="Longer clips are left out, and listed. Default: no limit.")
    frame_interval: int = Field(1, ge=1, le=64, description="Takes every so-many-th frame, after resampling in time.")


def _crop_style(value: Any) -> Any:
    return "center" if value == "centre" else value


def _resolution(value: Any) -> Any:
    """A number, or "832x480" checked and written in one way."""
    if isinstance(value, str) and "x" in value.lower().replace("×", "x"):
        width, height = frame_size(value)
        return f"{width}x{height}"
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError('must be a number, or "WIDTHxHEIGHT" for a prompts dataset') from error
    if not 0 < number < 1e5:
        raise ValueError("must be above 0 and below 100000")
    return number


class DatasetEntry(Options):
    """One dataset. After loading, what an entry leaves out has the value of config.json's option of the same name."""

    id: str = Field("", description="Name of the dataset, in caches and logs. Default: the folder's name.")
    type: Literal["local"] = Field("local", description="Where the files are: `local`, a folder on this machine.")
    dataset_type: Literal["video", "text_embeds", "prompts"] = Field(
        "video",
        description="`video`: clips with captions. `prompts`: captions alone, enough for DMD. "
        "`text_embeds`: where the cache of text embeddings goes.",
    )
    disabled: bool = Field(False, description="Leaves this entry out.")
    instance_data_dir: str | None = Field(
        None, description="Folder of the videos; for `prompts` a folder of .txt files, or one .txt or .jsonl file."
    )
    cache_dir_vae: str | None = Field(
        None, description="Folder of this dataset's cached latents. Default: one below config.json's `cache_dir_vae`."
    )
    cache_dir: str | None = Field(
        None,
        description="`text_embeds`: folder of the cached text embeddings. Default: config.json's `cache_dir_text`.",
    )
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] = Field(
        "textfile",
        description="Where captions come from: a .txt file beside each video, the file's name, or `instance_prompt`.",
    )
    instance_prompt: str | None = Field(None, description="The caption of every sample, for `instanceprompt`.")
    prepend_instance_prompt: bool = Field(False, description="Puts `instance_prompt` in front of every caption.")
    resolution: Annotated[float | str | None, BeforeValidator(_resolution)] = Field(
        None, description='Training size in the unit of `resolution_type`; for `prompts` "WIDTHxHEIGHT".'
    )
    resolution_type: Literal["pixel", "pixel_area", "area"] | None = Field(
        None, description="Unit of the sizes of this entry, as in config.json."
    )
    crop: bool = Field(
        False, description="Cuts videos to the shape of `crop_aspect`; false keeps each one's own shape."
    )
    crop_aspect: Literal["square", "preserve", "random", "closest"] = Field(
        "square", description="Shape that videos are cut to: a square, their own, a random or the nearest bucket."
    )
    crop_style: Annotated[Literal["center", "random", "corner"], BeforeValidator(_crop_style)] = Field(
        "center", description="Which part of the picture is kept."
    )
    minimum_image_size: float | None = Field(None, ge=0, description="Smaller videos are left out, and listed.")
    maximum_image_size: float | None = Field(None, gt=0, description="Larger videos are reduced before the crop.")
    target_downsample_size: float | None = Field(
        None, gt=0, description="Size that videos above `maximum_image_size` are reduced to. Default: that size."
    )
    repeats: int = Field(0, ge=0, description="Extra passes over this dataset per epoch.")
    probability: float = Field(
        1.0, ge=0, description="Weight of this dataset when several are mixed; 0 switches it off."
    )
    metadata_backend: Literal["discovery"] = Field("discovery", description="How files are found: by looking.")
    default: bool = Field(True, description="`text_embeds`: this cache serves every dataset.")
    write_batch_size: int | None = Field(None, ge=1, description="`text_embeds`: embeddings encoded before a write.")
    video: VideoOptions = Field(default_factory=VideoOptions, description="Which frames are taken.")

    @field_validator("id")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value and (not PLAIN_NAME.fullmatch(value) or ".." in value):
            raise ValueError("must be a plain name: letters, digits, dot, dash, underscore; no slashes, no '..'")
        return value

    @property
    def is_training_data(self) -> bool:
        return self.dataset_type != "text_embeds"

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) in pixels where `resolution` names both, as a prompts dataset does."""
        return frame_size(self.resolution) if isinstance(self.resolution, str) else None


# Keys that act for a kind of dataset; the others get a notice when they are written on it.
_COMMON = {"id", "type", "dataset_type", "disabled"}
USED_BY: dict[str, frozenset[str]] = {
    "video": frozenset(set(DatasetEntry.model_fields) - {"cache_dir", "default", "write_batch_size"}),
    "prompts": frozenset(_COMMON | {"instance_data_dir", "resolution", "video", "repeats", "probability"}),
    "text_embeds": frozenset(_COMMON | {"cache_dir", "default", "write_batch_size"}),
}
