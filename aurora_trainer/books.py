"""The trainer's side of the link's books, one page per publisher's life (epoch), kept over a restart of the trainer.

    sent_seq = received + lost + rejected          lost: gaps in sent_seq, from an epoch's very first message on
    captured = (sent_seq - heartbeats) + sum(dropped) + queued        as the publisher says in a heartbeat

They are written at most once a second: what a killed trainer had received since then counts as lost, as it is.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from pathlib import Path

import msgspec

from aurora_sglang_plugin import wire

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
MAX_EPOCHS = 64
MAX_CAUSES = 32  # of drops, that a publisher may name


class Epoch(msgspec.Struct):
    """In messages. What the publisher says is as of its last message."""

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


class _File(msgspec.Struct):
    epochs: dict[str, Epoch] = {}  # least recently heard first
    rejected: dict[str, int] = {}  # by cause, all epochs and unknown ones
    forgotten_epochs: int = 0


class Books:
    """Not thread-safe: its owner locks. `path` None: not kept."""

    def __init__(self, path: Path | None):
        self._path = Path(path) if path else None
        file = _load(self._path)
        self.epochs: OrderedDict[str, Epoch] = OrderedDict(file.epochs)
        self.rejected = file.rejected
        self.forgotten_epochs = file.forgotten_epochs
        self._unwritten, self._written_at = False, 0.0

    def accept(self, header: wire.Header) -> bool:
        """Count a message as received. False (and rejected, cause `order`) where it repeats or precedes one."""
        if not self._enter(header):
            self.reject("order", None)
            return False
        self.epochs[header.epoch].received += 1
        return True

    def reject(self, cause: str, header_part: bytes | None) -> None:
        """Count a message that cannot be used, for its epoch as well where its header can be believed."""
        self.rejected[cause] = self.rejected.get(cause, 0) + 1
        self._unwritten = True
        header = _believable(header_part) if header_part is not None else None
        if header is not None and self._enter(header):
            self.epochs[header.epoch].rejected += 1

    def _enter(self, header: wire.Header) -> bool:
        epoch = self.epochs.setdefault(header.epoch, Epoch(target=header.target))
        if header.sent_seq <= epoch.sent_seq:
            return False
        self.epochs.move_to_end(header.epoch)
        if len(self.epochs) > MAX_EPOCHS:
            self.epochs.popitem(last=False)
            self.forgotten_epochs += 1
        epoch.lost += header.sent_seq - epoch.sent_seq - 1
        epoch.sent_seq, epoch.captured, epoch.heartbeats = header.sent_seq, header.captured_seq, header.heartbeats
        epoch.dropped, epoch.queued = header.dropped, header.queued
        epoch.draft_version = header.draft_version or epoch.draft_version  # an `end` does not say
        epoch.quiet, epoch.last_unix_s = header.kind == "heartbeat", time.time()
        self._unwritten = True
        return True

    def balanced(self, name: str) -> bool | str:
        """True where both equations hold after a heartbeat, else what is not equal."""
        epoch = self.epochs.get(name)
        if epoch is None:
            return "unknown epoch"
        if not epoch.quiet:
            return "no heartbeat since the last message"
        sent, dropped = epoch.sent_seq - epoch.heartbeats, sum(epoch.dropped.values())
        if epoch.captured != sent + dropped + epoch.queued:
            return f"captured {epoch.captured} is not sent {sent} + dropped {dropped} + queued {epoch.queued}"
        received, lost, rejected = epoch.received, epoch.lost, epoch.rejected
        if epoch.sent_seq != received + lost + rejected:
            return f"sent {epoch.sent_seq} is not received {received} + lost {lost} + rejected {rejected}"
        return True

    def as_dict(self) -> dict:
        return msgspec.to_builtins(_File(dict(self.epochs), self.rejected, self.forgotten_epochs))

    def due(self) -> bool:
        return self._unwritten and time.monotonic() - self._written_at >= WRITE_EVERY_S

    def write(self) -> None:
        """Atomic against a kill, not against a power failure: damaged books are replaced by new ones."""
        self._written_at, self._unwritten = time.monotonic(), False
        if self._path is None:
            return
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(self.as_dict()))
            os.replace(temporary, self._path)
        except OSError as error:
            log.error("books not written path=%s error=%s", self._path, error)


_header_decoder = msgspec.msgpack.Decoder(wire.Header)


def _believable(part: bytes) -> wire.Header | None:
    if len(part) > wire.MAX_HEADER_BYTES:
        return None
    try:
        header = _header_decoder.decode(part)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    counters = (header.captured_seq, header.heartbeats, header.queued, *header.dropped.values())
    if header.schema != wire.SCHEMA_VERSION or not 0 < len(header.epoch) <= 64 or len(header.dropped) > MAX_CAUSES:
        return None
    return header if header.sent_seq >= 1 and min(counters) >= 0 and max(header.sent_seq, *counters) < 1 << 53 else None


def _load(path: Path | None) -> _File:
    if path is None or not path.exists():
        return _File()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("books are damaged, starting new ones path=%s error=%s", path, error)
        return _File()
