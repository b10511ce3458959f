"""What is counted on the meta device, against closed forms, and against the same computation in a real process."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner_dmd.wan import blueprint
from simpletuner_dmd.wan.adapters import AdapterSpec
from simpletuner_dmd.wan.flavours import FLAVOURS, published_config
from simpletuner_dmd.wan.roles import build_roles
from simpletuner_dmd.wan.schemes import SCHEMES
from simpletuner_dmd.wan.shadow import Observation, Shadow, cast_products, stored_bytes
from tests.wan.tiny import prompts, tiny_wan

ROWS, WIDTH = 1000, 64


def watched(compute: Any, *held: torch.Tensor) -> Observation:
    shadow = Shadow([], held)
    with shadow.watching():
        compute()
    return shadow.seen


def test_what_is_freed_counts_no_longer() -> None:
    x, weight = torch.empty(ROWS, WIDTH, device="meta"), torch.empty(WIDTH, WIDTH, device="meta")

    def chain() -> None:
        y = x
        for _ in range(5):
            y = y @ weight.t()  # the old y and the new one: a view of the weight is not counted

    seen = watched(chain, x, weight)
    assert seen.peak == 2 * ROWS * WIDTH * 4
    assert seen.flops == 5 * 2 * ROWS * WIDTH * WIDTH


def test_attention_is_counted_as_a_kernel_does_it() -> None:
    query = torch.empty(1, 2, ROWS, WIDTH, device="meta", dtype=torch.bfloat16)
    seen = watched(lambda: nn.functional.scaled_dot_product_attention(query, query, query), query)
    assert seen.flops == 4 * 2 * ROWS * ROWS * WIDTH
    assert seen.peak < 2 * query.numel() * 2, "no quadratic matrix"


def test_numbers_that_are_asked_for_are_answered() -> None:
    x = torch.empty(3, device="meta")
    answers: list[Any] = []
    watched(lambda: answers.extend([float(x.sum()), bool((x > 0).any()), x.cpu().shape]), x)
    assert answers == [1.0, True, torch.Size([3])]


@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_is_weighed_without_its_library(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes per weight of the linear layers in a block, their scales included."""
    for library in ("torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, library, None)
    each = {"int4-quanto": 0.53, "int2-quanto": 0.28, "nf4-bnb": 0.516}.get(precision, 1.0)
    config = published_config(FLAVOURS["t2v-480p-1.3b-2.1"], "transformer")
    two, three = (
        blueprint.weights_of(blueprint.transformer(config, depth, torch.bfloat16, precision)) for depth in (2, 3)
    )
    width, hidden = 1536, 8960
    assert three - two == pytest.approx(each * (8 * width**2 + 2 * width * hidden), rel=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blueprint_weighs_what_the_model_weighs(dtype: torch.dtype) -> None:
    real = tiny_wan(dtype=dtype)
    config = dict(real.config)  # type: ignore[arg-type]
    planned = blueprint.transformer(config, 2, dtype)
    # `.to(bfloat16)` also rounds what from_pretrained keeps in fp32.
    kept = sum(parameter.numel() * 2 for parameter in planned.parameters() if parameter.dtype != dtype)
    assert blueprint.weights_of(planned) == stored_bytes(real.parameters()) + kept


@pytest.mark.parametrize(("name", "billions"), [("t2v-480p-1.3b-2.1", 1.42), ("t2v-480p-14b-2.1", 14.29)])
def test_published_sizes(name: str, billions: float) -> None:
    config = published_config(FLAVOURS[name], "transformer")
    two, three = (blueprint.weights_of(blueprint.transformer(config, depth, torch.float32)) for depth in (2, 3))
    assert (two + (config["num_layers"] - 2) * (three - two)) / 4e9 == pytest.approx(billions, rel=0.005)


def test_the_text_encoder_is_counted_with_one_table() -> None:
    config = published_config(FLAVOURS["t2v-480p-1.3b-2.1"], "text_encoder")
    assert blueprint.weights_of(blueprint.text_encoder(config, torch.bfloat16)) / 2e9 == pytest.approx(5.68, rel=0.005)


def of_depth(depth: int, full: bool = False) -> Observation:
    """A forward and backward of a student on a shared base, or with weights of its own under autocast."""
    config = dict(tiny_wan().config)  # type: ignore[arg-type]
    base = blueprint.transformer(config, depth, torch.float32)
    own = {}
    if full:
        own = {"student": blueprint.transformer(config, depth, torch.float32)}
        cast_products(own["student"], torch.bfloat16)
    with blueprint.META:
        adapters = {} if full else {"student": AdapterSpec(8, 8.0)}
        roles = build_roles(base, adapters=adapters, full=own, gradient_checkpointing=True)
    parameters = [parameter for _, parameter in roles.parameters["student"]]
    shadow = Shadow(roles.transformers(), parameters)
    with shadow.watching():
        x_t = torch.empty(1, 4, 6, 16, 24, device="meta")
        text = prompts(1).to("meta")
        loss = roles.student.velocity(x_t, torch.full((1,), 0.5, device="meta"), text).pow(2).mean()
        shadow.begin_backward()
        loss.backward(inputs=parameters)
        shadow.end_backward()
    return shadow.seen


@pytest.mark.parametrize("full", [False, True])
def test_two_shallow_networks_tell_of_a_deep_one(full: bool) -> None:
    found = of_depth(2, full).deeper(of_depth(3, full), 7)
    exact = of_depth(7, full)
    assert found.peak == pytest.approx(exact.peak, rel=0.01)
    assert found.flops == pytest.approx(exact.flops, rel=0.01)
