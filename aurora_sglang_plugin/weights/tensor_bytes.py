"""A safetensors file as buffers: the header, then the tensors' own memory, copied nowhere.

`safetensors.torch.save` makes one bytes object of all tensors, under the interpreter's lock: for
seconds, at a draft of a billion parameters, nothing else of the process would run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch

# as safetensors names them
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_buffers(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """What a file of these tensors holds, which stay as they are until it is written.

    Tensors on the CPU, contiguous. Wide types come first, so that every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return [memoryview(head), *(buffer(tensors[name]) for name in order)]


def buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def sha256(buffers: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in buffers:
        digest.update(part)
    return digest.hexdigest()
