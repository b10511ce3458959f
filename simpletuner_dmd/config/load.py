"""`load`: finds the file, merges the layers, checks everything and reports all mistakes at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from simpletuner_dmd.config.coerce import frame_counts, means_none
from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.datasets import Datasets, complete, hold_out, needs_videos, read_entries, size_notices
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.layers import (
    ALIASES,
    NESTED,
    PREFIX,
    Layer,
    command_line_layer,
    environment_layer,
    file_layer,
    find_config,
    option_field,
    recipe_layer,
    take_selectors,
)
from simpletuner_dmd.config.lycoris import read_lycoris
from simpletuner_dmd.config.methods import METHODS
from simpletuner_dmd.config.mistakes import refusals, unknown_key
from simpletuner_dmd.config.prompts import read_prompts
from simpletuner_dmd.config.read import exists, is_file, read_json
from simpletuner_dmd.config.recipes import recipe_problems
from simpletuner_dmd.config.rules import combination_notices, cross_problems
from simpletuner_dmd.config.run_options import DEMO, is_weight_file
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.simpletuner_keys import ABSENT_KEYS, METHOD_ABSENT_KEYS
from simpletuner_dmd.config.starting import resolve_starts
from simpletuner_dmd.config.tread import KEY as TREAD
from simpletuner_dmd.config.tread import read_tread

DEFAULT = "default"
DATA_FILE = "multidatabackend.json"
MODEL_PATHS = (
    "pretrained_model_name_or_path",
    "pretrained_transformer_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_t5_model_name_or_path",
)
EMPTY_MEANS_NONE = {"resume_from_checkpoint"}
"""Options whose null is a choice of its own; everywhere else null means "not set"."""


@dataclass
class LoadedConfig:
    """A configuration that is complete and checked.

    origins: dotted key -> where its value came from; keys that are not in it have their default.
    datasets: the entries to train on, defaults filled in, folders absolute.
    validation_prompts: short name -> prompt.
    """

    config: TrainConfig
    path: Path | None
    origins: dict[str, str]
    datasets: list[DatasetEntry]
    text_embeds: DatasetEntry
    validation_prompts: dict[str, str]
    notices: list[str]
    folders: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def text_cache_dir(self) -> Path:
        assert self.text_embeds.cache_dir is not None, "filled in while loading"
        return Path(self.text_embeds.cache_dir)

    def resolve_path(self, value: str | Path) -> Path:
        """A path as the person meant it: from the working directory if it is there, else from the config file."""
        return resolve_path(value, self.folders)

    def options(self) -> dict[str, Any]:
        """Dotted key -> value, of every option that has a say in this run, as JSON would hold it."""
        return flat_options(self.config)

    def differences_from_defaults(self) -> list[str]:
        """One line for every option whose value is not its default: value, default, and where it was set."""
        defaults = flat_options(_default_config(self.config))
        lines = []
        for key, value in self.options().items():
            if key not in defaults or defaults[key] == value:
                continue
            line = f"{key} = {_short(value)}"
            if defaults[key] not in (None, "", []):
                line += f" (default {_short(defaults[key])})"
            lines.append(f"{line}, {self.origins.get(key, 'follows from other options')}")
        return lines

    def resolved_json(self) -> dict[str, Any]:
        """Every option with its value and origin, and the datasets: the content of config.resolved.json."""
        return {
            "config_file": None if self.path is None else str(self.path),
            "options": {
                key: {"value": value, "origin": self.origins.get(key, DEFAULT)} for key, value in self.options().items()
            },
            "datasets": [entry.model_dump(mode="json") for entry in (*self.datasets, self.text_embeds)],
        }


def load(
    argv: list[str] | None = None,
    config: str | None = None,
    env: str | None = None,
    example: str | None = None,
    environ: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
    demo_if_none: bool = False,
) -> LoadedConfig:
    """Reads, merges and checks a configuration.

    argv: overrides, as on the command line. config, env, example: what chooses the file; at most one.
    demo_if_none: with no overrides and no file found, the example `demo` is taken.
    Raises UserError with every mistake in config file, environment, command line and data file.
    """
    cwd = Path.cwd() if cwd is None else cwd
    overrides, chosen = take_selectors(list(argv or []))
    config, env, example = (
        given or chosen.get(name) for given, name in ((config, "config"), (env, "env"), (example, "example"))
    )
    notices: list[str] = []
    path, looked = find_config(config, env, example, cwd)
    if path is None and demo_if_none and not overrides and not (config or env):
        path, _ = find_config(None, None, DEMO, cwd)
        notices.append("No configuration found: running the example `demo`.")
    if path is None:
        raise _nothing_found(looked, cwd)
    folders = (cwd, path.parent)
    name = f"example {path.parent.name}" if example or notices else _display(path, cwd)

    layers = [
        file_layer(path, name, folders),
        environment_layer(environ, folders),
        command_line_layer(overrides, folders),
    ]
    merged = merge_options(layers, name, folders)
    options, values, origins, problems = merged.options, merged.values, merged.origins, merged.problems
    notices += merged.notices
    resolve_starts(options, origins, name, lambda value: resolve_path(value, folders), problems)
    datasets, data_file = _load_datasets(options, origins, name, folders, problems)
    if datasets is not None:
        complete(datasets, options, lambda value: resolve_path(value, folders), cwd)
        problems += datasets.problems + hold_out(options, datasets.entries, origins.get("eval_dataset_id", name))
        if not datasets.problems:
            problems += needs_videos(options, datasets.entries, data_file)
    prompts, prompt_notices = _load_prompts(options, origins, name, folders, problems)
    if problems:
        raise UserError(problems)

    assert datasets is not None and datasets.text_embeds is not None, "without a data file there is a problem"
    _note_adjustments(options, values, notices)
    notices += [
        *datasets.notices,
        *combination_notices(options),
        *size_notices(options, datasets.entries),
        *prompt_notices,
    ]
    notices += _absent_webhook(options, folders)
    return LoadedConfig(
        config=options, path=path, origins=origins, datasets=datasets.entries, text_embeds=datasets.text_embeds,
        validation_prompts=prompts, notices=notices, folders=folders,
    )  # fmt: skip


@dataclass
class Merged:
    """Options of several layers, before anything they point at is read. origins: as in `LoadedConfig`.

    Where there are problems, `options` has the defaults of what could not be used.
    """

    options: TrainConfig
    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[Problem]
    notices: list[str]


def merge_options(layers: list[Layer], name: str, folders: tuple[Path, ...] = ()) -> Merged:
    """Merges layers, later wins, over the recipe that they name. Raises UserError if there is no such recipe."""
    notices: list[str] = []
    lowest = recipe_layer(layers)
    layers = layers if lowest is None else [lowest, *layers]
    problems = [problem for layer in layers for problem in layer.problems]
    values, origins = _merge(layers)
    if lowest is not None:
        misfits = recipe_problems(str(values["recipe"]), values, origins)
        if misfits:  # what follows from its other numbers would be noise
            values = {key: value for key, value in values.items() if origins[key] != lowest.name}
        problems += misfits
    read_lycoris(values, origins, folders, problems, notices)
    _sort_out_unknown(values, origins, problems, notices)
    _read_routes(values, origins, problems)
    options = _build(values, origins, name, problems)
    return Merged(options, values, origins, problems, notices)


def resolve_path(value: str | Path, folders: tuple[Path, ...]) -> Path:
    """The first of `folders` in which the path exists; if it exists nowhere, as it stands in the first."""
    path = Path(value).expanduser()
    candidates = [folder / path for folder in folders]
    return next((found.resolve() for found in candidates if exists(found)), candidates[0].absolute())


def _nothing_found(looked: list[Path], cwd: Path) -> UserError:
    places = ", ".join(_display(place, cwd) for place in looked)
    return UserError(
        f"found no configuration; looked for {places} (from {cwd})",
        fix="name one with --config PATH or --env NAME, copy one with `simpletuner examples copy demo config/my-run`, "
        "or run the demo with `simpletuner train --example demo`",
    )


def _display(path: Path, cwd: Path) -> str:
    try:
        return str(path.relative_to(cwd))
    except ValueError:
        return str(path)


# --- merging and typing -----------------------------------------------------------------------------------------------


def _merge(layers: list[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Later layers win; null takes an option back to its default."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            option = option_field(key)
            unset = value is None or (option is not None and means_none(value, option.annotation)) or value == ""
            if unset and key == NESTED:
                for inner in [inner for inner in values if inner.startswith(NESTED + ".")]:
                    del values[inner], origins[inner]
            elif unset and key not in EMPTY_MEANS_NONE and (option is not None or value is None):
                values.pop(key, None)
                origins.pop(key, None)
            else:
                values[key] = None if unset and key in EMPTY_MEANS_NONE else value
                origins[key] = layer.places[key]
    return values, origins


def _sort_out_unknown(
    values: dict[str, Any], origins: dict[str, str], problems: list[Problem], notices: list[str]
) -> None:
    """Takes keys out that are no options, each with a problem or a notice."""
    method = values.get("distillation_method")
    for key in list(values):
        nested = key.startswith(NESTED + ".")
        if nested and method is not None and method not in METHODS:
            # The method itself is the problem to report; its settings cannot be judged.
            del values[key]
        elif option_field(key) is None or (nested and method is not None and not _belongs(key, method)):
            inner = key.removeprefix(NESTED + ".")
            known = METHODS[method or "dmd"].model_fields if nested else {**TrainConfig.model_fields, **ALIASES}
            absent = METHOD_ABSENT_KEYS if nested else ABSENT_KEYS
            prefix = NESTED + "." if nested else ""
            problem, notice = unknown_key(origins[key], inner, values.pop(key), known, absent, prefix)
            if problem and origins[key].startswith("environment") and problem.message == "is not a known option" \
                    and not problem.fix.startswith("did you mean"):  # fmt: skip
                problem, notice = (
                    None,
                    f"{PREFIX}{inner.upper()} in the environment is not an option and is left alone.",
                )
            problems += [problem] if problem else []
            notices += [notice] if notice else []
            origins.pop(key)
    if values.get("lr_scheduler") == "constant" and values.get("lr_warmup_steps") not in (None, 0, "0"):
        values["lr_scheduler"] = "constant_with_warmup"
        notices.append("lr_scheduler constant with lr_warmup_steps is read as constant_with_warmup.")


def _read_routes(values: dict[str, Any], origins: dict[str, str], problems: list[Problem]) -> None:
    """The routes of TREAD, read apart: their mistakes are named by the route and its key."""
    if TREAD in values:
        values[TREAD], mistakes = read_tread(values[TREAD], origins[TREAD])
        problems += mistakes


def _belongs(key: str, method: str) -> bool:
    return key.removeprefix(NESTED + ".") in METHODS[method].model_fields


def _build(values: dict[str, Any], origins: dict[str, str], name: str, problems: list[Problem]) -> TrainConfig:
    """A TrainConfig of what can be used; what cannot is added to `problems` and takes its default."""
    remaining = dict(values)
    refused: set[str] = set()
    while True:
        try:
            config = TrainConfig.model_validate(_nested(remaining))
            break
        except ValidationError as error:
            before = len(remaining)
            for path, message, fix in refusals(error, TrainConfig):
                key = ".".join(map(str, path))
                gone = [k for k in remaining if k == key or k.startswith(key + ".")]
                if not gone:
                    continue  # a value that follows from another one, which is reported itself
                place = origins.get(key) or next((o for k, o in origins.items() if k.startswith(key + ".")), name)
                if key == NESTED:
                    message = "is given, but distillation_method is not"
                    fix = 'add "distillation_method": "dmd", or remove distillation_config'
                if not (key == NESTED and "distillation_method" in refused):
                    problems.append(Problem(place, key, message, fix))
                refused.add(key)
                for k in gone:
                    del remaining[k]
            assert len(remaining) < before, f"a default does not pass its own check: {error}"
    for problem in cross_problems(config):
        if not (problem.key in refused or problem.key.split(".")[0] in refused):
            place = origins.get(problem.key, name)
            problems.append(Problem(place, problem.key, problem.message, problem.fix))
    return config


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith(NESTED + "."):
            result.setdefault(NESTED, {})[key.removeprefix(NESTED + ".")] = value
        else:
            result[key] = value
    return result


def _note_adjustments(config: TrainConfig, values: dict[str, Any], notices: list[str]) -> None:
    """Values that were changed on the way in, because Wan cannot take them as written."""
    written = values.get("validation_num_video_frames")
    if written is not None and frame_counts(written) != config.validation_num_video_frames:
        notices.append(
            f"validation_num_video_frames {written} -> "
            f"{', '.join(map(str, config.validation_num_video_frames))}: Wan takes 4n+1 frames."
        )


# --- what the options point at ----------------------------------------------------------------------------------------


def _load_datasets(
    config: TrainConfig, origins: dict[str, str], name: str, folders: tuple[Path, ...], problems: list[Problem]
) -> tuple[Datasets | None, str]:
    """Reads the data file; also makes paths of local model folders absolute."""
    _resolve_models(config, origins, name, folders, problems)
    written = config.data_backend_config
    if written is None:
        path = folders[-1] / DATA_FILE
        if not is_file(path):
            problems.append(
                Problem(name, "data_backend_config", f"is not set, and there is no {DATA_FILE} beside the config file",
                        'add "data_backend_config": "path/to/multidatabackend.json"')
            )  # fmt: skip
            return None, ""
    else:
        path = resolve_path(written, folders)
        if not is_file(path):
            looked = " and ".join(dict.fromkeys(str(folder / Path(written).expanduser()) for folder in folders))
            problems.append(
                Problem(origins.get("data_backend_config", name), "data_backend_config",
                        f"found no file {written}; looked for {looked}", "correct the path, or write that file")
            )  # fmt: skip
            return None, written
    shown = written or _display(path, folders[0])
    try:
        return read_entries(read_json(path, shown), shown), shown
    except UserError as error:
        problems += error.problems
        return None, shown


def _resolve_models(
    config: TrainConfig, origins: dict[str, str], name: str, folders: tuple[Path, ...], problems: list[Problem]
) -> None:
    for key in MODEL_PATHS:
        value = getattr(config, key)
        if value is None or value == DEMO:
            continue
        path = resolve_path(value, folders)
        if exists(path):
            setattr(config, key, str(path))
        elif _can_only_be_a_path(value):
            problems.append(
                Problem(origins.get(key, name), key, f"there is no {value}",
                        'name a folder that exists, or a Hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"')
            )  # fmt: skip


def _can_only_be_a_path(value: str) -> bool:
    """A Hub id is `name` or `owner/name`."""
    if is_weight_file(value):
        return True
    return value.startswith((".", "/", "~", "\\")) or value.endswith("/") or value.count("/") > 1 or "\\" in value


def _load_prompts(
    config: TrainConfig, origins: dict[str, str], name: str, folders: tuple[Path, ...], problems: list[Problem]
) -> tuple[dict[str, str], list[str]]:
    try:
        return read_prompts(config, lambda value: resolve_path(value, folders))
    except UserError as error:
        problems += error.problems
        return {}, []


def _absent_webhook(config: TrainConfig, folders: tuple[Path, ...]) -> list[str]:
    written = config.webhook_config
    if not isinstance(written, str):
        return []
    path = resolve_path(written, folders)
    if is_file(path):
        config.webhook_config = str(path)
        return []
    config.webhook_config = None
    return [f"webhook_config: there is no {written}; nobody is told how the run goes."]


# --- reports ----------------------------------------------------------------------------------------------------------


def _without_addresses(webhook: Any) -> Any:
    """The address of a webhook is its password: what is printed, kept and sent to trackers does not hold it."""
    if isinstance(webhook, list):
        return [_without_addresses(entry) for entry in webhook]
    if not isinstance(webhook, dict):
        return webhook
    secret = ("webhook_url", "callback_url", "auth_token")
    return {key: "***" if key in secret else value for key, value in webhook.items()}


def flat_options(model: BaseModel) -> dict[str, Any]:
    """Dotted key -> value, as JSON would hold it, without the addresses of webhooks."""
    flat: dict[str, Any] = {}
    for key, value in model.model_dump(mode="json").items():
        if key == "webhook_config":
            value = _without_addresses(value)
        if key == NESTED and isinstance(value, dict):
            flat.update({f"{NESTED}.{inner}": item for inner, item in value.items()})
        else:
            flat[key] = value
    return flat


def _default_config(config: TrainConfig) -> TrainConfig:
    """What a run of this kind would be if nothing but its kind were written."""
    return TrainConfig(
        model_flavour=config.model_flavour,
        model_type=config.model_type,
        distillation_method=config.distillation_method,
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
