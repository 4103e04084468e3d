"""Who may connect to the trainer: CURVE with an allow-list, and what strangers may cost.

Without an answer to its ZAP questions libzmq lets EVERY client key in. The answers are given here,
on the receiver's thread and a few at a time, so that there is no second thread to die;
ZAP_ENFORCE_DOMAIN closes the door if nobody answers. A stranger can hold a connection for
HANDSHAKE_S, about 12 kB and one file descriptor, and gets nothing.
"""

from __future__ import annotations

import logging
import resource
import time

import zmq
from zmq.utils import z85

from aurora_sglang_plugin.link import handshakes
from aurora_sglang_plugin.link.keys import TrainerKeys

log = logging.getLogger(__name__)

ZAP_ENDPOINT, ZAP_DOMAIN = "inproc://zeromq.zap.01", b"aurora"
ANSWERS_PER_TURN = 64
# at least, however many messages come
TURN_EVERY_S = 1.0
BACKLOG = 1024
# open at once: without free ones nobody can connect and no checkpoint can be written
FILES = 65536
LOG_EVERY_S = 60.0


class PeerLimits:
    """Stands before one socket, from before it binds until before it closes.

    For the thread that owns the socket.
    """

    def __init__(self, socket: zmq.Socket, keys: TrainerKeys | None):
        self._socket, self._keys = socket, keys
        self._log_at = self._turn_at = 0.0
        socket.handshake_ivl = int(handshakes.HANDSHAKE_S * 1000)
        socket.backlog = BACKLOG
        self._zap: zmq.Socket | None = None
        if keys is not None:
            self._zap = socket.context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind(ZAP_ENDPOINT)
            socket.curve_server = 1
            socket.curve_secretkey = keys.secret
            socket.zap_domain = ZAP_DOMAIN
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._accepted = handshakes.Accepted(socket)
        _allow_files()

    def wait(self, timeout_ms: int) -> bool:
        """Whether a message waits, after `timeout_ms` at most. Answers connections meanwhile."""
        others = [s for s in (self._zap, self._accepted.monitor.reader) if s is not None]
        events = zmq.zmq_poll([(s, zmq.POLLIN) for s in (self._socket, *others)], timeout_ms)
        waits = any(socket is self._socket for socket, _ in events)
        if len(events) > waits or not waits or time.monotonic() >= self._turn_at:
            self.turn()
        return waits

    def turn(self) -> None:
        """Answer connections and count what became of them; bounded work."""
        for _ in range(ANSWERS_PER_TURN if self._zap is not None else 0):
            try:
                question = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._zap.send_multipart(self._answer(question))
        self._accepted.turn()
        self._turn_at = time.monotonic() + TURN_EVERY_S

    def refused(self) -> dict[str, int]:
        """{cause: connections}, causes of handshakes.py; and `unwatched`: times when too many came
        to be counted.
        """
        pauses = (
            {"unwatched": self._accepted.monitor.pauses} if self._accepted.monitor.pauses else {}
        )
        return dict(self._accepted.refused) | pauses

    def close(self) -> None:
        self._accepted.monitor.close()
        if self._zap is not None:
            self._zap.close(linger=0)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """ZAP (rfc.zeromq.org/spec/27): 200 lets in, 400 does not.

        The name goes with the connection as its user.
        """
        number = question[1] if len(question) > 1 else b""
        name = None
        if (
            len(question) == 7
            and question[0] == b"1.0"
            and question[2] == ZAP_DOMAIN
            and question[5] == b"CURVE"
        ):
            key = z85.encode(question[6]) if len(question[6]) == 32 else b""
            name = self._keys.servers.get(key)
            if name is None and time.monotonic() >= self._log_at:
                self._log_at = time.monotonic() + LOG_EVERY_S
                log.warning(
                    "refused an unlisted key=%s address=%s",
                    key.decode(),
                    question[3].decode(errors="replace"),
                )
        if name is None:
            return [b"1.0", number, b"400", b"not on the allow-list", b"", b""]
        return [b"1.0", number, b"200", b"", name.encode(), b""]


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
