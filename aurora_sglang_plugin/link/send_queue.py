"""The publisher's queue and its ledger: bounded in bytes and messages, the OLDEST message is
dropped, each by a cause.

    captured = sent + sum(dropped) + queued        (messages; the one in flight counts as queued;
                                                   heartbeats are apart)

holds at every instant that `counters` sees.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from aurora_sglang_plugin.config import PublishConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.rows import bad_rows, excluded

# frame name -> (wire dtype, C-contiguous array), in wire.FRAMES' order
Arrays = dict[str, tuple[str, np.ndarray]]


class Snapshot(Protocol):
    """What one message will be made of (snapshot.py)."""

    @property
    def nbytes(self) -> int:
        """Held while it is queued: the measure of the queue."""

    def unload(self) -> None:
        """Give back what is scarce (pinned memory): the message has to wait.

        On the publisher thread, before build.
        """

    def build(self) -> Arrays:
        """The frames of the message.

        Called at most once, on the publisher thread; may raise (cause `build`).
        """


@dataclass(slots=True)
class Item:
    kind: wire.Kind
    snapshot: Snapshot | None
    nbytes: int
    captured_seq: int
    time_ns: int
    # of the header, as the scheduler knew them
    fields: dict[str, Any]
    unloaded: bool = False


class SendQueue:
    """put() and drop() are for the scheduler's thread, the rest is the publisher's.

    The lock is held for moments.
    """

    def __init__(self, config: PublishConfig):
        self._config = config
        self._lock = threading.Lock()
        self._queue: deque[Item] = deque()
        self._queued_bytes = 0
        self._in_flight: Item | None = None
        self._captured = self._sent = self._heartbeats = self._bytes_sent = 0
        self._dropped: dict[str, int] = {}
        self._excluded: dict[str, int] = {}
        self._sealed = False
        self._taken_at = time.monotonic()
        self._draft_version = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def blocked_s(self) -> float:
        """Since anything was taken, a heartbeat included."""
        return time.monotonic() - self._taken_at

    def put(self, kind: wire.Kind, snapshot: Snapshot, fields: dict[str, Any]) -> bool:
        """Queue one message, dropping older ones for it. True if the queue was empty before.

        O(1) amortised.
        """
        nbytes, now_ns = snapshot.nbytes, time.time_ns()
        # freed after the lock is given back
        released = []
        with self._lock:
            self._captured += 1
            self._draft_version = fields["draft_version"] or self._draft_version
            if self._sealed or nbytes > self._config.queue_bytes:
                self._drop("closed" if self._sealed else "too_large")
                return False
            while self._queue and (
                self._queued_bytes + nbytes > self._config.queue_bytes
                or len(self._queue) >= self._config.queue_messages
            ):
                released.append(self._queue.popleft())
                self._queued_bytes -= released[-1].nbytes
                self._drop("queue_full")
            self._queue.append(Item(kind, snapshot, nbytes, self._captured, now_ns, fields))
            self._queued_bytes += nbytes
            return len(self._queue) == 1

    def drop(self, cause: str) -> None:
        """Count a message that was due and could not even be put."""
        with self._lock:
            self._captured += 1
            self._drop(cause)

    def take(self) -> Item | None:
        """The oldest message, now in flight until settle()."""
        with self._lock:
            if self._queue:
                self._in_flight = self._queue.popleft()
                self._queued_bytes -= self._in_flight.nbytes
            return self._in_flight

    def unload(self) -> None:
        """Nobody takes messages now: have those that came since the last call give back what is
        scarce.
        """
        came = []
        with self._lock:
            for item in reversed(self._queue):
                if item.unloaded:
                    break
                item.unloaded = True
                came.append(item.snapshot)
        # one that is dropped meanwhile lives until this is done
        for snapshot in reversed(came):
            snapshot.unload()

    def leave_out_bad_rows(self, item: Item, arrays: Arrays) -> Arrays:
        """The frames of `item` without the requests whose row cannot be used (rows.py), which are
        counted by cause.

        The message goes all the same, if need be without any row, so that it leaves no hole in its
        session.
        """
        fields = item.fields
        dtypes = {name: dtype for name, (dtype, _) in arrays.items()}
        values = {name: array for name, (_, array) in arrays.items()}
        about = (fields.get("num_steps", 0), fields["requests"], fields.get("domains", ()))
        bad = bad_rows(item.kind, *about, values, dtypes)
        if not bad:
            return arrays
        with self._lock:
            for cause in bad.values():
                self._excluded[cause] = self._excluded.get(cause, 0) + 1
        item.fields, arrays = excluded(bad, fields, arrays)
        return arrays

    def settle(self, cause: str, nbytes: int = 0) -> None:
        """The message in flight was sent (nbytes > 0) or is dropped by `cause`."""
        with self._lock:
            self._in_flight = None
            if nbytes > 0:
                self._sent += 1
                self._bytes_sent += nbytes
                self._taken_at = time.monotonic()
            else:
                self._drop(cause)

    def beat(self, nbytes: int) -> None:
        """A heartbeat was sent."""
        with self._lock:
            self._heartbeats += 1
            self._bytes_sent += nbytes
            self._taken_at = time.monotonic()

    def seal(self) -> None:
        """Take no more: what comes is dropped, cause `closed`."""
        with self._lock:
            self._sealed = True

    def discard(self) -> None:
        """Drop all that is queued, cause `closed`."""
        with self._lock:
            left = list(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            for _ in left:
                self._drop("closed")

    def header(self, item: Item | None, session: str, target: str) -> wire.Header:
        """The header of `item`, or of a heartbeat (None), with the ledger as it will be once
        sent.

        `target` is a heartbeat's: an item says itself which target it was captured of.
        """
        if item is None:
            fields: dict[str, Any] = {"draft_version": self._draft_version, "extend_version": 0}
        else:
            fields = item.fields
        with self._lock:
            return wire.Header(
                schema=wire.SCHEMA_VERSION,
                kind=item.kind if item else "heartbeat",
                session=session,
                captured_seq=item.captured_seq if item else self._captured,
                sent_seq=self._sent + self._heartbeats + 1,
                heartbeats=self._heartbeats + (item is None),
                dropped=dict(self._dropped),
                queued=len(self._queue),
                time_ns=item.time_ns if item else time.time_ns(),
                **({"target": target} | fields),
            )

    def counters(self) -> dict:
        with self._lock:
            in_flight = self._in_flight
            return {
                "captured": self._captured,
                "sent": self._sent,
                "dropped": dict(self._dropped),
                "excluded": dict(self._excluded),
                "queued": len(self._queue) + (in_flight is not None),
                "queued_bytes": self._queued_bytes + (in_flight.nbytes if in_flight else 0),
                "bytes_sent": self._bytes_sent,
                "heartbeats": self._heartbeats,
                "blocked_s": self.blocked_s,
            }

    def _drop(self, cause: str) -> None:
        self._dropped[cause] = self._dropped.get(cause, 0) + 1
