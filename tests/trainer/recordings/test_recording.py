"""A recording: bounded, private, whole after a kill, and readable around any damage, which is
reported where it is.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from aurora_trainer.recordings.recording import (
    RETRY_S,
    RecordConfig,
    Recording,
    read_messages,
    read_recording,
    recording_files,
)
from aurora_trainer.recordings.trace import HEAD, MAGIC, TraceError

MESSAGES = [[f"header {n}".encode(), bytes([n]) * 300] for n in range(20)]
# so that 20 messages are 5 files
PER_FILE = 4
CONFIG = RecordConfig(file_bytes=1600, max_bytes=1 << 20)


def write(directory, messages=MESSAGES, config=CONFIG):
    recording = Recording(directory, config)
    for parts in messages:
        recording.write(parts)
    recording.close()
    return recording


def read(path, damage=None):
    return [record.parts for record in read_recording(path, damage)]


def test_files_rotate_are_private_and_read_in_order(tmp_path):
    directory = tmp_path / "deep" / "recording"
    recording = write(directory, MESSAGES[:11])
    assert recording.files == 3 and recording.counters["messages"] == 11
    # goes on in the last file
    recording = write(directory, MESSAGES[11:])
    files = recording_files(directory)
    assert [f.name for f in files] == [f"{n:06d}.trace" for n in range(5)] and recording.files == 5
    assert read(directory) == MESSAGES
    # a single file is a recording as well
    assert read(files[1]) == MESSAGES[PER_FILE : 2 * PER_FILE]
    assert all(
        f.stat().st_size <= CONFIG.file_bytes and f.stat().st_mode & 0o777 == 0o600 for f in files
    )
    assert directory.stat().st_mode & 0o777 == 0o700
    assert recording.nbytes == sum(f.stat().st_size for f in files)


def test_the_oldest_files_go_and_are_counted(tmp_path):
    recording = write(tmp_path / "r", config=RecordConfig(file_bytes=1600, max_bytes=4000))
    assert recording.counters["removed_files"] == 3 and recording.counters["messages"] == 20
    # no complaint: its own bound removed them
    assert read(tmp_path / "r") == MESSAGES[3 * PER_FILE :]
    assert sum(f.stat().st_size for f in recording_files(tmp_path / "r")) <= 4000
    large = write(
        tmp_path / "r",
        [[b"x" * 5000], [b"y" * 3000]],
        RecordConfig(file_bytes=1600, max_bytes=4000),
    )
    assert large.counters["full"] == 1 and read(tmp_path / "r")[-1] == [b"y" * 3000]
    # numbers are never used again
    assert recording_files(tmp_path / "r")[0].name == "000005.trace"


def test_or_it_stops_when_full(tmp_path):
    config = RecordConfig(file_bytes=1600, max_bytes=4000, when_full="stop")
    recording = write(tmp_path / "r", config=config)
    assert recording.counters["messages"] == 11 and recording.counters["full"] == 9
    assert read(tmp_path / "r") == MESSAGES[:11] and recording.nbytes <= 4000
    with pytest.raises(ValidationError, match="at most half"):
        RecordConfig(file_bytes=10, max_bytes=15)


def test_one_writer_at_a_time(tmp_path):
    first = Recording(tmp_path / "r", CONFIG)
    with pytest.raises(ValueError, match="another process"):
        Recording(tmp_path / "r", CONFIG)
    first.close()
    Recording(tmp_path / "r", CONFIG).close()


def test_what_a_killed_writer_wrote_is_whole(tmp_path):
    code = """
import sys
from aurora_trainer.recordings.recording import RecordConfig, Recording
recording = Recording(sys.argv[1], RecordConfig(file_bytes=1 << 20, max_bytes=1 << 30))
for n in range(10**9):
    recording.write([b"%d" % n, b"x" * (n * 7919 % 100_000)])
"""
    written = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")])
        deadline = time.monotonic() + 20
        while (
            time.monotonic() < deadline
            and len(list((tmp_path / "r").glob("*.trace"))) < written + 3
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = len(recording_files(tmp_path / "r"))
    runs = [int(parts[0]) for parts in read(tmp_path / "r")]
    starts = [at for at, n in enumerate(runs) if n == 0]
    assert len(starts) == 3
    for begin, end in zip(starts, [*starts[1:], len(runs)]):
        assert runs[begin:end] == list(range(end - begin)) and end - begin > 20


def test_a_full_disk_is_counted_and_leaves_whole_records(tmp_path):
    """RLIMIT_FSIZE refuses in the middle of a record, as a full disk does."""
    code = """
