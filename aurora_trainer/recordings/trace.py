"""A trace: raw wire messages in one file, to look at, to replay and to resume on bit for bit.

    file     MAGIC, then records
    record   mark, part count, bytes of all parts, CRC-32 of these three (HEAD); each part's length
             (u64); the parts; CRC-32 of the lengths and the parts (TAIL). Little endian.

A killed writer leaves at most a torn last record, which the next writer cuts off. Damage in the
middle is reported by record and byte offset; reading can go on at the next mark. `recording.py` has
many such files in a directory.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

MAGIC = b"AURORA-TRACE-1\n\0"
MARK = b"\xa5\x5aMSG\xa5\x5a\n"
HEAD = struct.Struct("<8sIQI")
TAIL = struct.Struct("<I")
# of a record, below what one system call takes
MAX_PARTS = 1000


class TraceError(ValueError):
    """A trace that is not whole: `record` counts from 0, `offset` is the byte where that record
    begins.
    """

    def __init__(self, path: Path, record: int, offset: int, detail: str):
        super().__init__(f"{path}: record {record} at byte {offset}: {detail}")
        self.record, self.offset = record, offset


class Record(NamedTuple):
    """A whole record and where it is: `record` counts from 0 in its file, a damaged stretch counts
    as one.
    """

    path: Path
    record: int
    offset: int
    parts: list[bytes]


class TraceWriter:
    """Appends messages to a trace, a new one or one that is there. One writer at a time.

    Raises TraceError where the file is not a trace, OSError where it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        # It holds prompts: nobody else's to read. Not buffered, so that a failed write leaves
        # nothing behind.
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(self._fd).st_size
            if size < len(MAGIC):
                os.ftruncate(self._fd, 0)
                _write_all(self._fd, [MAGIC])
                self.nbytes = len(MAGIC)
            else:
                self.nbytes = _whole_end(self.path)
                if self.nbytes < size:
                    log.warning(
                        "trace: torn last record cut off path=%s bytes=%d",
                        self.path,
                        size - self.nbytes,
                    )
                    os.ftruncate(self._fd, self.nbytes)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def fileno(self) -> int:
        return self._fd

    def write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Append one record.

        Raises OSError, and leaves the trace as it was: on a full disk, for example.
        """
        lens = struct.pack(f"<{len(parts)}Q", *map(len, parts))
        crc = zlib.crc32(lens)
        for part in parts:
            crc = zlib.crc32(part, crc)
        try:
            _write_all(
                self._fd, [_head(len(parts), sum(map(len, parts))) + lens, *parts, TAIL.pack(crc)]
            )
        except OSError:
            os.ftruncate(self._fd, self.nbytes)
            raise
        self.nbytes += record_bytes(parts)

    def close(self) -> None:
        """Sync and close: a finished file is worth the wait. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def record_bytes(parts: Sequence[bytes | memoryview]) -> int:
    """What a message takes in a file."""
    return HEAD.size + 8 * len(parts) + sum(map(len, parts)) + TAIL.size


def read_trace(
    path: Path, on_damage: Callable[[TraceError], None] | None = None, *, may_be_torn: bool = True
) -> Iterator[Record]:
    """Each whole record, in order.

    A torn last record ends the trace with a warning, or is damage too.

    Damage raises TraceError, or is handed to `on_damage` and skipped up to the next whole head. A
    file without a single head is no trace and raises.
    """
    path = Path(path)
    with open(path, "rb") as file:
        begins = file.read(len(MAGIC))
        not_a_trace = TraceError(
            path, 0, 0, f"not a trace, expected the file to begin with {MAGIC!r}"
        )
        if len(begins) < len(MAGIC) or (begins != MAGIC and on_damage is None):
            raise not_a_trace
        if path.stat().st_size == len(MAGIC) and begins == MAGIC:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            offset, record = len(MAGIC), 0
            if begins != MAGIC:
                offset = _next_head(data, 0)
                if offset < 0:
                    raise not_a_trace
                on_damage(not_a_trace)
            while offset < len(data):
                try:
                    parts, end = _record(data, offset)
                except (EOFError, ValueError) as error:
                    torn = isinstance(error, EOFError)
                    end = _next_head(data, offset + 1)
                    if torn and end < 0 and may_be_torn:
                        log.warning(
                            "trace: torn last record path=%s record=%d offset=%d",
                            path,
                            record,
                            offset,
                        )
                        return
                    damage = TraceError(
                        path, record, offset, "the file ends within it" if torn else str(error)
                    )
                    if on_damage is None:
                        raise damage from None
                    on_damage(damage)
                    if end < 0:
                        return
                else:
                    yield Record(path, record, offset, parts)
                offset, record = end, record + 1


def _write_all(fd: int, pieces: Sequence[bytes | memoryview]) -> None:
    written = os.writev(fd, pieces)
    # a nearly full disk takes what fits, and refuses the rest
    if written < sum(map(len, pieces)):
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            rest = rest[os.write(fd, rest) :]


def _record(data: mmap.mmap, offset: int) -> tuple[list[bytes], int]:
    """Parts and end of the record at `offset`.

    ValueError: damaged; EOFError: the file ends within it.
    """
    count, nbytes = _read_head(data, offset)
    begin = offset + HEAD.size
    body = begin + 8 * count
    end = body + nbytes + TAIL.size
    if end > len(data):
        raise EOFError
    crc = zlib.crc32(memoryview(data)[begin : body + nbytes])
    if crc != TAIL.unpack_from(data, body + nbytes)[0]:
        raise ValueError("checksum of the parts does not match")
    lens = struct.unpack_from(f"<{count}Q", data, begin)
    if sum(lens) != nbytes:
        raise ValueError("lengths of the parts do not add up")
    parts = []
    for length in lens:
        parts.append(data[body : body + length])
        body += length
    return parts, end


def _head(count: int, nbytes: int) -> bytes:
    crc = zlib.crc32(HEAD.pack(MARK, count, nbytes, 0))
    return HEAD.pack(MARK, count, nbytes, crc)


def _read_head(data: mmap.mmap, offset: int) -> tuple[int, int]:
    if offset + HEAD.size > len(data):
        raise EOFError
    mark, count, nbytes, _ = HEAD.unpack_from(data, offset)
    if (
        mark != MARK
        or count > MAX_PARTS
        or data[offset : offset + HEAD.size] != _head(count, nbytes)
    ):
        raise ValueError("no head of a record here")
    return count, nbytes


def _next_head(data: mmap.mmap, offset: int) -> int:
    """Offset of the next head that checks, -1 where there is none."""
    while (offset := data.find(MARK, offset)) >= 0:
        try:
            _read_head(data, offset)
            return offset
        except ValueError:
            offset += 1
        except EOFError:
            return -1
    return -1


def _whole_end(path: Path) -> int:
    """Where the last record that is whole in length ends; damage in the middle is left for readers
    to report.
    """
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise TraceError(path, 0, 0, f"not a trace, expected the file to begin with {MAGIC!r}")
        size = file.seek(0, 2)
        if size == len(MAGIC):
            return size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            offset = len(MAGIC)
            while offset < size:
                try:
                    count, nbytes = _read_head(data, offset)
                except EOFError:
                    return offset
                except ValueError:
                    offset = _next_head(data, offset + 1)
                    if offset < 0:
                        return size
                    continue
                end = offset + HEAD.size + 8 * count + nbytes + TAIL.size
                if end > size:
                    return offset
                offset = end
    return size
