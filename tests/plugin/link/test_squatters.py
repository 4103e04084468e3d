"""Whoever sits at the trainer's endpoint without the trainer's key gets no prompt, and the trainer
gets them later.
"""

import logging
import os
import socket
import threading
import time

import numpy as np
import pytest
import zmq
from zmq.utils import z85

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link import handshakes
from aurora_sglang_plugin.link.keys import load_server_keys, load_trainer_keys, make_keys
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver

PROMPT = "the secret prompt"
# Lengths that a message may carry, and that nothing else on the way looks like.
MARK = np.array([7340031, 1234567, 7654321, 1111111, 2222222], np.int32)


class End:
    nbytes = 64

    def unload(self):
        pass

    def build(self):
        return {"committed_lens": ("int32", MARK.copy())}


def offer(publisher):
    publisher.offer("end", End(), requests=[PROMPT] * len(MARK), reasons=["stop"] * len(MARK))


def until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, value
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def quick_handshakes(monkeypatch):
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.5)


@pytest.fixture(params=["tcp", "ipc"])
def link(request, tmp_path):
    keys = tmp_path / "keys"
    make_keys(keys, ["server"])
    if request.param == "ipc":
        endpoint = f"ipc://{tmp_path}/link"
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    return LinkConfig(endpoint=endpoint, trainer_keys=keys / "trainer", server_keys=keys / "server")


@pytest.fixture
def publisher(link):
    publisher = Publisher(link, PublishConfig(heartbeat_s=0.05, queue_messages=10), "target")
    yield publisher
    publisher.close(0.0)


