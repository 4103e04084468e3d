"""The receiver among peers that send anything, clocks that are wrong, endpoints that are taken, and
ledgers that are damaged or cannot be written: all of it is counted, and receiving goes on.
"""

import socket
import time

import numpy as np
import pytest
import zmq
from deadline import until, values

from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.ledger import Ledger
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver

HOUR_S = 3600.0


def fields_of(number):
    return dict(
        schema=wire.SCHEMA_VERSION, kind="end", session="fuzz", captured_seq=number,
        sent_seq=number,
        heartbeats=0,
        dropped={}, queued=0, target="target", draft_version=0, extend_version=0, time_ns=1,
        requests=["r"],
        reasons=["stop"],
    )  # fmt: skip


def parts_of(number, **changes):
    fields = fields_of(number)
    arrays = {"committed_lens": ("int32", np.array([number], np.int32))}
    return [bytes(part) for part in wire.encode(wire.Header(**fields | changes), arrays)]


@pytest.fixture
def push(link):
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(link.endpoint)
    yield push
    context.destroy(linger=0)


def test_bad_input_is_refused_and_counted_and_receiving_goes_on(receive, push):
    receiver = receive(target="target")
    garbage = np.random.default_rng(0)
    good = parts_of(1)
    push.send_multipart(good)
    push.send_multipart([b"", b"", b""])
    push.send_multipart([garbage.bytes(500)])
    push.send_multipart([good[0][:20], good[1]])
    # far more parts than a message may have
    push.send_multipart([b"x"] * 5000)
    # each part is allowed, all of them are not
    push.send_multipart([b"y" * (1 << 19)] * 5)
    push.send_multipart(parts_of(2, schema=99))
    push.send_multipart([parts_of(3)[0], good[1][:2]])
    push.send_multipart(parts_of(4, target="another"))
    push.send_multipart(parts_of(5, dropped={f"cause{i}": 1 for i in range(1000)}))
    push.send_multipart(parts_of(5, session="x" * 65))
    push.send_multipart(parts_of(5, sent_seq=1 << 60))
    # again
    push.send_multipart(parts_of(1))
    push.send_multipart(parts_of(6))
    assert values(receiver, 1) == [1]
    # of number 3: its request's sample ends there, and no hole ends all others'
    stand_in = receiver.get(10.0)
    assert (stand_in.header.captured_seq, stand_in.header.requests, stand_in.bad) == (
        3,
        ["r"],
        {0: "length"},
    )
    assert values(receiver, 1) == [6]
    ledger = receiver.ledger()
    assert ledger["rejected"] == {
        "header": 5, "frames": 1, "size": 2, "schema": 1, "target": 1, "values": 1, "order": 1,
    }  # fmt: skip
    # 3 and 4 could be told to be its; 2 and 5 could not
    session = ledger["sessions"]["fuzz"]
    assert (session["received"], session["rejected"], session["lost"], session["sent_seq"]) == (
        2,
        2,
        2,
        6,
    )
    assert list(ledger["sessions"]) == ["fuzz"]


def test_an_oversized_part_costs_the_peer_its_connection_and_others_nothing(link, receive, push):
    receiver = receive()
    push.send(b"x" * (link.max_message_bytes + 1))
    push.send_multipart(parts_of(1))
    context = zmq.Context()
    other = context.socket(zmq.PUSH)
    other.connect(link.endpoint)
    other.send_multipart(parts_of(1, session="other"))
    got = receiver.get(10.0)
    assert got is not None and got.header.session in ("other", "fuzz")
    context.destroy(linger=0)


def test_random_mutations_never_stop_the_receiver(receive, push):
    receiver = receive()
    draw = np.random.default_rng(1)
    for sent_seq in range(1, 400):
        parts = [bytearray(part) for part in parts_of(sent_seq)]
        for _ in range(draw.integers(1, 4)):
            part = parts[draw.integers(len(parts))]
            part[draw.integers(len(part))] = draw.integers(256)
        push.send_multipart(parts)
    push.send_multipart(parts_of(1, session="last"))
    while receiver.get(10.0).header.session != "last":
        pass
    assert (
        "failed" not in receiver.ledger()["rejected"]
        and sum(receiver.ledger()["rejected"].values()) > 100
    )


def test_an_endpoint_in_use_is_a_clear_error_and_stays_with_its_owner(link, receive, push):
    receiver = receive()
    with pytest.raises(ValueError, match="another trainer runs there"):
        Receiver(link, ReceiveConfig(), None)
    push.send_multipart(parts_of(1))
    assert values(receiver, 1) == [1]


def test_a_stale_ipc_path_of_a_killed_trainer_is_taken_over(tmp_path):
    link = LinkConfig(endpoint=f"ipc://{tmp_path}/stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "stale"))
    Receiver(link, ReceiveConfig(), None).close()


def test_an_ipc_directory_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="EXISTING/DIRECTORY"):
        Receiver(LinkConfig(endpoint=f"ipc://{tmp_path}/missing/link"), ReceiveConfig(), None)


def test_damaged_ledger_are_replaced(link, receive, push, tmp_path):
    (tmp_path / "ledger.json").write_bytes(b'{"sessions": {"fuzz": {"rec\xff')
    receiver = receive()
    push.send_multipart(parts_of(1))
    assert values(receiver, 1) == [1]
    receiver.close()
    assert Receiver(link, ReceiveConfig(), tmp_path / "ledger.json").close() is None
    assert b'"received":1' in (tmp_path / "ledger.json").read_bytes()


