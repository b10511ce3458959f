"""`simpletuner train`: prepares, trains, validates, exports, loads the export back, and says where everything is."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from simpletuner_dmd.cli.common import LAUNCHED, add_config_arguments, arguments_again, load_config

if TYPE_CHECKING:
    from simpletuner_dmd.config import LoadedConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when trained and exported, 130 when interrupted (a checkpoint is saved), 3 when a red
    light stopped it, 2 for a person's mistake."""
    loaded = load_config(args)
    if loaded.config.num_processes > 1 and LAUNCHED not in os.environ:
        examine_run(loaded)
        from simpletuner_dmd.training.launch import launch

        return launch(loaded.config.num_processes, arguments_again("train", args), {LAUNCHED: "1"})
    if LAUNCHED not in os.environ:
        _announce(loaded)
        examine_run(loaded)
    from simpletuner_dmd.cli.run import TrainingRun
    from simpletuner_dmd.config import UserError
    from simpletuner_dmd.training.launch import end_with_mistake

    try:
        return TrainingRun(loaded).go()
    except UserError as error:
        if LAUNCHED not in os.environ:
            raise
        return end_with_mistake(str(error))


def _announce(loaded: LoadedConfig) -> None:
    print(f"Configuration: {loaded.path}")
    for line in loaded.differences_from_defaults():
        print(f"  {line}")
    for notice in loaded.notices:
        print(f"  note: {notice}")


def examine_run(loaded: LoadedConfig) -> None:
    """Everything that can be known to fail is said before anything is loaded or written."""
    from simpletuner_dmd.cli.check import model_problems, output_problems
    from simpletuner_dmd.cli.check_data import folder_problem
    from simpletuner_dmd.config import UserError

    problems = [*model_problems(loaded), *output_problems(loaded)]
    problems += [problem for entry in loaded.datasets if (problem := folder_problem(entry, loaded.config))]
    if problems:
        raise UserError(problems)
