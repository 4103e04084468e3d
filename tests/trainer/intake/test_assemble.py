"""Assembly against a simulated server that knows the truth, position by position and node by
node.
"""

from collections import Counter

import numpy as np
import pytest
from simulator import S, Server, token

from aurora_sglang_plugin.link import wire
from aurora_trainer.intake.assemble import AssembleConfig, Assembler

WHOLE = AssembleConfig(part_positions=10_000)


def assemble(server, config=WHOLE):
    assembler = Assembler(config)
    samples = []
    for message in server.run():
        if message is not None:
            samples += assembler.add(message)
    assembler.idle(0.0)
    samples += assembler.idle(config.idle_s)
    assert assembler.open_requests == 0 and assembler.nbytes == 0
    return samples, assembler


def check(sample, server):
    """Every value of the sample against the truth.

    Returns (request number, numbers of its trees).
    """
    length, start = len(sample.features), sample.start
    number = int(sample.features[0, 0])
    request = server.requests[number]
    assert sample.request == request.rid
    truth = [[number, p, token(number, p)] for p in range(start, start + length)]
    assert sample.features.tolist() == truth
    assert sample.tokens.tolist() == [token(number, p) for p in range(start, start + length + 1)]
    assert sample.position_version.shape == (length,)
    assert sample.num_steps == S and sample.topk == 2

    firsts = [*sample.tree_first.tolist(), len(sample.node_token)]
    numbers = []
    for g, (first, end) in enumerate(zip(firsts, firsts[1:])):
        uid, root_index = divmod(int(sample.logsumexp[first]) - 1, 64)
        tree = server.trees[uid]
        numbers.append(uid)
        assert root_index == 0 and tree.number == number
        used = [i for i, parent in enumerate(tree.parents) if parent != -2]
        assert ((sample.logsumexp[first:end] - 1) % 64).tolist() == used
        assert sample.topk_ids[first:end, 0].tolist() == [uid * 8 + i for i in used]
        assert sample.node_token[first:end].tolist() == [tree.tokens[i] for i in used]
        parents = [-1 if tree.parents[i] < 0 else first + used.index(tree.parents[i]) for i in used]
        assert sample.node_parent[first:end].tolist() == parents
        assert sample.node_position[first:end].tolist() == [tree.root - 1 - start] * len(used)
        assert 0 <= tree.root - 1 - start < length
        depth = sample.node_depth[first:end].tolist()
        assert depth == [0, *(depth[parent - first] + 1 for parent in parents[1:])]
        at_most = [node for k, node in enumerate(tree.path) if tree.root + k <= start + length]
        accepted = [i for i, on in zip(used, sample.node_accepted[first:end].tolist()) if on]
        assert accepted == sorted(at_most[: len(accepted)]) and accepted[0] == 0
        assert sample.tree_version[g] == tree.version
        assert set(sample.node_altered[first:end].tolist()) == {tree.altered}
    positions = (sample.position_node >= 0).nonzero().flatten()
    nodes = sample.position_node[positions]
    # it stands where the position's token does
    assert (sample.node_position + sample.node_depth)[nodes].equal(positions)
    assert (
        sample.node_token[nodes].equal(sample.tokens[positions + 1])
        and sample.node_accepted[nodes].all()
    )
    return number, numbers


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


@pytest.mark.parametrize("seed", range(20))
def test_two_requests_of_one_id_are_never_glued(seed):
    """The first one's `end` and the second one's prefill are lost: the verify that comes may well
    fit by its token.
    """
    server = Server(seed, requests=2, odd=False)
    first, second = server.requests
    second.rid, second.prompt_len = first.rid, first.prompt_len + 3
    first.total_len = second.total_len = first.prompt_len + 30
    kept = [
        m
        for m in server.run()
        if m.header.kind == "verify" or not second.lives and m.header.kind != "end"
    ]
    assembler = Assembler(WHOLE)
    samples = [s for m in kept for s in assembler.add(m)]
    assembler.idle(0.0)
    samples += assembler.idle(1e3)
    assert sorted(check(sample, server)[0] for sample in samples) == [0, 1]


def one_request(length=30):
    server = Server(3, requests=1, odd=False)
    server.requests[0].total_len = server.requests[0].prompt_len + length
    return server, list(server.run())


