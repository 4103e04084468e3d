"""A step's tensors become the arrays of a message that the other side accepts."""

import numpy as np
import pytest
import torch
from trees import NAMED_TREES

from aurora_sglang_plugin.config import PublishConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.send_queue import SendQueue
from aurora_sglang_plugin.serve.accepted_counts import Acceptance
from aurora_sglang_plugin.serve.snapshot import End, Prefill, Verify, parents
from aurora_sglang_plugin.serve.transfer import HostTensors, Pinned, pack

F, V, P = 6, 40, 5


def links(tree, nodes):
    """First-child and next-sibling links of a tree, as SGLang keeps them; the nodes past its end
    are unused.
    """
    child, sibling = np.full(nodes, -1), np.full(nodes, -1)
    for node in range(1, len(tree)):
        earlier = [n for n in range(1, node) if tree[n] == tree[node]]
        if earlier:
            sibling[earlier[-1]] = node
        else:
            child[tree[node]] = node
    return child, sibling


def batch_links(trees):
    nodes = max(map(len, trees))
    both = [links(tree, nodes) for tree in trees]
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*both))


def test_parents_of_named_trees():
    # of different sizes in one batch
    trees = list(NAMED_TREES.values())
    found = parents(*(part.numpy() for part in batch_links(trees)))
    for row, tree in zip(found.tolist(), trees):
        assert row == tree + [-2] * (len(row) - len(tree))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_parents_take_sglang_s_dtypes(dtype):
    child, sibling = batch_links([NAMED_TREES["ragged"]])
    found = parents(child.numpy().astype(dtype), sibling.numpy().astype(dtype))
    assert found.tolist() == [NAMED_TREES["ragged"]]


def header(kind, requests, **fields):
    fields = (dict(num_steps=P - 1, topk=2) if kind == "verify" else {}) | fields
    counters = dict(captured_seq=1, sent_seq=1, heartbeats=0, dropped={}, queued=0)
    return wire.Header(
        wire.SCHEMA_VERSION, kind, "session", **counters, target="t", draft_version=0,
        extend_version=0, time_ns=1,
        requests=requests, **fields,
    )  # fmt: skip


def decoded(head, arrays):
    return wire.decode([bytes(p) for p in wire.encode(head, arrays)], max_bytes=1 << 20)


def parts_of(arrays):
    return [bytes(part) for part in wire.encode(header("verify", ["a", "b"]), arrays)]


def verify_tensors(dtype=torch.float32):
    """Two ragged trees.

    Row 0 accepted 0 -> 1 -> 3, row 1 the root only; ids of SGLang's path are row * N + node.
    """
    tree = NAMED_TREES["ragged"]
    nodes = len(tree)
    child, sibling = batch_links([tree, tree])
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2 * nodes, V, generator=generator)
    tensors = {
        "hidden": torch.randn(2, P, F, generator=generator).to(dtype),
        "draft_tokens": torch.arange(2 * nodes).view(2, nodes),
        "next_token": child,
        "next_sibling": sibling,
        "positions": torch.tensor([11, 7]),
        "accept_index": torch.tensor(
            [[0, 1, 3, -1, -1], [nodes, -1, -1, -1, -1]], dtype=torch.int32
        ),
        "accept_lens": torch.tensor([3, 1], dtype=torch.int32),
        "next_tokens": torch.tensor([[1, 3, 30, 77, 77], [31, 77, 77, 77, 77]]),
    }
    tensors["logits"] = raw
    return tensors, raw


def test_verify():
    tensors, raw = verify_tensors()
    snapshot = Verify(HostTensors().stage(tensors), k=4)
    assert snapshot.nbytes >= sum(t.nbytes for t in tensors.values())
    message = decoded(header("verify", ["a", "b"], flags=[0, 1]), snapshot.build())
    a = message.arrays
    assert a["positions"].tolist() == [11, 7]
    assert a["parents"].tolist() == [NAMED_TREES["ragged"]] * 2
    assert a["accept_path"].tolist() == [[0, 1, 3, -1, -1], [0, -1, -1, -1, -1]]
    assert a["feature_lens"].tolist() == [3, 1]
    assert a["next_tokens"][0, :3].tolist() == [1, 3, 30] and a["next_tokens"][1, 0] == 31
    hidden = torch.cat([tensors["hidden"][0, :3], tensors["hidden"][1, :1]])
    np.testing.assert_array_equal(a["aux_hidden_states"], hidden.numpy())
    top = raw.topk(4)
    np.testing.assert_array_equal(a["topk_ids"].reshape(-1, 4), top.indices.numpy())
    np.testing.assert_array_equal(a["topk_logits"].reshape(-1, 4), top.values.numpy())
    np.testing.assert_allclose(a["logsumexp"].ravel(), raw.logsumexp(-1).numpy(), rtol=1e-6)