class Squatter:
    """Listens, records what it is told, and says `banner` to everybody."""

    def __init__(self, link, banner=b"", hang_up=False):
        self.told, self.came = b"", 0
        self._banner, self._hang_up = banner, hang_up
        if link.endpoint.startswith("ipc://"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._path = link.endpoint.removeprefix("ipc://")
            self._socket.bind(self._path)
        else:
            self._socket, self._path = (
                socket.create_server(("127.0.0.1", int(link.endpoint.rpartition(":")[2]))),
                None,
            )
        self._socket.listen()
        self._open = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            self.came += 1
            self._open.append(peer)
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    def _listen(self, peer):
        try:
            peer.sendall(self._banner)
            if self._hang_up:
                peer.close()
            while part := peer.recv(4096):
                self.told += part
        except OSError:
            pass

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for peer in self._open:
            peer.close()
        if self._path:
            os.unlink(self._path)


NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
SQUATTERS = {
    "silent": (dict(), None),
    "hangs up": (dict(hang_up=True), None),
    "ssh": (dict(banner=b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), "garbage"),
    "plaintext zmtp": (
        dict(banner=NULL_GREETING + b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PULL"),
        "protocol",
    ),
}


@pytest.mark.parametrize("kind", SQUATTERS)
def test_a_squatter_is_told_nothing_and_the_trainer_gets_the_newest(link, publisher, kind, caplog):
    options, cause = SQUATTERS[kind]
    squatter = Squatter(link, **options)
    for _ in range(50):
        offer(publisher)
    until(lambda: squatter.came)
    if cause:
        until(
            lambda: publisher.counters()["refused"].get(cause) and f"cause={cause}" in caplog.text
        )
    time.sleep(0.3)
    counters = publisher.counters()
    assert (counters["sent"], counters["queued"], counters["dropped"]) == (
        0,
        10,
        {"queue_full": 40},
    )
    # greeting, hello
    assert PROMPT.encode() not in squatter.told and len(squatter.told) <= 300 * squatter.came
    squatter.close()
    receiver = Receiver(link, ReceiveConfig(), None)
    assert all(receiver.get(10.0).header.requests[0] == PROMPT for _ in range(10))
    receiver.close()


def false_trainer(link, secret, plaintext=False):
    """A ZeroMQ PULL that lets everybody in, with keys of its own."""
    pull = zmq.Context().socket(zmq.PULL)
    pull.linger = 0
    if not plaintext:
        pull.curve_server, pull.curve_secretkey = 1, secret
    pull.bind(link.endpoint)
    return pull


@pytest.mark.parametrize("kind", ["own key", "plaintext"])
def test_a_false_trainer_gets_no_message(link, publisher, kind):
    _, secret = zmq.curve_keypair()
    pull = false_trainer(link, secret, plaintext=kind == "plaintext")
    for _ in range(50):
        offer(publisher)
    until(lambda: publisher.counters()["refused"])
    assert not pull.poll(500)
    counters = publisher.counters()
    assert counters["sent"] == 0 and counters["dropped"] == {"queue_full": 40}
    pull.context.destroy(linger=0)


def test_the_same_false_trainer_gets_everything_without_keys(link):
    """What the keys are for."""
    plain = LinkConfig(endpoint=link.endpoint)
    pull = false_trainer(link, None, plaintext=True)
    publisher = Publisher(plain, PublishConfig(heartbeat_s=0.05), "target")
    offer(publisher)
    until(
        lambda: pull.poll(5000) and any(PROMPT.encode() in part for part in pull.recv_multipart())
    )
    publisher.close(0.0)
    pull.context.destroy(linger=0)


def test_with_the_right_keys_nothing_readable_is_on_the_way(link, publisher):
    """Between the two stands a relay that reads everything, and finds neither prompt nor request
    id.
    """
    if link.endpoint.startswith("ipc://"):
        pytest.skip("the relay speaks TCP")
    inner = socket.create_server(("127.0.0.1", 0))
    receiver_link = link.model_copy(
        update={"endpoint": f"tcp://127.0.0.1:{inner.getsockname()[1]}"}
    )
    inner.close()
    receiver = Receiver(receiver_link, ReceiveConfig(), None)
    outer = socket.create_server(("127.0.0.1", int(link.endpoint.rpartition(":")[2])))
    seen = bytearray()

    def relay(source, sink):
        try:
            while part := source.recv(65536):
                seen.extend(part)
                sink.sendall(part)
        except OSError:
            pass

    offer(publisher)
    peer, _ = outer.accept()
    with (
        peer,
        socket.create_connection(
            ("127.0.0.1", int(receiver_link.endpoint.rpartition(":")[2]))
        ) as onward,
    ):
        for pair in ((peer, onward), (onward, peer)):
            threading.Thread(target=relay, args=pair, daemon=True).start()
        assert receiver.get(10.0).header.requests[0] == PROMPT
        assert len(seen) > 300 and PROMPT.encode() not in seen and MARK.tobytes() not in seen
        for part in (peer, onward):
            part.shutdown(socket.SHUT_RDWR)
    outer.close()
    receiver.close()


def test_a_server_that_is_listed_later_is_let_in_by_the_next_trainer(link, publisher, caplog):
    listed = link.trainer_keys / "servers/server.public"
    other = link.trainer_keys / "servers/other.public"
    key = listed.read_bytes()
    public, _ = zmq.curve_keypair()
    listed.write_bytes(public)
    first = Receiver(link, ReceiveConfig(), None)
    with caplog.at_level(logging.WARNING):
        offer(publisher)
        until(
            lambda: (
                publisher.counters()["refused"].get("key")
                and first.ledger()["refused_peers"].get("key")
            )
        )
    own = load_server_keys(link.server_keys).public.decode()
    # both ends say which
    until(lambda: f"public_key={own}" in caplog.text and f"key={own} address=" in caplog.text)
    first.close()
    other.write_bytes(key)
    other.chmod(0o600)
    second = Receiver(link, ReceiveConfig(), None)
    assert second.get(10.0).header.requests[0] == PROMPT
    second.close()


def test_no_secret_is_in_any_text(link, publisher, caplog):
    secrets = {
        load_trainer_keys(link.trainer_keys).secret.decode(),
        load_server_keys(link.server_keys).secret.decode(),
    }
    texts = [
        repr(load_trainer_keys(link.trainer_keys)),
        repr(load_server_keys(link.server_keys)),
        repr(link),
    ]
    texts += [str(vars(publisher)), caplog.text]
    raw = [repr(z85.decode(secret)) for secret in secrets]
    assert not any(secret in text for secret in [*secrets, *raw] for text in texts)
