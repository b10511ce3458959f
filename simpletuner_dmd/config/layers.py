"""The layers a configuration is merged from: file, environment, command line; and where the file is looked for.

Inside, `distillation_config` is spread out into dotted keys, so that every layer can change one key of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.coerce import FALSE_WORDS, TRUE_WORDS, is_boolean
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.methods import METHODS
from simpletuner_dmd.config.read import is_file, parse_json, read_json
from simpletuner_dmd.config.recipes import recipe
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.tread import KEY as TREAD

COMMAND_LINE = "command line"
ENVIRONMENT = "environment"
PREFIX = "SIMPLETUNER_"
NESTED = "distillation_config"
NO_OBJECT = {"", "none", "null"}

ALIASES = {
    "checkpointing_steps": "checkpoint_step_interval",
    "validation_steps": "validation_step_interval",
    "user_prompt_library": "validation_prompt_library",
    "save_total_limit": "checkpoints_total_limit",
    "pretrained_transformer_name_or_path": "pretrained_transformer_model_name_or_path",
    "ema_warmup_steps": "ema_start_step",
    "musubi_blocks_to_swap": "blocks_to_swap",
    "ignore_final_epochs": "strict_epoch_limit",
}
INVERTED = {"ignore_final_epochs"}
SELECTORS = ("config", "env", "example")
"""Written as `env=NAME` among the overrides, as SimpleTuner's users do, they choose the file."""

# Variables of the same prefix that steer SimpleTuner's launcher and are no options.
NOT_OPTIONS = (
    "PLATFORM", "ENV", "ENVIRONMENT", "CONFIG_BACKEND", "CONFIG_DIR", "LOG_LEVEL", "JOB_ID", "ALLOW_MODIFYING_BSZ",
    "LORA_DROPOUT_FORCE_ENABLED", "PROCESS_GROUP_TIMEOUT_SECONDS", "DISABLE_ACCELERATOR", "SCHEDULER_VERBOSE",
    "PUBLISH_FINAL_ARTIFACTS", "SSL_NO_VERIFY", "ENABLE_FP8_OPTIMIZERS", "MAXIMUM_IMAGE_SIZE_OVERRIDE",
)  # fmt: skip

BARE_OPTION = re.compile(r"(--)?[A-Za-z][\w.\-]*=.*", re.DOTALL)


@dataclass
class Layer:
    """Options from one place: dotted key -> value, and where each was written."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, key: str, value: Any, place: str | None = None, folders: tuple[Path, ...] = ()) -> None:
        """Takes one option, under its own name or an alias; JSON objects for `distillation_config` are spread out."""
        place = place or self.name
        written, key = key, ALIASES.get(key, key)
        if written in INVERTED:
            value = _inverted(value)
        if key == NESTED:
            self._add_nested(value, place, folders)
            return
        if key == TREAD:
            try:
                value, place = _unwrapped(key, value, place, folders)
            except UserError as error:
                self.problems += error.problems
                return
        if key in self.values and self.values[key] != value:
            if key == "validation_prompt_library" and value in (False, None, "false"):
                return  # SimpleTuner has two keys here; the built-in library being off does not unset the user's own
            if not (key == "validation_prompt_library" and self.values[key] in (False, None, "false")):
                self.problems.append(
                    Problem(
                        place, written, f"is written twice with different values (it is the same as {key})", "keep one"
                    )
                )
                return
        self.values[key] = value
        self.places[key] = place

    def _add_nested(self, value: Any, place: str, folders: tuple[Path, ...]) -> None:
        if isinstance(value, str) and value.strip().lower() not in NO_OBJECT:
            try:
                value, place = _object_or_file(value, place, folders, NESTED)
            except UserError as error:
                self.problems += error.problems
                return
        if value is None or value == "" or isinstance(value, str):
            self.values[NESTED], self.places[NESTED] = None, place
            return
        if isinstance(value, dict) and set(value) == {NESTED}:
            value = value[NESTED]
        if isinstance(value, dict) and set(value) == {"dmd"}:
            value = value["dmd"]
        if not isinstance(value, dict):
            self.problems.append(
                Problem(place, NESTED, "must be an object of settings, or the path of a JSON file that holds one",
                        'for example "distillation_config": {"dmd_denoising_steps": "1000,757,522"}')
            )  # fmt: skip
            return
        for inner, item in value.items():
            self.values[f"{NESTED}.{bare(inner)}"] = item
            self.places[f"{NESTED}.{bare(inner)}"] = place


def _unwrapped(key: str, value: Any, place: str, folders: tuple[Path, ...]) -> tuple[Any, str]:
    """The object itself, where it was written as text, as a file's path, or inside an object of its own name."""
    if isinstance(value, str) and value.strip().lower() not in NO_OBJECT:
        value, place = _object_or_file(value, place, folders, key)
    if isinstance(value, dict) and set(value) == {key}:
        value = value[key]
    return value, place


