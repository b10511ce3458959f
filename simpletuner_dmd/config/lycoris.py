"""Options of `lycoris_config`: which LyCORIS algorithm the adapters are, how large, and on which layers of Wan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from simpletuner_dmd.config.coerce import Options, words
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.mistakes import refusals, unknown_key
from simpletuner_dmd.config.read import is_file, parse_json, read_json
from simpletuner_dmd.config.simpletuner_keys import Absent

KEY = "lycoris_config"

Algo = Literal["lora", "locon", "loha", "lokr", "full", "diag-oft", "boft", "glora"]

WEIGHT_ALGOS = ("full", "diag-oft", "boft", "glora")
"""They change the weight as a function of the weight itself (or replace it), so it must not be quantised."""
ROTATIONS = ("diag-oft", "boft")

NOT_FOR_COMFYUI = (*ROTATIONS, "glora")
"""ComfyUI has formulas of its own for these, which were not compared with lycoris'."""

CANNOT_RUN = {
    "ia3": "lycoris cannot load an ia3 file back (its reader takes one tensor too few); use lokr with a small factor",
    "dylora": "lycoris does not load a dylora file back exactly; use locon",
    "tlora": "its rank follows the timestep, which lycoris is not told for Wan; use locon",
    "kohya": "it is not an algorithm; use locon",
    "dora": 'use "lora_type": "standard" with "use_dora": true',
}
CLASS_NAMES = {"Attention": "WanAttention"}
"""Names that configurations for other models carry, and the class of the stock Wan transformer that is meant."""


class LycorisModuleOptions(Options):
    """What one class of layers takes instead of the options of the whole network; unset follows the network."""

    algo: Algo | None = Field(None, description="Algorithm of these layers.")
    linear_dim: int | None = Field(None, ge=1, description="Rank (block size in diag-oft and boft) of these layers.")
    linear_alpha: float | None = Field(None, gt=0, description="Alpha of these layers; strength is alpha / rank.")
    factor: int | None = Field(None, ge=-1, description="LoKr factor of these layers.")
    full_matrix: bool | None = Field(None, description="LoKr: the larger factor of these layers is not decomposed.")
    decompose_both: bool | None = Field(None, description="LoKr: the smaller factor of these layers is decomposed too.")


class LycorisPreset(Options):
    """Which layers get an adapter."""

    target_module: Annotated[list[str], BeforeValidator(words)] = Field(
        ["WanAttention", "FeedForward"],
        description="Classes of the transformer; every linear layer inside gets an adapter.",
    )
    target_name: Annotated[list[str], BeforeValidator(words)] = Field(
        [], description="Names of layers, as regular expressions, that get an adapter as well."
    )
    exclude_name: Annotated[list[str], BeforeValidator(words)] = Field(
        [], description="Names of layers, as regular expressions, that get none."
    )
    use_fnmatch: bool = Field(False, description="Names are shell patterns (`*.to_q`) instead of regular expressions.")
    module_algo_map: dict[str, LycorisModuleOptions] = Field({}, description="Class -> its own options.")
    name_algo_map: dict[str, LycorisModuleOptions] = Field({}, description="Name pattern -> its own options.")

    @field_validator("target_module", "module_algo_map", mode="after")
    @classmethod
    def _classes_of_wan(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {CLASS_NAMES.get(name, name): options for name, options in value.items()}
        return list(dict.fromkeys(CLASS_NAMES.get(name, name) for name in value))


class LycorisOptions(Options):
    """A LyCORIS network, as `lycoris_config` describes it."""

    algo: Algo = Field(
        "lokr",
        description="`lokr`: Kronecker product; `loha`: Hadamard product; `lora` = `locon`: low rank; `full`: the "
        "whole difference; `diag-oft`, `boft`: rotations; `glora`: low rank on both sides.",
    )
    multiplier: float = Field(1.0, gt=0, description="Strength in training. The export has it folded in.")
    linear_dim: int = Field(16, ge=1, description="Rank; in diag-oft and boft the size of a rotated block.")
    linear_alpha: float = Field(
        default_factory=lambda data: float(data.get("linear_dim", 16)),
        gt=0,
        description="The adapter acts with strength alpha / rank. Default: the rank. The export has it folded in.",
    )
    factor: int = Field(-1, ge=-1, description="LoKr: size of the smaller factor; -1 splits evenly.")
    full_matrix: bool = Field(False, description="LoKr: the larger factor is not decomposed.")
    decompose_both: bool = Field(False, description="LoKr: the smaller factor is decomposed too.")
    constraint: float = Field(0.0, ge=0, description="diag-oft, boft: largest rotation; 0 is none.")
    apply_preset: LycorisPreset = Field(default_factory=LycorisPreset, description="Which layers, and their options.")

    @property
    def algos(self) -> set[str]:
        """Every algorithm in use."""
        preset = self.apply_preset
        overrides = (*preset.module_algo_map.values(), *preset.name_algo_map.values())
        return {self.algo, *(options.algo for options in overrides if options.algo)}

    @property
    def linear_in_scale(self) -> bool:
        """Whether half the strength is exactly half the change of every weight (not so for a product of rotations)."""
        return "boft" not in self.algos


_NO_DROPOUT = Absent("dropout would make student and teacher differ for reasons the critic cannot see; leave it out")
_PATH = Absent("it changes how lycoris computes, not what; the exact way is always taken here", harmless=True)
_NO_CONV = Absent("Wan's blocks have no convolutions", harmless=True)
_ABSENT: dict[str, Absent] = {
    **dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), _NO_DROPOUT),
    "bypass_mode": _PATH,
    **dict.fromkeys(("conv_dim", "conv_alpha", "use_tucker", "use_cp", "enable_conv"), _NO_CONV),
    **dict.fromkeys(("rescaled", "use_scalar", "train_norm", "block_size", "unbalanced_factorization", "rs_lora"),
                    Absent("it is not supported here; leave it out")),
    **dict.fromkeys(("dora_wd", "weight_decompose"), Absent('use "lora_type": "standard" with "use_dora": true')),
    **dict.fromkeys(("unet_target_module", "unet_target_name"), Absent("use target_module and target_name")),
    **dict.fromkeys(("text_encoder_target_module", "text_encoder_target_name"),
                    Absent("the text encoder stays frozen", harmless=True)),
    "lora_prefix": Absent("the export carries lycoris' own prefix", off=(None, "", "lycoris")),
}  # fmt: skip
_SHORT_NAMES = {"dim": "linear_dim", "rank": "linear_dim", "alpha": "linear_alpha"}


