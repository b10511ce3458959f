"""SimpleTuner's config.json, config.toml and config.env: its keys are this tool's, with a few exceptions."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from simpletuner_dmd.cli.convert.result import NESTED, STANDARD, Converted, number
from simpletuner_dmd.config.coerce import TRUE_WORDS
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.config.layers import ALIASES, INVERTED, bare
from simpletuner_dmd.config.methods import METHODS
from simpletuner_dmd.config.read import is_file, read_json
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.config.simpletuner_keys import ABSENT_KEYS, METHOD_ABSENT_KEYS

# Names in config.env that are not the option's own in capitals.
VARIABLES = {
    "MODEL_NAME": "pretrained_model_name_or_path",
    "MAX_NUM_STEPS": "max_train_steps",
    "NUM_EPOCHS": "num_train_epochs",
    "LR_SCHEDULE": "lr_scheduler",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "DATALOADER_CONFIG": "data_backend_config",
    "HUB_MODEL_NAME": "hub_model_id",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "TRAINING_SEED": "seed",
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines",
    "DELETE_ERRORED_IMAGES": "delete_problematic_images",
    "WEBHOOK_CONFIG": "webhook_config",
}
EXTRA = ("TRAINER_EXTRA_ARGS", "DEBUG_EXTRA_ARGS")
OTHER_MODELS = ("FLUX", "STABLE_", "PIXART", "KOLORS", "HUNYUAN", "SMOLDIT", "SD3", "DEEPFLOYD", "SANA", "LTX")
OFF = ("", "0", "false", "none", "no")
SAME_NOTATION = "the same notation, 1 is off; copied from a FastVideo or Self-Forcing script it should be one more"


def convert(content: dict[str, Any], path: Path) -> Converted:
    found = Converted("SimpleTuner")
    options = _of_variables(content, found) if path.suffix == ".env" else {bare(key): v for key, v in content.items()}
    method = options.get("distillation_method")
    for key, value in options.items():
        if key == "distillation_config":
            _method(found, value, str(method), path)
        elif key == "data_backend_config":
            _data(found, value, path)
        else:
            _option(found, key, value)
    return found


def _of_variables(content: dict[str, Any], found: Converted) -> dict[str, Any]:
    """The options of a config.env, those of its extra arguments included."""
    options: dict[str, Any] = {}
    for name, value in content.items():
        key = VARIABLES.get(name, name.lower())
        if name in EXTRA:
            for word in shlex.split(value):
                option, separator, given = word.partition("=")
                options[bare(option)] = given if separator else True
        elif key in TrainConfig.model_fields or key in ALIASES or key in ABSENT_KEYS:
            options[key] = value
        elif value.strip().lower() not in OFF and not name.startswith(OTHER_MODELS):
            found.leave(name, value, "this variable sets no option here")
    return options


def _option(found: Converted, key: str, value: Any) -> None:
    ours = ALIASES.get(key, key)
    if ours in TrainConfig.model_fields:
        if key in INVERTED:
            found.change(key, value, ours, str(value).strip().lower() not in TRUE_WORDS, "the opposite word")
        elif key != ours:
            # SimpleTuner has a switch and a path where this tool has one key; the path is what a person means.
            if not (ours in found.values and str(value).strip().lower() in OFF):
                found.change(key, value, ours, value)
        elif not (key in found.values and str(value).strip().lower() in OFF):
            found.keep(key, value)
    elif key in ABSENT_KEYS:
        absent = ABSENT_KEYS[key]
        found.leave(key, value, "off, as here, it does nothing" if absent.is_off(value) else absent.use)
    else:
        found.leave(key, value, "no option of that name is known")


def _method(found: Converted, value: Any, method: str, path: Path) -> None:
    """The settings of the method, its guidance in the ordinary notation."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("{") else read_json(_beside(value, path))
        except json.JSONDecodeError as error:
            raise UserError("is not valid JSON", file=str(path), key="distillation_config", fix="correct it") from error
    if not isinstance(value, dict):
        return
    for name in ("distillation_config", method):
        if set(value) == {name}:
            value = value[name]
    fields = METHODS[method].model_fields if method in METHODS else {}
    for key, item in value.items():
        amount = number(item)
        if key == "distill_cfg" and amount is not None:
            found.change(f"{NESTED}{key}", item, NESTED + "real_score_guidance_scale", amount + 1, STANDARD)
        elif key == "real_score_guidance_scale" and amount is not None:
            found.change(f"{NESTED}{key}", item, NESTED + key, amount, SAME_NOTATION)
        elif key == "euler_steps" and "euler_timesteps" in fields:
            found.change(f"{NESTED}{key}", item, NESTED + "euler_timesteps", item)
        elif key == "mode" and item == "fine":
            found.change(f"{NESTED}{key}", item, NESTED + key, "detail")
        elif key == "shift" and amount is not None:
            found.change(f"{NESTED}{key}", item, "flow_schedule_shift", amount)
        elif key in ("w_min", "w_max") and amount is not None:
            found.change(f"{NESTED}{key}", item, f"{NESTED}guidance_{key[2:]}", amount + 1, STANDARD)
        elif key in fields:
            found.keep(NESTED + key, item)
        elif key in METHOD_ABSENT_KEYS:
            found.leave(f"{NESTED}{key}", item, METHOD_ABSENT_KEYS[key].use)
        else:
            found.leave(f"{NESTED}{key}", item, f"{method} has no such setting here")


def _data(found: Converted, value: Any, path: Path) -> None:
    """The datasets of the file that is named; without it, the name stays."""
    file = _beside(str(value), path)
    if not is_file(file):
        found.leave(
            "data_backend_config", value, "there is no such file; name the data: instance_data_dir=... or prompts=..."
        )
        return
    content = read_json(file)
    entries = content if isinstance(content, list) else [content]
    found.datasets = [entry for entry in entries if isinstance(entry, dict)]
    found.changed.append((f"data_backend_config {value}", f"multidatabackend.json: {len(found.datasets)} entries",
                          "copied beside the new config.json; their keys are read there as they are"))  # fmt: skip


def _beside(written: str, path: Path) -> Path:
    """A path of the file, from here or from the folder it is in, or two above (config/NAME/config.json)."""
    places = [
        Path(written),
        path.parent / written,
        *(parent / written for parent in list(path.absolute().parents)[1:4]),
    ]
    return next((place for place in places if is_file(place)), places[0])
