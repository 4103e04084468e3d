"""Behind a cached prefix a sample begins with what an earlier request computed of it, and only
if that was the same text.
"""

import numpy as np
import torch

from aurora_sglang_plugin.link import wire
from aurora_trainer.intake.assemble import AssembleConfig, Assembler
from aurora_trainer.intake.prefixes import KEY_BYTES, Prefixes

SENT = iter(range(1, 1 << 30))
F = 3


def i32(*values):
    return "int32", np.array(values, np.int32)


def features(text, positions, dtype="float32"):
    """A row for every position: what it is, and a number of all the text up to it."""
    rows = [[p, text[p], sum(text[: p + 1])] for p in positions]
    values = np.array(rows, np.float32).reshape(-1, F)
    if dtype == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values


def send(kind, request, arrays, session="e", version=1, **fields):
    seq = next(SENT)
    header = wire.Header(
        schema=wire.SCHEMA_VERSION, kind=kind, session=session, captured_seq=seq, sent_seq=seq,
        heartbeats=0, dropped={}, queued=0, target="t", draft_version=version,
        extend_version=version, time_ns=seq, requests=[request], **fields,
    )  # fmt: skip
    message = wire.decode(
        [bytes(part) for part in wire.encode(header, arrays)], max_bytes=wire.MAX_HEADER_BYTES
    )
    assert not message.bad
    return message


def request(rid, text, prompt, cached=0, sent=0, dtype="float32", version=1):
    """Messages of a request: `text` is its prompt and what it generates, of which the first
    `cached` tokens were cached and the last `sent` of these travel."""
    first = cached - sent
    yield send("prefill", rid, {
        "positions": i32(first), "extend_lens": i32(prompt - first),
        "feature_lens": i32(prompt - cached), "prompt_lens": i32(prompt),
        "input_ids": i32(*text[first:prompt]), "next_tokens": i32(text[prompt]),
        "aux_hidden_states": features(text, range(cached, prompt), dtype),
    }, version=version)  # fmt: skip
    for root in range(prompt, len(text) - 1):
        yield send("verify", rid, {
            "positions": i32(root), "draft_tokens": i32([text[root], 0]), "parents": i32([-1, 0]),
            "accept_path": i32([0, -1]), "feature_lens": i32(1),
            "next_tokens": i32([text[root + 1], 0]),
            "aux_hidden_states": features(text, [root], dtype),
            "topk_ids": i32([[5], [5]]),
            "topk_logits": ("float32", np.zeros((1, 2, 1), np.float32)),
            "logsumexp": ("float32", np.ones((1, 2), np.float32)),
        }, version=version, num_steps=1, topk=1, flags=[0])  # fmt: skip
    yield send("end", rid, {"committed_lens": i32(len(text))}, reasons=["stop"])


def assemble(*requests, **config):
    assembler = Assembler(AssembleConfig(**config))
    samples = [s for messages in requests for m in messages for s in assembler.add(m)]
    return samples, assembler


def words(seed, count):
    return np.random.default_rng(seed).integers(1, 1000, count).tolist()


def check(sample, text, start):
    """It knows the text from `start` on, as it is."""
    assert sample.start == start
    assert sample.tokens.tolist() == text[start : start + len(sample.tokens)]
    expected = torch.from_numpy(features(text, range(start, start + len(sample.features)))[1])
    torch.testing.assert_close(sample.features.float(), expected, atol=0, rtol=1e-2)


def test_a_turn_knows_the_turns_before_it():
    text = words(0, 200)
    samples, assembler = assemble(
        request("a", text[:90], 60),
        request("b", text[:140], 110, cached=88, sent=88, version=2),
        request("c", text[:190], 160, cached=137, sent=137, version=3),
    )
    for sample, end in zip(samples, (90, 140, 190)):
        check(sample, text, 0)
        assert len(sample.features) == end - 1
    first = samples[1].prompt_len - 1
    assert samples[1].prompt_len == 110 and samples[1].position_version[:88].tolist() == [1] * 88
    # what was computed before proposes nothing
    assert (samples[1].position_node[:first] < 0).all() and samples[1].has_target[first:-1].all()
    assert assembler.prefixes.positions == {"found": 88 + 137, "missing": 0}


