"""The settings of every distillation method, by the name that `distillation_method` gives it."""

from simpletuner_dmd.config.methods.base import DistillationOptions
from simpletuner_dmd.config.methods.blockwise import DiffusionForcingConfig, OdeInitConfig, SelfForcingConfig
from simpletuner_dmd.config.methods.critic import CriticOptions
from simpletuner_dmd.config.methods.dcm import DcmConfig
from simpletuner_dmd.config.methods.dmd import DmdConfig
from simpletuner_dmd.config.methods.lcm import LcmConfig
from simpletuner_dmd.config.methods.matching import MatchingOptions
from simpletuner_dmd.config.methods.pcm import PcmConfig
from simpletuner_dmd.config.methods.rcm import RcmConfig

METHODS: dict[str, type[DistillationOptions]] = {
    "dmd": DmdConfig,
    "lcm": LcmConfig,
    "pcm": PcmConfig,
    "dcm": DcmConfig,
    "self_forcing": SelfForcingConfig,
    "diffusion_forcing": DiffusionForcingConfig,
    "ode_init": OdeInitConfig,
    "rcm": RcmConfig,
}

__all__ = ["METHODS", "CriticOptions", "DistillationOptions", "DmdConfig", "MatchingOptions"]
