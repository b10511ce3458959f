"""What a person may write: the schema of every option, finding and merging files, errors. No torch in this room."""

from simpletuner_dmd.config.databackend import DatasetEntry, TableOptions, VideoOptions
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.load import LoadedConfig, load
from simpletuner_dmd.config.methods import METHODS, CriticOptions, DistillationOptions, DmdConfig
from simpletuner_dmd.config.run_options import DEMO
from simpletuner_dmd.config.schema import TrainConfig, frames_4n1

__all__ = [
    "DEMO",
    "METHODS",
    "CriticOptions",
    "DatasetEntry",
    "DistillationOptions",
    "DmdConfig",
    "LoadedConfig",
    "Problem",
    "TableOptions",
    "TrainConfig",
    "UserError",
    "VideoOptions",
    "frames_4n1",
    "load",
]
