"""A model that is another flavour is refused by name; the flavour itself and a custom Wan are not."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from simpletuner_dmd.config import UserError
from simpletuner_dmd.wan.fit import ModelConfigs, check_fit
from simpletuner_dmd.wan.flavours import FLAVOURS, Flavour, published_config

NAMES = {"transformer": "model/transformer/config.json", "vae": "model/vae/config.json",
         "text_encoder": "model/text_encoder/config.json", "index": "model/model_index.json"}  # fmt: skip
ONE: dict[str, Any] = {"_class_name": "WanPipeline"}
TWO = {**ONE, "transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}


def model_of(flavour: Flavour, **changes: Any) -> ModelConfigs:
    parts: dict[str, Any] = {
        "transformer": published_config(flavour, flavour.transformer) | changes.pop("transformer", {}),
        "vae": published_config(flavour, "vae"),
        "text_encoder": published_config(flavour, "text_encoder"),
        "index": TWO if flavour.expert else ONE,
    }
    return ModelConfigs(**parts | changes, names=NAMES)


def same_model(one: Flavour, other: Flavour) -> bool:
    return (one.parts["transformer"], one.boundary) == (other.parts["transformer"], other.boundary)


@pytest.mark.parametrize(("wanted", "given"), [*product(FLAVOURS.values(), FLAVOURS.values())],
                         ids=lambda flavour: flavour.name)  # fmt: skip
def test_every_published_model_fits_its_own_flavours_alone(wanted: Flavour, given: Flavour) -> None:
    if same_model(wanted, given):
        assert check_fit(wanted, model_of(given)) is None
        return
    with pytest.raises(UserError) as caught:
        check_fit(wanted, model_of(given))
    (problem,) = caught.value.problems
    assert "model/" in problem.message and wanted.name in problem.message
    assert f'"{given.name}"' in problem.fix or "t2v-14b-2.2-high" in problem.fix


def test_the_message_names_file_key_found_expected_and_the_flavour_that_fits() -> None:
    with pytest.raises(UserError) as caught:
        check_fit(FLAVOURS["t2v-480p-1.3b-2.1"], model_of(FLAVOURS["t2v-480p-14b-2.1"]))
    (problem,) = caught.value.problems
    assert problem.message.startswith(
        "model/transformer/config.json: found num_layers 40, expected 30 for t2v-480p-1.3b-2.1"
    )
    assert '"t2v-480p-14b-2.1"' in problem.fix and problem.key == "model_flavour"
    with pytest.raises(UserError, match='found in_channels 36, expected 16 for t2v-480p-14b-2.1; it is "i2v-14b-2.1"'):
        check_fit(FLAVOURS["t2v-480p-14b-2.1"], model_of(FLAVOURS["i2v-14b-2.1"]))


CUSTOM = {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}


def test_a_custom_wan_is_said_and_trains() -> None:
    flavour = FLAVOURS["t2v-480p-1.3b-2.1"]
    line = check_fit(flavour, model_of(flavour, transformer=CUSTOM))
    assert line is not None and "a custom Wan (num_layers 2, num_attention_heads 2" in line


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"transformer": {"_class_name": "WanVACETransformer3DModel"}}, "_class_name WanVACETransformer3DModel"),
        ({"transformer": {**CUSTOM, "in_channels": 36}}, "in_channels 36, expected 16"),
        ({"vae": published_config(FLAVOURS["ti2v-5b-2.2"], "vae")}, "vae/config.json: found z_dim 48, expected 16"),
        ({"text_encoder": {"d_model": 64}}, "text_encoder/config.json: found d_model 64, expected 4096"),
        ({"index": TWO}, "model_index.json: transformer_2 is there"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, Any], found: str) -> None:
    flavour = FLAVOURS["t2v-480p-14b-2.1"]
    with pytest.raises(UserError, match=found):
        check_fit(flavour, model_of(flavour, **changes))


def test_an_experts_boundary_is_the_models() -> None:
    flavour = FLAVOURS["t2v-14b-2.2-low"]
    with pytest.raises(UserError, match="boundary_ratio 0.9, expected 0.875"):
        check_fit(flavour, model_of(flavour, index={**TWO, "boundary_ratio": 0.9}))
    assert check_fit(flavour, model_of(flavour, index={})) is None  # a transformer's folder alone has no index