def test_what_many_requests_begin_with():
    system = words(1, 70)
    texts = [system + words(2 + i, 60) for i in range(4)]
    samples, assembler = assemble(
        request("0", texts[0], 100),
        *(request(f"{i}", texts[i], 100, cached=70, sent=70) for i in (1, 2, 3)),
    )
    for sample, text in zip(samples, texts):
        check(sample, text, 0)


def test_in_bfloat16_and_not_of_another_dtype():
    text = words(3, 120)
    samples, _ = assemble(
        request("a", text[:80], 50, dtype="bfloat16"),
        request("b", text[:110], 90, cached=78, sent=78, dtype="bfloat16"),
        request("c", text, 100, cached=78, sent=78, dtype="float32"),
    )
    check(samples[1], text, 0)
    assert samples[1].features.dtype == torch.bfloat16
    check(samples[2], text, 78)


def test_only_as_much_as_is_wanted_and_as_the_server_sent():
    text = words(4, 300)
    first = request("a", text[:200], 150)
    samples, _ = assemble(first, request("b", text, 250, 190, 190), context_positions=40)
    check(samples[1], text, 150)
    samples, assembler = assemble(
        request("a", text[:200], 150), request("b", text, 250, cached=190, sent=70)
    )
    check(samples[1], text, 120)
    assert assembler.prefixes.positions == {"found": 70, "missing": 120}
    samples, _ = assemble(request("a", text[:200], 150), request("b", text, 250, 190, 190),
                          context_positions=0)  # fmt: skip
    check(samples[1], text, 190)


def test_another_text_is_not_taken_for_it():
    """Not if an early token differs, nor if the same words stand elsewhere, nor if too
    little of it was sent to tell."""
    text, shifted = words(5, 150), [7, *words(5, 149)]
    other = [text[0] + 1, *text[1:]]
    for earlier, sent in ((other, 100), (shifted, 100), (text, 0), (text, 10)):
        samples, assembler = assemble(
            request("a", earlier[:110], 80), request("b", text, 130, cached=100, sent=sent)
        )
        check(samples[1], text, 100)
        assert assembler.prefixes.positions == {"found": 0, "missing": 100}
    # a run that begins behind what differs agrees in all that it knows
    samples, _ = assemble(
        request("a", other[:140], 80, cached=20, sent=0), request("b", text, 130, 120, 120)
    )
    check(samples[1], text, 20)
    # too short a run to tell
    samples, _ = assemble(
        request("a", other[:130], 110, cached=90, sent=0), request("b", text, 130, 112, 112)
    )
    check(samples[1], text, 112)


def test_what_is_kept_is_bounded():
    """The run that is asked for stays, the others go in the order of their last use."""
    system = words(6, 64)
    texts = [system + words(7 + i, 40) for i in range(12)]
    # features, tokens, versions, keys
    size = 90 * F * 4 + 91 * 4 + 90 * 4 + 5 * KEY_BYTES
    requests = [request("0", texts[0], 80)]
    requests += [request(f"{i}", texts[i], 80, cached=64, sent=64) for i in range(1, 12)]
    samples, assembler = assemble(*requests, prefix_bytes=4 * size)
    for sample, text in zip(samples, texts):
        check(sample, text, 0)
    kept = assembler.prefixes
    assert kept._nbytes == sum(run.nbytes for run in kept._runs.values()) <= 4 * size
    assert set(kept._at.values()) <= set(kept._runs) and len(kept._runs) <= 4
    nothing, _ = assemble(
        request("a", texts[0], 80), request("b", texts[1], 80, cached=64, sent=64), prefix_bytes=1
    )
    check(nothing[1], texts[1], 64)


def test_what_was_asked_for_stays_longer():
    texts = [words(20 + i, 80) for i in range(3)]
    first, second, third = assemble(*(request(f"{t[0]}", t, 60) for t in texts))[0]
    (prefixes := Prefixes(1 << 20, most=100)).put(first)
    # of two and a half
    prefixes = Prefixes(5 * prefixes._nbytes // 2, most=100)

    def known(text):
        return prefixes.before(64, np.array(text[:65], np.int32), "float32", F) is not None

    prefixes.put(first)
    prefixes.put(second)
    assert known(texts[0])
    prefixes.put(third)
    assert [known(text) for text in texts] == [True, False, True]
