"""Assembly against a simulated server that knows the truth, position by position and node by
node.
"""

import tracemalloc

import numpy as np
import pytest
from assembly import WHOLE, assemble, check, one_request
from simulator import Server

from aurora_sglang_plugin.link import wire
from aurora_trainer.intake.assemble import AssembleConfig, Assembler
from aurora_trainer.intake.request import Tree, _forest


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_what_arrives_is_never_lost(seed, odd):
    """Each life of a request (until it is retracted or ends) is one sample, cut where it ended,
    with all its trees.
    """
    server = Server(seed, odd=odd)
    samples, assembler = assemble(server)
    found = {}
    for sample in samples:
        number, trees = check(sample, server)
        found[number, sample.start, sample.start + len(sample.features)] = sample, trees
    assert len(found) == len(samples)
    rootless = 0
    for request in server.requests:
        for life in request.lives:
            first, last = life["first"], life["committed"] - 1
            trees = [t for t in life["trees"] if first < server.trees[t].root <= last]
            rootless += sum(server.trees[t].root == first for t in life["trees"][:1])
            # nothing to learn from
            if last - first < 2 or not trees:
                continue
            sample, kept = found.pop((request.number, first, last))
            assert sample.reason == life["reason"] and sample.prompt_len == request.prompt_len
            assert kept == trees
            covered = set()
            for t in trees:
                tree = server.trees[t]
                path = [
                    n
                    for k, n in enumerate(tree.path[: tree.committed + 1])
                    if tree.root + k <= last
                ]
                nodes = (
                    sample.logsumexp[
                        sample.node_accepted & (sample.node_position == tree.root - 1 - first)
                    ]
                    - 1
                )
                assert (nodes % 64).tolist() == path
                covered |= {tree.root + k for k in range(len(path))}
            assert covered == {
                first + 1 + i for i, node in enumerate(sample.position_node.tolist()) if node >= 0
            }
    assert not found
    assert assembler.counters["rootless_trees"] == rootless and assembler.counters["holes"] == 0
    if odd:
        assert assembler.counters["cut_back"] + assembler.counters["after_end"] > 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lose", [0.0, 0.05, 0.4])
def test_whatever_happens_no_sample_is_wrong(seed, lose):
    server = Server(1000 + seed, requests=20, lose=lose)
    config = (
        WHOLE
        if seed % 2
        else AssembleConfig(part_positions=10, context_positions=seed % 6, max_positions=20)
    )
    samples, assembler = assemble(server, config)
    keys, seen = set(), []
    for sample in samples:
        number, trees = check(sample, server)
        seen += trees
        keys.add((sample.session, sample.request, sample.attempt))
        if sample.reason in ("stop", "length", "abort", "retract"):
            ends = [
                (life["reason"], life["committed"])
                for life in server.requests[number].lives
                if "reason" in life
            ]
            assert any(
                r == sample.reason and sample.start + len(sample.features) < c for r, c in ends
            )
    assert samples and len(keys) == len(samples)
    assert len(seen) == len(set(seen)), "a tree is in two samples"
    assert not assembler.bad_rows


def test_parts_of_a_long_request_share_context_only():
    server = Server(5, requests=1, odd=False)
    server.requests[0].total_len = server.requests[0].prompt_len + 300
    samples, _ = assemble(server, AssembleConfig(part_positions=50, context_positions=16))
    assert [s.reason for s in samples[:-1]] == ["part"] * (len(samples) - 1) and len(samples) >= 5
    trees = [t for sample in samples for t in check(sample, server)[1]]
    (life,) = server.requests[0].lives
    assert trees == [t for t in life["trees"] if server.trees[t].root < life["committed"]]
    for before, after in zip(samples, samples[1:]):
        end = before.start + len(before.features)
        assert after.start == end - 16
        assert (after.position_node[:16] < 0).all() and (after.position_node[16:20] >= 0).all()
        assert (before.position_node[-20:] >= 0).all()


