"""The prompts that validation renders: the person's own, a file of them, or a small built-in set."""

from __future__ import annotations

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


def read_prompts(config: TrainConfig, resolve: Callable[[str], Path]) -> tuple[dict[str, str], list[str]]:
    """(short name -> prompt, notices). Raises UserError if a prompt file is there and cannot be used."""
    prompts: dict[str, str] = {}
    notices: list[str] = []
    library = config.validation_prompt_library
    if library is True:
        prompts.update(BUILT_IN)
    elif isinstance(library, str):
        path = resolve(library)
        if is_file(path):
            prompts.update(_prompts_of(read_json(path, library), library))
        else:
            notices.append(f"validation_prompt_library: there is no {library}; its prompts are not rendered.")
    if config.validation_prompt:
        prompts[OWN_PROMPT] = config.validation_prompt
    return prompts, notices


def _prompts_of(content: Any, file: str) -> dict[str, str]:
    if not isinstance(content, dict):
        raise UserError("must hold a JSON object of short names and prompts", file=file, fix='{"cat": "a cat runs"}')
    prompts, problems = {}, []
    for name, value in content.items():
        text = value.get("prompt") if isinstance(value, dict) else value
        if isinstance(text, str) and text.strip():
            prompts[name] = text
        else:
            problems.append(Problem(file, name, "must be a prompt in quotes", f'"{name}": "what the video shows"'))
    if problems:
        raise UserError(problems)
    return prompts
