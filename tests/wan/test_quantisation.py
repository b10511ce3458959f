"""Every way to quantise, behind one door: layers, saved and restored, trained on, compared with the dense base."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from simpletuner_dmd.cli.main import main
from simpletuner_dmd.config import UserError
from simpletuner_dmd.demo.path import model_path
from simpletuner_dmd.wan import loading, schemes
from simpletuner_dmd.wan.loading import Storage, load_text_encoder, load_transformer, transformer_config
from simpletuner_dmd.wan.lycoris import LycorisSpec
from simpletuner_dmd.wan.model_cache import Entry
from simpletuner_dmd.wan.parity import SIGMAS, Parity, ParityRow, Probe
from simpletuner_dmd.wan.quantisation import dense_weight, linear_layers, quantise
from simpletuner_dmd.wan.roles import build_roles, self_test
from simpletuner_dmd.wan.schemes import SCHEMES, scheme_problem
from simpletuner_dmd.wan.sources import ModelSource
from simpletuner_dmd.wan.streaming import saved_tensors

from .test_lycoris import spec_of
from .tiny import LORA, latents, prompts, tiny_wan

CPU = torch.device("cpu")
SOURCE = ModelSource(*[str(model_path())] * 4)
ABSENT = {name for name, scheme in SCHEMES.items() if importlib.util.find_spec(scheme.module) is None}
# Relative error of a weight of normal numbers, from above.
WEIGHT_ERROR = {
    "int8-quanto": 0.01, "fp8-quanto": 0.04, "int4-quanto": 0.15, "int2-quanto": 0.6,
    "int8-torchao": 0.01, "fp8-torchao": 0.04, "nf4-bnb": 0.12, "int8-bnb": 0.01,
}  # fmt: skip
EVERY = [
    pytest.param(
        name,
        marks=[
            *([pytest.mark.skipif(name in ABSENT, reason=f"{SCHEMES[name].library} is not installed")]),
            # quanto compiles a kernel the first time a machine unpacks them, for a minute or more.
            *([pytest.mark.slow] if name in ("int4-quanto", "int2-quanto") else []),
        ],
    )
    for name in SCHEMES
]


def kinds(model: nn.Module) -> dict[str, nn.Module]:
    return dict(linear_layers(model))


@pytest.mark.parametrize("precision", EVERY)
def test_a_layer_is_saved_and_comes_back_bit_for_bit(precision: str, tmp_path: Path) -> None:
    scheme = SCHEMES[precision]
    assert scheme_problem(precision, CPU, "key") is None
    torch.manual_seed(0)
    layer = nn.Linear(256, 384).to(torch.bfloat16).requires_grad_(False)
    dense, x = layer.weight.clone(), torch.randn(3, 256, dtype=torch.bfloat16)
    made = scheme.quantise(layer)
    error = float((dense_weight(made).float() - dense.float()).norm() / dense.float().norm())
    assert 0 < error < WEIGHT_ERROR[precision]
    tensors, notes = scheme.save(made)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "layer.safetensors")
    taken = sum(tensor.nbytes for tensor in tensors.values())
    assert taken < (0.55 if "8" in precision else 0.35) * dense.nbytes
    from safetensors.torch import load_file

    with torch.device("meta"):
        empty = nn.Linear(256, 384, dtype=torch.bfloat16)
    back = scheme.restore(empty, load_file(tmp_path / "layer.safetensors"), notes)
    assert torch.equal(back(x), made(x)) and torch.equal(dense_weight(back), dense_weight(made))
    assert scheme.owns(back) and not any(parameter.requires_grad for parameter in back.parameters())


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_student_and_critic_train_on_a_base_in_every_scheme(precision: str, adapter: str) -> None:
    base = tiny_wan(dtype=torch.bfloat16)
    dense = {name: tensor.clone() for name, tensor in base.named_parameters()}
    assert quantise(base, precision) == 2 * 10
    for name, layer in linear_layers(base):
        assert SCHEMES[precision].owns(layer), f"{name} was not quantised"
    for name, parameter in base.named_parameters():
        if name in dense and not name.startswith("blocks.") and "norm" not in name:
            assert torch.equal(parameter, dense[name]), f"{name} is outside of the blocks and was changed"
    spec = LORA if adapter == "lora" else spec_of("lokr")
    assert isinstance(spec, LycorisSpec) or adapter == "lora"
    roles = build_roles(base, adapters={"student": spec, "critic": spec}, gradient_checkpointing=True)
    with roles.evaluating(), torch.no_grad():  # a validation before training must leave nothing behind
        roles.student.velocity(latents(), torch.full((2,), 0.7), prompts())
    lines = self_test(roles, latents(), prompts(), fresh=True)
    assert [line.split(": ")[1] for line in lines[:2]] == [
        "the student equals the teacher bit for bit", "the critic equals the teacher bit for bit",
    ]  # fmt: skip


@pytest.mark.parametrize("precision", EVERY)
def test_the_cache_gives_the_same_model_and_report_without_the_checkpoint(precision: str, tmp_path: Path) -> None:
    probe = Probe.of(transformer_config(SOURCE), 5.0)
    first, again = (Storage(precision, cache=tmp_path / "models", probe=probe) for _ in range(2))
    one = load_transformer(SOURCE, torch.bfloat16, first)
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "stream", lambda *arguments, **more: read.append("checkpoint"))
        two = load_transformer(SOURCE, torch.bfloat16, again)
    assert not read, "the checkpoint was read although the cache holds the model"
    assert torch.equal(probe.velocities(one), probe.velocities(two))
    assert first.parity is not None and again.parity == first.parity
    assert "is kept in" in first.lines[-1] and " GB)" in first.lines[-1]
    assert {name: parameter.dtype for name, parameter in one.named_parameters()} == {
        name: parameter.dtype for name, parameter in two.named_parameters()
    }


def entry_files(cache: Path) -> tuple[Path, Path]:
    (weights,), (document,) = cache.glob("*.safetensors"), cache.glob("*.json")
    return weights, document


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "no document", "half a document", "no weights"])
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    probe = Probe.of(transformer_config(SOURCE), 5.0)
    expected = probe.velocities(load_transformer(SOURCE, torch.bfloat16, Storage("int8-quanto", cache=tmp_path)))
    weights, document = entry_files(tmp_path)
    content = weights.read_bytes()
    if damage == "a flipped byte":
        weights.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "cut short":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "no document":
        document.unlink()
    elif damage == "half a document":
        document.write_text(document.read_text()[:50])
    else:
        weights.unlink()
    storage = Storage("int8-quanto", cache=tmp_path)
    assert torch.equal(probe.velocities(load_transformer(SOURCE, torch.bfloat16, storage)), expected)
    assert "is kept in" in storage.lines[-1]
    assert entry_files(tmp_path)[0].read_bytes() == content
    copied = Storage("int8-quanto", cache=tmp_path)
    load_transformer(SOURCE, torch.bfloat16, copied)
    assert "is read quantised from" in copied.lines[0]


def test_an_entry_is_of_one_model_scheme_library_and_fine_tune(tmp_path: Path) -> None:
    facts = {"part": "transformer", "scheme": "int8-quanto", "dtype": "bf16", "library": "optimum-quanto 0.2.7",
             "weights": "a", "merged": None}  # fmt: skip
    key = Entry(tmp_path, facts).key
    assert key == Entry(tmp_path, dict(facts)).key
    for name in facts:
        assert Entry(tmp_path, {**facts, name: "another"}).key != key, f"{name} is not part of the key"


def test_a_cache_that_cannot_be_written_is_a_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(path: Path, write: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("simpletuner_dmd.wan.model_cache.write_through", full)
    storage = Storage("int8-quanto", cache=tmp_path)
    model = load_transformer(SOURCE, torch.bfloat16, storage)
    assert "QLinear" in {type(layer).__name__ for layer in kinds(model).values()}
    assert len(storage.lines) == 1 and "No space left on device" in storage.lines[0]


def test_the_text_encoder_goes_through_the_same_door(tmp_path: Path) -> None:
    plain = load_text_encoder(SOURCE, torch.bfloat16)[1]
    models = [load_text_encoder(SOURCE, torch.bfloat16, Storage("int8-quanto", cache=tmp_path))[1] for _ in range(2)]
    tokens = torch.arange(3, 9)[None]
    expected = plain(tokens).last_hidden_state.float()
    rows = [model(tokens).last_hidden_state.float() for model in models]
    assert torch.equal(*rows)
    assert 0 < float((rows[0] - expected).norm() / expected.norm()) < 0.05
    quantised = {name for name, layer in linear_layers(models[0]) if type(layer).__name__ == "QLinear"}
    assert quantised == {name for name, _ in linear_layers(plain)} and len(quantised) > 5
    assert models[1].encoder.embed_tokens.weight is models[1].shared.weight  # type: ignore[union-attr]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_is_the_difference_of_two_whole_models() -> None:
    """The dense velocities were seen block by block while loading; here both models are there at once."""
    probe = Probe.of(transformer_config(SOURCE), 5.0)
    storage = Storage("int8-quanto", probe=probe)
    quantised = load_transformer(SOURCE, torch.bfloat16, storage)
    dense = load_transformer(SOURCE, torch.bfloat16)
    assert storage.parity == probe.compare("int8-quanto", probe.velocities(dense), probe.velocities(quantised))
    assert [row.sigma for row in storage.parity.rows] == list(SIGMAS)
    assert 1e-3 < storage.parity.worst < 0.05
    assert not any(line.startswith("warning") for line in storage.lines)


def test_errors_and_cosines_are_those_of_plain_numbers() -> None:
    probe = Probe(torch.zeros(1), torch.zeros(1), guidance=3.0)
    dense = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]).expand(5, 2, 2)
    moved = torch.tensor([[[3.0, 4.5], [1.0, 0.0]]]).expand(5, 2, 2)
    row = probe.compare("int8-quanto", dense, moved).rows[0]
    assert row.relative_error == pytest.approx(0.1)
    assert row.cosine == pytest.approx((9 + 18) / (5 * (9 + 20.25) ** 0.5))
    # v_u + 3 (v_c - v_u): (7, 12) and (7, 13.5)
    assert row.guided_relative_error == pytest.approx(1.5 / (49 + 144) ** 0.5)


def test_below_8_bits_there_is_a_warning_with_the_figure() -> None:
    row = ParityRow(0.5, 0.03, 0.99, 0.04, 0.99)
    assert "up to 3.0%" in Parity("nf4-bnb", 5.0, (row,)).lines()[-1]
    assert "warning" not in Parity("int8-quanto", 5.0, (row,)).lines()[-1]
    far = ParityRow(0.5, 0.3, 0.9, 0.4, 0.9)
    assert "up to 30.0%" in Parity("int8-quanto", 5.0, (far,)).lines()[-1]


# --- what cannot run here ---------------------------------------------------------------------------------------------


def test_a_library_that_is_not_there_is_a_sentence_before_any_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(schemes.importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    monkeypatch.setattr(loading, "stream", lambda *arguments, **more: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"base_model_precision: int8-torchao needs torchao(.|\n)*\[quantisation\]"):
        load_transformer(SOURCE, torch.bfloat16, Storage("int8-torchao"))


def test_a_layer_that_lets_no_gradient_through_is_no_way_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(schemes.Quanto):
        def quantise(self, layer: nn.Linear) -> nn.Module:
            class Detached(nn.Linear):
                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return nn.functional.linear(x.detach(), self.weight.requires_grad_(), self.bias)

            return Detached(128, 128, dtype=torch.bfloat16)

    monkeypatch.setitem(SCHEMES, "int8-quanto", Broken("qint8"))
    problem = scheme_problem("int8-quanto", CPU, "base_model_precision")
    assert problem is not None and "no gradient passes such a layer" in problem.message


def test_check_says_that_a_scheme_cannot_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        schemes.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    code = main(["check", "--json", "--example", "demo", "base_model_precision=nf4-bnb"])
    document = json.loads(capsys.readouterr().out)
    assert code == 2
    (problem,) = document["problems"]
    assert problem["key"] == "base_model_precision" and "bitsandbytes, which is not installed" in problem["message"]
    assert "pip install" in problem["fix"]
    assert any("below 8 bits" in notice for notice in document["notices"])


def test_saving_copies_nothing_large() -> None:
    base = tiny_wan(dtype=torch.bfloat16)
    quantise(base, "int8-quanto")
    tensors, _ = saved_tensors(base, SCHEMES["int8-quanto"])
    own = {parameter.data_ptr() for parameter in base.parameters()}
    large = {name: tensor for name, tensor in tensors.items() if tensor.numel() >= 4096 and "blocks." not in name}
    assert large and all(tensor.data_ptr() in own for tensor in large.values())
