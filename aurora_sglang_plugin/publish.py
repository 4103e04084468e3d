"""Publish captured messages to the trainer: the left end of the wire. Serving never waits for it.

    scheduler thread   offer() -> bounded queue (the OLDEST message is dropped and counted by cause)
    publisher thread   queue -> build() -> wire.encode -> PUSH socket, only while the trainer takes messages

Delivery is at most once. Books, exact at every instant that `counters` sees:

    captured = sent + sum(dropped) + queued        (the message in flight counts as queued; heartbeats are apart)

ZeroMQ's own queue would keep the oldest messages, count them in messages and fill while nobody is connected; it is
kept at SEND_QUEUE_MESSAGES and unused while unconnected. A message that ZeroMQ took and the trainer never got is
`sent` here and `lost` in the trainer's books.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zmq

from aurora_sglang_plugin import wire
from aurora_sglang_plugin.config import LinkConfig, PublishConfig

log = logging.getLogger(__name__)

SEND_QUEUE_MESSAGES = 4
WRITABLE_POLL_MS = 50  # how soon a closing publisher is noticed while nobody takes messages
REOPEN_S = 1.0

Arrays = dict[str, tuple[str, np.ndarray]]  # frame name -> (wire dtype, C-contiguous array), in wire.FRAMES' order


class Snapshot(Protocol):
    """What one message will be made of (snapshot.py)."""

    @property
    def nbytes(self) -> int:
        """Held while it is queued: the measure of the queue."""

    def build(self) -> Arrays:
        """The frames of the message. Called at most once, on the publisher thread; may raise (cause `build`)."""


@dataclass(slots=True)
class _Item:
    kind: wire.Kind
    snapshot: Snapshot | None
    nbytes: int
    captured_seq: int
    time_ns: int
    fields: dict


class Publisher:
    """One server's end of the link. Create it once per process; `offer` and `drop` are for one thread.

    Raises ValueError where the endpoint cannot be connected to at all (an absent trainer is not an error).
    """

    def __init__(self, link: LinkConfig, config: PublishConfig, target: str):
        self.epoch = secrets.token_hex(8)
        self._link, self._config, self._target = link, config, target
        self._lock = threading.Lock()  # held for a few bytecodes only: books and queue
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._in_flight: _Item | None = None
        self._captured = self._sent = self._heartbeats = self._bytes_sent = 0
        self._dropped: dict[str, int] = {}
        self._logged: set[str] = set()
        self._draft_version = 0
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
        draft_version: int = 0,
        extend_version: int = 0,
        num_steps: int = 0,
        topk: int = 0,
    ) -> None:
        """Queue one message: never blocks, never raises for a full queue, O(1) amortised.

        A dropped message's snapshot is released without `build`; the arrays that `build` returned are sent without a
        copy and released when ZeroMQ is done with them.
        """
        nbytes = snapshot.nbytes
        fields = {
            "requests": list(requests),
            "flags": list(flags),
            "reasons": list(reasons),
            "draft_version": draft_version,
            "extend_version": extend_version,
            "num_steps": num_steps,
            "topk": topk,
        }
        now_ns = time.time_ns()
        released = []  # freed after the lock is given back
        with self._lock:
            self._captured += 1
            self._draft_version = draft_version
            if self._close_at is not None or nbytes > self._config.queue_bytes:
                cause = "closed" if self._close_at is not None else "too_large"
                self._dropped[cause] = self._dropped.get(cause, 0) + 1
                return
            while self._queue and (
                self._queued_bytes + nbytes > self._config.queue_bytes
                or len(self._queue) >= self._config.queue_messages
            ):
                released.append(self._queue.popleft())
                self._queued_bytes -= released[-1].nbytes
                self._dropped["queue_full"] = self._dropped.get("queue_full", 0) + 1
            self._queue.append(_Item(kind, snapshot, nbytes, self._captured, now_ns, fields))
            self._queued_bytes += nbytes
            idle = len(self._queue) == 1
        if idle:
            self._wake.set()

    def drop(self, cause: str) -> None:
        """Count a message that was due and could not even be offered, e.g. drop("no_slot")."""
        with self._lock:
            self._captured += 1
            self._dropped[cause] = self._dropped.get(cause, 0) + 1

    def counters(self) -> dict:
        """The books: captured, sent, dropped {cause: n}, queued (messages); queued_bytes, bytes_sent; heartbeats."""
        with self._lock:
            in_flight = self._in_flight
            return {
                "captured": self._captured,
                "sent": self._sent,
                "dropped": dict(self._dropped),
                "queued": len(self._queue) + (in_flight is not None),
                "queued_bytes": self._queued_bytes + (in_flight.nbytes if in_flight else 0),
                "bytes_sent": self._bytes_sent,
                "heartbeats": self._heartbeats,
            }

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what the trainer takes within `timeout_s`, count the rest as dropped by cause `closed`. Idempotent."""
        with self._lock:
            if self._close_at is None:
                self._close_at = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join(timeout_s + 5)

    # ---- the publisher thread

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
        while self._close_at is None or (self._queue and time.monotonic() < self._close_at):
            self._wake.clear()
            try:
                if self._socket.closed:
                    self._socket = self._connect()
                if self._queue:
                    if self._send_next():
                        heartbeat_at = time.monotonic() + self._config.heartbeat_s
                    continue
                if time.monotonic() >= heartbeat_at:
                    self._send_heartbeat()
                    heartbeat_at = time.monotonic() + self._config.heartbeat_s
            except Exception as error:  # serving goes on without publishing until the socket works again
                self._log_once("publish", error)
                self._socket.close(linger=0)
                heartbeat_at = time.monotonic() + REOPEN_S
            self._wake.wait(max(0.0, heartbeat_at - time.monotonic()))
        self._finish()

    def _finish(self) -> None:
        with self._lock:
            left = list(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            if left:
                self._dropped["closed"] = self._dropped.get("closed", 0) + len(left)
        assert self._close_at is not None
        try:  # the last books
            while not self._send_heartbeat() and (left_s := self._close_at - time.monotonic()) > 0:
                self._socket.poll(min(WRITABLE_POLL_MS, left_s * 1000), zmq.POLLOUT)
        except Exception as error:
            self._log_once("publish", error)
        self._socket.close(linger=max(0, int((self._close_at - time.monotonic()) * 1000)))
        self._context.term()

    def _send_next(self) -> bool:
        """Send the oldest message if the trainer takes one. The queue goes on dropping its oldest meanwhile."""
        if not self._socket.poll(WRITABLE_POLL_MS, zmq.POLLOUT):
            return False
        with self._lock:
            if not self._queue:
                return False
            item = self._in_flight = self._queue.popleft()
            self._queued_bytes -= item.nbytes
        cause = "closed"
        try:
            arrays = item.snapshot.build()
            item.snapshot = None  # only the arrays are needed from here on
            while not (nbytes := self._send(item, arrays)):
                if self._close_at is not None and time.monotonic() >= self._close_at:
                    break
                self._socket.poll(WRITABLE_POLL_MS, zmq.POLLOUT)
            else:
                if nbytes < 0:
                    cause = "too_large"
        except zmq.ZMQError:
            self._settle("publish")
            raise
        except Exception as error:  # a fault of capture's conversions must not end publishing
            self._log_once("build", error)
            nbytes, cause = 0, "build"
        self._settle(cause, nbytes)
        return nbytes > 0

    def _settle(self, cause: str, nbytes: int = 0) -> None:
        """The message in flight was sent (nbytes > 0) or is dropped by `cause`."""
        with self._lock:
            self._in_flight = None
            if nbytes > 0:
                self._sent += 1
                self._bytes_sent += nbytes
            else:
                self._dropped[cause] = self._dropped.get(cause, 0) + 1

    def _send(self, item: _Item | None, arrays: Arrays) -> int:
        """Bytes handed to ZeroMQ; 0 where it would block; -1 where the message exceeds the link's bound.

        `item` None is a heartbeat. The header is made anew for each attempt, so that its books are those of sending.
        """
        with self._lock:
            header = wire.Header(
                schema=wire.SCHEMA_VERSION,
                kind=item.kind if item else "heartbeat",
                epoch=self.epoch,
                captured_seq=item.captured_seq if item else self._captured,
                sent_seq=self._sent + self._heartbeats + 1,
                heartbeats=self._heartbeats + (item is None),
                dropped=dict(self._dropped),
                queued=len(self._queue),
                target=self._target,
                time_ns=item.time_ns if item else time.time_ns(),
                **(item.fields if item else {"draft_version": self._draft_version, "extend_version": 0}),
            )
        parts = wire.encode(header, arrays)
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
        if nbytes := self._send(None, {}):
            with self._lock:
                self._heartbeats += 1
                self._bytes_sent += nbytes
        return nbytes > 0

    def _log_once(self, cause: str, error: Exception) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            log.error("aurora publisher failed cause=%s (counted, logged once)", cause, exc_info=error)
