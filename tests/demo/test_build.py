"""The script that made the tiny Wan still makes one: a pipeline folder that stock diffusers opens."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from simpletuner_dmd.demo.build import Effort, build
from simpletuner_dmd.demo.path import model_path


def test_the_build_script_makes_a_pipeline(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    build(tmp_path, seed=0, effort=Effort(vae_steps=(2, 2, 1), vae_clips=32, clips=32, transformer_steps=2))
    pipeline = WanPipeline.from_pretrained(tmp_path)
    shipped = WanPipeline.from_pretrained(model_path())
    assert dict(pipeline.transformer.config) == dict(shipped.transformer.config) | {
        "_name_or_path": pipeline.transformer.config._name_or_path
    }
    # The random text encoder follows from the seed alone, so it is the one that ships, bit for bit.
    for name, tensor in shipped.text_encoder.state_dict().items():
        assert torch.equal(tensor, pipeline.text_encoder.state_dict()[name]), name
    facts = json.loads((tmp_path / "built.json").read_text(encoding="utf-8"))
    assert set(json.loads((model_path() / "built.json").read_text(encoding="utf-8"))) <= set(facts)
