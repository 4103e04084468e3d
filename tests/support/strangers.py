"""A legitimate server's traffic on a link with keys, and strangers on the trainer's port."""

import socket
import threading
import time

import numpy as np
import zmq
from deadline import until

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link.keys import make_keys
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver

# of a legitimate message: strangers cost processor time on a machine of two cores, never a wait
SLOWEST_S = 1.0
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
CURVE_GREETING = SIGNATURE + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
NULL_GREETING = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
NULL_READY = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PUSH"


def keyed_link(tmp_path):
    """A link with keys, of which the trainer lists `server` and does not list `unlisted`."""
    make_keys(tmp_path / "keys", ["server", "unlisted"])
    (tmp_path / "keys/trainer/servers/unlisted.public").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    return LinkConfig(
        endpoint=endpoint,
        trainer_keys=tmp_path / "keys/trainer",
        server_keys=tmp_path / "keys/server",
    )


class End:
    nbytes = 64

    def __init__(self, value):
        self.value = value

    def unload(self):
        pass

    def build(self):
        return {"committed_lens": ("int32", np.full(1, self.value, np.int32))}


def offer(publisher, value, name="r"):
    publisher.offer("end", End(value), requests=[name], reasons=["stop"])


class Traffic:
    """A server that sends a message every few milliseconds, and the trainer that gets them."""

    def __init__(self, link):
        self.receiver = Receiver(link, ReceiveConfig(), None)
        self.publisher = Publisher(link, PublishConfig(heartbeat_s=0.05), "target")
        self.offered, self.got = [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._offer, self._get)]
        for thread in self._threads:
            thread.start()
        until(lambda: self.got)

    def _offer(self):
        while not self._stop.is_set():
            self.offered.append(time.monotonic())
            offer(self.publisher, len(self.offered) - 1)
            time.sleep(0.003)

    def _get(self):
        while not self._stop.is_set() or len(self.got) < len(self.offered):
            message = self.receiver.get(2.0)
            if message is None:
                return
            self.got.append((int(message.arrays["committed_lens"][0]), time.monotonic()))

    def check(self) -> float:
        """End it; nothing was lost, nothing came late. Returns the slowest message's seconds."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert [value for value, _ in self.got] == list(range(len(self.offered)))
        until(lambda: self.receiver.balanced(self.publisher.session))
        ledger = self.receiver.ledger()
        assert list(ledger["sessions"]) == [self.publisher.session] and ledger["rejected"] == {}
        assert (
            ledger["sessions"][self.publisher.session]["lost"] == 0
            and not self.publisher.counters()["dropped"]
        )
        slowest = max(at - self.offered[value] for value, at in self.got)
        assert slowest < SLOWEST_S
        return slowest

    def refused(self):
        return self.receiver.ledger()["refused_peers"]

    def close(self):
        self._stop.set()
        self.publisher.close(0.0)
        self.receiver.close()
        for thread in self._threads:
            thread.join()


def connect(link):
    stranger = socket.create_connection(("127.0.0.1", int(link.endpoint.rpartition(":")[2])))
    stranger.settimeout(5.0)
    return stranger


def client(link, keys=None, *, trainer=None, kind=zmq.PUSH):
    """A ZeroMQ socket that tries to join, and its context. `keys` None: plaintext."""
    context = zmq.Context()
    sock = context.socket(kind)
    sock.linger, sock.immediate = 0, 1
    if keys is not None:
        sock.curve_secretkey, sock.curve_publickey = keys.secret, keys.public
        sock.curve_serverkey = trainer or keys.trainer
    sock.connect(link.endpoint)
    return context, sock
