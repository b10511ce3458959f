"""State dictionaries as one JSON document and one safetensors file, and back, exactly. No pickle.

A tree of dicts, lists, tuples, tensors and plain values becomes JSON in which a tensor is {"$tensor": name}, a tuple
{"$tuple": [...]}, a dict whose keys are not plain strings {"$items": [[key, value], ...]} and a number that JSON does
not know {"$float": "nan"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from simpletuner_dmd.durable import HashingFile

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON-ready tree, tensors by name). Raises TypeError, with the place, for what neither can hold."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, place: str) -> Any:
        if isinstance(node, Tensor):
            name = place or "tensor"
            while name in tensors:
                name += "'"
            tensors[name] = node
            return {"$tensor": name}
        if isinstance(node, float):
            return node if math.isfinite(node) else {"$float": repr(node)}
        if node is None or isinstance(node, (str, bool, int)):
            return node
        if isinstance(node, tuple):
            return {"$tuple": [walk(item, f"{place}/{index}") for index, item in enumerate(node)]}
        if isinstance(node, list):
            return [walk(item, f"{place}/{index}") for index, item in enumerate(node)]
        if isinstance(node, Mapping):
            inner = {key: walk(item, f"{place}/{key}".lstrip("/")) for key, item in node.items()}
            if all(isinstance(key, str) and not key.startswith("$") for key in inner):
                return inner
            return {"$items": [[walk(key, f"key of {place}"), item] for key, item in inner.items()]}
        raise TypeError(f"a checkpoint cannot hold {type(node).__name__} at {place or 'the top'}")

    return walk(tree, ""), tensors


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(document, list):
        return [unpack(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1:
        (key, value), = document.items()  # fmt: skip
        if key == "$tensor":
            return tensors[value]
        if key == "$float":
            return float(value)
        if key == "$tuple":
            return tuple(unpack(item, tensors) for item in value)
        if key == "$items":
            return {unpack(name, tensors): unpack(item, tensors) for name, item in value}
    return {key: unpack(value, tensors) for key, value in document.items()}


def write_safetensors(file: HashingFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Streams tensors in the safetensors layout, one at a time from wherever they live.

    Written here because the library's own writer takes a path: it could neither be hashed in the same pass nor flushed
    before the rename, and would hold all tensors of a GPU in host memory at once. Reading is the library's.
    """
    # Widest first, as the library does: every tensor then starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"safetensors has no {tensor.dtype} ({name})")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for name in order:
        tensor = tensors[name]
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, in memory of their own (the file may be deleted or replaced)."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Size on disk, with room for the header."""
    return sum(tensor.numel() * tensor.element_size() + len(name) + 128 for name, tensor in tensors.items()) + 4096
