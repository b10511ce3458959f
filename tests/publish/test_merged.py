"""The base with adapters in its weights, file by file; a LoRA taken out of the difference again."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from simpletuner_dmd.config import UserError
from simpletuner_dmd.publish import fresh_process, lycoris
from simpletuner_dmd.publish.dialects import comfyui_module, to_comfyui
from simpletuner_dmd.publish.extract import extract_lora, factors
from simpletuner_dmd.publish.merged import MergedBase
from simpletuner_dmd.publish.read_adapter import AdapterFile, read_adapter
from simpletuner_dmd.wan.sources import ModelSource

from .conftest import ALPHA, RANK, merged
from .test_dialects import comfyui_load, deltas
from .test_experts import alphas_of, changed, lycoris_network


def source_of(folder: Path) -> ModelSource:
    return ModelSource(*[str(folder)] * 4)


def folded(lora, alpha=ALPHA):
    return {name: t * (alpha / RANK if ".lora_B." in name else 1) for name, t in lora.items()}


@pytest.fixture(scope="module")
def sharded(base_folder, tmp_path_factory):
    """The base in several files, as large ones come."""
    folder = tmp_path_factory.mktemp("sharded")
    model = WanTransformer3DModel.from_pretrained(base_folder, subfolder="transformer", dtype=torch.float32)
    model.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("files", ["one", "several"])
def test_merging_gives_the_weights_by_hand(tmp_path, base_folder, sharded, lora, files):
    adapter = AdapterFile(Path("student"), "lora", folded(lora))
    base = MergedBase(source_of(base_folder if files == "one" else sharded), [(adapter, 0.5), (adapter, 0.5)])
    base.write(tmp_path)
    found = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    expected = merged(base_folder, lora, ALPHA / RANK).state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lokr", "full"])
def test_a_lycoris_network_is_merged_without_the_base_in_memory(tmp_path, base_folder, kind):
    tensors, changes = lycoris_network(kind, 3)
    tensors = lycoris.folded(tensors, alphas_of(tensors), 1.0)
    MergedBase(source_of(base_folder), [(AdapterFile(Path("student"), "lycoris", tensors), 1.0)]).write(tmp_path)
    found = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in changed(base_folder, changes).state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_another_model_is_named(tmp_path, base_folder):
    other = {
        "blocks.7.attn1.to_q.lora_A.weight": torch.zeros(1, 48),
        "blocks.7.attn1.to_q.lora_B.weight": torch.zeros(48, 1),
    }
    with pytest.raises(UserError, match=r"blocks\.7"):
        MergedBase(source_of(base_folder), [(AdapterFile(Path("other"), "lora", other), 1.0)])
    with pytest.raises(UserError, match="no transformer folder"):
        MergedBase(source_of(tmp_path), [])


def test_extraction_finds_a_lora_again(base_folder, lora):
    """What was a LoRA of that rank comes back without loss; at half the rank the error is the exact one."""
    student, base = merged(base_folder, lora, ALPHA / RANK).state_dict(), MergedBase(source_of(base_folder), [])

    def tensors():
        return (entry for file in base.files for entry in base.tensors(file))

    found = extract_lora(student, tensors(), RANK)
    assert found.relative_error < 1e-5 and found.left_out == 0
    wanted = deltas(lora, ALPHA / RANK)
    for name, delta in deltas(found.tensors, 1.0).items():
        torch.testing.assert_close(delta, wanted.get(name, torch.zeros_like(delta)), rtol=1e-4, atol=1e-5)
    half = extract_lora(student, tensors(), 2)
    spectra = [torch.linalg.svdvals(delta.double()) for delta in wanted.values()]
    lost, whole = (sum(float((s[start:] ** 2).sum()) for s in spectra) for start in (2, 0))
    assert half.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert half.worst_layer in wanted and half.worst_error >= half.relative_error
    assert {t.shape[0 if ".lora_A." in name else 1] for name, t in half.tensors.items()} == {2}


def test_what_no_lora_carries_is_counted(base_folder):
    base = MergedBase(source_of(base_folder), [])
    student = dict(entry for file in base.files for entry in base.tensors(file))
    student["scale_shift_table"] = student["scale_shift_table"] + 1
    found = extract_lora(student, ((name, t) for file in base.files for name, t in base.tensors(file)), 2)
    assert (found.relative_error, found.left_out) == (0.0, 1.0)


def test_the_randomised_decomposition_is_near_the_exact_one_and_repeats():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(200, 30, generator=generator) @ torch.randn(30, 300, generator=generator)
    up, down = factors(change, 8)
    exact = torch.linalg.svdvals(change)[8:].norm()
    assert (change - up @ down).norm() < 1.001 * exact
    again = factors(change, 8)
    assert torch.equal(again[0], up) and torch.equal(again[1], down)


@pytest.mark.parametrize("form", ["folded", "alpha beside", "alpha is the rank"])
def test_a_comfyui_style_loader_gives_one_change_of_weights(tmp_path, lora, form):
    """Wan's own names, alpha present or folded: by ComfyUI's rules and by ours."""
    file = dict(to_comfyui(lora, rank=RANK, alpha=ALPHA if form != "alpha beside" else RANK))
    if form != "folded":
        value = ALPHA if form == "alpha beside" else RANK
        file |= {f"{name.split('.lora_')[0]}.alpha": torch.tensor(float(value)) for name in list(file)}
    trained = deltas(lora, ALPHA / RANK)
    patches, not_loaded = comfyui_load(file, [f"{comfyui_module(module)}.weight" for module in trained])
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in file.items()}, tmp_path / "file.safetensors")
    ours = deltas(read_adapter(tmp_path / "file.safetensors", "init_lora").tensors, 1.0)
    assert not not_loaded and ours.keys() == trained.keys() and len(patches) == len(trained)
    for module, delta in trained.items():
        torch.testing.assert_close(patches[f"{comfyui_module(module)}.weight"], delta, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[module], delta, rtol=1e-5, atol=1e-6)


def test_the_fresh_process_knows_nothing_of_this_package():
    """At its top it imports what a user has; below, only what quantises a base as training did."""
    tree = ast.parse(Path(fresh_process.__file__).read_text(encoding="utf-8"))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.startswith("simpletuner_dmd")} == {"simpletuner_dmd.wan.quantisation"}
    top = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
           for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert not {str(name) for name in top if str(name).startswith(("simpletuner_dmd", "peft", "lycoris", "optimum"))}
