"""Publish captured messages to the trainer: the left end of the wire. Serving never waits for it.

    scheduler's thread   offer() -> send_queue (bounded; the OLDEST message is dropped and counted
                         by cause)
    publisher's thread   send_queue -> build() -> wire.encode -> PUSH socket, only while the trainer
                         takes messages

Delivery is at most once. ZeroMQ's own queue would keep the oldest messages, count them in messages
and fill while nobody is connected; it is kept at SEND_QUEUE_MESSAGES and unused while unconnected.
A message that ZeroMQ took and the trainer never got is `sent` here and `lost` in the trainer's
ledger. With link.server_keys nothing is sent to a peer that does not have the trainer's secret key.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import zmq

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.endpoint import EXPECTED, check_ipc_directory
from aurora_sglang_plugin.link import handshakes, wire
from aurora_sglang_plugin.link.keys import load_server_keys
from aurora_sglang_plugin.link.send_queue import Arrays, Item, SendQueue, Snapshot

log = logging.getLogger(__name__)

SEND_QUEUE_MESSAGES = 4
# Smaller parts are copied, without the interpreter's lock. One that is not costs a turn of pyzmq's
# own Python thread, when ZeroMQ is done with it.
COPIED_BYTES = 1 << 18
# plain numbers: combining zmq's own, which are an enum, takes longer than sending a part
LAST, MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
POLLOUT = int(zmq.POLLOUT)
# while nobody takes messages: how soon a new one is unloaded, or closing is noticed
WRITABLE_POLL_MS = 10
# without a message or heartbeat that was taken, but for at least three heartbeats: there is no
# trainer
NO_TRAINER_S = 5.0
REOPEN_S = 1.0
REMEDIES = {
    "key": (
        "the trainer does not list this server's key; add it to servers/ in link.trainer_keys,"
        " restart the trainer"
    ),
    "protocol": (
        "who listens there does not encrypt as this side does; expected a trainer with the same"
        " [link]"
    ),
    "unfinished": (
        "who listens there is stopped, or is not the trainer whose key link.server_keys holds"
    ),
    "garbage": "who listens there is no trainer; expected one, or another link.endpoint",
}


class Publisher:
    """One server's end of the link.

    Create it once per process; `offer` and `drop` are for one thread.

    Raises ValueError if the endpoint cannot be connected to at all, or its keys cannot be used
    (an absent trainer is not an error).
    """

    def __init__(self, link: LinkConfig, config: PublishConfig, target: str):
        self.session = secrets.token_hex(8)
        self._link, self._heartbeat_s, self._target = link, config.heartbeat_s, target
        self._send_queue = SendQueue(config)
        self._logged: set[str] = set()
        self._wake = threading.Event()
        # monotonic; set once by close()
        self._close_at: float | None = None
        self._keys = load_server_keys(link.server_keys) if link.server_keys else None
        check_ipc_directory(link.endpoint, keys=self._keys is not None)
        self._refused: Counter[str] = Counter()
        self._context = zmq.Context()
        self._connect()
        self._thread = threading.Thread(target=self._run, name="aurora-publish", daemon=True)
        self._thread.start()

    def offer(
        self,
        kind: wire.Kind,
        snapshot: Snapshot,
        *,
        requests: Sequence[str],
        **header: Any,
    ) -> None:
        """Queue one message: never blocks, never raises for a full queue, O(1) amortised.

        `header` are fields of wire.Header but for session, time and counters, which the queue
        knows.
        A dropped message's snapshot is released without `build`; the arrays that `build` returned
        are sent without a copy and released when ZeroMQ is done with them.
        """
        fields = {
            "target": self._target,
            "requests": list(requests),
            "draft_version": 0,
            "extend_version": 0,
            **header,
        }
        if self._send_queue.put(kind, snapshot, fields):
            self._wake.set()

    @property
    def no_trainer(self) -> bool:
        """Nobody took anything for a while. Read without a lock."""
        return self._send_queue.blocked_s > max(NO_TRAINER_S, 3 * self._heartbeat_s)

    def retarget(self, target: str) -> None:
        """The server has another target: what is captured from here on says so."""
        self._target = target

    def drop(self, cause: str) -> None:
        """Count a message that was due and could not even be offered, e.g. drop("no_buffer")."""
        self._send_queue.drop(cause)

    def counters(self) -> dict:
        """The ledger: captured, sent, dropped {cause: n}, queued (messages); queued_bytes,
        bytes_sent; heartbeats.

        Causes: queue_full, too_large, build, publish, closed, and those of drop(). `excluded`
        {cause: n} counts rows of requests that were left out of messages, by the causes of rows.py;
        `refused` {cause: n} attempts to connect that failed at the handshake, by the causes of
        handshakes.py.
        """
        return self._send_queue.counters() | {"refused": dict(self._refused)}

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what the trainer takes within `timeout_s`, count the rest as dropped by cause
        `closed`. Idempotent.
        """
        self._send_queue.seal()
        if self._close_at is None:
            self._close_at = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join(timeout_s + 5)

    # ---- the publisher's thread

    def _connect(self) -> None:
        self._socket = socket = self._context.socket(zmq.PUSH)
        socket.sndhwm = SEND_QUEUE_MESSAGES
        socket.linger = 0
        # nothing is queued for a peer that is not there
        socket.immediate = 1
        # ms
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000
        socket.handshake_ivl = int(handshakes.HANDSHAKE_S * 1000)
        socket.ipv6 = self._link.endpoint.startswith("tcp://[")
        # s
        socket.tcp_keepalive, socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl = 1, 60, 20
        if self._keys is not None:
            self._keys.encrypt(socket)
        self._connected = handshakes.Connected(socket, self._refused)
        try:
            socket.connect(self._link.endpoint)
        except zmq.ZMQError as error:
            self._disconnect()
            raise ValueError(
                f"link.endpoint {self._link.endpoint!r}: {error}; {EXPECTED}"
            ) from None

    def _disconnect(self, linger_ms: int = 0) -> None:
        self._connected.monitor.close()
        self._socket.close(linger=linger_ms)

    def _handle_blocked_link(self) -> None:
        """Nobody takes messages: try again if libzmq would not, and say why, once for each
        cause.
        """
        self._connected.turn()
        for cause in self._refused.keys() - self._logged:
            self._logged.add(cause)
            key = f" public_key={self._keys.public.decode()}" if self._keys else ""
            log.warning(
                "aurora link refused cause=%s endpoint=%s%s (counted, logged once): %s",
                cause, self._link.endpoint, key, REMEDIES[cause],
            )  # fmt: skip
        if (
            self._connected.stuck is not None
            and time.monotonic() > self._connected.stuck + REOPEN_S
        ):
            self._disconnect()
            self._connect()

    def _run(self) -> None:
        # the first one tells the trainer that this session began
        heartbeat_at = time.monotonic()
        while self._close_at is None or (self._send_queue and time.monotonic() < self._close_at):
            self._wake.clear()
            try:
                if self._socket.closed:
                    self._connect()
                if self._send_queue:
                    if self._send_next():
                        heartbeat_at = time.monotonic() + self._heartbeat_s
                    continue
                if time.monotonic() >= heartbeat_at:
                    if not self._send_heartbeat():
                        self._handle_blocked_link()
                    heartbeat_at = time.monotonic() + self._heartbeat_s
            except Exception as error:
                # serving goes on without publishing until the socket works again
                self._log_once("publish", error)
                self._disconnect()
                heartbeat_at = time.monotonic() + REOPEN_S
            self._wake.wait(max(0.0, heartbeat_at - time.monotonic()))
        self._finish()

    def _finish(self) -> None:
        assert self._close_at is not None
        self._send_queue.discard()
        # the last ledger
        try:
            while not self._send_heartbeat() and (left_s := self._close_at - time.monotonic()) > 0:
                self._socket.poll(int(min(WRITABLE_POLL_MS, left_s * 1000)), zmq.POLLOUT)
        except Exception as error:
            self._log_once("publish", error)
        self._disconnect(max(0, int((self._close_at - time.monotonic()) * 1000)))
        self._context.term()

    def _send_next(self) -> bool:
        """Send the oldest message if the trainer takes one.

        The queue goes on dropping its oldest meanwhile.
        """
        if not self._writable() or (item := self._send_queue.take()) is None:
            return False
        cause = "closed"
        try:
            arrays = self._send_queue.leave_out_bad_rows(item, item.snapshot.build())
            # only the arrays are needed from here on
            item.snapshot = None
            while not (nbytes := self._send(item, arrays)):
                if self._close_at is not None and time.monotonic() >= self._close_at:
                    break
                self._writable()
            if nbytes < 0:
                cause = "too_large"
        except zmq.ZMQError:
            self._send_queue.settle("publish")
            raise
        except Exception as error:
            # a fault of capture's conversions must not end publishing
            self._log_once("build", error)
            nbytes, cause = 0, "build"
        self._send_queue.settle(cause, nbytes)
        return nbytes > 0

    def _writable(self) -> bool:
        """Whether the trainer takes a message.

        If it does not at once, what is queued gives back its pinned buffers:
        else the few buffers would hold the oldest messages, and the newest would be the ones that
        are dropped."""
        # as self._socket.poll(0), which makes a poller first
        if zmq.zmq_poll([(self._socket, POLLOUT)], 0):
            return True
        try:
            self._send_queue.unload()
        except Exception as error:
            # that message fails to build as well, and is counted there
            self._log_once("unload", error)
        self._handle_blocked_link()
        return bool(self._socket.poll(WRITABLE_POLL_MS, zmq.POLLOUT))

    def _send(self, item: Item | None, arrays: Arrays) -> int:
        """Bytes handed to ZeroMQ; 0 if it would block; -1 if the message exceeds the link's
        bound.

        `item` None is a heartbeat. The header is made anew for each attempt, so that its ledger is
        those of sending.
        """
        parts = wire.encode(self._send_queue.header(item, self.session, self._target), arrays)
        nbytes = sum(map(len, parts))
        if nbytes > self._link.max_message_bytes or len(parts[0]) > wire.MAX_HEADER_BYTES:
            return -1
        last = len(parts) - 1
        for i, part in enumerate(parts):
            try:
                self._socket.send(part, MORE if i < last else LAST, copy=len(part) < COPIED_BYTES)
            except zmq.Again:
                # the peer went away within a message: a fresh socket is the way to be rid of the
                # rest
                if i:
                    self._disconnect()
                    self._connect()
                return 0
        return nbytes

    def _send_heartbeat(self) -> bool:
        nbytes = self._send(None, {})
        if nbytes > 0:
            self._send_queue.beat(nbytes)
        return nbytes > 0

    def _log_once(self, cause: str, error: Exception) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            log.error(
                "aurora publisher failed cause=%s (counted, logged once)", cause, exc_info=error
            )
