"""The trace file: what was written is read, and damage is reported where it is."""

import pytest

from aurora_trainer.recordings.trace import MAGIC, TraceError, TraceWriter, read_trace

MESSAGES = [
    [b"header", b"", b"x" * 1000],
    [b"only"],
    [b"a", b"\xa5\x5aMSG\xa5\x5a\n" * 3],
    [b"last", b"part"],
]


def write(path, messages):
    writer = TraceWriter(path)
    offsets = []
    for parts in messages:
        offsets.append(path.stat().st_size)
        writer.write([memoryview(part) for part in parts])
    writer.close()
    return offsets


def read(*arguments):
    return [record.parts for record in read_trace(*arguments)]


def test_round_trip_and_append(tmp_path):
    path = tmp_path / "t.trace"
    write(path, MESSAGES)
    write(path, MESSAGES[:2])
    assert read(path) == MESSAGES + MESSAGES[:2]
    write(tmp_path / "empty", [])
    assert read(tmp_path / "empty") == []


@pytest.mark.parametrize("record", range(4))
def test_every_damaged_byte_is_reported_with_its_record(tmp_path, record):
    path = tmp_path / "t.trace"
    offsets = write(path, MESSAGES)
    whole, end = path.read_bytes(), [*offsets[1:], path.stat().st_size][record]
    for at in range(offsets[record], end, 1 if record else 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(TraceError) as error:
            list(read_trace(path))
        assert (error.value.record, error.value.offset) == (record, offsets[record])
        errors = []
        assert read(path, errors.append) == MESSAGES[:record] + MESSAGES[record + 1 :]
        assert (errors[0].record, errors[0].offset) == (record, offsets[record])


def test_a_torn_tail_ends_the_trace_and_the_next_writer_cuts_it_off(tmp_path):
    path = tmp_path / "t.trace"
    offsets = write(path, MESSAGES)
    whole = path.read_bytes()
    for size in range(offsets[-1] + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert read(path) == MESSAGES[:-1]
    write(path, [[b"more"]])
    assert read(path) == [*MESSAGES[:-1], [b"more"]]


def test_a_writer_keeps_what_follows_damage(tmp_path):
    path = tmp_path / "t.trace"
    offsets = write(path, MESSAGES)
    data = bytearray(path.read_bytes())
    data[offsets[1] + 3] ^= 1
    path.write_bytes(data)
    write(path, [[b"more"]])
    assert read(path, lambda error: None) == [MESSAGES[0], *MESSAGES[2:], [b"more"]]


@pytest.mark.parametrize("data", [b"", b"not a trace at all, but long enough", MAGIC[:-1]])
def test_not_a_trace(tmp_path, data):
    path = tmp_path / "t.trace"
    path.write_bytes(data)
    with pytest.raises(TraceError, match="not a trace"):
        list(read_trace(path))
    if len(data) > len(MAGIC):
        with pytest.raises(TraceError, match="not a trace"):
            TraceWriter(path)
        assert path.read_bytes() == data
