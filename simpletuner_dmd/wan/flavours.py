"""The published Wan models: `Flavour`, and the config.json of every part as its makers published it.

The files ship with the package, so that a plan can be made and a model folder be judged without any weights. This file
imports no torch.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from simpletuner_dmd.config.flavours import FLAVOURS, PARTS, Flavour, Part, flavour_of

__all__ = ["FLAVOURS", "PARTS", "Flavour", "Part", "flavour_of", "published_config"]


def published_config(flavour: Flavour, part: Part) -> dict[str, Any]:
    """The config of one part, ready for the stock class's `from_config`; the caller may change it.

    Raises KeyError for a part that the flavour does not have (transformer_2 of a model of one network).
    """
    config: dict[str, Any] = json.loads(_text(flavour.parts[part]))
    return config


@cache
def _text(name: str) -> str:
    return files("simpletuner_dmd.wan").joinpath("published", f"{name}.json").read_text(encoding="utf-8")
