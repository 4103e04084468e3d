"""Tensors reach the host whole, and a buffer that is not free is a drop and never a wait."""

from types import SimpleNamespace

import pytest
import torch

from aurora_sglang_plugin.serve.transfer import HostTensors, PinnedBuffers, Staged

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tensors(device, rows=7):
    generator = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, 33, generator=generator).to(device, torch.bfloat16),
        "ids": torch.randint(1 << 40, (rows, 3), generator=generator).to(device),
        "odd": torch.ones(rows * 3 + 1, dtype=torch.uint8, device=device),
        "empty": torch.empty(0, 5, device=device),
    }


def transfer(device):
    return HostTensors() if device == "cpu" else PinnedBuffers(torch.device(device), 2, 1 << 16)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_staged_arrives(device):
    sent = tensors(device)
    staged = transfer(device).stage(sent)
    found = staged.fetch()
    assert staged.nbytes >= sum(t.nbytes for t in sent.values())
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert found[name].device.type == "cpu" and torch.equal(found[name], tensor.cpu()), name
    staged.release()
    assert staged.tensors == {}


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
    buffer, free = torch.arange(6), []
    staged = Staged({"x": buffer[:4]}, 32, None, "buffer", SimpleNamespace(free=free))
    staged.unload()
    staged.unload()
    assert free == ["buffer"]
    # the next step is written there
    buffer.zero_()
    assert staged.fetch()["x"].tolist() == [0, 1, 2, 3] and staged.buffer is None
    staged.release()
    assert staged.tensors == {} and free == ["buffer"]


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
        staged = pool.stage({"x": source.clone()})
        source.zero_()
        assert torch.equal(staged.fetch()["x"], torch.arange(1 << 12))