import resource, sys, time
from aurora_trainer.recordings.recording import RETRY_S, RecordConfig, Recording
recording = Recording(sys.argv[1], RecordConfig(file_bytes=1 << 20, max_bytes=1 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
for n in range(20):
    recording.write([b"%d" % n, b"x" * 900])
assert recording.counters["messages"] == 5 and recording.counters["disk"] == 15, recording.counters
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
time.sleep(RETRY_S)
recording.write([b"again"])
recording.close()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=True)
    assert [parts[0] for parts in read(tmp_path / "r")] == [b"0", b"1", b"2", b"3", b"4", b"again"]
    assert RETRY_S <= 2


def replaced(path):
    path.rename(path.with_name("away"))
    path.mkdir() if path.with_name("away").is_dir() else path.touch()


def directory_removed(directory):
    shutil.rmtree(directory)


def file_removed(directory):
    recording_files(directory)[-1].unlink()


@pytest.mark.parametrize(
    "remove",
    [
        directory_removed,
        file_removed,
        replaced,
        lambda directory: directory.rename(directory.with_name("away")),
        lambda directory: replaced(recording_files(directory)[-1]),
    ],
    ids=["directory", "file", "another directory", "directory renamed", "another file"],
)
def test_a_recording_that_is_removed_begins_anew(tmp_path, remove, monkeypatch, caplog):
    monkeypatch.setattr("aurora_trainer.recordings.recording.LOOK_S", 0.05)
    recording = Recording(tmp_path / "r", RecordConfig())
    for parts in MESSAGES[:5]:
        recording.write(parts)
    remove(tmp_path / "r")
    time.sleep(0.06)
    for parts in MESSAGES[5:10]:
        recording.write(parts)
    # what went into nothing since the last look, and neither more nor less of it
    assert 1 <= recording.counters["disk"] <= 5
    assert sum("removed while" in r.getMessage() for r in caplog.records) == 1
    # what was put in the file's place may be no trace
    assert read(tmp_path / "r", [].append)[-5:] == MESSAGES[5:10]
    assert recording.files == len(recording_files(tmp_path / "r"))
    assert recording.nbytes == sum(f.stat().st_size for f in recording_files(tmp_path / "r"))
    # its lock is of the directory that is there
    with pytest.raises(ValueError, match="another process"):
        Recording(tmp_path / "r", CONFIG)
    recording.close()


def test_a_directory_that_cannot_come_back_is_tried_again(tmp_path, monkeypatch):
    for name in ("LOOK_S", "RETRY_S"):
        monkeypatch.setattr(f"aurora_trainer.recordings.recording.{name}", 0.0)
    recording = Recording(tmp_path / "r", CONFIG)
    recording.write(MESSAGES[0])
    shutil.rmtree(tmp_path / "r")
    (tmp_path / "r").write_text("in the way")
    for parts in MESSAGES[1:3]:
        recording.write(parts)
    faults = recording.counters["disk"]
    # the one before, and the two that were refused
    assert faults == 3 and recording.counters["messages"] == 1
    (tmp_path / "r").unlink()
    recording.write(MESSAGES[3])
    assert recording.counters["messages"] == 2 and read(tmp_path / "r") == [MESSAGES[3]]
    recording.close()


def damaged(directory, damage):
    errors = []
    rest = read(directory, errors.append)
    with pytest.raises(TraceError):
        read(directory)
    return rest, [(error.record, error.offset) for error in errors], errors


def offset(index: int) -> int:
    """A record's place in its file."""
    return len(MAGIC) + sum(
        HEAD.size + 8 * 2 + sum(map(len, m)) + 4 for m in MESSAGES[PER_FILE : PER_FILE + index]
    )


@pytest.mark.parametrize(
    ("damage", "lost", "where"),
    [
        ("flip", {6}, (2, offset(2))),
        ("zero", {5, 6}, (1, offset(1))),
        ("truncate", {6, 7}, (2, offset(2))),
        ("magic", set(), (0, 0)),
        ("missing", {4, 5, 6, 7}, (0, 0)),
        ("garbage", {4, 5, 6, 7}, (0, 0)),
    ],
)
def test_damage_is_reported_by_file_and_position_and_the_rest_is_read(
    tmp_path, damage, lost, where
):
    write(tmp_path / "r")
    path = recording_files(tmp_path / "r")[1]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[offset(2) + 100] ^= 0x10
    elif damage == "zero":
        data[offset(1) + 5 : offset(3) - 5] = bytes(offset(3) - offset(1) - 10)
    elif damage == "truncate":
        del data[offset(2) + 100 :]
    elif damage == "magic":
        data[3] ^= 1
    elif damage == "garbage":
        data = bytearray(os.urandom(len(data)))
    path.unlink() if damage == "missing" else path.write_bytes(data)
    rest, positions, errors = damaged(tmp_path / "r", damage)
    assert rest == [m for n, m in enumerate(MESSAGES) if n not in lost]
    assert positions == [where] and str(path) in str(errors[0])


def test_a_record_that_is_no_message_is_damage(tmp_path):
    write(tmp_path / "r")
    errors = []
    assert list(read_messages(tmp_path / "r", errors.append)) == []
    assert len(errors) == 20 and "not a message" in str(errors[0])


def test_no_recording(tmp_path):
    with pytest.raises(ValueError, match="no \\*.trace files"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no recording"):
        read(tmp_path / "nowhere")
