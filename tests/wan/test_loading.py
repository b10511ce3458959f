"""Every form a checkpoint comes in gives the tensors that the stock loaders give, and the host holds little of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from simpletuner_dmd.cli.check import model_problems
from simpletuner_dmd.cli.starting import TeacherMerge
from simpletuner_dmd.config import TrainConfig, UserError
from simpletuner_dmd.config import load as load_config
from simpletuner_dmd.demo.path import model_path
from simpletuner_dmd.publish.dialects import comfyui_module
from simpletuner_dmd.wan.loading import Storage, load_text_encoder, load_transformer, load_vae, transformer_config
from simpletuner_dmd.wan.parity import Probe
from simpletuner_dmd.wan.quantisation import linear_layers, quantise
from simpletuner_dmd.wan.sources import ModelSource, borrowed

from .test_lycoris import file_of, lora_file, two_networks
from .tiny import tiny_wan

DEMO = model_path()
SOURCE = ModelSource(*[str(DEMO)] * 4)
ROOT = Path(__file__).parents[2]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Every parameter and buffer: name, precision, value; and the mode."""
    ours, theirs = tensors_of(model), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, f"{name}: {ours[name].dtype} instead of {tensor.dtype}"
        assert ours[name].device == tensor.device and torch.equal(ours[name], tensor), name
    assert model.training == expected.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def stock(dtype: torch.dtype, folder: Path = DEMO) -> nn.Module:
    model: nn.Module = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_has_the_value_and_precision_of_from_pretrained(dtype: torch.dtype) -> None:
    transformer = load_transformer(SOURCE, dtype)
    assert_same(transformer, stock(dtype))
    kept = {name for name, tensor in transformer.named_parameters() if tensor.dtype == torch.float32}
    if dtype != torch.float32:
        assert any("scale_shift_table" in name for name in kept) and any("norm2" in name for name in kept)
        assert not any(".to_q." in name for name in kept)
    tokenizer, encoder = load_text_encoder(SOURCE, dtype)
    assert_same(encoder, UMT5EncoderModel.from_pretrained(DEMO, subfolder="text_encoder", dtype=dtype))
    assert tokenizer("a square").input_ids


def test_the_vae_is_the_stock_one_in_fp32() -> None:
    assert_same(load_vae(SOURCE), AutoencoderKLWan.from_pretrained(DEMO, subfolder="vae", torch_dtype=torch.float32))


# --- the forms of a checkpoint ----------------------------------------------------------------------------------------


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Wan's own repository names them: the inverse of diffusers' converter."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "scale_shift_table":
            renamed[f"{module}.modulation" if module else "head.modulation"] = tensor
        elif ".norm" in module:
            norm = module.replace("attn1", "self_attn").replace("attn2", "cross_attn").replace(".norm2", ".norm3")
            renamed[f"{norm}.{leaf}"] = tensor
        else:
            renamed[f"{comfyui_module(module)}.{leaf}"] = tensor
    return renamed


def as_sharded(folder: Path) -> dict[str, Any]:
    stock(torch.float32).save_pretrained(folder / "transformer", max_shard_size="200KB")  # type: ignore[operator]
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return {"transformer": str(folder)}


def as_part(folder: Path) -> dict[str, Any]:
    shutil.copytree(DEMO / "transformer", folder / "part")
    return {"transformer": str(folder / "part")}


def as_part_without_subfolder(folder: Path) -> dict[str, Any]:
    shutil.copytree(DEMO / "transformer", folder / "part" / "transformer")
    shutil.copytree(DEMO / "transformer", folder / "part", dirs_exist_ok=True)
    (folder / "part" / "transformer" / "config.json").write_text("{")
    return {"transformer": str(folder / "part"), "network": None}


def as_other_subfolder(folder: Path) -> dict[str, Any]:
    shutil.copytree(DEMO / "transformer", folder / "step-1000")
    return {"transformer": str(folder), "network": "step-1000"}


