"""Entries of multidatabackend.json: where samples come from and how they are cut."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator

from simpletuner_dmd.config.coerce import Options, frame_size
from simpletuner_dmd.config.run_options import DEFAULT_FRAMES

BUILTIN = "builtin"
"""What `instance_data_dir` of a prompts dataset says to mean the prompts that come with the tool."""

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


class TableOptions(Options):
    """The `table` block of a dataset: a csv, parquet or jsonl file that names files, captions, or both."""

    path: str | None = Field(
        None, description="The file. Default: metadata.csv, .jsonl or .parquet in the dataset's folder."
    )
    filename_column: str | None = Field(
        None, description="Column of file names, paths or URLs. Default: the first of the usual names it has."
    )
    caption_column: str | None = Field(
        None, description="Column of captions; a list in it is several captions. Default: caption, prompt or text."
    )
    fallback_caption_column: str | None = Field(
        None, description="Column that is read where `caption_column` is empty. Default: none."
    )
    identifier_includes_extension: bool = Field(
        True, description="false: the column holds file names without their endings."
    )


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
    type: Literal["local", "huggingface", "csv", "aws"] = Field(
        "local",
        description="Where the files are: `local` a folder on this machine, `huggingface` a dataset of the Hub or its "
        "parquet files on disk, `csv` a table of URLs or paths, `aws` a bucket of any S3-compatible store.",
    )
    dataset_type: Literal["video", "image", "text_embeds", "prompts"] = Field(
        "video",
        description="`video`: clips with captions. `image`: pictures, as videos of one frame. `prompts`: captions "
        "alone, enough for DMD. `text_embeds`: where the cache of text embeddings goes.",
    )
    disabled: bool = Field(False, description="Leaves this entry out.")
    instance_data_dir: str | None = Field(
        None,
        description="Folder of the videos; for `prompts` a .txt, .jsonl, .csv or .parquet file, a folder of them, or "
        "`builtin` for the prompts that come with the tool; for `aws` the prefix inside the bucket.",
    )
    cache_dir_vae: str | None = Field(
        None, description="Folder of this dataset's cached latents. Default: one below config.json's `cache_dir_vae`."
    )
    cache_dir: str | None = Field(
        None,
        description="`text_embeds`: folder of the cached text embeddings. Default: config.json's `cache_dir_text`.",
    )
    caption_strategy: Literal["textfile", "filename", "instanceprompt", "csv", "parquet", "jsonl"] = Field(
        "textfile",
        description="Where captions come from: a .txt file beside each video, the file's name, `instance_prompt`, or "
        "the `table`. Tables that name the files (`type` csv and huggingface) give the captions too.",
    )
    disable_multiline_split: bool = Field(
        False, description="true: a caption file is one caption; false: each of its lines is one."
    )
    instance_prompt: str | None = Field(
        None, description="The caption of every sample, for `instanceprompt`. Default: config.json's."
    )
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
    max_num_samples: int | None = Field(
        None, ge=1, description="Takes at most this many, the same seeded choice at every start. Default: all."
    )
    metadata_backend: Literal["discovery", "csv", "parquet", "json"] = Field(
        "discovery",
        description="How files are found: by looking into the folder, or by the `table`, which must name each.",
    )
    table: TableOptions = Field(default_factory=TableOptions, description="A file of file names and captions.")
    download_dir: str | None = Field(
        None, description="Folder where files from elsewhere are kept. Default: cache/downloads/<id>."
    )
    dataset_name: str | None = Field(
        None, description="`huggingface`: the Hub's owner/name, or a folder or file of parquet on this machine."
    )
    split: str = Field("train", description="`huggingface`: which part of the dataset.")
    revision: str | None = Field(None, description="`huggingface`: branch, tag or commit. Default: the newest.")
    video_column: str = Field("video", description="`huggingface`: the column of videos.")
    image_column: str = Field("image", description="`huggingface`: the column of pictures of an image dataset.")
    caption_column: str | None = Field(
        None, description="`huggingface`: the column of captions. Default: caption, prompt or text."
    )
    aws_bucket_name: str | None = Field(None, description="`aws`: the bucket.")
    aws_endpoint_url: str | None = Field(None, description="`aws`: address of the store. Default: Amazon's.")
    aws_region_name: str | None = Field(None, description="`aws`: the region. Default: the store's.")
    aws_access_key_id: SecretStr | None = Field(
        None, description="`aws`: the key, best as {env:NAME}. Default: what the AWS tools of this machine use."
    )
    aws_secret_access_key: SecretStr | None = Field(None, description="`aws`: the secret that belongs to the key.")
    aws_session_token: SecretStr | None = Field(None, description="`aws`: the token of temporary keys.")
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

    @property
    def table_kind(self) -> str | None:
        """csv, parquet or jsonl where a table is read for files or captions; None where none is."""
        if self.type == "csv":
            return "csv"
        for choice in (self.caption_strategy, self.metadata_backend):
            if choice in ("csv", "parquet", "jsonl", "json"):
                return "jsonl" if choice == "json" else choice
        return None


# Keys that act for a kind of dataset; the others get a notice when they are written on it.
_COMMON = {"id", "type", "dataset_type", "disabled"}
_HUGGINGFACE = {"dataset_name", "split", "revision", "video_column", "image_column", "caption_column"}
_AWS = {name for name in DatasetEntry.model_fields if name.startswith("aws_")}
_REMOTE = {"download_dir"}
_SAMPLES = {"instance_data_dir", "repeats", "probability", "max_num_samples", "table"}
_CAPTIONS = {"instance_prompt", "prepend_instance_prompt"}
_OF_TYPES = _HUGGINGFACE | _AWS | _REMOTE
_OF_CLIPS = set(DatasetEntry.model_fields) - {"cache_dir", "default", "write_batch_size"} - _OF_TYPES
USED_BY: dict[str, frozenset[str]] = {
    "video": frozenset(_OF_CLIPS),
    "image": frozenset(_OF_CLIPS - {"video"}),
    "prompts": frozenset(_COMMON | _SAMPLES | _CAPTIONS | {"resolution", "video"}),
    "text_embeds": frozenset(_COMMON | {"cache_dir", "default", "write_batch_size"}),
}
USED_BY_TYPE: dict[str, frozenset[str]] = {
    "local": frozenset(),
    "huggingface": frozenset(_HUGGINGFACE | _REMOTE),
    "csv": frozenset(_REMOTE),
    "aws": frozenset(_AWS | _REMOTE),
}


def idle_keys(entry: DatasetEntry) -> list[str]:
    """Keys written on an entry that change nothing for its kind and place."""
    used = USED_BY[entry.dataset_type]
    if entry.is_training_data:
        used |= USED_BY_TYPE[entry.type]
    idle = set(entry.model_fields_set) - used
    # "discovery" on a prompts or csv entry is what people carry over from other files, and is what happens.
    if entry.metadata_backend == "discovery":
        idle.discard("metadata_backend")
    if "table" in entry.model_fields_set and entry.table_kind is None and entry.dataset_type != "prompts":
        idle.add("table")
    return sorted(idle)
