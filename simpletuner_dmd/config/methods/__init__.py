"""The settings of every distillation method, by the name that `distillation_method` gives it."""

from simpletuner_dmd.config.methods.base import DistillationOptions
from simpletuner_dmd.config.methods.critic import CriticOptions
from simpletuner_dmd.config.methods.dmd import DmdConfig

METHODS: dict[str, type[DistillationOptions]] = {
    "dmd": DmdConfig,
}

__all__ = ["METHODS", "CriticOptions", "DistillationOptions", "DmdConfig"]