def as_file(prefix: str, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        tensors = rename(dict(stock(torch.float32).state_dict()))
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        return {"transformer": str(folder / "model.safetensors")}

    return make


FORMS = {
    "sharded": as_sharded,
    "the part's folder": as_part,
    "no subfolder": as_part_without_subfolder,
    "another subfolder": as_other_subfolder,
    "one file": as_file("", dict),
    "one file, original names": as_file("", original_names),
    "one file, ComfyUI's prefix": as_file("model.diffusion_model.", original_names),
    "one file, short prefix": as_file("diffusion_model.", dict),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_is_the_same_model(form: str, tmp_path: Path) -> None:
    source = ModelSource(**{**dict.fromkeys(("base", "vae", "text_encoder"), str(DEMO)), **FORMS[form](tmp_path)})
    assert_same(load_transformer(source, torch.bfloat16), stock(torch.bfloat16))
    plain = dict(linear_layers(load_transformer(source, torch.bfloat16, Storage("int8-quanto"))))
    assert {type(layer).__name__ for layer in plain.values()} == {"QLinear"}


def test_the_original_names_of_these_tests_are_those_that_diffusers_reads() -> None:
    own = dict(stock(torch.float32).state_dict())
    named = original_names(own)
    assert "blocks.0.self_attn.q.weight" in named and "head.modulation" in named
    assert "blocks.0.norm3.weight" in named and "patch_embedding.weight" in named
    back = convert_wan_transformer_to_diffusers(dict(named))
    assert back.keys() == own.keys()


def test_a_model_from_the_hub_cache_is_found_by_its_id(tmp_path: Path) -> None:
    """In a process of its own, because the cache's place is read when the library is imported."""
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(DEMO, snapshot)
    refs = tmp_path / "hub" / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    shutil.rmtree(snapshot / "transformer")
    as_sharded(snapshot)
    code = (
        "import torch, sys\n"
        "from simpletuner_dmd.wan.loading import load_transformer, load_vae\n"
        "from simpletuner_dmd.wan.sources import ModelSource\n"
        "source = ModelSource(*['someone/tiny'] * 4)\n"
        "from safetensors.torch import save_file\n"
        "save_file(load_transformer(source, torch.float32).state_dict(), sys.argv[1])\n"
        "load_vae(source)\n"
        "try: load_transformer(ModelSource(*['someone/else'] * 4), torch.float32)\n"
        "except ValueError as error: print(error)\n"
    )
    import os

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", code, str(tmp_path / "loaded.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded = load_file(tmp_path / "loaded.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stock(torch.float32).state_dict().items())
    assert "could not be loaded from 'someone/else'" in done.stdout and "local Hub cache" in done.stdout


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_text_encoder_in_one_file_takes_its_tokenizer_from_the_base(name: str, tmp_path: Path) -> None:
    expected: Any = UMT5EncoderModel.from_pretrained(DEMO, subfolder="text_encoder", dtype=torch.bfloat16)
    tensors = {key: tensor for key, tensor in expected.state_dict().items() if "embed_tokens" not in key}
    tensors[name] = tensors.pop("shared.weight")
    file = tmp_path / "umt5.safetensors"
    save_file({**tensors, "spiece_model": torch.zeros(8, dtype=torch.uint8)}, file)
    source = ModelSource(*[str(DEMO)] * 3, str(file))
    tokenizer, encoder = load_text_encoder(source, torch.bfloat16)
    assert_same(encoder, expected)
    assert tokenizer("a square").input_ids == load_text_encoder(SOURCE, torch.bfloat16)[0]("a square").input_ids


def test_a_vae_in_one_file(tmp_path: Path) -> None:
    expected = AutoencoderKLWan.from_pretrained(DEMO, subfolder="vae", torch_dtype=torch.float32)
    save_file(dict(expected.state_dict()), tmp_path / "vae.safetensors")
    source = ModelSource(str(DEMO), str(DEMO), str(tmp_path / "vae.safetensors"), str(DEMO))
    assert_same(load_vae(source), expected)


# --- what does not fit ------------------------------------------------------------------------------------------------


def saved(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> ModelSource:
    tensors = dict(stock(torch.float32).state_dict())
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return ModelSource(str(DEMO), str(folder / "model.safetensors"), str(DEMO), str(DEMO))


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["blocks.1.attn1.to_q.weight"]


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.attn1.to_q.weight"] = torch.zeros(8, 8)


def add(tensors: dict[str, Tensor]) -> None:
    tensors["vace_blocks.0.weight"] = torch.zeros(1)


def scale(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.attn1.to_q.scale_weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "lacks 1 of .* tensors, for example blocks.1.attn1.to_q.weight"),
        (widen, r"blocks.1.attn1.to_q.weight is \(8, 8\) in it, but .* by the model's config(.|\n)*model_flavour"),
        (add, "holds 1 tensors that the model has not, for example vace_blocks.0.weight"),
        (scale, "fp8 with scales of their own(.|\n)*bf16"),
    ],
)
def test_a_file_that_does_not_fit_is_a_sentence(
    change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"pretrained_transformer_model_name_or_path: (.|\n)*{said}"):
        load_transformer(saved(tmp_path, change), torch.float32)


def test_an_incomplete_download_names_the_file_that_is_missing(tmp_path: Path) -> None:
    source = ModelSource(**{**dict.fromkeys(("base", "vae", "text_encoder"), str(DEMO)), **as_sharded(tmp_path)})
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{shards[1].name} cannot be read(.|\n)*download"):
        load_transformer(source, torch.float32)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks {shards[1].name}, one of the"):
        load_transformer(source, torch.float32)


def test_what_a_base_lacks_comes_from_the_flavours_own_repository(tmp_path: Path) -> None:
    hub = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    (tmp_path / "fine-tune" / "transformer").mkdir(parents=True)
    base = str(tmp_path / "fine-tune")
    config = TrainConfig(pretrained_model_name_or_path=base)
    source = ModelSource.of(config)
    assert (source.base, source.transformer, source.vae, source.text_encoder) == (base, base, hub, hub)
    assert [line.split(":")[0] for line in borrowed(config)] == [f"{base} has no vae", f"{base} has no text_encoder"]
    file = str(tmp_path / "wan.safetensors")
    named = TrainConfig(pretrained_model_name_or_path=file, pretrained_vae_model_name_or_path="my/vae")
    source = ModelSource.of(named)
    assert (source.base, source.transformer, source.vae, source.text_encoder) == (hub, file, "my/vae", hub)
    assert len(borrowed(named)) == 1
    assert not borrowed(TrainConfig()) and not borrowed(TrainConfig(pretrained_model_name_or_path=str(DEMO)))


def test_the_subfolder_follows_the_flavour_and_the_option() -> None:
    def subfolder(**options: Any) -> str | None:
        return ModelSource.of(TrainConfig(**options)).network

    assert subfolder() == "transformer"
    assert subfolder(model_flavour="t2v-14b-2.2-low") == "transformer_2"
    assert subfolder(pretrained_transformer_subfolder="None") is None
    assert subfolder(pretrained_transformer_subfolder="ema") == "ema"


def test_a_weight_file_that_is_not_there_is_said_when_the_configuration_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pretrained_transformer_model_name_or_path: there is no wan.safetensors"):
        load_config(argv=["pretrained_transformer_model_name_or_path=wan.safetensors"], example="demo")


# --- on the way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lokr", "full", "diag-oft"])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_a_fine_tune_is_merged_before_its_layer_is_quantised(kind: str, precision: str, tmp_path: Path) -> None:
    network = tiny_wan()
    network.save_pretrained(tmp_path / "transformer")  # type: ignore[operator]
    source = ModelSource(*[str(tmp_path)] * 4)
    file = (
        lora_file(tmp_path / "a.safetensors", "comfyui")[0]
        if kind == "lora"
        else file_of(two_networks(kind), tmp_path / "a.safetensors")
    )
    expected = load_transformer(source, torch.float32, merge=None)
    merge = TeacherMerge(f"{file}:0.8")
    merge.start(expected)
    for name, layer in expected.named_modules():
        if isinstance(layer, nn.Linear):
            merge(name, layer)
    quantise(expected, precision)
    probe = Probe.of(transformer_config(source), 3.0)
    merged = load_transformer(source, torch.float32, Storage(precision), TeacherMerge(f"{file}:0.8"))
    assert torch.equal(probe.velocities(merged), probe.velocities(expected))
    bare = load_transformer(source, torch.float32, Storage(precision))
    assert not torch.equal(probe.velocities(merged), probe.velocities(bare))


def test_a_fine_tune_of_another_model_is_refused_before_any_weight(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    layer = "transformer.blocks.77.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}, file)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match="changes blocks.77.attn1.to_q, which is no layer"),
    ):
        patch.setattr("simpletuner_dmd.wan.checkpoints.Checkpoint.read", lambda *_: pytest.fail("weights were read"))
        load_transformer(SOURCE, torch.bfloat16, merge=TeacherMerge(str(file)))


def test_the_host_never_holds_the_dense_model() -> None:
    """A Wan of 70 MB in processes of their own: streamed and from the cache, against quantising the loaded model."""
    command = [sys.executable, "benchmarks/loading.py", "--json", "--width", "512", "--layers", "8", "--shard", "15MB"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["shards"] >= 4 and found["dense"] > 1.75 * found["quantised"]
    for way in ("streamed", "cached"):
        assert found[way]["peak"] <= found["limit"], way
    assert found["from_pretrained"]["peak"] > found["limit"], "the measure does not see a dense model"


def test_check_names_parts_that_are_missing_where_nothing_stands_in(tmp_path: Path) -> None:
    """No transformer and no scheduler; VAE and text encoder would come from the flavour's repository."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    loaded = load_config(argv=[f"pretrained_model_name_or_path={tmp_path}"], example="demo")
    missing = [problem.message.split(":")[0] for problem in model_problems(loaded)]
    assert missing == [f"{tmp_path} has no transformer", f"{tmp_path} has no scheduler"]
