"""A file as buffers is a safetensors file, and nothing of it is copied."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load, load_file

from aurora_sglang_plugin.weights.tensor_bytes import buffer, safetensors_buffers, sha256

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.randn(5, 7).bfloat16(),
    "mask": torch.tensor([True, False, True]),
    "ids": torch.arange(4),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(2.5, dtype=torch.float16),
}


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    parts = safetensors_buffers(TENSORS)
    data = b"".join(parts)
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    for found in (load(data), load_file(path)):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert sha256(parts) == hashlib.sha256(data).hexdigest()
    # every tensor begins where its type may be read
    assert len(parts[0]) % 8 == 0
    header = json.loads(bytes(parts[0][8:]))
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0, name


def test_the_same_tensors_in_any_order_are_the_same_bytes():
    turned = dict(reversed(TENSORS.items()))
    assert sha256(safetensors_buffers(turned)) == sha256(safetensors_buffers(TENSORS))


def test_the_buffers_are_the_tensors_own_memory():
    tensor = torch.zeros(4)
    view = buffer(tensor)
    tensor.fill_(1.0)
    assert bytes(view) == torch.ones(4).numpy().tobytes()


def test_a_type_that_no_server_reads_is_refused():
    with pytest.raises(KeyError):
        safetensors_buffers({"c": torch.zeros(2, dtype=torch.complex64)})
