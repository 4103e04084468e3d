"""Publisher and receiver on one real link: the ledgers of both sides agree, whatever happens to
either.
"""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from deadline import until, values

from aurora_sglang_plugin.config import PublishConfig
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
from aurora_trainer.recordings.recording import RecordConfig, Recording, read_messages


class End:
    nbytes = 64

    def __init__(self, value, count=1):
        self.value, self.count = value, count

    def unload(self):
        pass

    def build(self):
        return {"committed_lens": ("int32", np.full(self.count, self.value, np.int32))}


def offer(publisher, value, count=1):
    publisher.offer("end", End(value, count), requests=["r"] * count, reasons=["stop"] * count)


@pytest.fixture
def publish(link, started):
    def start(**config):
        started.append(Publisher(link, PublishConfig(**{"heartbeat_s": 0.05} | config), "target"))
        return started[-1]

    return start


def both_sides(publisher, receiver):
    """True when the receiver's ledger balances and says what the publisher's counters say."""
    balanced = receiver.balanced(publisher.session)
    if balanced is not True:
        return balanced
    theirs, ours = publisher.counters(), receiver.ledger()["sessions"][publisher.session]
    if theirs["queued"] or theirs["captured"] != ours["captured"]:
        return f"not quiet: {theirs} {ours}"
    return (
        theirs["dropped"] == ours["dropped"]
        and theirs["sent"] == ours["sent_seq"] - ours["heartbeats"]
    )


def test_every_message_arrives_in_order_and_the_ledger_balances(publish, receive, tmp_path):
    recording = Recording(tmp_path / "recording", RecordConfig())
    receiver, publisher = receive(target="target", record=recording.write), publish()
    for value in range(200):
        offer(publisher, value)
    assert values(receiver, 200) == list(range(200))
    assert receiver.get(0.0) is None
    until(lambda: both_sides(publisher, receiver))
    assert receiver.ledger()["sessions"][publisher.session]["lost"] == 0
    publisher.close()
    receiver.close()
    recording.close()
    recorded = [message for _, message in read_messages(tmp_path / "recording")]
    kept = [int(m.arrays["committed_lens"][0]) for m in recorded if m.header.kind == "end"]
    assert kept == list(range(200))


def test_a_full_receiver_pushes_back_and_the_drops_are_the_publishers(publish, receive):
    receiver, publisher = receive(ReceiveConfig(queue_bytes=1 << 20)), publish(queue_messages=4)
    for value in range(400):
        # 30 kB with its header
        offer(publisher, value, 4096)
        time.sleep(0.001)
    assert receiver.ledger()["queued_bytes"] < 2 << 20
    dropped = publisher.counters()["dropped"]["queue_full"]
    got = []
    until(
        lambda: (
            got.extend(iter(lambda: receiver.get(0.05), None)) or both_sides(publisher, receiver)
        )
    )
    assert len(got) == 400 - dropped and dropped > 0
    assert receiver.ledger()["sessions"][publisher.session]["lost"] == 0


def test_ledger_go_on_over_a_restart_of_the_trainer(publish, receive):
    publisher = publish()
    first = receive()
    for value in range(50):
        offer(publisher, value)
    assert values(first, 50) == list(range(50))
    first.close()
    for value in range(50, 100):
        offer(publisher, value)
    time.sleep(0.1)
    second = receive()
    until(lambda: both_sides(publisher, second))
    session = second.ledger()["sessions"][publisher.session]
    assert session["captured"] == 100 and session["sent_seq"] - session["heartbeats"] == 100
    # what the first one had is still in the ledger
    assert session["received"] >= 50
    rest = len(list(iter(lambda: second.get(0.0), None)))
    # what the link held when the first one closed is counted lost
    assert rest <= 50 and 50 - rest <= session["lost"]


def test_a_new_session_of_a_restarted_server_has_ledger_of_its_own(publish, receive):
    receiver = receive()
    one = publish()
    offer(one, 1)
    assert values(receiver, 1) == [1]
    one.close()
    two = publish()
    offer(two, 2)
    assert values(receiver, 1) == [2]
    until(lambda: both_sides(two, receiver))
    assert one.session != two.session
    # close() sent its last ledger
    assert receiver.balanced(one.session) is True
    assert receiver.balanced("never seen") == "unknown session"


def run_trainer(link, ledger_path):
    receiver = Receiver(link, ReceiveConfig(), ledger_path)
    while True:
        receiver.get(1.0)


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_the_ledger_balances_after_the_trainer_was_killed_or_stopped(
    link, publish, receive, tmp_path, harm
):
    ledger_path = tmp_path / "ledger.json"
    process = multiprocessing.get_context("spawn").Process(
        target=run_trainer, args=(link, ledger_path), daemon=True
    )
    process.start()
    publisher = publish(queue_messages=8)
    offer(publisher, 0)
    until(lambda: ledger_path.exists() and publisher.counters()["sent"])
    os.kill(process.pid, harm)
    for value in range(100):
        offer(publisher, value, 4096)
    time.sleep(0.2)
    process.kill()
    process.join()
    receiver = receive()
    for value in range(5):
        offer(publisher, value)
    until(lambda: both_sides(publisher, receiver))
    session = receiver.ledger()["sessions"][publisher.session]
    assert session["captured"] == 106 and session["dropped"]["queue_full"] > 0
