"""The expert of two that a run does not train: checked at the start, loaded while something is rendered, then dropped.

It is the teacher's own, or the student of a finished run of the other flavour (`other_expert_run`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner_dmd.cli.starting import AdapterMerge
from simpletuner_dmd.config import TrainConfig, UserError
from simpletuner_dmd.config.flavours import FLAVOURS, Flavour
from simpletuner_dmd.flow import Denoiser, Experts
from simpletuner_dmd.validation.sampling import HandedOver, Sampler, VideoSampler
from simpletuner_dmd.wan.attention import choose_attention
from simpletuner_dmd.wan.denoiser import WanDenoiser
from simpletuner_dmd.wan.loading import load_transformer
from simpletuner_dmd.wan.roles import Roles

if TYPE_CHECKING:
    from simpletuner_dmd.cli.assemble import Assembly

KEY = "other_expert_run"


@dataclass(frozen=True)
class Partner:
    """A finished run of the other expert. folder: its export. document: that export's distill.json."""

    folder: Path
    document: dict[str, Any]


def partner_of(config: TrainConfig, base_name: str) -> Partner | None:
    """The run named by `other_expert_run`; a UserError where it does not go together with this one."""
    if config.other_expert_run is None:
        return None
    given, other = Path(config.other_expert_run), _other(config.flavour)
    folder = next((place for place in (given / "export", given) if (place / "distill.json").is_file()), None)
    if folder is None:
        raise UserError(f"found no export at {given}: it has no distill.json", key=KEY,
                        fix=f"name the output or export folder of a finished run of {other.name}")  # fmt: skip
    document = json.loads((folder / "distill.json").read_text(encoding="utf-8"))
    ladder = list(config.student_timesteps())
    facts = {
        "expert": ((document.get("experts") or {}).get("expert"), other.expert),
        "base": (document["base"], base_name),
        "steps": (_rounded(document["ladder"]["timesteps"]), _rounded(ladder)),
        "renoise": (document["renoise"], config.distillation.transition if ladder else None),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise UserError(f"{folder / 'distill.json'}: found {name} {found}, expected {expected}: the two experts "
                            "make one video and must agree", key=KEY,
                            fix=f"name a run of {other.name} with the same base, ladder and renoise")  # fmt: skip
    if document["teacher_lora"] is not None:
        raise UserError(
            f"{folder / 'distill.json'}: its base had {document['teacher_lora']['file']} merged in, which is not "
            "merged again here",
            key=KEY,
            fix="merge it into a model folder and train from that",
        )
    return Partner(folder, document)


def _rounded(timesteps: list[float]) -> list[float]:
    return [round(timestep, 3) for timestep in timesteps]


def _other(flavour: Flavour) -> Flavour:
    assert flavour.partner is not None, f"{flavour.name} is one network"
    return FLAVOURS[flavour.partner]


def load_other(assembly: Assembly, partner: Partner | None) -> WanDenoiser:
    """The other expert in the precision of the run, on its device: the student of `partner`, or the teacher's own."""
    from diffusers import WanTransformer3DModel

    config = assembly.config
    if partner is not None and partner.document["model_type"] == "full":
        folder = partner.folder / "diffusers" / "transformer"
        network: Any = WanTransformer3DModel.from_pretrained(folder, dtype=assembly.dtype).requires_grad_(False)
    else:
        merge = None if partner is None else AdapterMerge(partner.folder, 1.0, KEY)
        source = assembly.source.other_expert(_other(config.flavour).transformer)
        network = load_transformer(source, assembly.dtype, assembly.storage(config.base_model_precision), merge)
    choose_attention(network, config.attention_mechanism, assembly.device)
    return WanDenoiser(network.to(assembly.device).eval(), None, None)


def paired(assembly: Assembly, own: Denoiser, other: Denoiser) -> Experts:
    """Both experts as one denoiser."""
    flavour = assembly.config.flavour
    assert flavour.boundary is not None
    high, low = (own, other) if flavour.expert == "high" else (other, own)
    return Experts(high, low, flavour.boundary)


@contextmanager
def whole_teacher(assembly: Assembly, own: Denoiser) -> Iterator[Denoiser]:
    """The teacher with both of its experts, where it has two."""
    if assembly.config.flavour.expert is None:
        yield own
        return
    with _for_a_while(assembly, None) as other:
        yield paired(assembly, own, other)


@contextmanager
def whole_student(assembly: Assembly, roles: Roles, sampler: Sampler) -> Iterator[tuple[Denoiser, VideoSampler]]:
    """(what is sampled, by which sampler: the one given). Without a finished partner the teacher's own other expert
    makes its part of the way in the teacher's many steps, so that the video shows what this one has learned."""
    if assembly.config.flavour.expert is None:
        yield assembly.sampled_student(roles), sampler
        return
    partner = assembly.partner
    with _for_a_while(assembly, partner) as other:
        if partner is not None or not sampler.schedule.ladder:
            yield paired(assembly, roles.student, other), sampler
        else:
            yield roles.student, HandedOver(sampler, other, assembly.teacher_sampler, assembly.known_noise)


@contextmanager
def _for_a_while(assembly: Assembly, partner: Partner | None) -> Iterator[WanDenoiser]:
    other = load_other(assembly, partner)
    try:
        yield other
    finally:
        del other
        gc.collect()
        if assembly.device.type == "cuda":
            torch.cuda.empty_cache()
