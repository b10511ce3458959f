"""Fixtures of the data room's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.buckets import LatentGeometry
from tests.data.clips import Encoders, make_config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_config(tmp_path)


@pytest.fixture
def encoders() -> Encoders:
    return Encoders(LatentGeometry())
