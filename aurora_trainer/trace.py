"""A trace: the raw wire messages of a run in one file, to look at, to replay and to resume on bit for bit.

    file     MAGIC, then records
    record   mark, part count, bytes of all parts, CRC-32 of these three (HEAD); each part's length (u64);
             the parts; CRC-32 of the lengths and the parts (TAIL). Little endian.

A record is written with one flush, so a killed writer leaves at most a torn last record, which the next writer cuts
off. Damage in the middle is reported by record and byte offset; reading can go on at the next mark.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

MAGIC = b"AURORA-TRACE-1\n\0"
MARK = b"\xa5\x5aMSG\xa5\x5a\n"
HEAD = struct.Struct("<8sIQI")
TAIL = struct.Struct("<I")
MAX_PARTS = 1024


class TraceError(ValueError):
    """A trace that is not whole: `record` counts from 0, `offset` is the byte where that record begins."""

    def __init__(self, path: Path, record: int, offset: int, detail: str):
        super().__init__(f"{path}: record {record} at byte {offset}: {detail}")
        self.record, self.offset = record, offset


class TraceWriter:
    """Appends messages to a trace, a new one or one that is there. One writer at a time.

    Raises TraceError where the file is not a trace.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        # It holds prompts: nobody else's to read. Closed by close().
        self._file = open(self.path, "ab+", opener=lambda path, flags: os.open(path, flags, 0o600))  # noqa: SIM115
        size = self._file.seek(0, 2)
        if size < len(MAGIC):
            self._file.truncate(0)
            self._file.write(MAGIC)
            self._file.flush()
        elif (end := _whole_end(self.path)) < size:
            log.warning("trace: torn last record cut off path=%s bytes=%d", self.path, size - end)
            self._file.truncate(end)

    def write(self, parts: Sequence[bytes | memoryview]) -> None:
        lens = struct.pack(f"<{len(parts)}Q", *map(len, parts))
        crc = zlib.crc32(lens)
        for part in parts:
            crc = zlib.crc32(part, crc)
        self._file.write(_head(len(parts), sum(map(len, parts))) + lens)
        for part in parts:
            self._file.write(part)
        self._file.write(TAIL.pack(crc))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_trace(path: Path, on_damage: Callable[[TraceError], None] | None = None) -> Iterator[list[bytes]]:
    """Each message's parts, in order. A torn last record ends the trace with a warning.

    Damage raises TraceError, or is handed to `on_damage` and skipped up to the next whole head.
    """
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise TraceError(path, 0, 0, f"not a trace, expected the file to begin with {MAGIC!r}")
        if path.stat().st_size == len(MAGIC):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            offset, record = len(MAGIC), 0
            while offset < len(data):
                try:
                    parts, end = _record(data, offset)
                except EOFError:
                    if _next_head(data, offset + 1) < 0:
                        log.warning("trace: torn last record path=%s record=%d offset=%d", path, record, offset)
                        return
                    parts, end = None, -1
                    error = TraceError(path, record, offset, "its length runs past the end of the file")
                except ValueError as damage:
                    parts, end = None, -1
                    error = TraceError(path, record, offset, str(damage))
                if parts is None:
                    if on_damage is None:
                        raise error
                    on_damage(error)
                    end = _next_head(data, offset + 1)
                    if end < 0:
                        return
                else:
                    yield parts
                offset, record = end, record + 1


def _record(data: mmap.mmap, offset: int) -> tuple[list[bytes], int]:
    """Parts and end of the record at `offset`. ValueError: damaged; EOFError: the file ends within it."""
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
    if mark != MARK or count > MAX_PARTS or data[offset : offset + HEAD.size] != _head(count, nbytes):
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
    """Where the last record that is whole in length ends; damage in the middle is left for readers to report."""
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
