"""Tensors reach the host whole, and a buffer that is not free is a drop and never a wait."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aurora_sglang_plugin.serve.transfer import (
    HostTensors,
    Pinned,
    PinnedBuffers,
    as_array,
    pack,
    unpack,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tensors(device, rows=7):
    generator = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, 33, generator=generator).to(device, torch.bfloat16),
        "ids": torch.randint(1 << 40, (rows, 3), generator=generator).to(device),
        "odd": torch.ones(rows * 3 + 1, dtype=torch.uint8, device=device),
        "empty": torch.empty(0, 5, device=device),
        "column": torch.arange(rows * 4, device=device).view(rows, 4)[:, 1],
        "columns": torch.randn(rows, 8, generator=generator).to(device)[:, :3],
    }


def check(found, sent):
    assert set(found) == set(sent)
    for name, tensor in sent.items():
        np.testing.assert_array_equal(found[name], as_array(tensor.cpu()), err_msg=name)
        assert found[name].flags.aligned, name


def transfer(device):
    return HostTensors() if device == "cpu" else PinnedBuffers(torch.device(device), 2, 1 << 16)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_staged_arrives(device):
    sent = tensors(device)
    staged = transfer(device).stage(sent)
    found = staged.fetch()
    assert staged.nbytes >= sum(t.nbytes for t in sent.values())
    check(found, sent)
    staged.release()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_what_is_packed_is_a_copy_of_all(rows):
    sent = tensors("cpu", rows)
    packed, layout = pack(sent)
    kept = {name: tensor.clone() for name, tensor in sent.items()}
    for tensor in sent.values():
        tensor.zero_()
    assert packed.nbytes == sum(tensor.nbytes for tensor in sent.values())
    check(unpack(packed.numpy(), layout), kept)


@pytest.mark.parametrize("device", DEVICES)
def test_release_twice_and_when_forgotten(device):
    pool = transfer(device)
    # more often than there are buffers
    for _ in range(5):
        staged = pool.stage(tensors(device))
        staged.fetch()
        staged.release()
        staged.release()
        # a message that is dropped unread
        dropped = pool.stage(tensors(device))
        assert dropped is not None
        del dropped


def test_unloaded_tensors_outlive_their_buffer():
    sent, waits = tensors("cpu"), []
    packed, layout = pack(sent)
    buffer = SimpleNamespace(done=SimpleNamespace(synchronize=lambda: waits.append(1)))
    pool = SimpleNamespace(free=[])
    staged = Pinned(packed.numpy(), layout, packed.nbytes, buffer, pool)
    staged.unload()
    staged.unload()
    assert pool.free == [buffer] and waits == [1]
    # the next step is written there
    packed.zero_()
    check(staged.fetch(), sent)
    staged.release()
    assert pool.free == [buffer] and waits == [1]


if "cuda" in DEVICES:

    def test_no_free_buffer_is_a_drop():
        pool = transfer("cuda")
        held = [pool.stage(tensors("cuda")) for _ in range(2)]
        assert None not in held
        assert pool.stage(tensors("cuda")) is None
        held.pop().release()
        assert pool.stage(tensors("cuda")) is not None

    def test_larger_than_a_buffer_is_a_drop():
        pool = transfer("cuda")
        assert pool.stage({"large": torch.zeros(1 << 17, dtype=torch.uint8, device="cuda")}) is None
        assert len(pool.free) == 2

    def test_the_source_may_be_overwritten_at_once():
        pool = transfer("cuda")
        source = torch.arange(1 << 12, device="cuda")
        staged = pool.stage({"x": source})
        source.zero_()
        np.testing.assert_array_equal(staged.fetch()["x"], np.arange(1 << 12))