def test_an_end_after_a_lost_message_is_not_sure_to_be_this_ones():
    server, messages = one_request()
    *before, lost, end = messages
    assembler = Assembler(WHOLE)
    (sample,) = [s for m in [*before, end] for s in assembler.add(m)]
    assert (lost.header.kind, end.header.kind, sample.reason) == ("verify", "end", "gap")
    check(sample, server)


def test_another_token_than_was_accepted_starts_anew():
    server, messages = one_request()
    roots = [m for m in messages if m.header.kind == "verify"]
    roots[5].arrays["draft_tokens"] = roots[5].arrays["draft_tokens"].copy()
    roots[5].arrays["draft_tokens"][0, 0] += 1
    assembler = Assembler(WHOLE)
    one, two = [s for m in messages for s in assembler.add(m)]
    root = int(roots[5].arrays["positions"][0])
    assert (one.reason, one.start + len(one.features), two.start, two.attempt) == (
        "gap",
        root,
        root,
        1,
    )


def test_an_id_that_comes_again_without_an_end_starts_anew():
    """The same text again, found in the prefix cache up to its last token, now as a longer
    prompt.
    """
    server, messages = one_request()
    *first, _ = messages
    chunk = next(m for m in reversed(first) if m.header.kind == "prefill")
    assembler = Assembler(WHOLE)
    assert not [s for m in first for s in assembler.add(m)]
    (segment,) = assembler._open.values()
    chunk.header.captured_seq = first[-1].header.captured_seq + 1
    length = len(chunk.arrays["input_ids"])
    chunk.arrays |= {"positions": chunk.arrays["positions"] * 0 + segment.next,
                     "prompt_lens": chunk.arrays["prompt_lens"] * 0 + segment.next + length,
                     "input_ids": chunk.arrays["input_ids"] * 0 + segment.last_token}  # fmt: skip
    (sample,) = assembler.add(chunk)
    assert sample.reason == "gap" and check(sample, server)[0] == 0


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


def test_a_lost_end_is_closed_by_idling_and_cut_at_eos():
    server = Server(3, requests=1, odd=False)
    request = server.requests[0]
    request.total_len = request.prompt_len + 40
    messages = [m for m in server.run() if m.header.kind != "end"]
    eos = token(0, request.prompt_len + 10)
    first_eos = next(p for p in range(request.prompt_len, 10_000) if token(0, p) == eos)
    assembler = Assembler(AssembleConfig(idle_s=5, eos_token_ids=(eos,)))
    assert not [s for m in messages for s in assembler.add(m)]
    assert assembler.idle(100.0) == [] and assembler.idle(104.9) == []
    (sample,) = assembler.idle(105.0)
    assert sample.reason == "idle" and sample.start + len(sample.features) == first_eos
    check(sample, server)


def test_bounds_take_the_least_recent_request_early():
    server = Server(8, odd=False)
    samples, assembler = assemble(server, AssembleConfig(max_open=1, part_positions=10_000))
    assert assembler.counters["evicted"] > 0
    for sample in samples:
        check(sample, server)
    tight = Assembler(AssembleConfig(max_bytes=2000))
    for message in Server(8, odd=False).run():
        tight.add(message)
        assert tight.nbytes <= 2000


def test_repeated_messages_change_nothing():
    once, _ = assemble(Server(11))
    assembler, twice = Assembler(WHOLE), []
    for message in Server(11).run():
        twice += assembler.add(message) + assembler.add(message)
    assembler.idle(0.0)
    twice += assembler.idle(1e3)
    assert [s.tokens.tolist() for s in once] == [s.tokens.tolist() for s in twice]
    assert assembler.counters["duplicate"] == assembler.counters["messages"]


def changed(message, **arrays):
    """The message as it would have arrived with other frames."""
    frames = {
        name: (message.dtype(name), array) for name, array in (message.arrays | arrays).items()
    }
    return wire.decode(
        [bytes(part) for part in wire.encode(message.header, frames)], max_bytes=1 << 20
    )


