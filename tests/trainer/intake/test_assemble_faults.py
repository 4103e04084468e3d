"""Assembly when messages are lost, refused or bad, ids come again and servers flood: a sample ends
early, and is never wrong.
"""

from collections import Counter

import numpy as np
import pytest
from assembly import WHOLE, assemble, check, one_request
from simulator import Server, token

from aurora_sglang_plugin.link import wire
from aurora_trainer.intake.assemble import AssembleConfig, Assembler


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


def test_a_prompt_that_is_said_to_be_endless_makes_no_endless_sample():
    """Its verify steps lie in the prompt: parts are taken all the same, and none is wrong."""
    server = Server(5, requests=1, odd=False)
    server.requests[0].total_len = server.requests[0].prompt_len + 400
    messages = list(server.run())
    for message in messages:
        if message.header.kind == "prefill":
            message.arrays["prompt_lens"] = np.full_like(message.arrays["prompt_lens"], 1 << 20)
    assembler = Assembler(AssembleConfig(part_positions=50, context_positions=16))
    samples = [s for m in messages for s in assembler.add(m)]
    assert len(samples) > 5 and max(len(s.features) for s in samples) < 150
    for sample in samples:
        check(sample, server)
