"""A recording: the wire's messages as they came, in a directory of trace files (`trace.py`).

    DIRECTORY/000000.trace, 000001.trace, ...    the next one begins where the last would outgrow
                                                 `file_bytes`

One writer at a time. It never raises for the disk: what it cannot write is counted, and it tries
again later. Wherever a recording is read, a single trace file does as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, model_validator

from aurora_sglang_plugin.config import Section
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.weights.atomic_files import lock
from aurora_trainer.recordings.trace import (
    MAGIC,
    Record,
    TraceError,
    TraceWriter,
    read_trace,
    record_bytes,
)

log = logging.getLogger(__name__)

SUFFIX = ".trace"
# after the disk refused a message
RETRY_S = 1.0
# between two looks at whether what is written to is still there
LOOK_S = 1.0
# that is read back; what is written passed link.max_message_bytes
MAX_MESSAGE_BYTES = 1 << 30
OnDamage = Callable[[TraceError], None]


class RecordConfig(Section):
    """The bounds of a recording, for `record --out DIR` and `run --record DIR` (see
    [recordings.md](recordings.md)).
    """

    # of one file; a larger message has a file of its own
    file_bytes: PositiveInt = 256 << 20
    # of all files
    max_bytes: PositiveInt = 16 << 30
    # `drop_oldest` removes the oldest whole file and counts it, `stop` records no more
    when_full: Literal["drop_oldest", "stop"] = "drop_oldest"

    @model_validator(mode="after")
    def _has_room_for_two(self) -> RecordConfig:
        if self.file_bytes * 2 > self.max_bytes:
            raise ValueError(
                f"file_bytes {self.file_bytes}: expected at most half of max_bytes {self.max_bytes}"
            )
        return self


class Recording:
    """The writing end: a new recording, or one that is there and goes on.

    `counters`: messages, bytes (of them, written), removed_files, and messages that were not
    written by cause: `full`, `disk`. Raises ValueError where another process writes it, OSError
    where there cannot be one.
    """

    def __init__(self, directory: Path, config: RecordConfig):
        self.directory, self.config = Path(directory), config
        self.counters: Counter[str] = Counter()
        # full, with when_full = "stop"
        self.stopped = False
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock(self._lock)
            # oldest first
            self._files = {path: path.stat().st_size for path in _files(self.directory)}
            self._next = 1 + max(map(_number, self._files), default=-1)
            self._writer: TraceWriter | None = self._open_last()
            # of all files
            self.nbytes = sum(self._files.values())
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"recording {self.directory} is being written by another process; expected one"
                " writer: end that process or choose another directory"
            ) from None
        except BaseException:
            os.close(self._lock)
            raise
        self._retry_at = 0.0
        # when to look again, and what was written since the last look
        self._look_at, self._unseen = 0.0, 0

    @property
    def files(self) -> int:
        return len(self._files)

    def write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Append a message, or count why not. For one thread."""
        if self.stopped:
            self.counters["full"] += 1
            return
        if self._retry_at and time.monotonic() < self._retry_at:
            self.counters["disk"] += 1
            return
        try:
            if time.monotonic() >= self._look_at:
                self._look()
            self._write(parts)
            self._unseen += 1
            self._retry_at = 0.0
        except OSError as error:
            if not self._retry_at:
                log.error(
                    "message not recorded, going on without directory=%s error=%s",
                    self.directory,
                    error,
                )
            self._retry_at = time.monotonic() + RETRY_S
            self.counters["disk"] += 1

    def close(self) -> None:
        """Sync the last file. Idempotent."""
        if self._lock < 0:
            return
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            log.error("recording not synced directory=%s error=%s", self.directory, error)
        os.close(self._lock)
        self._lock = -1

    def _look(self) -> None:
        """Begin anew where the directory or the file that is written to was removed or replaced.

        What was written since the last look counts as `disk`.
        """
        here = _same(self.directory, self._lock)
        if here and (self._writer is None or _same(self._writer.path, self._writer.fileno)):
            self._look_at, self._unseen = time.monotonic() + LOOK_S, 0
            return
        self.counters["disk"] += self._unseen
        writer, self._writer, self._unseen = self._writer, None, 0
        if writer is not None:
            log.error("recording removed while it was written path=%s", writer.path)
            writer.close()
        if not here:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
            try:
                lock(held)
            except OSError:
                os.close(held)
                raise
            os.close(self._lock)
            self._lock = held
        self._files = {path: path.stat().st_size for path in _files(self.directory)}
        # numbers are never used again
        self._next = max(self._next, 1 + max(map(_number, self._files), default=-1))
        self.nbytes = sum(self._files.values())

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        nbytes, limit = record_bytes(parts), self.config
        fits = self._writer is not None and self._writer.nbytes + nbytes <= limit.file_bytes
        more = nbytes + (0 if fits else len(MAGIC))
        if limit.when_full == "stop" and self.nbytes + more > limit.max_bytes:
            self.stopped = True
            log.warning(
                "recording full, stopped directory=%s bytes=%d", self.directory, self.nbytes
            )
        if self.stopped or more > limit.max_bytes:
            self.counters["full"] += 1
            return
        while self.nbytes + more > limit.max_bytes:
            self._remove_oldest()
        if not fits or self._writer is None:
            self._rotate()
        self._writer.write(parts)
        self._files[self._writer.path] += nbytes
        self.nbytes += nbytes
        self.counters["messages"] += 1
        self.counters["bytes"] += nbytes

    def _open_last(self) -> TraceWriter | None:
        if not self._files:
            return None
        last = list(self._files)[-1]
        try:
            writer = TraceWriter(last)
        except TraceError as error:
            # its beginning is damaged: it is left as it is, for readers to report
            log.error("recording goes on in a new file error=%s", error)
            return None
        self._files[last] = writer.nbytes
        return writer

    def _rotate(self) -> None:
        path = self.directory / f"{self._next:06d}{SUFFIX}"
        writer = TraceWriter(path)
        before, self._writer = self._writer, writer
        self._files[path] = writer.nbytes
        self.nbytes += writer.nbytes
        self._next += 1
        if before is not None:
            before.close()

    def _remove_oldest(self) -> None:
        oldest = next(iter(self._files))
        if self._writer is not None and self._writer.path == oldest:
            writer, self._writer = self._writer, None
            writer.close()
        with contextlib.suppress(FileNotFoundError):
            oldest.unlink()
        self.nbytes -= self._files.pop(oldest)
        self.counters["removed_files"] += 1


