"""Publish captured messages to the trainer: the left end of the wire. Serving never waits for it.

    scheduler's thread   offer() -> outbox (bounded; the OLDEST message is dropped and counted by cause)
    publisher's thread   outbox -> build() -> wire.encode -> PUSH socket, only while the trainer takes messages

Delivery is at most once. ZeroMQ's own queue would keep the oldest messages, count them in messages and fill while
nobody is connected; it is kept at SEND_QUEUE_MESSAGES and unused while unconnected. A message that ZeroMQ took and the
trainer never got is `sent` here and `lost` in the trainer's books.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence

import zmq

from aurora_sglang_plugin import wire
from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.outbox import Arrays, Item, Outbox, Snapshot

log = logging.getLogger(__name__)

SEND_QUEUE_MESSAGES = 4
WRITABLE_POLL_MS = 10  # while nobody takes messages: how soon a new one is unloaded, or closing is noticed
REOPEN_S = 1.0


class Publisher:
    """One server's end of the link. Create it once per process; `offer` and `drop` are for one thread.

    Raises ValueError where the endpoint cannot be connected to at all (an absent trainer is not an error).
    """

    def __init__(self, link: LinkConfig, config: PublishConfig, target: str):
        self.epoch = secrets.token_hex(8)
        self._link, self._heartbeat_s, self._target = link, config.heartbeat_s, target
        self._outbox = Outbox(config)
        self._logged: set[str] = set()
        self._wake = threading.Event()
        self._close_at: float | None = None  # monotonic; set once by close()
        self._context = zmq.Context()
        self._socket = self._connect()
        self._thread = threading.Thread(target=self._run, name="aurora-publish", daemon=True)
        self._thread.start()

    def offer(
        self,
        kind: wire.Kind,
        snapshot: Snapshot,
        *,
        requests: Sequence[str],
        flags: Sequence[int] = (),
        reasons: Sequence[wire.EndReason] = (),
        domains: Sequence[str] = (),
        draft_version: int = 0,
        extend_version: int = 0,
        num_steps: int = 0,
        topk: int = 0,
    ) -> None:
        """Queue one message: never blocks, never raises for a full queue, O(1) amortised.

        A dropped message's snapshot is released without `build`; the arrays that `build` returned are sent without a
        copy and released when ZeroMQ is done with them.
        """
        fields = {
            "requests": list(requests),
            "flags": list(flags),
            "reasons": list(reasons),
            "domains": list(domains),
            "draft_version": draft_version,
            "extend_version": extend_version,
            "num_steps": num_steps,
            "topk": topk,
        }
        if self._outbox.put(kind, snapshot, fields):
            self._wake.set()

    def drop(self, cause: str) -> None:
        """Count a message that was due and could not even be offered, e.g. drop("no_slot")."""
        self._outbox.drop(cause)

    def counters(self) -> dict:
        """The books: captured, sent, dropped {cause: n}, queued (messages); queued_bytes, bytes_sent; heartbeats.

        Causes: queue_full, too_large, build, publish, closed, and those of drop().
        """
        return self._outbox.counters()

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what the trainer takes within `timeout_s`, count the rest as dropped by cause `closed`. Idempotent."""
        self._outbox.seal()
        if self._close_at is None:
            self._close_at = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join(timeout_s + 5)

    # ---- the publisher's thread

    def _connect(self) -> zmq.Socket:
        socket = self._context.socket(zmq.PUSH)
        socket.sndhwm = SEND_QUEUE_MESSAGES
        socket.linger = 0
        socket.immediate = 1  # nothing is queued for a peer that is not there
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000  # ms
        try:
            socket.connect(self._link.endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise ValueError(
                f"link.endpoint {self._link.endpoint!r}: {error}; expected ipc:///PATH or tcp://127.0.0.1:PORT"
            ) from None
        return socket

    def _run(self) -> None:
        heartbeat_at = time.monotonic()  # the first one tells the trainer that this epoch began
        while self._close_at is None or (self._outbox and time.monotonic() < self._close_at):
            self._wake.clear()
            try:
                if self._socket.closed:
                    self._socket = self._connect()
                if self._outbox:
                    if self._send_next():
                        heartbeat_at = time.monotonic() + self._heartbeat_s
                    continue
                if time.monotonic() >= heartbeat_at:
                    self._send_heartbeat()
                    heartbeat_at = time.monotonic() + self._heartbeat_s
            except Exception as error:  # serving goes on without publishing until the socket works again
                self._log_once("publish", error)
                self._socket.close(linger=0)
                heartbeat_at = time.monotonic() + REOPEN_S
            self._wake.wait(max(0.0, heartbeat_at - time.monotonic()))
        self._finish()

    def _finish(self) -> None:
        assert self._close_at is not None
        self._outbox.discard()
        try:  # the last books
            while not self._send_heartbeat() and (left_s := self._close_at - time.monotonic()) > 0:
                self._socket.poll(min(WRITABLE_POLL_MS, left_s * 1000), zmq.POLLOUT)
        except Exception as error:
            self._log_once("publish", error)
        self._socket.close(linger=max(0, int((self._close_at - time.monotonic()) * 1000)))
        self._context.term()

    def _send_next(self) -> bool:
        """Send the oldest message if the trainer takes one. The queue goes on dropping its oldest meanwhile."""
        if not self._writable() or (item := self._outbox.take()) is None:
            return False
        cause = "closed"
        try:
            arrays = item.snapshot.build()
            item.snapshot = None  # only the arrays are needed from here on
            while not (nbytes := self._send(item, arrays)):
                if self._close_at is not None and time.monotonic() >= self._close_at:
                    break
                self._writable()
            if nbytes < 0:
                cause = "too_large"
        except zmq.ZMQError:
            self._outbox.settle("publish")
            raise
        except Exception as error:  # a fault of capture's conversions must not end publishing
            self._log_once("build", error)
            nbytes, cause = 0, "build"
        self._outbox.settle(cause, nbytes)
        return nbytes > 0

    def _writable(self) -> bool:
        """Whether the trainer takes a message. Where it does not at once, what is queued gives back its pinned slots:
        else the few slots would hold the oldest messages, and the newest would be the ones that are dropped."""
        if self._socket.poll(0, zmq.POLLOUT):
            return True
        try:
            self._outbox.unload()
        except Exception as error:  # that message fails to build as well, and is counted there
            self._log_once("unload", error)
        return bool(self._socket.poll(WRITABLE_POLL_MS, zmq.POLLOUT))

    def _send(self, item: Item | None, arrays: Arrays) -> int:
        """Bytes handed to ZeroMQ; 0 where it would block; -1 where the message exceeds the link's bound.

        `item` None is a heartbeat. The header is made anew for each attempt, so that its books are those of sending.
        """
        parts = wire.encode(self._outbox.header(item, self.epoch, self._target), arrays)
        nbytes = sum(map(len, parts))
        if nbytes > self._link.max_message_bytes or len(parts[0]) > wire.MAX_HEADER_BYTES:
            return -1
        for i, part in enumerate(parts):
            more = zmq.SNDMORE if i + 1 < len(parts) else 0
            try:
                self._socket.send(part, zmq.DONTWAIT | more, copy=False)
            except zmq.Again:
                if i:  # the peer went away within a message: a fresh socket is the way to be rid of the rest
                    self._socket.close(linger=0)
                    self._socket = self._connect()
                return 0
        return nbytes

    def _send_heartbeat(self) -> bool:
        nbytes = self._send(None, {})
        if nbytes > 0:
            self._outbox.beat(nbytes)
        return nbytes > 0

    def _log_once(self, cause: str, error: Exception) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            log.error("aurora publisher failed cause=%s (counted, logged once)", cause, exc_info=error)
