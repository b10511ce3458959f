import math

import pytest
import torch
from safetensors.torch import load_file

from simpletuner_dmd.durable import HashingFile, sha256_of
from simpletuner_dmd.training.packing import DTYPES, bytes_of, pack, read_safetensors, unpack, write_safetensors


def write(path, tensors):
    with HashingFile(path) as file:
        write_safetensors(file, tensors, {})
    return file


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and one.tolist() == two.tolist()
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return one == two or (one != one and two != two)


TREE = {
    "state": {0: {"step": torch.tensor(3), "kahan": None}, 1: {"step": torch.tensor(4.5)}},
    "param_groups": [{"lr": 1e-6 / 3, "betas": (0.9, 0.999), "params": [0, 1], "fused": True, "empty": ()}],
    "limits": [math.inf, -math.inf, math.nan],
    "$tensor": "a key that looks like ours",
    "nested": {"$x": 1, "plain": {}},
    "a/b": torch.zeros(2),
    "a": {"b": torch.ones(2)},
    "": {"": 1},
    "integer keys": {True: 1, None: 2, (1, "x"): [torch.tensor([1, 2])]},
    "large": 2**70,
}


def test_a_tree_comes_back_as_it_was():
    import json

    document, tensors = pack(TREE)
    assert same(unpack(json.loads(json.dumps(document, allow_nan=False)), tensors), TREE)


def test_a_value_that_json_cannot_hold_is_named_with_its_place():
    with pytest.raises(TypeError, match="dtype at state/0/x"):
        pack({"state": {0: {"x": torch.float32}}})


def test_every_dtype_and_shape_reads_back_through_the_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (24 * dtype.itemsize,), generator=generator)
        tensors[f"full.{dtype}"] = raw.to(torch.uint8).view(dtype).reshape(2, 3, 4)
        tensors[f"scalar.{dtype}"] = tensors[f"full.{dtype}"][0, 0, 0].clone()
        tensors[f"empty.{dtype}"] = torch.zeros(0, 5, dtype=dtype)
    tensors["transposed"] = torch.arange(12.0).reshape(3, 4).t()
    tensors["view"] = torch.arange(10)[2:7]
    file = write(tmp_path / "x.safetensors", tensors)
    assert file.sha256 == sha256_of(file.path)
    assert file.size == file.path.stat().st_size <= bytes_of(tensors)
    for loaded in (load_file(file.path), read_safetensors(file.path)):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            if tensor.numel():
                bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor)]
                assert torch.equal(*bits), name


def test_more_than_one_chunk(tmp_path, monkeypatch):
    from simpletuner_dmd import durable

    monkeypatch.setattr(durable, "CHUNK", 100)
    monkeypatch.setattr(durable, "_write", lambda fd, chunk, write=durable._write: write(fd, chunk[:33]))
    tensors = {"w": torch.randn(500)}
    write(tmp_path / "x.safetensors", tensors)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], tensors["w"])


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(TypeError, match="complex64"):
        write(tmp_path / "x", {"w": torch.zeros(1, dtype=torch.complex64)})