def read_lycoris(
    values: dict[str, Any],
    origins: dict[str, str],
    folders: tuple[Path, ...],
    problems: list[Problem],
    notices: list[str],
) -> None:
    """Puts the object in place of the path in `values`, with every key checked; drops it where it has no effect.

    `lycoris_config.factor` and the like, from the command line or the environment, change one key of it.
    """
    changes = {key: values.pop(key) for key in list(values) if key.startswith(f"{KEY}.")}
    written = values.get(KEY, {} if changes else None)
    if written is None:
        return
    place = origins.get(KEY) or origins[next(iter(changes))]
    values[KEY], origins[KEY] = written, place
    if str(values.get("lora_type", "standard")).strip().lower() != "lycoris":
        del values[KEY], origins[KEY]
        notices.append(f"{KEY} ({place}) has no effect: lora_type is standard.")
        return
    if isinstance(written, str):
        try:
            written, place = _object_or_file(written, place, folders)
        except UserError as error:
            problems += error.problems
            del values[KEY], origins[KEY]
            return
    if isinstance(written, dict):
        written = copy.deepcopy(written)
        for key, value in changes.items():
            _change(written, key.split(".")[1:], value)
            origins.pop(key)
        written = _checked(written, LycorisOptions, f"{KEY}.", place, problems, notices)
        try:
            LycorisOptions.model_validate(written)
        except ValidationError as error:
            for path, message, fix in refusals(error, LycorisOptions):
                problems.append(Problem(place, ".".join((KEY, *map(str, path))), message, fix))
            del values[KEY], origins[KEY]
            return
    values[KEY] = written  # what is no object is refused with the rest of the options


def _change(written: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = written.get(part)
        written[part] = inner = inner if isinstance(inner, dict) else {}
        written = inner
    written[path[-1]] = value


def _object_or_file(value: str, place: str, folders: tuple[Path, ...]) -> tuple[Any, str]:
    if value.lstrip().startswith("{"):
        return parse_json(value, place, KEY), place
    for folder in folders:
        if is_file(folder / Path(value).expanduser()):
            return read_json(folder / Path(value).expanduser(), value), value
    looked = ", ".join(str(folder / value) for folder in folders)
    raise UserError(
        f"found no file {value}; looked for {looked}", file=place, key=KEY, fix="check the path, or write the object"
    )


def _checked(
    written: Mapping[str, Any], model: type[BaseModel], prefix: str, place: str, problems: list[Problem],
    notices: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The keys that are options; what to say about the others goes to `problems` and `notices`."""
    kept: dict[str, Any] = {}
    for name, value in written.items():
        name = _SHORT_NAMES.get(name, name)
        if name not in model.model_fields:
            problem, notice = unknown_key(place, name, value, model.model_fields, _ABSENT, prefix)
            problems += [problem] if problem else []
            notices += [notice] if notice else []
        elif name == "algo" and str(value).strip().lower() in CANNOT_RUN:
            word = str(value).strip().lower()
            problems.append(Problem(place, prefix + name, f"found {value!r}, which cannot run here", CANNOT_RUN[word]))
        elif name == "apply_preset" and isinstance(value, Mapping):
            kept[name] = _checked(value, LycorisPreset, f"{prefix}{name}.", place, problems, notices)
        elif name.endswith("_algo_map") and isinstance(value, Mapping):
            kept[name] = {
                key: _checked(options, LycorisModuleOptions, f"{prefix}{name}.{key}.", place, problems, notices)
                if isinstance(options, Mapping) else options
                for key, options in value.items()
            }  # fmt: skip
        elif value is not None:
            kept[name] = value
    return kept


def lycoris_problems(options: LycorisOptions, base_precision: str) -> list[Problem]:
    """Combinations that cannot work, without their file."""
    problems = []
    weight_bound = sorted(options.algos & set(WEIGHT_ALGOS))
    if weight_bound and base_precision != "no_change":
        problems.append(
            Problem("", "base_model_precision",
                    f"found {base_precision}, but {', '.join(weight_bound)} acts on the base's own weights, which "
                    "are not there once they are quantised",
                    'set "base_model_precision": "no_change", or "algo": "lokr" in lycoris_config')
        )  # fmt: skip
    rotations = sorted(options.algos & set(ROTATIONS))
    if rotations and options.multiplier != 1:
        problems.append(
            Problem("", f"{KEY}.multiplier",
                    f"found {options.multiplier:g}, but the strength of {', '.join(rotations)} cannot be folded into "
                    "a file that is right at strength 1", "leave it out")
        )  # fmt: skip
    return problems
