"""Strangers on the trainer's port, on real sockets: they get nothing, disturb nothing, are counted,
and are gone soon.

Every test runs beside a legitimate server whose messages must all arrive, in order and without
delay.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link import handshakes
from aurora_sglang_plugin.link import peer_limits as guard
from aurora_sglang_plugin.link.curve import load_server_keys, load_trainer_keys, make_keys
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver

# of a legitimate message: strangers cost processor time on a machine of two cores, never a wait
SLOWEST_S = 1.0
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
CURVE_GREETING = SIGNATURE + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
NULL_GREETING = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
NULL_READY = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PUSH"


@pytest.fixture(autouse=True)
def quick_handshakes(monkeypatch):
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.5)


@pytest.fixture
def link(tmp_path):
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


def until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not (value := condition()) or isinstance(value, str):
        assert time.monotonic() < end, value
        time.sleep(0.01)


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


@pytest.fixture
def traffic(link):
    traffic = Traffic(link)
    yield traffic
    traffic.close()


def connect(link):
    stranger = socket.create_connection(("127.0.0.1", int(link.endpoint.rpartition(":")[2])))
    stranger.settimeout(5.0)
    return stranger


def read_to_end(stranger) -> bytes:
    """All that a stranger is told before it is cut off; fails where it is not cut off."""
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while part := stranger.recv(4096):
            told += part
    return told


RAW = {
    # name: (bytes, seconds between them, the cause it is counted by)
    "silence": (b"", 0.0, "unfinished"),
    "signature": (SIGNATURE, 0.0, "unfinished"),
    "greeting": (CURVE_GREETING, 0.0, "unfinished"),
    "half a hello": (CURVE_GREETING + b"\x04\xc8\x05HELLO\x01\x00" + bytes(50), 0.0, "unfinished"),
    "a command of 60 MB": (
        CURVE_GREETING + b"\x06" + struct.pack(">Q", 60 << 20) + bytes(1 << 20),
        0.0,
        "unfinished",
    ),
    "drip": (CURVE_GREETING, 0.05, "unfinished"),
    "plaintext": (NULL_GREETING + NULL_READY + b"\x00\x05hello", 0.0, "protocol"),
    "a hello of zeros": (
        CURVE_GREETING + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
        0.0,
        "protocol",
    ),
    "http": (b"GET / HTTP/1.1\r\n\r\n", 0.0, "garbage"),
    "noise": (np.random.default_rng(0).bytes(1000), 0.0, "garbage"),
}


def test_raw_strangers_are_cut_off_and_counted(link, traffic):
    def be(data, pause_s):
        with connect(link) as stranger, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in [data[i : i + 1] for i in range(len(data))] if pause_s else [data]:
                stranger.sendall(part)
                time.sleep(pause_s)
            told.append(read_to_end(stranger))

    told: list[bytes] = []
    started = time.monotonic()
    strangers = [
        threading.Thread(target=be, args=(data, pause_s)) for data, pause_s, _ in RAW.values()
    ]
    for stranger in strangers:
        stranger.start()
    for stranger in strangers:
        stranger.join()
    assert time.monotonic() - started < 3.0
    # the trainer's greeting at most
    assert all(len(text) <= 64 for text in told)
    expected = {cause: sum(c == cause for _, _, c in RAW.values()) for _, _, cause in RAW.values()}
    until(lambda: traffic.refused() == expected or str(traffic.refused()))
    traffic.check()


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


@pytest.mark.parametrize("who", ["plaintext", "unlisted key", "another trainer's key"])
def test_zeromq_strangers_never_get_a_message_in(link, traffic, tmp_path, who):
    listed, unlisted = (
        load_server_keys(tmp_path / "keys" / name) for name in ("server", "unlisted")
    )
    keys = {"plaintext": None, "unlisted key": unlisted, "another trainer's key": listed}[who]
    trainer = unlisted.public if who == "another trainer's key" else None
    context, push = client(link, keys, trainer=trainer)
    # no connection that a message could go to
    assert not push.poll(700, zmq.POLLOUT)
    context.destroy(linger=0)
    cause = "key" if who == "unlisted key" else "protocol"
    until(lambda: traffic.refused())
    # Unfinished: the plaintext client saw the trainer's greeting first and left, or the last
    # attempt was broken off.
    assert set(traffic.refused()) <= {cause, "unfinished"}
    assert who == "plaintext" or traffic.refused()[cause] >= 1
    traffic.check()


def test_a_crowd_with_unlisted_keys(link, traffic, tmp_path):
    """More at once than are answered in a turn; each costs the trainer a key exchange."""
    crowd = 3 * guard.ANSWERS_PER_TURN
    context, push = client(link, load_server_keys(tmp_path / "keys/unlisted"))
    for _ in range(crowd - 1):
        push.connect(link.endpoint)
    until(lambda: sum(traffic.refused().values()) >= crowd or str(traffic.refused()))
    assert not push.poll(0, zmq.POLLOUT) and traffic.refused()["key"] > guard.ANSWERS_PER_TURN
    context.destroy(linger=0)
    traffic.check()


FLOOD = """
import socket, sys, time
port, seconds, data = int(sys.argv[1]), float(sys.argv[2]), bytes.fromhex(sys.argv[3])
end, sent, connections = time.monotonic() + seconds, 0, 0
while time.monotonic() < end:
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        connections += 1
        try:
            while time.monotonic() < end:
                sent += stranger.send(data)
        except OSError:
            pass