def header_of(session, sent_seq, **changes):
    return wire.decode(parts_of(sent_seq, session=session, **changes), max_bytes=1 << 20).header


@pytest.mark.parametrize("bound", [8192, 16])
def test_the_ledger_of_many_servers_stay_exact(bound, monkeypatch, tmp_path):
    """80 in turns.

    If more speak than are remembered, none is charged what was there before it was forgotten.
    """
    monkeypatch.setattr("aurora_sglang_plugin.link.ledger.MAX_SESSIONS", bound)
    ledger = Ledger(tmp_path / "ledger.json")
    for sent_seq in range(1, 31):
        for server in range(80):
            # one in ten is lost
            if (sent_seq + server) % 10:
                assert ledger.accept(header_of(f"e{server}", sent_seq, captured_seq=sent_seq))
        if sent_seq == 15:
            ledger.write()
            ledger = Ledger(tmp_path / "ledger.json")
    assert len(ledger.sessions) == min(80, bound) and (ledger.forgotten_sessions == 0) == (
        bound > 80
    )
    for name, session in ledger.sessions.items():
        assert session.sent_seq - session.before == session.received + session.lost, name
    if bound > 80:
        lost = sum(
            not (sent_seq + server) % 10 for server in range(80) for sent_seq in range(1, 30)
        )
        assert lost - 80 <= sum(e.lost for e in ledger.sessions.values()) <= lost
    else:
        assert ledger.forgotten_sessions > 0 and sum(e.lost for e in ledger.sessions.values()) <= 16


BAD_COUNTERS = [
    dict(captured_seq=1 << 52),
    dict(sent_seq=1 << 52),
    dict(sent_seq=1 << 52, captured_seq=1 << 52),
    dict(sent_seq=1 << 30),
    dict(captured_seq=1 << 52, dropped={"queue_full": 1 << 52}),
    dict(heartbeats=1 << 52),
    dict(sent_seq=1 << 52, heartbeats=1 << 52),
]


@pytest.mark.parametrize("bad", BAD_COUNTERS, ids=str)
@pytest.mark.parametrize("at", [1, 4])
def test_a_header_with_wrong_counters_costs_itself(bad, at, receive, push):
    """Whichever counter is wrong, all later messages of its session count as they would without.

    As the first of a session one that could be true is believed.
    """
    if at == 1 and bad == dict(sent_seq=1 << 30):
        pytest.skip("a session may have sent so much before")
    receiver = receive()
    for number in range(1, 8):
        push.send_multipart(parts_of(number, **(bad if number == at else {})))
    assert values(receiver, 6) == [n for n in range(1, 8) if n != at]
    ledger = receiver.ledger()
    assert ledger["rejected"] == {"values": 1}
    session = ledger["sessions"]["fuzz"]
    assert session["received"] == 6 and session["lost"] == (at > 1)


@pytest.mark.parametrize("old", [None, b"damaged"])
def test_a_new_ledger_counts_from_where_it_meets_a_session(old, tmp_path):
    path = tmp_path / "ledger.json"
    if old is not None:
        path.write_bytes(old)
    ledger = Ledger(path)
    # in the middle; then exact
    for number in (1000, 1001, 1004):
        assert ledger.accept(header_of("middle", number))
    # from the beginning: exact at once
    for number in (1, 4):
        assert ledger.accept(header_of("begins", number))
    assert {n: s.lost for n, s in ledger.sessions.items()} == {"middle": 2, "begins": 2}
    assert ledger.sessions["middle"].before == 999
    ledger.write(at_once=True)
    # one that is whole knows that this session is new
    ledger = Ledger(path)
    assert ledger.accept(header_of("later", 3)) and ledger.sessions["later"].lost == 2


@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S, 1.0])
def test_a_servers_wrong_clock_is_put_right_by_its_heartbeats(ahead_s, receive, push):
    receiver, now_ns = receive(target="target"), time.time_ns()
    there_ns = now_ns + int(ahead_s * 1e9)
    beat = dict(
        kind="heartbeat", heartbeats=1, requests=[], reasons=[], captured_seq=0, time_ns=there_ns
    )
    push.send_multipart([bytes(p) for p in wire.encode(wire.Header(**fields_of(1) | beat), {})])
    push.send_multipart(parts_of(2, captured_seq=1, time_ns=there_ns))
    push.send_multipart(parts_of(1, session="another", time_ns=now_ns))
    found = {
        m.header.session: m.header.time_ns - now_ns
        for m in (receiver.get(10.0), receiver.get(10.0))
    }
    assert found["another"] == 0 and abs(found["fuzz"]) < 20e9
    if abs(ahead_s) < 5:
        # as it came: it may have waited on the way
        assert found["fuzz"] == int(ahead_s * 1e9)


def test_a_disk_that_takes_no_ledger_is_counted_and_they_come_later(link, receive, push, tmp_path):
    receiver = receive()
    # nothing can be written there
    (tmp_path / "ledger.json.tmp").mkdir()
    push.send_multipart(parts_of(1))
    assert values(receiver, 1) == [1]
    until(lambda: receiver.ledger()["write_faults"])
    (tmp_path / "ledger.json.tmp").rmdir()
    push.send_multipart(parts_of(2))
    until(lambda: (tmp_path / "ledger.json").exists())
