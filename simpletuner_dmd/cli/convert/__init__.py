"""Configurations of other tools, read into options of this one, with every change said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpletuner_dmd.cli.convert import fastvideo, self_forcing, simpletuner
from simpletuner_dmd.cli.convert.files import read_any
from simpletuner_dmd.cli.convert.result import Converted
from simpletuner_dmd.config.errors import UserError

__all__ = ["Converted", "convert"]

FASTVIDEO_SCRIPT = ("fastvideo", "dmd_denoising_steps", "num_latent_t")


def convert(path: Path) -> Converted:
    """Reads a configuration of SimpleTuner (.json, .toml, .env), FastVideo (.yaml, a script) or Self-Forcing (.yaml).

    Raises UserError if the file cannot be read, or is none of these.
    """
    content = read_any(path)
    kind = _kind(content, path)
    if kind is None:
        raise UserError(
            "is no configuration of SimpleTuner, FastVideo or Self-Forcing", file=str(path),
            fix="name SimpleTuner's config.json, config.toml or config.env, FastVideo's script or .yaml, or "
            "Self-Forcing's .yaml",
        )  # fmt: skip
    found: Converted = {
        "SimpleTuner": simpletuner.convert, "FastVideo": fastvideo.convert, "Self-Forcing": self_forcing.convert
    }[kind](content, path)  # fmt: skip
    found.settle()
    return found


def _kind(content: dict[str, Any], path: Path) -> str | None:
    if path.suffix in (".json", ".toml", ".env"):
        return "SimpleTuner"
    if "denoising_step_list" in content or "distribution_loss" in content or "generator_ckpt" in content:
        return "Self-Forcing"
    if "method" in content or "training" in content or any(key in content for key in FASTVIDEO_SCRIPT[1:]):
        return "FastVideo"
    return "SimpleTuner" if "model_family" in content or "model_type" in content else None