print(connections, sent)
"""


def test_a_flood_of_plaintext_messages(link, traffic):
    data = NULL_GREETING + NULL_READY + b"\x00\xf0" + bytes(240) + (b"\x00\xf0" + bytes(240)) * 200
    port = link.endpoint.rpartition(":")[2]
    flood = [
        subprocess.Popen(
            [sys.executable, "-c", FLOOD, port, "2", data.hex()], stdout=subprocess.PIPE
        )
    ]
    connections, sent = map(int, flood[0].communicate(timeout=20)[0].split())
    assert connections > 100 and sent > 1 << 20
    until(
        lambda: (
            sum(traffic.refused().values()) >= 0.9 * connections
            or str((connections, traffic.refused()))
        )
    )
    assert traffic.publisher.counters()["refused"] == {}
    traffic.check()


WAVES = """
import resource, socket, sys, time
port, total, wave, hold_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
greeting = bytes.fromhex(sys.argv[5])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for begun in range(0, total, wave):
    strangers = []
    for i in range(wave):
        stranger = socket.create_connection(("127.0.0.1", port))
        strangers.append(stranger)
        if i % 2:
            stranger.sendall(greeting)
    time.sleep(hold_s)
    for stranger in strangers:
        stranger.close()
print("done")
"""


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_ten_thousand_connections(link, traffic):
    files, resident = open_files(), resident_bytes()
    arguments = [link.endpoint.rpartition(":")[2], "10000", "500", "0.05", CURVE_GREETING.hex()]
    waves = subprocess.Popen([sys.executable, "-c", WAVES, *arguments], stdout=subprocess.PIPE)
    most = 0
    while waves.poll() is None:
        most = max(most, open_files())
        time.sleep(0.01)
    assert waves.communicate()[0] == b"done\n" and waves.returncode == 0
    # they were really there
    assert most > files + 100
    until(lambda: open_files() <= files + 2 or f"{open_files()} files, {files} before")
    until(lambda: sum(traffic.refused().values()) == 10_000 or str(traffic.refused()))
    assert resident_bytes() - resident < 100 << 20
    traffic.check()


def test_too_many_to_count_are_not_counted_and_nothing_stalls(link, monkeypatch):
    monkeypatch.setattr(handshakes, "EVENTS_PER_TURN", 20)
    monkeypatch.setattr(handshakes, "PAUSE_S", 0.1)
    traffic = Traffic(link)
    try:
        for _ in range(10):
            strangers = [connect(link) for _ in range(50)]
            for stranger in strangers:
                stranger.sendall(NULL_GREETING)
                stranger.close()
        until(lambda: traffic.refused().get("unwatched"))
        traffic.check()
    finally:
        traffic.close()


def test_half_open_connections_do_not_use_up_the_files(link, traffic):
    """Cut off after the handshake's time, also where they stay: what a stranger holds is bounded by
    its rate.
    """
    files = open_files()
    strangers = [connect(link) for _ in range(200)]
    # both ends are in this process
    until(lambda: open_files() >= files + 400)
    until(lambda: open_files() <= files + 202, 3.0)
    for stranger in strangers:
        stranger.close()
    traffic.check()


def test_without_a_guard_libzmq_lets_every_key_in(link, tmp_path):
    """Why peer_limits.py is there: this is what `curve_server` alone does."""
    unlisted = load_server_keys(tmp_path / "keys/unlisted")
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.curve_server, pull.curve_secretkey = 1, load_trainer_keys(link.trainer_keys).secret
        pull.bind(link.endpoint)
        other, push = client(link, unlisted)
        assert push.poll(5000, zmq.POLLOUT)
        push.send(b"in")
        assert pull.poll(5000) and pull.recv() == b"in"
        other.destroy(linger=0)


@pytest.mark.parametrize("how", ["silent", "absent"])
def test_a_guard_that_does_not_answer_lets_nobody_in(link, monkeypatch, how):
    if how == "silent":
        monkeypatch.setattr(guard.PeerLimits, "turn", lambda self: None)
    else:
        monkeypatch.setattr(guard, "ZAP_ENDPOINT", "inproc://elsewhere")
    receiver = Receiver(link, ReceiveConfig(), None)
    context, push = client(link, load_server_keys(link.server_keys))
    assert not push.poll(700, zmq.POLLOUT)
    context.destroy(linger=0)
    receiver.close()


def test_a_key_that_is_removed_is_refused_after_the_trainers_next_start(link, tmp_path):
    traffic = Traffic(link)
    try:
        name = link.trainer_keys / "servers/server.public"
        name.rename(name.with_suffix(".removed"))
        make_keys(tmp_path / "keys", ["another"])
        traffic.check()
        traffic.receiver.close()
        traffic.receiver = Receiver(link, ReceiveConfig(), None)
        until(lambda: traffic.refused().get("key"))
        offer(traffic.publisher, 0)
        assert traffic.receiver.get(0.3) is None
        name.with_suffix(".removed").rename(name)
        traffic.receiver.close()
        traffic.receiver = Receiver(link, ReceiveConfig(), None)
        # the server tries again by itself
        assert traffic.receiver.get(10.0).arrays["committed_lens"][0] == 0
    finally:
        traffic.close()
