"""The accounting adds up exactly: nobody there, a receiver that comes, restarts, is stopped and
killed, and a server that is killed and starts again. One server of its own, over an encrypted link;
the tests go in this order.

    captured = sent + dropped + queued        sent = received + lost + rejected

It also starts with versions in its weights directory, twice: it must serve the newest.
"""

from __future__ import annotations

import signal
import time

import pytest
from drafts import disturb
from parity import compare, eligible
from rig import Loop, generate, receiver_process, wait_until

from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.target import open_target

QUEUE_MESSAGES, QUEUE_BYTES = 60, 4 << 20
PARAMS = {"max_new_tokens": 32}


# of the noise in each version; the last one must propose other tokens than the rest
SIZES = (0.1, 0.1, 0.1, 0.5)


@pytest.fixture(scope="module")
def drafts(taught, target):
    embed = open_target(target).embedding()
    return [
        disturb(Draft.load(taught / "full", embed), seed=seed, size=size)
        for seed, size in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def loop(target, taught, drafts, tmp_path_factory):
    settings = [
        f"plugin.publish.queue_messages={QUEUE_MESSAGES}",
        f"plugin.publish.queue_bytes={QUEUE_BYTES}",
    ]
    folder = tmp_path_factory.mktemp("ledger")
    loop = Loop(
        folder, target, taught / "full", settings=settings, listening=False, versions=drafts[:3],
        encrypted=True,
        topk=1, num_steps=3,
    )  # fmt: skip
    yield loop
    loop.stop()


@pytest.fixture
def batch(stream):
    return [stream[37000 + 97 * i : 37000 + 97 * i + 10 + 11 * i] for i in range(8)]


def replay(loop, batch, version):
    answers = loop.generate(batch, PARAMS)
    samples = [s for found in loop.taken([a["rid"] for a in answers]).values() for s in found]
    fit = eligible(samples, version)
    assert fit
    return compare(loop.draft(version), fit)


def test_nobody_listens(loop, plain, batch):
    """Unreachable endpoint: served as usual, the newest messages are kept, all others counted as
    dropped.
    """
    # of three in the directory, not the draft that it was given
    assert loop.version() == 3
    expected = [a["output_ids"] for a in generate(plain, batch, PARAMS, None)]
    for _ in range(3):
        assert [a["output_ids"] for a in loop.generate(batch, PARAMS)] == expected
    # the metrics follow once a second
    time.sleep(1.5)
    metrics = loop.metrics()
    assert metrics["aurora_attached"] == 1 and metrics["aurora_sent_messages"] == 0
    assert metrics["aurora_capture_errors"] == 0
    queued = metrics["aurora_captured_messages"] - metrics["aurora_dropped_messages{queue_full}"]
    assert 0 < queued <= QUEUE_MESSAGES and metrics["aurora_queued_bytes"] <= QUEUE_BYTES
    assert metrics["aurora_dropped_messages{queue_full}"] > 0


def test_somebody_comes(loop, batch):
    loop.listen()
    ledger = loop.quiet()
    sent = ledger["sent_seq"] - ledger["heartbeats"]
    assert ledger["dropped"]["queue_full"] > 0 and ledger["lost"] == ledger["rejected"] == 0
    assert ledger["captured"] == sent + sum(ledger["dropped"].values())
    assert ledger["sent_seq"] == ledger["received"]
    assert loop.metrics()["aurora_sent_messages"] == sent == len(loop.messages)
    result = replay(loop, [p[::-1] for p in batch], 3)
    assert result.same >= 0.999 * result.nodes > 0 and not result.unexplained, result.text()


def test_restart_of_the_receiver(loop, batch):
    with loop.load(batch, PARAMS) as rounds:
        wait_until(lambda: rounds, "a round")
        loop.deafen()
        done = len(rounds)
        wait_until(lambda: len(rounds) > done, "a round without a receiver", 60)
        loop.listen()
    ledger = loop.quiet()
    assert ledger["sent_seq"] == ledger["received"] + ledger["lost"]
    assert ledger["captured"] == ledger["sent_seq"] - ledger["heartbeats"] + sum(
        ledger["dropped"].values()
    )


def test_a_stopped_receiver(loop, batch):
    """SIGSTOP with a full queue: the kernel's buffers and ZeroMQ's take some, the bound holds,
    nothing is lost.
    """
    before = loop.quiet()
    loop.deafen()
    process = receiver_process(loop)
    try:
        loop.generate(batch, PARAMS)
        process.send_signal(signal.SIGSTOP)
        dropped = loop.metrics().get("aurora_dropped_messages{queue_full}", 0)

        def full():
            loop.generate(batch, PARAMS)
            metrics = loop.metrics()
            assert metrics["aurora_queued_bytes"] <= QUEUE_BYTES
            return metrics["aurora_dropped_messages{queue_full}"] > dropped

        wait_until(full, "a full queue", 60)
        process.send_signal(signal.SIGCONT)
        captured = loop.metrics()["aurora_captured_messages"]

        def sent():
            m = loop.metrics()
            drops = sum(v for k, v in m.items() if k.startswith("aurora_dropped"))
            return (
                m["aurora_captured_messages"] == m["aurora_sent_messages"] + drops
                and m["aurora_queued_bytes"] == 0
            )

        wait_until(sent, "an empty queue")
        assert loop.metrics()["aurora_captured_messages"] >= captured
        # the last second of its ledger is lost with it, and the messages are counted as lost
        process.terminate()
        process.wait()
        loop.listen()
        ledger = loop.quiet()
    finally:
        process.kill()
        process.wait()
    assert (
        ledger["sent_seq"] == ledger["received"] + ledger["lost"]
        and ledger["sent_seq"] > before["sent_seq"]
    )
    assert ledger["captured"] == ledger["sent_seq"] - ledger["heartbeats"] + sum(
        ledger["dropped"].values()
    )


def test_a_killed_server_starts_again(loop, plain, drafts, batch):
    # this test alone
    if loop.receiver is None:
        loop.listen()
        loop.generate(batch, PARAMS)
    loop.quiet()
    first = loop.session
    loop.server.kill()
    version = loop.publish(drafts[3])
    loop.start()
    assert loop.version() == version
    expected = [a["output_ids"] for a in generate(plain, batch, PARAMS, None)]
    answers = loop.generate(batch, PARAMS)
    assert [a["output_ids"] for a in answers] == expected
    samples = [s for found in loop.taken([a["rid"] for a in answers]).values() for s in found]
    result = compare(loop.draft(version), eligible(samples, version))
    assert result.same >= 0.999 * result.nodes > 0 and not result.unexplained, result.text()
    other = compare(loop.draft(version - 1), eligible(samples, version))
    assert other.same < 0.99 * other.nodes
    ledger = loop.quiet()
    assert loop.session != first and ledger["lost"] == ledger["rejected"] == 0
    assert loop.receiver.balanced(first) is True
