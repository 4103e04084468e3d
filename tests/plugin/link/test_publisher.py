"""The publisher against real sockets: it never blocks, and its ledger is exact whatever the
trainer does.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import zmq

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.publisher import Publisher


class End:
    """A snapshot; `pad` makes its message heavy."""

    def __init__(self, value=0, requests=1, nbytes=64, fail=False):
        self.value, self.count, self.nbytes, self.fail = value, requests, nbytes, fail
        self.unloaded = 0

    def unload(self):
        self.unloaded += 1

    def build(self):
        if self.fail:
            raise RuntimeError("conversion failed")
        return {"committed_lens": ("int32", np.full(self.count, self.value, np.int32))}


def offer(publisher, value=0, requests=1, **kwargs):
    publisher.offer(
        "end",
        End(value, requests, **kwargs),
        requests=["r"] * requests,
        reasons=["stop"] * requests,
    )


def exact(counters):
    return (
        counters["captured"]
        == counters["sent"] + sum(counters["dropped"].values()) + counters["queued"]
    )


def until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "condition not reached"
        time.sleep(0.01)


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request, tmp_path):
    if request.param == "ipc":
        return f"ipc://{tmp_path}/link"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def publish(endpoint):
    publishers = []

    def start(max_message_bytes=64 << 20, **config):
        link = LinkConfig(endpoint=endpoint, max_message_bytes=max_message_bytes)
        publishers.append(
            Publisher(link, PublishConfig(**{"heartbeat_s": 0.05} | config), "target")
        )
        return publishers[-1]

    yield start
    for publisher in publishers:
        publisher.close(0.0)


@pytest.fixture
def pull(endpoint):
    context = zmq.Context()
    sockets = []

    def bind(rcvhwm=4):
        sockets.append(context.socket(zmq.PULL))
        sockets[-1].rcvhwm = rcvhwm
        sockets[-1].bind(endpoint)
        return sockets[-1]

    yield bind
    context.destroy(linger=0)


def receive(pull, timeout_ms=3000):
    assert pull.poll(timeout_ms), "nothing came"
    return wire.decode(pull.recv_multipart(), max_bytes=1 << 30)


def test_order_and_ledger_in_headers(publish, pull):
    puller, publisher = pull(), publish()
    for value in range(50):
        offer(publisher, value)
    messages = []
    while not messages or messages[-1].header.kind != "heartbeat" or len(messages) < 51:
        messages.append(receive(puller))
    assert [m.header.sent_seq for m in messages] == list(range(1, len(messages) + 1))
    values = [int(m.arrays["committed_lens"][0]) for m in messages if m.header.kind == "end"]
    assert values == list(range(50))
    last = messages[-1].header
    assert (last.captured_seq, last.queued, last.dropped, last.target) == (50, 0, {}, "target")
    assert last.sent_seq - last.heartbeats == 50 and last.session == publisher.session
    assert all(
        m.header.captured_seq == i + 1
        for i, m in enumerate(m for m in messages if m.header.kind == "end")
    )


def test_it_knows_whether_there_is_a_trainer(publish, pull, monkeypatch):
    """None for a while, then one, whose heartbeats are taken, then one that is stopped."""
    monkeypatch.setattr("aurora_sglang_plugin.link.publisher.NO_TRAINER_S", 0.3)
    publisher = publish()
    assert not publisher.no_trainer
    until(lambda: publisher.no_trainer)
    puller = pull()
    until(lambda: not publisher.no_trainer)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        while puller.poll(10):
            puller.recv_multipart()
        assert not publisher.no_trainer
    # it reads no more: what the sockets hold fills up
    heavy = np.zeros(1 << 18, np.int32)
    until(lambda: offer(publisher, heavy, len(heavy)) or publisher.no_trainer)


def test_nobody_listens_the_oldest_go_and_the_newest_arrive(publish, pull):
    publisher = publish(queue_messages=10)
    start = time.perf_counter()
    for value in range(1000):
        offer(publisher, value)
        assert exact(publisher.counters())
    # 1000 offers and 1000 checks, nothing waited
    assert time.perf_counter() - start < 2
    counters = publisher.counters()
    assert (
        counters["dropped"] == {"queue_full": 990}
        and counters["queued"] == 10
        and counters["sent"] == 0
    )
    puller = pull()
    got = [receive(puller) for _ in range(10)]
    assert [int(m.arrays["committed_lens"][0]) for m in got] == list(range(990, 1000))
    assert got[0].header.dropped == {"queue_full": 990}
    assert [m.header.queued for m in got] == list(range(9, -1, -1))


def test_a_message_says_which_target_it_was_captured_of(publish, pull):
    publisher = publish()
    offer(publisher, 1)
    publisher.retarget("another")
    offer(publisher, 2)
    puller = pull()
    got = [receive(puller).header for _ in range(3)]
    assert [h.target for h in got if h.kind == "end"] == ["target", "another"]
    assert got[-1].kind == "heartbeat" and got[-1].target == "another"


def test_messages_that_wait_give_back_what_is_scarce_once(publish, pull):
    publisher = publish()
    snapshots = [End(value) for value in range(20)]
    for snapshot in snapshots:
        publisher.offer("end", snapshot, requests=["r"], reasons=["stop"])
        until(lambda: snapshots[0].unloaded)
    until(lambda: snapshots[-1].unloaded)
    puller = pull()
    assert [int(receive(puller).arrays["committed_lens"][0]) for _ in snapshots] == list(range(20))
    assert [s.unloaded for s in snapshots] == [1] * 20


def test_the_queue_is_bounded_in_bytes(publish):
    publisher = publish(queue_bytes=1000)
    for _ in range(10):
        offer(publisher, nbytes=300)
        assert publisher.counters()["queued_bytes"] <= 1000
    offer(publisher, nbytes=1001)
    counters = publisher.counters()
    assert (
        counters["dropped"] == {"queue_full": 7, "too_large": 1}
        and counters["queued"] == 3
        and exact(counters)
    )


def test_every_cause_is_counted_and_publishing_goes_on(publish, pull, caplog):
    puller, publisher = pull(), publish(max_message_bytes=4096)
    offer(publisher, 1, fail=True)
    offer(publisher, 2, fail=True)
    # 20 kB
    offer(publisher, 3, requests=5000)
    publisher.drop("no_buffer")
    offer(publisher, 4)
    while (message := receive(puller)).header.kind != "end":
        pass
    assert int(message.arrays["committed_lens"][0]) == 4
    assert (
        message.header.dropped == {"build": 2, "too_large": 1, "no_buffer": 1}
        and message.header.captured_seq == 5
    )
    assert exact(publisher.counters())
    # logged once
    assert sum("cause=build" in r.getMessage() for r in caplog.records) == 1


def test_heartbeats_only_while_nothing_else_is_sent(publish, pull):
    puller, publisher = pull(), publish(heartbeat_s=0.2)
    until(lambda: publisher.counters()["heartbeats"] == 1)
    for _ in range(20):
        offer(publisher)
        time.sleep(0.02)
    assert publisher.counters()["heartbeats"] <= 2
    until(lambda: publisher.counters()["heartbeats"] >= 4)
    assert puller.poll(0)


def test_a_slow_trainer_gets_whole_messages_and_the_rest_is_counted(publish, pull):
    puller, publisher = pull(rcvhwm=1), publish(queue_messages=8)
    received = 0
    for value in range(300):
        # 200 kB, more in all than any socket buffer
        offer(publisher, value, requests=4096)
        assert exact(publisher.counters())
        if value % 20 == 0 and puller.poll(100):
            assert receive(puller).header.kind in ("end", "heartbeat")
            received += 1
    assert publisher.counters()["dropped"]["queue_full"] > 0
    while puller.poll(500) and (message := receive(puller)):
        received += 1
        if message.header.kind == "heartbeat" and message.header.captured_seq == 300:
            break
    counters = publisher.counters()
    assert exact(counters) and counters["queued"] == 0
    header = message.header
    # nothing was lost between two living sides
    assert header.sent_seq == received
    assert header.captured_seq == header.sent_seq - header.heartbeats + sum(header.dropped.values())


PULLER = """
import sys, zmq
socket = zmq.Context().socket(zmq.PULL)
socket.rcvhwm = 1
socket.bind(sys.argv[1])
print("bound", flush=True)
while True: socket.recv_multipart()
"""


@pytest.fixture
def puller_process(endpoint):
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", PULLER, endpoint], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "bound\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_stopped_or_killed_trainer_never_makes_offer_wait(publish, puller_process):
    process, publisher = puller_process(), publish(queue_messages=8)
    offer(publisher)
    until(lambda: publisher.counters()["sent"] == 1)
    for harm in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(process.pid, harm)
        slowest = 0.0
        for _ in range(200):
            start = time.perf_counter()
            offer(publisher, requests=4096)
            slowest = max(slowest, time.perf_counter() - start)
            assert exact(publisher.counters())
            time.sleep(0.001)
        # a scheduling hiccup of a busy machine, not a wait for a trainer
        assert slowest < 0.1
        assert publisher.counters()["dropped"]["queue_full"] > 0

        # a socket's buffers may have grown just now, and have taken some
        def full() -> bool:
            offer(publisher, requests=4096)
            return publisher.counters()["queued"] >= 8

        until(full)
    process.wait()
    # and it goes on when one is there again
    puller_process()
    until(lambda: publisher.counters()["queued"] == 0)
    assert exact(publisher.counters())


def test_close_sends_what_it_can_and_counts_the_rest(publish, pull):
    puller, publisher = pull(rcvhwm=1000), publish()
    for value in range(20):
        offer(publisher, value)
    publisher.close(5.0)
    assert publisher.counters()["sent"] == 20 and exact(publisher.counters())
    while (
        message := receive(puller)
    ).header.captured_seq < 20 or message.header.kind != "heartbeat":
        # the last ledger arrives as well
        pass
    offer(publisher)
    assert publisher.counters()["dropped"] == {"closed": 1}
    publisher.close(0.0)


def test_close_without_a_trainer_is_quick(publish):
    publisher = publish()
    for value in range(20):
        offer(publisher, value)
    start = time.perf_counter()
    publisher.close(0.2)
    assert time.perf_counter() - start < 2
    assert publisher.counters()["dropped"] == {"closed": 20} and exact(publisher.counters())


def test_an_endpoint_that_means_nothing_is_an_error_at_start():
    with pytest.raises(ValueError, match="link.endpoint"):
        Publisher(LinkConfig(endpoint="tcp://127.0.0.1:notaport"), PublishConfig(), "t")