def test_a_bad_row_ends_its_requests_sample_and_no_others():
    server = Server(12, requests=6, odd=False)
    whole, _ = assemble(Server(12, requests=6, odd=False))
    assembler, samples, broken, hurt = Assembler(WHOLE), [], Counter(), set()
    for message in server.run():
        a = message.arrays
        if (
            message.header.kind == "verify"
            and message.header.captured_seq % 5 == 0
            and message.header.requests
        ):
            row = message.header.captured_seq % len(message.header.requests)
            cause = ("not_finite", "path", "logits", "token")[message.header.captured_seq // 5 % 4]
            if cause == "not_finite":
                features = a["aux_hidden_states"].copy()
                features[a["feature_lens"].cumsum()[row] - 1] = np.nan
                message = changed(message, aux_hidden_states=features)
            elif cause == "logits":
                # more than all of it
                logits = a["topk_logits"].copy()
                logits[row] += 1e6
                message = changed(message, topk_logits=logits)
            elif cause == "token":
                tokens = a["draft_tokens"].copy()
                tokens[row] = -1
                message = changed(message, draft_tokens=tokens)
            else:
                path = a["accept_path"].copy()
                path[row, 0] = 1
                message = changed(message, accept_path=path)
            assert message.bad == {row: cause}
            broken[cause] += 1
            hurt.add(message.header.requests[row])
        samples += assembler.add(message)
    for sample in samples:
        check(sample, server)
    assert len(broken) == 4 and assembler.bad_rows == broken and assembler.counters["holes"] == 0
    untouched = {s.request: s for s in whole if s.request not in hurt}
    same = {s.request: s for s in samples if s.request in untouched}
    assert untouched and untouched.keys() == same.keys()
    assert all(
        same[r].tokens.equal(untouched[r].tokens) and same[r].reason == untouched[r].reason
        for r in same
    )


def test_a_refused_messages_stand_in_ends_its_requests_only():
    server, messages = one_request()
    other = Server(4, requests=1, odd=False)
    other.requests[0].rid, other.requests[0].number = "another", 0
    both = [m for pair in zip(messages, list(other.run())) for m in pair]
    for number, message in enumerate(both, 1):
        message.header.captured_seq = message.header.sent_seq = number
    assembler, samples, refused = Assembler(WHOLE), [], 0
    for message in both:
        if (
            message.header.kind == "verify"
            and message.header.requests == ["another"]
            and refused < 3
        ):
            refused += 1
            message = wire.decode(
                [bytes(p) for p in wire.missing(message.header)], max_bytes=1 << 20
            )
        samples += assembler.add(message)
    assembler.idle(0.0)
    samples += assembler.idle(1e3)
    (whole,) = [s for s in samples if s.request == "r0"]
    assert refused == 3 and whole.attempt == 0 and assembler.counters["holes"] == 0


def test_a_loss_while_its_session_was_forgotten_is_noticed(monkeypatch):
    monkeypatch.setattr("aurora_trainer.intake.gaps.MAX_SESSIONS", 2)
    server, messages = one_request()
    others = [
        m
        for n in range(2)
        for m in list(Server(n, requests=1, odd=False, session=f"other{n}").run())[:1]
    ]
    assembler, samples, half = Assembler(WHOLE), [], len(messages) // 2
    for number, message in enumerate(messages):
        if number == half:
            for other in others:
                assembler.add(other)
        message.header.captured_seq += 5 * (number >= half)
        samples += assembler.add(message)
    assert len(assembler._gaps._sessions) == 2
    assert [s.reason for s in samples][0] == "gap" and len(samples) == 2 and samples[1].attempt == 1
    for sample in samples:
        check(sample, server)


def test_a_flood_of_one_server_evicts_what_is_its_own():
    server, messages = one_request(200)
    flood = next(
        m
        for m in Server(9, requests=1, odd=False, session="flood").run()
        if m.header.kind == "prefill"
    )
    samples, number = [], 0
    assembler = Assembler(AssembleConfig(max_open=8, part_positions=10_000))
    for message in messages:
        samples += assembler.add(message)
        for _ in range(20):
            number += 1
            flood.header.requests, flood.header.captured_seq = [f"f{number}"], number
            samples += assembler.add(flood)
    (whole,) = [s for s in samples if s.session == "e"]
    assert whole.reason in ("stop", "length", "abort") and whole.attempt == 0
    assert assembler.counters["evicted"] > 100 and assembler.open_requests <= 8


@pytest.mark.parametrize("kind", ["prefill", "end"])
def test_the_domain_reaches_the_sample(kind):
    server, messages = one_request()
    for message in messages:
        message.header.domains = ["code"] if message.header.kind == kind else []
    assembler = Assembler(WHOLE)
    (sample,) = [s for m in messages for s in assembler.add(m)]
    assert sample.domain == "code"
