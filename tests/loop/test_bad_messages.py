"""A stranger sends garbage to the trainer's socket while a server publishes: it is counted, nothing
else is lost.
"""

from __future__ import annotations

import msgspec
import zmq
from rig import wait_until

from aurora_sglang_plugin.link import wire


def garbage(real: wire.Header) -> list[list[bytes]]:
    """Messages that must be refused, some of them close to right."""
    header = msgspec.to_builtins(real) | {"session": "stranger", "sent_seq": 1}

    def encoded(**changes):
        return msgspec.msgpack.encode(header | changes)

    return [
        [b""],
        [b"\xff" * 100],
        [b"\x80"],
        [encoded(schema=99)],
        [encoded(kind="pickle")],
        [encoded(kind="heartbeat"), b"one frame too many"],
        [
            encoded(
                kind="end",
                requests=["r"],
                reasons=["stop"],
                frames=[("committed_lens", "int32", (1,))],
            ),
            b"abc",
        ],
        [
            encoded(
                kind="end",
                requests=["r"],
                reasons=["stop"],
                frames=[("committed_lens", "int64", (1,))],
            ),
            b"\0" * 8,
        ],
        [encoded(unknown_key=1)],
        [b"x" * (2 << 20)],
        [b"part"] * 60,
    ]


def test_garbage_while_a_server_publishes(chain, stream):
    answers = chain.generate([stream[33500:33510]], {"max_new_tokens": 2})
    chain.taken([answers[0]["rid"]])
    chain.quiet()
    before = chain.receiver.ledger()
    header = chain.messages[-1].header
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.linger = 0
    socket.connect(chain.link.endpoint)
    bad = garbage(header)
    try:
        with chain.load(
            [stream[34000 + 50 * i : 34040 + 50 * i] for i in range(4)], {"max_new_tokens": 24}
        ) as rounds:
            for _ in range(5):
                for parts in bad:
                    socket.send_multipart(parts)
            while not rounds:
                chain.drain()
    finally:
        ledger = chain.quiet()
        socket.close()
    after = chain.receiver.ledger()
    assert sum(after["rejected"].values()) - sum(before["rejected"].values()) == 5 * len(bad)
    assert ledger["lost"] == before["sessions"][chain.session]["lost"] and ledger["rejected"] == 0
    for answers in rounds:
        for rid, samples in chain.taken([a["rid"] for a in answers]).items():
            assert samples and samples[-1].reason == "length", rid


def test_a_request_that_cannot_travel_costs_nobody_else(chain, stream):
    """A client's id of 2,000 characters beside others': it is left out, they are whole."""
    chain.quiet()
    holes = chain.assembler.counters["holes"]
    out = chain.metrics().get("aurora_excluded_requests{request_id}", 0)
    rids = [f"beside-{n}" for n in range(3)]
    prompts = [stream[35000 + 50 * i : 35040 + 50 * i] for i in range(4)]
    answers = chain.generate(prompts, {"max_new_tokens": 24}, [*rids, "x" * 2000])
    assert len(answers) == 4 and all(len(a["output_ids"]) == 24 for a in answers)
    for rid, samples in chain.taken(rids).items():
        assert [s.reason for s in samples] == ["length"], rid
    ledger = chain.quiet()
    assert ledger["rejected"] == 0 and chain.assembler.counters["holes"] == holes
    assert not chain.assembler.bad_rows and all(len(rid) <= 1024 for rid in chain.samples)
    counted = "aurora_excluded_requests{request_id}"
    wait_until(lambda: chain.metrics().get(counted, 0) > out, "the left-out request in the metrics")
