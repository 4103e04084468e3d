"""The trainer's side of the message ledger: one entry for each session (a publisher's life), kept
over a restart of the trainer.

    sent_seq = received + lost + rejected          lost: gaps in sent_seq, from a session's very
                                                   first message on
    captured = (sent_seq - heartbeats) + sum(dropped) + queued        as the publisher says in a
                                                                      heartbeat

They are written at most once a second: what a killed trainer had received since then counts as
lost, as it is.

There are entries for many more sessions than servers can be at work at once, those of ended ones
included: the entry that is forgotten, at the bound, is of the session that was silent for longest.
Should it speak again, what it had sent before is not counted as lost. So it is for a session that a
ledger without an older one on the disk meets in the middle.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import OrderedDict
from pathlib import Path

import msgspec

from aurora_sglang_plugin.disk_faults import Retry
from aurora_sglang_plugin.link import wire

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
MAX_SESSIONS = 8192
# No server sends more, lost or not: a header that says so would have all later ones of its session
# taken for repetitions.
MOST_PER_S, MOST_AT_ONCE, MOST_EVER = 100_000, 1 << 16, 1 << 40
# A server's clock counts as this one's within so much: what is older than that waited on the way,
# perhaps.
CLOCK_S = 5.0


class Session(msgspec.Struct):
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
    # the last message was a heartbeat: the publisher's ledger is complete
    quiet: bool = False
    last_unix_s: float = 0.0
    # The part of sent_seq that a session had sent before this ledger knew it: it may have arrived,
    # and its counts are forgotten.
    before: int = 0
    # How far the server's clock is ahead of this machine's, 0 within CLOCK_S.
    ahead_s: float = 0.0


class _File(msgspec.Struct):
    # least recently heard first
    sessions: dict[str, Session] = {}
    # by cause, all sessions and unknown ones
    rejected: dict[str, int] = {}
    forgotten_sessions: int = 0


class Ledger:
    """Not thread-safe: its owner locks. `path` None: not kept."""

    def __init__(self, path: Path | None):
        self._path = Path(path) if path else None
        found = _load(self._path)
        # which sessions there were before is not known
        self._new = found is None
        file = found or _File()
        self.sessions: OrderedDict[str, Session] = OrderedDict(file.sessions)
        self.rejected = file.rejected
        self.forgotten_sessions = file.forgotten_sessions
        self._unwritten, self._written_at = False, 0.0
        self._retry = Retry("ledger")

    def accept(self, header: wire.Header) -> bool:
        """Count a message as received.

        False (and rejected) if it repeats or precedes one, cause `order`, or its counters cannot be
        those of its session, cause `values`.
        """
        if cause := self._enter(header):
            self.reject(cause, None)
            return False
        self.sessions[header.session].received += 1
        return True

    def reject(self, cause: str, header: wire.Header | None) -> bool:
        """Count a message that cannot be used, for its session as well if its header can be
        believed (not None).

        True if it is the next one of its session.
        """
        self.rejected[cause] = self.rejected.get(cause, 0) + 1
        self._unwritten = True
        if header is None or self._enter(header):
            return False
        self.sessions[header.session].rejected += 1
        return True

    def _enter(self, header: wire.Header) -> str | None:
        """Take a header in, or why not: a cause."""
        session, now_s, most = self.sessions.get(header.session), time.time(), MOST_EVER
        if session is not None:
            if header.sent_seq <= session.sent_seq:
                return "order"
            most = MOST_AT_ONCE + int(MOST_PER_S * max(0.0, now_s - session.last_unix_s))
        known = session or Session()
        if max(header.sent_seq - known.sent_seq, header.captured_seq - known.captured) > most:
            return "values"
        if session is None:
            before = header.sent_seq - 1 if self.forgotten_sessions or self._new else 0
            session = Session(header.target, sent_seq=before, before=before)
        self.sessions[header.session] = session
        self.sessions.move_to_end(header.session)
        if len(self.sessions) > MAX_SESSIONS:
            self.sessions.popitem(last=False)
            self.forgotten_sessions += 1
        session.lost += header.sent_seq - session.sent_seq - 1
        session.sent_seq, session.captured, session.heartbeats = (
            header.sent_seq,
            header.captured_seq,
            header.heartbeats,
        )
        session.dropped, session.queued = header.dropped, header.queued
        # an `end` does not say
        session.draft_version = header.draft_version or session.draft_version
        session.quiet, session.last_unix_s = header.kind == "heartbeat", now_s
        ahead_s = header.time_ns / 1e9 - session.last_unix_s
        # only a heartbeat is sent as soon as it is made
        if session.quiet or ahead_s > CLOCK_S:
            session.ahead_s = ahead_s if abs(ahead_s) > CLOCK_S else 0.0
        self._unwritten = True
        return None

    def balanced(self, name: str) -> bool | str:
        """True if both equations hold after a heartbeat, else what is not equal."""
        session = self.sessions.get(name)
        if session is None:
            return "unknown session"
        if not session.quiet:
            return "no heartbeat since the last message"
        sent, dropped = session.sent_seq - session.heartbeats, sum(session.dropped.values())
        if session.captured != sent + dropped + session.queued:
            return (
                f"captured {session.captured} is not sent {sent} + dropped {dropped} + queued"
                f" {session.queued}"
            )
        received, lost, rejected = session.received, session.lost, session.rejected
        if session.sent_seq - session.before != received + lost + rejected:
            return (
                f"sent {session.sent_seq} is not received {received} + lost {lost} + rejected"
                f" {rejected}"
            )
        return True

    def as_dict(self) -> dict:
        """JSON-able: {sessions: {session: {...}}, rejected: {cause: n}, forgotten_sessions: n}."""
        return msgspec.to_builtins(
            _File(dict(self.sessions), self.rejected, self.forgotten_sessions)
        )

    @property
    def write_faults(self) -> int:
        return self._retry.faults

    def due(self) -> bool:
        return self._unwritten and time.monotonic() - self._written_at >= WRITE_EVERY_S

    def write(self, at_once: bool = False) -> None:
        """Atomic against a kill, not against a power failure: a damaged ledger is replaced by a new
        one.
        """
        self._written_at, self._unwritten = time.monotonic(), False
        if self._path is not None and not self._retry.run(self._write, time.monotonic(), at_once):
            self._unwritten = True

    def _write(self) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(self.as_dict()))
            os.replace(temporary, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _load(path: Path | None) -> _File | None:
    if path is None or not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("the ledger is damaged, starting a new one path=%s error=%s", path, error)
        return None
