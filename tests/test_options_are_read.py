"""No option is accepted and then ignored: each one is read somewhere, as an attribute, by the code that acts on it."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from simpletuner_dmd.config import METHODS, DatasetEntry, TableOptions, TrainConfig, VideoOptions
from simpletuner_dmd.config.coerce import allowed_words
from simpletuner_dmd.config.explain import ONLY_SHOW, attributes_read
from simpletuner_dmd.config.lycoris import LycorisOptions, LycorisPreset
from simpletuner_dmd.config.methods.dmd import BLOCK_KEYS
from simpletuner_dmd.config.tread import TreadConfig, TreadRoute

PACKAGE = Path(__file__).parents[1] / "simpletuner_dmd"

# One value is allowed in this version: checking it is the whole effect.
ONE_VALUE = {"model_family"}
# They rule block-wise students, which do not exist yet; writing them is answered at start.
ANSWERED_AT_START = set(BLOCK_KEYS)
# Options that the config room itself turns into something, and the file that reads them.
READ_IN_CONFIG = {
    "strict_epoch_limit": "rules.py",
    "evaluation_type": "rules.py",
    "student_steps": "methods/base.py",
    "dmd_denoising_steps": "methods/base.py",
    "warp_denoising_steps": "methods/base.py",
    "phases": "methods/pcm.py",
    "phase_edges": "methods/pcm.py",
    "denoising_steps": "methods/dcm.py",
    "multiphase": "methods/dcm.py",
    "split_index": "methods/dcm.py",
    "sigma_split": "methods/dcm.py",
    "discriminator_head_stride": "methods/consistency.py",
    "data_backend_config": "load.py",
    "validation_prompt": "prompts.py",
    "validation_prompt_library": "prompts.py",
    "disabled": "datasets.py",
    "default": "datasets.py",
    "distillation_config": "schema.py",
    "routes": "tread.py",
    "selection_ratio": "tread.py",
    "start_layer_idx": "tread.py",
    "end_layer_idx": "tread.py",
    "cache_dir_text": "datasets.py",
    "cache_dir": "load.py",
    "optimizer_config": "optimizer_options.py",
}


CONFIG = PACKAGE / "config"
READ = attributes_read(
    path
    for path in PACKAGE.rglob("*.py")
    if CONFIG not in path.parents and path.relative_to(PACKAGE).as_posix() not in ONLY_SHOW
)
OPTIONS = [
    (model, name)
    for model in (
        TrainConfig,
        *METHODS.values(),
        LycorisOptions,
        LycorisPreset,
        TreadConfig,
        TreadRoute,
        DatasetEntry,
        TableOptions,
        VideoOptions,
    )  # fmt: skip
    for name in model.model_fields
]


@pytest.mark.parametrize(("model", "name"), OPTIONS, ids=[f"{model.__name__}.{name}" for model, name in OPTIONS])
def test_option_is_read(model: type[BaseModel], name: str) -> None:
    if name in ONE_VALUE:
        assert len(allowed_words(model.model_fields[name].annotation)) == 1
    elif name in READ_IN_CONFIG:
        assert name in attributes_read([CONFIG / READ_IN_CONFIG[name]])
    elif name not in ANSWERED_AT_START:
        assert name in READ, f"{model.__name__}.{name} is accepted, and nothing reads it"
