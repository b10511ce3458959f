"""The prompts that validation renders: the person's own, a file of them, or a small built-in set."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.read import is_file, read_json
from simpletuner_dmd.config.schema import TrainConfig

OWN_PROMPT = "validation"

BUILT_IN = {
    "cat-boxing": "Two anthropomorphic cats in boxing gear and bright gloves fight on a spotlit stage",
    "surf-dog": "A golden retriever rides a surfboard on a small wave at sunset, water drops in the air",
    "city-rain": "A woman with a red umbrella walks through a neon-lit street in the rain, the camera follows her",
    "steam-train": "A steam train crosses a stone viaduct in the mountains, smoke drifting, aerial view",
    "pouring-tea": "Close-up of tea being poured from a clay pot into a white cup, steam rising, soft morning light",
    "dancer": "A dancer in a flowing blue dress spins slowly in an empty theatre, dust in the beam of a lamp",
}


MOTION = {
    "horse-gallop": "A brown horse gallops along a beach through shallow water, the camera moves beside it",
    "skateboard": "A teenager on a skateboard jumps down a flight of stairs and rolls on, street in daylight",
    "waterfall": "Water falls over black rocks into a pool, spray rises, leaves tremble in the wind",
    "juggler": "A street performer juggles five burning torches at night in front of a crowd",
    "train-ride": "The view from the side window of a fast train, fields and houses rush past",
    "dog-fetch": "A border collie runs after a ball across a lawn, catches it in the air and runs back",
}
LIBRARIES = {"general": BUILT_IN, "motion": MOTION}
"""Built-in sets by name; `true` is the first."""


def read_prompts(config: TrainConfig, resolve: Callable[[str], Path]) -> tuple[dict[str, str], list[str]]:
    """(short name -> prompt, notices), the person's own prompt first: it is the one that the export shows.

    Raises UserError if a prompt file is there and cannot be used.
    """
    prompts: dict[str, str] = {}
    notices: list[str] = []
    if config.validation_prompt:
        prompts[OWN_PROMPT] = config.validation_prompt
    library = config.validation_prompt_library
    if library is True:
        prompts.update(BUILT_IN)
    elif isinstance(library, str) and library in LIBRARIES:
        prompts.update(LIBRARIES[library])
    elif isinstance(library, str):
        path = resolve(library)
        if is_file(path):
            for name, prompt in _prompts_of(read_json(path, library), library).items():
                prompts[f"{name}-of-library" if name in prompts else name] = prompt
        else:
            notices.append(
                f"validation_prompt_library: there is no {library}, and no built-in set of that name "
                f"({', '.join(LIBRARIES)}); its prompts are not rendered."
            )
    return prompts, notices


def file_name(name: str) -> str:
    """A short name as part of a file's name on any system."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "prompt"


def _prompts_of(content: Any, file: str) -> dict[str, str]:
    if not isinstance(content, dict):
        raise UserError("must hold a JSON object of short names and prompts", file=file, fix='{"cat": "a cat runs"}')
    prompts, problems = {}, []
    files: dict[str, str] = {}
    for name, value in content.items():
        text = value.get("prompt") if isinstance(value, dict) and set(value) == {"prompt"} else value
        if not isinstance(text, str) or not text.strip():
            problems.append(Problem(file, name, "must be a prompt in quotes", f'"{name}": "what the video shows"'))
        elif (other := files.setdefault(file_name(name).lower(), name)) != name:
            problems.append(Problem(file, name, f"its videos would have the file name of {other}'s", "rename one"))
        else:
            prompts[name] = text
    if problems:
        raise UserError(problems)
    return prompts
