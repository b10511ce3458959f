"""A run of the production code on a Wan with random weights, made on the device from its config: nothing to download.

What is not production here: where the weights and the batches come from. Roles, adapters, quantisation, method, losses,
optimizers and the loop are those of `simpletuner train`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import nn

from simpletuner_dmd.cli.assemble import Assembly
from simpletuner_dmd.cli.moving import STUDENT_ROLES, role_optimizers, student_average
from simpletuner_dmd.config import LoadedConfig, load
from simpletuner_dmd.flow import Batch, TextEmbedding
from simpletuner_dmd.training.ema import AveragedDenoiser
from simpletuner_dmd.training.tracking import Tracking
from simpletuner_dmd.training.trainer import Trainer, TrainerSettings
from simpletuner_dmd.wan import blueprint
from simpletuner_dmd.wan.quantisation import quantise
from simpletuner_dmd.wan.swap import BlockSwap

DMD = {"generator_update_interval": 5, "student_steps": 3, "real_score_guidance_scale": 3.5}


def configured(
    folder: Path, size: str, frames: int, network: Mapping[str, Any] | None = None, **options: Any
) -> LoadedConfig:
    """The configuration of a run on one prompt. network: its config where it is no published one."""
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {
        "model_family": "wan", "output_dir": str(folder / "output"), "validation_disable": True,
        "distillation_method": "dmd", "distillation_config": DMD, "cache_dir_text": str(folder / "text"), **options,
    }  # fmt: skip
    if network is not None:
        model = folder / "model"
        (model / "transformer").mkdir(parents=True, exist_ok=True)
        (model / "transformer" / "config.json").write_text(json.dumps(network), encoding="utf-8")
        written["pretrained_transformer_model_name_or_path"] = str(model / "transformer")
    if written["distillation_method"] is None:
        del written["distillation_method"], written["distillation_config"]
    (folder / "prompts.txt").write_text("a cat on a surfboard\n", encoding="utf-8")
    dataset = {"id": "prompts", "dataset_type": "prompts", "instance_data_dir": "prompts.txt", "resolution": size,
               "video": {"num_frames": frames}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "multidatabackend.json").write_text(json.dumps([dataset]), encoding="utf-8")
    return load([], config=str(folder / "config.json"), cwd=folder)


class RandomAssembly(Assembly):
    """The parts of a run; its networks have the shape that `network` says and weights that nobody trained."""

    def __init__(self, loaded: LoadedConfig, device: torch.device, network: Mapping[str, Any]) -> None:
        super().__init__(loaded, device)
        self._config = dict(network)

    @property
    def network(self) -> dict[str, Any]:
        return self._config

    def _fit_lines(self) -> list[str]:
        return []  # there is nothing of it on a disk

    def base_transformer(
        self, *, quantised: bool = True, swapped: bool = False, lines: list[str] | None = None
    ) -> nn.Module:
        precision = self.config.base_model_precision if quantised else "no_change"
        network = random_transformer(self._config, self.dtype, precision, self.device)
        if swapped and self.config.blocks_to_swap:
            BlockSwap(network, self.config.blocks_to_swap, self.device)
        return network

    def _full_network(self) -> nn.Module:
        return random_transformer(self._config, torch.float32, "no_change", self.device)


def random_transformer(
    config: Mapping[str, Any], dtype: torch.dtype, precision: str, device: torch.device
) -> nn.Module:
    """Built block by block on the device, each quantised before the next, so that the peak is the quantised size."""
    network: Any = blueprint.transformer(config, int(config["num_layers"]), dtype)
    blocks = network.blocks
    for block in blocks:
        _fill(block, device)
        quantise(_Blocks(block), precision, device)
    network.blocks = nn.ModuleList()
    network.rope = nn.Module()
    _fill(network, device)
    network.blocks = blocks
    network.rope = WanRotaryPosEmbed(
        config["attention_head_dim"], tuple(config["patch_size"]), config["rope_max_seq_len"]
    ).to(device)
    return network.requires_grad_(False)


class _Blocks(nn.Module):
    """One block, as the quantisation of a model finds it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])


@torch.no_grad()
def _fill(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


class _Samples:
    """The same random sample at every step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def micro_batch(self, step: int, micro: int, rank: int, **unused: int) -> Batch:
        return self.batch


def random_batch(assembly: Assembly, shape: tuple[int, int, int, int]) -> Batch:
    """On the CPU, as the data room hands it over."""
    config = assembly.config
    rows = torch.randn(1, config.tokenizer_max_length, int(assembly.network["text_dim"]))
    count = config.train_batch_size
    latents = torch.randn(count, *shape) if assembly.needs_latents else None
    text = TextEmbedding(rows.expand(count, -1, -1).contiguous())
    return Batch(tuple(range(count)), text, TextEmbedding(rows), shape, latents)


def train(
    assembly: Assembly, shape: tuple[int, int, int, int], steps: int, stepped: Callable[[dict[str, float]], None]
) -> Trainer:
    """Runs the production Trainer for `steps` steps; `stepped` gets the metrics of each."""
    config, device = assembly.config, assembly.device
    roles, _ = assembly.roles()
    average = student_average(config, roles)
    method = assembly.method(roles, None if average is None else AveragedDenoiser(roles.student, average))
    accelerator = Accelerator(cpu=device.type == "cpu")
    output = Path(config.output_dir)
    trainer = Trainer(
        TrainerSettings(output, steps, config.train_batch_size, config.gradient_accumulation_steps, config.seed,
                        checkpoint_interval=10**9, checkpoints_kept=1, validation_interval=10**9, device=device),
        method,
        role_optimizers(config, roles, method, steps),
        _Samples(random_batch(assembly, shape)),
        accelerator,
        Tracking(output),
        ema=average,
        averaged=STUDENT_ROLES,
    )  # fmt: skip
    trainer.stepped = stepped
    trainer.run()
    trainer.tracking.close()
    return trainer
