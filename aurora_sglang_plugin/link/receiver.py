"""Receive messages from the servers: the right end of the wire.

    PULL socket (peer_limits.py) -> check (wire.decode) -> ledger -> bounded queue -> get()

One thread receives. When the queue is full it stops, so that the pressure reaches the publishers'
queues, where the oldest messages are dropped and counted. Nothing that a peer sends ends it; what
cannot be used is counted by cause: WireError's causes, `target`, `order` (repeats or precedes a
message that came), `failed` (a fault of ours). In the place of a refused message whose header says
which requests it was about comes one that ends those (wire.missing).
"""

from __future__ import annotations

import logging
import socket as unix
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from pydantic import PositiveInt

from aurora_sglang_plugin.config import LinkConfig, Section
from aurora_sglang_plugin.endpoint import check_ipc_directory
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.keys import load_trainer_keys
from aurora_sglang_plugin.link.ledger import Ledger
from aurora_sglang_plugin.link.peer_limits import PeerLimits

log = logging.getLogger(__name__)

RECEIVE_QUEUE_MESSAGES = 4
POLL_MS = 100
# of the ledger, in the status: those that were heard last
SHOWN_SESSIONS = 64
# a server that was silent for longer does not count as being there
HEARD_S = 10.0


class ReceiveConfig(Section):
    """The bound of received messages that wait for the trainer."""

    # then receiving stops and the publishers' queues drop their oldest, counted
    queue_bytes: PositiveInt = 256 << 20


class Receiver:
    """Binds link.bound and receives until close().

    `target`: refuse messages about another one (cause `target`).

    `ledger_path` is None if the ledger need not survive. `record` is called with the raw parts
    of every accepted message. Raises ValueError if the endpoint cannot be bound, or its keys
    cannot be used.
    """

    def __init__(
        self,
        link: LinkConfig,
        config: ReceiveConfig,
        ledger_path: Path | None,
        *,
        target: str | None = None,
        record: Callable[[Sequence[bytes | memoryview]], None] | None = None,
    ):
        self._max_bytes, self._config, self._target, self._record = (
            link.max_message_bytes,
            config,
            target,
            record,
        )
        self._ledger = Ledger(ledger_path)
        self._refused_schema = False
        self._queue: deque[tuple[wire.Message, int]] = deque()
        self._queued_bytes = self._received_bytes = 0
        # guards queue and ledger
        self._changed = threading.Condition()
        self._closing = False
        self._context = zmq.Context()
        self._socket, self._peer_limits = _bind(self._context, link)
        self._thread = threading.Thread(target=self._run, name="aurora-receive", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float = 0.0) -> wire.Message | None:
        """The oldest message that waits (never a heartbeat), None if none came within
        `timeout_s`.
        """
        with self._changed:
            if (
                not self._changed.wait_for(lambda: self._queue or self._closing, timeout_s)
                or not self._queue
            ):
                return None
            message, nbytes = self._queue.popleft()
            self._queued_bytes -= nbytes
            self._changed.notify_all()
            return message

    def ledger(self) -> dict:
        """{sessions: {session: {received, lost, rejected, sent_seq, captured, dropped, ...}},
        rejected: {cause: n}, ...}

        Sessions are in the order in which they were last heard; `write_faults` counts ledger that
        were not written. `rejected` is in messages; `refused_peers` {cause: n} in connections,
        since this receiver began (peer_limits.py).
        """
        with self._changed:
            # since it began
            queue = {"queued_bytes": self._queued_bytes, "received_bytes": self._received_bytes}
            counts = {
                "write_faults": self._ledger.write_faults,
                "refused_peers": self._peer_limits.refused(),
            }
            return self._ledger.as_dict() | queue | counts

    def status(self) -> dict:
        """The ledger as figures of the trainer's status."""
        ledger, now_s = self.ledger(), time.time()
        sessions = ledger["sessions"].values()
        heard = [e["last_unix_s"] for e in sessions]
        return {
            "ledger": dict(list(ledger["sessions"].items())[-SHOWN_SESSIONS:]),
            "received": sum(e["received"] for e in sessions),
            "lost": sum(e["lost"] for e in sessions),
            "rejected": ledger["rejected"],
            "refused_peers": ledger["refused_peers"],
            # by the publishers
            "dropped": dict(sum((Counter(e["dropped"]) for e in sessions), Counter())),
            "servers": sum(now_s - at < HEARD_S for at in heard),
            "message_age_s": max(0.0, now_s - max(heard)) if heard else None,
            "received_bytes": ledger["received_bytes"],
            "receive_queue_bytes": ledger["queued_bytes"],
        }

    def balanced(self, session: str) -> bool | str:
        """True if both equations of ledger.py hold after a heartbeat, else what is not equal."""
        with self._changed:
            return self._ledger.balanced(session)

    def close(self) -> None:
        """Stop receiving, write the ledger. Messages that wait can still be taken by get()."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # ---- the receiver thread

    def _run(self) -> None:
        while not self._closing:
            try:
                if not self._has_room():
                    self._peer_limits.turn()
                elif self._peer_limits.wait(POLL_MS):
                    self._accept(*self._receive())
            except Exception:
                # whatever it was, the next message may be well
                log.exception("receiver failed on a message, going on")
                with self._changed:
                    self._ledger.reject("failed", None)
                time.sleep(0.01)
            if self._ledger.due():
                with self._changed:
                    self._ledger.write()
        self._ledger.write(at_once=True)
        self._peer_limits.close()
        self._socket.close(linger=0)
        self._context.term()

    def _has_room(self) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: self._queued_bytes < self._config.queue_bytes or self._closing,
                POLL_MS / 1000,
            )

    def _receive(self) -> tuple[list[bytes], str | None]:
        """One message's parts; a cause instead of a message that is too large to be kept."""
        parts: list[bytes] = []
        nbytes, cause = 0, None
        while True:
            part = self._socket.recv()
            nbytes += len(part)
            if len(parts) > wire.MAX_FRAMES:
                cause = "frames"
            elif nbytes > self._max_bytes:
                cause = "size"
            else:
                parts.append(part)
            if not self._socket.getsockopt(zmq.RCVMORE):
                return parts, cause

    def _accept(self, parts: list[bytes], cause: str | None) -> None:
        message, header = None, None
        try:
            if cause is not None:
                header = wire.read_header(parts[0]) if parts else None
            else:
                message = wire.decode(parts, max_bytes=self._max_bytes)
                header = message.header
                if self._target is not None and header.target != self._target:
                    cause = "target"
        except wire.WireError as error:
            cause, header = cause or error.cause, error.header
            if cause == "schema" and not self._refused_schema:
                self._refused_schema = True
                log.error("messages refused (counted, logged once) %s", error)
        with self._changed:
            if cause is not None:
                if (
                    not self._ledger.reject(cause, header)
                    or cause == "target"
                    or header.kind == "heartbeat"
                ):
                    return
                # What came in its place ends its requests' samples: the session has no hole for all
                # the others.
                parts = [bytes(part) for part in wire.missing(header)]
                message = wire.decode(parts, max_bytes=self._max_bytes)
            elif not self._ledger.accept(header):
                return
            header = message.header
            nbytes = sum(map(len, parts))
            self._received_bytes += nbytes
            # From here on times are this machine's; a recording has them as they came.
            header.time_ns = max(
                0, header.time_ns - int(self._ledger.sessions[header.session].ahead_s * 1e9)
            )
            if header.kind != "heartbeat":
                self._queue.append((message, nbytes))
                self._queued_bytes += nbytes
                self._changed.notify_all()
        if self._record is not None:
            self._record(parts)


