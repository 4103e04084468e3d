"""Strangers on the trainer's port, on real sockets: they get nothing, disturb nothing, are counted,
and are gone soon.

Every test runs beside a legitimate server whose messages must all arrive, in order and without
delay.
"""

import contextlib
import struct
import threading
import time

import numpy as np
import pytest
import zmq
from deadline import until
from strangers import (
    CURVE_GREETING,
    NULL_GREETING,
    NULL_READY,
    SIGNATURE,
    Traffic,
    client,
    connect,
    offer,
)

from aurora_sglang_plugin.link import peer_limits
from aurora_sglang_plugin.link.keys import load_server_keys, load_trainer_keys, make_keys
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver


def read_to_end(stranger) -> bytes:
    """All that a stranger is told before it is cut off; fails if it is not cut off."""
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
        monkeypatch.setattr(peer_limits.PeerLimits, "turn", lambda self: None)
    else:
        monkeypatch.setattr(peer_limits, "ZAP_ENDPOINT", "inproc://elsewhere")
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
