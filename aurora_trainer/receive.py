"""Receive messages from the servers: the right end of the wire, and the trainer's side of the books.

    PULL socket -> check (wire.decode) -> bounded queue -> get()

One thread receives. When the queue is full it stops, so that the pressure reaches the publishers' queues, where the
oldest messages are dropped and counted. Nothing that a peer sends ends it; what cannot be used is counted by cause.

Books, per epoch (one publisher's life), kept over a restart of the trainer:

    sent_seq = received + lost + rejected          lost: gaps in sent_seq, from an epoch's very first message on
    captured = (sent_seq - heartbeats) + sum(dropped) + queued        as the publisher says in a heartbeat

The books are written at most once a second: what a killed trainer had received since then counts as lost, as it is.
"""

from __future__ import annotations

import logging
import os
import socket as unix
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq
from pydantic import PositiveInt

from aurora_sglang_plugin import wire
from aurora_sglang_plugin.config import LinkConfig, Section
from aurora_trainer.trace import TraceWriter

log = logging.getLogger(__name__)

RECEIVE_QUEUE_MESSAGES = 4
POLL_MS = 100
BOOKS_EVERY_S = 1.0
MAX_EPOCHS = 64
MAX_CAUSES = 32  # of drops, that a publisher may name


class ReceiveConfig(Section):
    """The bound of received messages that wait for the trainer."""

    queue_bytes: PositiveInt = 256 << 20


class Epoch(msgspec.Struct):
    """The books of one publisher's life, in messages. What the publisher says is as of its last message."""

    target: str = ""
    received: int = 0
    rejected: int = 0
    lost: int = 0
    sent_seq: int = 0
    captured: int = 0
    heartbeats: int = 0
    dropped: dict[str, int] = {}
    queued: int = 0
    draft_version: int = 0
    quiet: bool = False  # the last message was a heartbeat: the publisher's books are complete
    last_unix_s: float = 0.0


class Books(msgspec.Struct):
    epochs: dict[str, Epoch] = {}
    rejected: dict[str, int] = {}  # by cause, all epochs and unknown ones
    forgotten_epochs: int = 0