def _bind(context: zmq.Context, link: LinkConfig) -> tuple[zmq.Socket, PeerLimits]:
    endpoint = link.bound
    keys = load_trainer_keys(link.trainer_keys) if link.trainer_keys else None
    check_ipc_directory(endpoint, keys=keys is not None)
    socket = context.socket(zmq.PULL)
    socket.rcvhwm = RECEIVE_QUEUE_MESSAGES
    # of a part: a peer that sends a larger one is disconnected
    socket.maxmsgsize = link.max_message_bytes
    socket.linger = 0
    socket.ipv6 = endpoint.startswith("tcp://[")
    # s; a server that vanished
    socket.tcp_keepalive, socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl = 1, 60, 20
    guard = PeerLimits(socket, keys)
    try:
        # libzmq would take the path away from whoever serves it
        if _ipc_is_served(endpoint):
            raise zmq.ZMQError(zmq.EADDRINUSE)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        guard.close()
        socket.close()
        context.term()
        remedy = (
            "expected ipc:///EXISTING/DIRECTORY/NAME or tcp://OWN-ADDRESS:PORT (link.bind, if it"
            " is set)"
        )
        if error.errno == zmq.EADDRINUSE:
            remedy = (
                "another trainer runs there: stop it, or set link.endpoint for this trainer and its"
                " servers"
            )
        raise ValueError(f"link.endpoint {endpoint!r} cannot be bound: {error}; {remedy}") from None
    return socket, guard


def _ipc_is_served(endpoint: str) -> bool:
    path = endpoint.removeprefix("ipc://")
    # not ipc, or an abstract name, which cannot be taken away
    if path == endpoint or path.startswith("@"):
        return False
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