def test_bounds_take_the_least_recent_request_early():
    server = Server(8, odd=False)
    samples, assembler = assemble(server, AssembleConfig(max_open=1, part_positions=10_000))
    assert assembler.counters["evicted"] > 0
    for sample in samples:
        check(sample, server)
    tight = Assembler(AssembleConfig(max_bytes=20_000))
    for message in Server(8, odd=False).run():
        tight.add(message)
        assert tight.nbytes <= 20_000
    assert tight.counters["evicted"] > 0


def test_narrow_steps_take_no_more_memory_than_they_are_counted_for():
    """A server that sends features of width 1, one token at a time, and never ends a request."""
    none, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    tracemalloc.start()
    assembler = Assembler(AssembleConfig(max_bytes=1 << 18))
    before = tracemalloc.get_traced_memory()[0]
    for n in range(1000):
        request, position = f"r{n // 250}", n % 250
        header = wire.Header(
            schema=wire.SCHEMA_VERSION, kind="prefill", session="e", captured_seq=n + 1,
            sent_seq=n + 1, heartbeats=0, dropped={}, queued=0, target="t", draft_version=0,
            extend_version=0, time_ns=n, requests=[request],
        )  # fmt: skip
        arrays = {
            "positions": none + position, "extend_lens": one, "feature_lens": one,
            "prompt_lens": none + 1000, "input_ids": one, "next_tokens": one,
        }  # fmt: skip
        frames = {name: ("int32", array) for name, array in arrays.items()}
        frames["aux_hidden_states"] = "float32", np.zeros((1, 1), np.float32)
        assembler.add(
            wire.decode([bytes(p) for p in wire.encode(header, frames)], max_bytes=1 << 20)
        )
        assert assembler.nbytes <= 1 << 18
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert assembler.counters["evicted"] > 0 and taken < 1.5 * (1 << 18), taken


def test_repeated_messages_change_nothing():
    once, _ = assemble(Server(11))
    assembler, twice = Assembler(WHOLE), []
    for message in Server(11).run():
        twice += assembler.add(message) + assembler.add(message)
    assembler.idle(0.0)
    twice += assembler.idle(1e3)
    assert [s.tokens.tolist() for s in once] == [s.tokens.tolist() for s in twice]
    assert assembler.counters["duplicate"] == assembler.counters["messages"]


@pytest.mark.parametrize("kind", ["prefill", "end"])
def test_the_domain_reaches_the_sample(kind):
    server, messages = one_request()
    for message in messages:
        message.header.domains = ["code"] if message.header.kind == kind else []
    assembler = Assembler(WHOLE)
    (sample,) = [s for m in messages for s in assembler.add(m)]
    assert sample.domain == "code"


def test_rounds_of_fewer_draft_steps_lie_in_one_sample():
    """A chain of three drafts whose first is accepted, a plain round, a chain of one draft."""

    def tree(nodes, path):
        k = np.arange(nodes, dtype=np.int32)
        return Tree(
            tokens=100 * nodes + k, parents=k - 1, path=np.array(path, np.int32),
            topk_ids=np.zeros((nodes, 2), np.int32) + k[:, None],
            topk_logits=np.zeros((nodes, 2), np.float32), logsumexp=np.full(nodes, 1.0, np.float32),
            version=nodes, altered=False,
        )  # fmt: skip

    trees = [tree(4, [0, 1, -1, -1]), tree(1, [0]), tree(2, [0, -1])]
    found = _forest(trees, np.array([0, 2, 3]), 5, "float32")
    assert found["node_token"].tolist() == [400, 401, 402, 403, 100, 200, 201]
    assert found["node_parent"].tolist() == [-1, 0, 1, 2, -1, -1, 5]
    assert found["node_depth"].tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert found["tree_first"].tolist() == [0, 4, 5]
    assert found["position_node"].tolist() == [0, 1, 4, 5, -1]
    assert found["topk_ids"][:, 0].tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert found["tree_version"].tolist() == [4, 1, 2]