def test_a_chain_needs_no_links():
    tensors, _ = verify_tensors()
    nodes = tensors["draft_tokens"].shape[1]
    chain = list(range(-1, nodes - 1))
    tensors["next_token"], tensors["next_sibling"] = batch_links([chain, chain])
    linked = Verify(HostTensors().stage(dict(tensors)), k=4).build()
    del tensors["next_token"], tensors["next_sibling"]
    unlinked = Verify(HostTensors().stage(tensors), k=4).build()
    assert unlinked["parents"][1].tolist() == [chain, chain]
    assert parts_of(unlinked) == parts_of(linked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_pinned_builds_the_same_message_of_its_own(dtype):
    """Its arrays outlive the buffer."""
    tensors, _ = verify_tensors(dtype)
    tensors["logits"] = tensors["logits"].to(dtype)
    expected = parts_of(Verify(HostTensors().stage(tensors), k=4).build())
    packed, layout = pack(tensors)
    built = Verify(Pinned(packed.numpy(), layout, packed.nbytes, None, None), k=4).build()
    packed.fill_(255)
    assert parts_of(built) == expected


def test_k_larger_than_the_vocabulary():
    tensors, _ = verify_tensors()
    arrays = Verify(HostTensors().stage(tensors), k=4096).build()
    assert arrays["topk_ids"][1].shape[-1] == V


def test_bfloat16_travels_as_its_bits():
    tensors, _ = verify_tensors(dtype=torch.bfloat16)
    message = decoded(
        header("verify", ["a", "b"], flags=[0, 0]),
        Verify(HostTensors().stage(tensors), k=4).build(),
    )
    assert message.dtype("aux_hidden_states") == "bfloat16"
    bits = message.arrays["aux_hidden_states"].view(np.int16).copy()
    hidden = torch.cat([tensors["hidden"][0, :3], tensors["hidden"][1, :1]])
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), hidden)


def test_infinite_logits_are_sent_finite():
    tensors, raw = verify_tensors()
    # a masked vocabulary: fewer tokens than K are left
    raw[3, 2:] = -torch.inf
    message = decoded(
        header("verify", ["a", "b"], flags=[0, 0]),
        Verify(HostTensors().stage(tensors), k=4).build(),
    )
    assert np.isfinite(message.arrays["topk_logits"]).all() and not message.bad


@pytest.mark.parametrize("what", ["feature", "logits", "id", "surrogate"])
def test_a_bad_row_is_left_out_and_the_message_goes(what):
    tensors, raw = verify_tensors()
    requests = ["a", "b"]
    if what == "feature":
        tensors["hidden"][0, 1, 2] = torch.nan
    elif what == "logits":
        raw[2, 7] = torch.nan
    else:
        requests[0] = "x" * 2000 if what == "id" else "\ud800"
    send_queue = SendQueue(PublishConfig())
    fields = dict(requests=requests, flags=[0, 1], reasons=[], domains=[], num_steps=P - 1, topk=2)
    send_queue.put(
        "verify",
        Verify(HostTensors().stage(tensors), k=4),
        fields | {"draft_version": 1, "extend_version": 1},
    )
    item = send_queue.take()
    arrays = send_queue.leave_out_bad_rows(item, item.snapshot.build())
    message = decoded(send_queue.header(item, "session", "target"), arrays)
    assert message.header.requests == ["b"] and message.header.flags == [1] and not message.bad
    np.testing.assert_array_equal(
        message.arrays["aux_hidden_states"], tensors["hidden"][1, :1].numpy()
    )
    counters = send_queue.counters()
    assert counters["excluded"] == {"request" if what in ("id", "surrogate") else "not_finite": 1}
    assert counters["captured"] == counters["queued"] == 1 and not counters["dropped"]


def test_prefill():
    """Three requests of the batch, the middle one not sampled; of the last one only a chunk's tail
    is taken.
    """
    hidden = torch.arange(5 * F, dtype=torch.float32).view(5, F)
    tensors = {
        "hidden": hidden,
        "input_ids": torch.tensor([10, 11, 12, 20, 21]),
        "rotated_ids": torch.tensor([11, 12, 13, 21, 22]),
        "seq_lens": torch.tensor([3, 99, 40]),
    }
    for before in ([], [17, 18, 19]):
        snapshot = Prefill(
            HostTensors().stage(dict(tensors)), [0, 2], lens=[3, 2], prompt_lens=[3, 64],
            before=[(), before],
        )  # fmt: skip
        a = decoded(header("prefill", ["a", "c"]), snapshot.build()).arrays
        assert a["positions"].tolist() == [0, 38 - len(before)]
        assert a["extend_lens"].tolist() == [3, 2 + len(before)]
        assert a["feature_lens"].tolist() == [3, 2]
        assert a["next_tokens"].tolist() == [13, 22]
        assert a["input_ids"].tolist() == [10, 11, 12, *before, 20, 21]
        assert a["prompt_lens"].tolist() == [3, 64]
        np.testing.assert_array_equal(a["aux_hidden_states"], hidden.numpy())


def test_end():
    a = decoded(header("end", ["a"], reasons=["stop"]), End(17).build()).arrays
    assert a["committed_lens"].tolist() == [17]


@pytest.mark.parametrize(
    "waits", [True, False], ids=["it waits for a trainer first", "it is sent at once"]
)
def test_accept_lengths_are_counted_once(waits):
    tensors, _ = verify_tensors()
    acceptance = Acceptance(num_steps=P - 1)
    snapshot = Verify(HostTensors().stage(tensors), k=4, version=5, acceptance=acceptance)
    if waits:
        snapshot.unload()
        # though it may never be sent
        assert acceptance.by_length == [0, 1, 0, 1, 0, 0]
    snapshot.build()
    assert acceptance.by_length == acceptance.of_role["current"] == [0, 1, 0, 1, 0, 0]