class Receiver:
    """Binds link.endpoint and receives until close(). `target`: refuse messages about another one (cause `target`).

    `books_path` is None where the books need not survive. `trace` gets the raw parts of every accepted message.
    Raises ValueError where the endpoint cannot be bound.
    """

    def __init__(
        self,
        link: LinkConfig,
        config: ReceiveConfig,
        books_path: Path | None,
        *,
        target: str | None = None,
        trace: TraceWriter | None = None,
    ):
        self._max_bytes, self._config, self._target, self._trace = link.max_message_bytes, config, target, trace
        self._books_path = Path(books_path) if books_path else None
        self._books = _load(self._books_path)
        self._epochs: OrderedDict[str, Epoch] = OrderedDict(self._books.epochs)  # least recently heard first
        self._unsaved, self._saved_at = False, 0.0
        self._queue: deque[tuple[wire.Message, int]] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()  # guards queue and books
        self._closing = False
        self._context = zmq.Context()
        self._socket = _bind(self._context, link)
        self._thread = threading.Thread(target=self._run, name="aurora-receive", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float = 0.0) -> wire.Message | None:
        """The oldest message that waits (never a heartbeat), None where none came within `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._closing, timeout_s) or not self._queue:
                return None
            message, nbytes = self._queue.popleft()
            self._queued_bytes -= nbytes
            self._changed.notify_all()
            return message

    def books(self) -> dict:
        """{epochs: {epoch: {received, lost, rejected, sent_seq, captured, dropped, ...}}, rejected: {cause: n}, ...}"""
        with self._changed:
            return msgspec.to_builtins(self._snapshot()) | {"queued_bytes": self._queued_bytes}

    def balanced(self, epoch: str) -> bool | str:
        """True where both equations hold after a heartbeat, else what is not equal."""
        with self._changed:
            return _balanced(self._epochs.get(epoch))

    def close(self) -> None:
        """Stop receiving, write the books. Messages that wait can still be taken by get()."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # ---- the receiver thread

    def _run(self) -> None:
        while not self._closing:
            try:
                if self._has_room() and self._socket.poll(POLL_MS):
                    self._accept(*self._receive())
            except Exception:  # whatever it was, the next message may be well
                log.exception("receiver failed on a message, going on")
                self._reject("failed", None)
                time.sleep(0.01)
            if self._unsaved and time.monotonic() - self._saved_at >= BOOKS_EVERY_S:
                self._save()
        self._save()
        self._socket.close(linger=0)
        self._context.term()

    def _has_room(self) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: self._queued_bytes < self._config.queue_bytes or self._closing, POLL_MS / 1000
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

    def _accept(self, parts: Sequence[bytes], cause: str | None) -> None:
        if cause is None:
            try:
                message = wire.decode(parts, max_bytes=self._max_bytes)
                header = message.header
                if self._target is not None and header.target != self._target:
                    cause = "target"
                elif len(header.dropped) > MAX_CAUSES:
                    cause = "header"
            except wire.WireError as error:
                cause = error.cause
        if cause is not None:
            return self._reject(cause, _header(parts))
        with self._changed:
            if not self._enter(header):
                self._count("order")
                return
            self._epochs[header.epoch].received += 1
            if header.kind != "heartbeat":
                nbytes = sum(map(len, parts))
                self._queue.append((message, nbytes))
                self._queued_bytes += nbytes
                self._changed.notify_all()
        if self._trace is not None:
            try:
                self._trace.write(parts)
            except OSError as error:
                log.error("trace ended path=%s error=%s", self._trace.path, error)
                self._trace = None

    def _reject(self, cause: str, header: wire.Header | None) -> None:
        with self._changed:
            self._count(cause)
            if header is not None and self._enter(header):
                self._epochs[header.epoch].rejected += 1

    def _count(self, cause: str) -> None:
        self._books.rejected[cause] = self._books.rejected.get(cause, 0) + 1
        self._unsaved = True

    def _enter(self, header: wire.Header) -> bool:
        """Enter what the publisher says. False where the message repeats or precedes one that was entered."""
        epoch = self._epochs.get(header.epoch)
        if epoch is None:
            epoch = self._epochs[header.epoch] = Epoch(target=header.target)
            if len(self._epochs) > MAX_EPOCHS:
                self._epochs.popitem(last=False)
                self._books.forgotten_epochs += 1
        if header.sent_seq <= epoch.sent_seq:
            return False
        self._epochs.move_to_end(header.epoch)
        epoch.lost += header.sent_seq - epoch.sent_seq - 1
        epoch.sent_seq, epoch.captured, epoch.heartbeats = header.sent_seq, header.captured_seq, header.heartbeats
        epoch.dropped, epoch.queued, epoch.draft_version = header.dropped, header.queued, header.draft_version
        epoch.quiet, epoch.last_unix_s = header.kind == "heartbeat", time.time()
        self._unsaved = True
        return True

    def _snapshot(self) -> Books:
        self._books.epochs = dict(self._epochs)
        return self._books

    def _save(self) -> None:
        self._saved_at, self._unsaved = time.monotonic(), False
        if self._books_path is None:
            return
        with self._changed:
            data = msgspec.json.encode(self._snapshot())
        temporary = self._books_path.with_name(self._books_path.name + ".tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self._books_path)
        except OSError as error:
            log.error("books not written path=%s error=%s", self._books_path, error)


def _balanced(epoch: Epoch | None) -> bool | str:
    if epoch is None:
        return "unknown epoch"
    if not epoch.quiet:
        return "no heartbeat since the last message"
    sent, dropped = epoch.sent_seq - epoch.heartbeats, sum(epoch.dropped.values())
    if epoch.captured != sent + dropped + epoch.queued:
        return f"captured {epoch.captured} is not sent {sent} + dropped {dropped} + queued {epoch.queued}"
    if epoch.sent_seq != epoch.received + epoch.lost + epoch.rejected:
        return (
            f"sent {epoch.sent_seq} is not received {epoch.received} + lost {epoch.lost} + rejected {epoch.rejected}"
        )
    return True


_header_decoder = msgspec.msgpack.Decoder(wire.Header)


def _header(parts: Sequence[bytes]) -> wire.Header | None:
    """The header of a rejected message where it can be believed, so that the message counts to its epoch."""
    if not parts or len(parts[0]) > wire.MAX_HEADER_BYTES:
        return None
    try:
        header = _header_decoder.decode(parts[0])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    counters = (header.captured_seq, header.heartbeats, header.queued, *header.dropped.values())
    if header.schema != wire.SCHEMA_VERSION or not 0 < len(header.epoch) <= 64 or len(header.dropped) > MAX_CAUSES:
        return None
    return header if header.sent_seq >= 1 and min(counters) >= 0 and max(header.sent_seq, *counters) < 1 << 53 else None


def _load(path: Path | None) -> Books:
    if path is None or not path.exists():
        return Books()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Books)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("books are damaged, starting new ones path=%s error=%s", path, error)
        return Books()


def _bind(context: zmq.Context, link: LinkConfig) -> zmq.Socket:
    socket = context.socket(zmq.PULL)
    socket.rcvhwm = RECEIVE_QUEUE_MESSAGES
    socket.maxmsgsize = link.max_message_bytes  # of a part: a peer that sends a larger one is disconnected
    socket.linger = 0
    try:
        if _ipc_is_served(link.endpoint):  # libzmq would take the path away from whoever serves it
            raise zmq.ZMQError(zmq.EADDRINUSE)
        socket.bind(link.endpoint)
    except zmq.ZMQError as error:
        socket.close()
        context.term()
        remedy = "expected ipc:///EXISTING/DIRECTORY/NAME or tcp://127.0.0.1:PORT"
        if error.errno == zmq.EADDRINUSE:
            remedy = "another trainer runs there: stop it, or set link.endpoint for this trainer and its servers"
        raise ValueError(f"link.endpoint {link.endpoint!r} cannot be bound: {error}; {remedy}") from None
    return socket


def _ipc_is_served(endpoint: str) -> bool:
    path = endpoint.removeprefix("ipc://")
    if path == endpoint or path.startswith("@"):  # not ipc, or an abstract name, which cannot be taken away
        return False
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