def recording_files(path: Path) -> list[Path]:
    """The files of a recording, oldest first, or the one trace that `path` is.

    Raises ValueError without any.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"no recording {path}; expected a directory of `aurora-trainer record`, or a file of it"
        )
    if not (files := _files(path)):
        raise ValueError(
            f"{path} holds no *{SUFFIX} files; expected a directory that `aurora-trainer record`"
            " wrote"
        )
    return files


def read_recording(path: Path, on_damage: OnDamage | None = None) -> Iterator[Record]:
    """Each whole record of all files, in order.

    A missing file between two others is damage as well.

    Damage raises TraceError, or is handed to `on_damage`, and the rest is still read. Files that
    are missing before the first one were removed by the recording's own bound.
    """

    def report(error: TraceError) -> None:
        if on_damage is None:
            raise error
        on_damage(error)

    files = recording_files(path)
    numbered = Path(path).is_dir()
    for at, file in enumerate(files):
        if numbered and at and (missing := _number(file) - _number(files[at - 1]) - 1):
            first = files[at - 1].with_name(f"{_number(files[at - 1]) + 1:06d}{SUFFIX}")
            report(TraceError(first, 0, 0, f"missing file, {missing} of them before {file.name}"))
        last = at == len(files) - 1
        if numbered and last and file.stat().st_size < len(MAGIC):
            # a writer was killed when it had just made it
            return
        try:
            yield from read_trace(file, on_damage, may_be_torn=last)
        except TraceError as error:
            report(error)
        except FileNotFoundError:
            report(TraceError(file, 0, 0, "removed while the recording was read"))


def read_messages(
    path: Path, on_damage: OnDamage | None = None
) -> Iterator[tuple[Record, wire.Message]]:
    """Each record and its message. One that is whole and yet no valid message counts as damage."""
    for record in read_recording(path, on_damage):
        try:
            message = wire.decode(record.parts, max_bytes=MAX_MESSAGE_BYTES)
        except wire.WireError as error:
            damage = TraceError(
                record.path, record.record, record.offset, f"not a message of this version: {error}"
            )
            if on_damage is None:
                raise damage from None
            on_damage(damage)
            continue
        yield record, message


class CorruptionLog:
    """An `on_damage` that logs each damage and keeps their texts, the first MAX of them."""

    MAX = 1000

    def __init__(self) -> None:
        self.count = 0
        self.texts: list[str] = []

    def __call__(self, error: TraceError) -> None:
        self.count += 1
        if len(self.texts) < self.MAX:
            self.texts.append(str(error))
            log.error("recording damaged, going on after it %s", error)


def _same(path: Path, fd: int) -> bool:
    """Whether the path leads to what is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _files(directory: Path) -> list[Path]:
    return sorted((p for p in directory.glob(f"*{SUFFIX}") if p.stem.isdigit()), key=_number)


def _number(path: Path) -> int:
    return int(path.stem)