def bare(key: str) -> str:
    """A key without the leading dashes that SimpleTuner's files may have."""
    return key.removeprefix("--")


def _inverted(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    word = str(value).strip().lower()
    if word in TRUE_WORDS:
        return False
    return True if word in FALSE_WORDS else value


def _object_or_file(value: str, place: str, folders: tuple[Path, ...], key: str) -> tuple[Any, str]:
    if value.lstrip().startswith("{"):
        return parse_json(value, place, key), place
    for folder in folders:
        if is_file(folder / value):
            return read_json(folder / value, value), value
    looked = ", ".join(str(folder / value) for folder in folders)
    raise UserError(f"found no file {value}; looked for {looked}", file=place, key=key, fix="check the path")


# --- the file ---------------------------------------------------------------------------------------------------------


def examples_folder() -> Path:
    return Path(__file__).parent / "examples"


def example_names() -> list[str]:
    """The examples that come with the package."""
    return sorted(path.parent.name for path in examples_folder().glob("*/config.json"))


def find_config(config: str | None, env: str | None, example: str | None, cwd: Path) -> tuple[Path | None, list[Path]]:
    """The config file and every place that was looked at, in order. Raises UserError if more than one way is chosen."""
    chosen = [f"--{name} {value}" for name, value in zip(SELECTORS, (config, env, example), strict=True) if value]
    if len(chosen) > 1:
        raise UserError(
            f"{' and '.join(chosen)} both choose the configuration", file=COMMAND_LINE, fix="give one of them"
        )
    if example:
        if example not in example_names():
            raise UserError(
                f"there is no example {example!r}", file=COMMAND_LINE, key="--example",
                fix=f"choose one of: {', '.join(example_names())}",
            )  # fmt: skip
        return examples_folder() / example / "config.json", []
    if config:
        path = cwd / Path(config).expanduser()
        places = [path / "config.json"] if path.is_dir() else [path]
    elif env:
        places = [cwd / "config" / env / "config.json"]
    else:
        places = [cwd / "config" / "config.json", cwd / "config.json"]
    return next((place for place in places if is_file(place)), None), places


def file_layer(path: Path, name: str, folders: tuple[Path, ...]) -> Layer:
    """The options of a config file. Raises UserError if it cannot be read or is not an object."""
    content = read_json(path, name)
    if not isinstance(content, dict):
        raise UserError(
            f"must hold one JSON object {{...}} of options, not {_kind(content)}", file=name,
            fix="datasets go to the file that data_backend_config names",
        )  # fmt: skip
    layer = Layer(name)
    for key, value in content.items():
        layer.add(bare(key), value, folders=folders)
    return layer


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"


def options_layer(values: Mapping[str, Any], name: str, folders: tuple[Path, ...] = ()) -> Layer:
    """Options that are not in a file yet, as a file would hold them."""
    layer = Layer(name)
    for key, value in values.items():
        layer.add(bare(key), value, folders=folders)
    return layer


# --- recipes ----------------------------------------------------------------------------------------------------------

INSTEAD: tuple[tuple[frozenset[str], ...], ...] = (
    (
        frozenset({f"{NESTED}.student_steps"}),
        frozenset({f"{NESTED}.dmd_denoising_steps", f"{NESTED}.warp_denoising_steps"}),
        frozenset({f"{NESTED}.denoising_steps"}),
    ),
    (frozenset({f"{NESTED}.phases"}), frozenset({f"{NESTED}.phase_edges"})),
    (frozenset({f"{NESTED}.split_index"}), frozenset({f"{NESTED}.sigma_split"})),
    (frozenset({"max_train_steps"}), frozenset({"num_train_epochs"})),
    (frozenset({"lora_rank", "lora_alpha"}), frozenset({"lycoris_config"})),
)
"""Options that say the same in different ways: one that a person writes takes the place of a recipe's other."""


def recipe_layer(layers: list[Layer]) -> Layer | None:
    """What the recipe says that the last of `layers` names, less what is said there in another way.

    Raises UserError if there is no such recipe.
    """
    naming = next((layer for layer in reversed(layers) if layer.values.get("recipe") not in (None, "", "none")), None)
    if naming is None:
        return None
    name = str(naming.values["recipe"])
    try:
        chosen = recipe(name)
    except UserError as error:
        problem = error.problems[0]
        raise UserError(problem.message, file=naming.places["recipe"], key="recipe", fix=problem.fix) from error
    written = {key for layer in layers for key, value in layer.values.items() if value not in (0, "0")}
    layer = Layer(f"recipe {name}")
    for key, value in chosen.options.items():
        if not any(
            key in one and written & other for ways in INSTEAD for one in ways for other in ways if one != other
        ):
            layer.add(key, value)
    return layer


# --- environment and command line -------------------------------------------------------------------------------------


def environment_layer(environ: Mapping[str, str], folders: tuple[Path, ...]) -> Layer:
    """SIMPLETUNER_LEARNING_RATE, SIMPLETUNER_DISTILLATION_CONFIG__FAKE_SCORE_LR."""
    layer = Layer(ENVIRONMENT)
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        if name != variable and name not in NOT_OPTIONS:
            layer.add(name.lower().replace("__", "."), environ[variable], f"{ENVIRONMENT} {variable}", folders)
    return layer


def take_selectors(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Splits `env=NAME`, `example=NAME`, `config=PATH` from the other overrides."""
    chosen: dict[str, str] = {}
    rest: list[str] = []
    for token in argv:
        name, separator, value = token.partition("=")
        if separator and name in SELECTORS:
            chosen[name] = value
        else:
            rest.append(token)
    return rest, chosen


def command_line_layer(argv: list[str], folders: tuple[Path, ...]) -> Layer:
    """`--key value`, `--key=value`, `key=value`, and bare `--flag` for booleans."""
    layer = Layer(COMMAND_LINE)
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if "=" in token and BARE_OPTION.fullmatch(token):
            key, _, value = token.partition("=")
            _override(layer, key, value, folders)
        elif token.startswith("--") and len(token) > 2:
            key = _key(token)
            boolean = _is_boolean_option(key)
            following = tokens[0] if tokens else None
            if boolean and (following is None or following.strip().lower() not in TRUE_WORDS | FALSE_WORDS | {"none"}):
                # `--validation_prompt_library prompts.json`: an option that takes more than true and false.
                if boolean == "also" and following is not None and not _looks_like_option(following):
                    _override(layer, key, tokens.pop(0), folders)
                else:
                    _override(layer, key, True, folders)
            elif following is None or following.startswith("--"):
                layer.problems.append(
                    Problem(COMMAND_LINE, token, "needs a value", f"write {token}=VALUE, or leave it out")
                )
            else:
                _override(layer, key, tokens.pop(0), folders)
        else:
            layer.problems.append(
                Problem(
                    COMMAND_LINE, token, "is not an option", "write options as --key value, --key=value or key=value"
                )
            )
    return layer


def _key(token: str) -> str:
    return bare(token).replace("-", "_")


def _looks_like_option(token: str) -> bool:
    return token.startswith("--") or BARE_OPTION.fullmatch(token) is not None


def _override(layer: Layer, key: str, value: Any, folders: tuple[Path, ...]) -> None:
    """The command line is read from left to right: the last of two overrides wins."""
    canonical = ALIASES.get(_key(key), _key(key))
    layer.values.pop(canonical, None)
    layer.add(_key(key), value, folders=folders)


def _is_boolean_option(key: str) -> str:
    """ "" for an option without true and false, "only" or "also" for one with."""
    if key in INVERTED:
        return "only"
    option = option_field(ALIASES.get(key, key))
    if option is None or not is_boolean(option.annotation):
        return ""
    return "only" if option.annotation is bool else "also"


def option_field(key: str) -> Any:
    """The pydantic field of a dotted key, or None if there is no such option."""
    if key.startswith(NESTED + "."):
        # Which method is meant is not known yet; a key that several methods have means the same in each.
        inner = key.removeprefix(NESTED + ".")
        return next((method.model_fields[inner] for method in METHODS.values() if inner in method.model_fields), None)
    return TrainConfig.model_fields.get(key)
