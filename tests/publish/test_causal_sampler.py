"""sampler.py of a causal student, the file a user runs, against the sampler of training."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner_dmd.flow import Schedule
from simpletuner_dmd.publish.causal_sampler import causal_sampler_file
from simpletuner_dmd.publish.fresh_process import _load_sampler
from simpletuner_dmd.validation.sampling import BlockSampling, Sampler
from simpletuner_dmd.wan.causal import CausalWanDenoiser, Window
from tests.wan.tiny import CHANNELS, prompts, tiny_wan

from .conftest import SDE3, make_info

SEED, FRAMES = 5, 7
SETTINGS = [
    ("sde", BlockSampling(2)),
    ("ode", BlockSampling(3)),
    ("sde", BlockSampling(2, context_noise=100.0)),
    ("ode", BlockSampling(2, independent_first_frame=True)),
    ("sde", BlockSampling(1, sink_frames=1, local_attn_frames=3)),
    ("ode", BlockSampling(2, True, 50.0, 1, 4)),
]


def shipped(folder: Path, schedule: Schedule, renoise: str, blocks: BlockSampling) -> Any:
    path = folder / "sampler.py"
    path.write_text(causal_sampler_file(make_info(schedule, renoise, blocks=blocks), blocks))
    return _load_sampler(path)


@pytest.mark.parametrize(("renoise", "blocks"), SETTINGS)
def test_the_shipped_file_samples_what_training_does(tmp_path: Path, renoise: str, blocks: BlockSampling) -> None:
    network, text, shape = tiny_wan().eval(), prompts(1), (1, CHANNELS, FRAMES, 4, 6)
    trained = CausalWanDenoiser(
        copy.deepcopy(network), None, None, blocks=lambda frames: blocks.plan(frames).blocks,
        window=Window(blocks.sink_frames, blocks.local_attn_frames),
    )  # fmt: skip
    device = torch.device("cpu")
    expected = Sampler(SDE3, renoise, blocks=blocks)(trained, text, text, shape, SEED, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        parts = list(shipped(tmp_path, SDE3, renoise, blocks).blocks_of(network, torch.randn(shape), text.rows_BLD))
    assert [part.shape[2] for part in parts] == [stop - start for start, stop in blocks.plan(FRAMES).blocks]
    error = float((torch.cat(parts, 2) - expected).abs().max() / expected.square().mean().sqrt())
    assert error < 1e-6, error


def test_each_setting_matters(tmp_path: Path) -> None:
    """What the test above compares depends on each of its settings."""
    network, text, noise = tiny_wan().eval(), prompts(1), torch.randn(1, CHANNELS, FRAMES, 4, 6)
    videos = []
    for number, (renoise, blocks) in enumerate([("ode", BlockSampling(2)), *SETTINGS[2:]]):
        (tmp_path / str(number)).mkdir()
        sampler = shipped(tmp_path / str(number), SDE3, renoise, blocks)
        torch.manual_seed(SEED)
        videos.append(torch.cat(list(sampler.blocks_of(network, noise, text.rows_BLD)), 2))
    for first in range(len(videos)):
        for second in range(first):
            assert (videos[first] - videos[second]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["lora", "full"])
@pytest.mark.parametrize("adapter", ["standard", "lycoris"])
def test_the_shipped_file_is_stock(model_type: str, adapter: str) -> None:
    blocks = BlockSampling(2)
    tree = ast.parse(causal_sampler_file(make_info(blocks=blocks, model_type=model_type, adapter=adapter), blocks))
    imports = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
               for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    own = {"lycoris"} if (model_type, adapter) == ("lora", "lycoris") else set()
    assert {str(name).partition(".")[0] for name in imports} == {"sys", "pathlib", "torch", "diffusers"} | own
