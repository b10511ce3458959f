"""What a configuration asks for that this machine cannot do. Shared by train and check; nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner_dmd.config import LoadedConfig, Problem


def machine_problems(loaded: LoadedConfig) -> list[Problem]:
    """Each with the file it came from, the reason and what to use instead."""
    import torch

    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.training.optimizers import check_runs_here

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_runs_here(loaded.config.optimizer, device)
    except UserError as error:
        return [replace(problem, file=loaded.origins.get(problem.key, "")) for problem in error.problems]
    return []
