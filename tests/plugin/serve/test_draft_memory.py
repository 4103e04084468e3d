"""The three places of a draft's weights, on the CPU and, if there is one, on a GPU, where two
streams write them.
"""

import pytest
import torch
from reload_site import VD, Draft, H, V, checkpoint
from torch import nn

from aurora_sglang_plugin.drafts.kinds import canonical_name
from aurora_sglang_plugin.serve.draft_memory import DraftMemory
from aurora_sglang_plugin.weights.manifest import ManifestError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def memory(request):
    model = Draft(nn.Parameter(torch.randn(V, H))).to(request.param)
    return DraftMemory(model, torch.arange(VD, device=request.param))


def as_read(tensors):
    return {canonical_name(name): ("", tensor.numpy()) for name, tensor in tensors.items()}


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def same(tensors, expected):
    return all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_copies_come_in_the_order_of_the_calls(memory):
    """Nobody waits in between but `fill`."""
    for seed in range(1, 8):
        memory.fill(as_read(checkpoint(seed)))
        before = copies(memory.live)
        memory.keep()
        memory.put(memory.staged)
        kept, new = copies(memory.previous), copies(memory.live)
        memory.exchange()
        exchanged = copies(memory.live), copies(memory.previous)
        memory.exchange()
        assert same(kept, before) and same(new, memory.staged) and (new[0] == seed).all()
        assert same(exchanged[0], before) and same(exchanged[1], new)
        assert same(memory.live, new) and same(memory.previous, before)
        memory.put(memory.previous)
        assert same(memory.live, before)
    # a swap, two exchanges and a put back
    assert len(list(memory.stopwatch.finished())) == 4 * 7


def test_what_is_not_whole_is_refused_and_another_try_works(memory):
    tensors = checkpoint(3)
    with pytest.raises(ManifestError, match="not whole and finite"):
        memory.fill(as_read({n: t for n, t in tensors.items() if n != "fc.weight"}))
    memory.fill(as_read(tensors))
    memory.put(memory.staged)
    assert (memory.live[0] == 3).all()
