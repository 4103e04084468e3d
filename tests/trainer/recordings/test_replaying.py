"""Replay: the same weights to the bit, around damage, and into a live trainer; record writes what
can be replayed.
"""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from traffic import HIDDEN, STEP_NS, VOCAB, messages

from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link.keys import make_keys
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
from aurora_sglang_plugin.weights.manifest import current_version, sha256_file, target_fingerprint
from aurora_trainer.config import load_trainer_config
from aurora_trainer.daemon import Daemon
from aurora_trainer.recordings.recording import (
    RecordConfig,
    Recording,
    read_messages,
    recording_files,
)
from aurora_trainer.recordings.replay import on_one_clock, paced, push

REQUESTS = 24


def record(directory: Path, models: Path, **about) -> Path:
    writer = Recording(directory, RecordConfig(file_bytes=150_000, max_bytes=1 << 30))
    about = dict(vocab=VOCAB, features=3 * HIDDEN, requests=REQUESTS) | about
    for parts in messages(target=target_fingerprint(models / "target"), **about):
        writer.write(parts)
    writer.close()
    return directory


@pytest.fixture(scope="module")
def recording(models, tmp_path_factory):
    return record(tmp_path_factory.mktemp("recording") / "r", models)


def train(models, site: Path, recording: Path, **more):
    settings = {
        "weights.directory": site / "weights",
        "trainer.model.target": models / "target",
        "trainer.model.draft": models / "draft",
        "trainer.checkpoint.directory": site / "checkpoints",
        "trainer.pace.new_positions_per_step": 20,
        "trainer.pace.nice": 0,
        "trainer.batch.max_positions": 256,
        "trainer.publish.every_s": 100 * STEP_NS / 1e9,
        "trainer.gate.enabled": False,
    } | {k.replace("__", "."): v for k, v in more.items()}
    daemon = Daemon(load_trainer_config(None, [f"{k}={v}" for k, v in settings.items()]))
    daemon.run_recording(recording)
    return daemon


def hashes(site: Path) -> dict[str, str]:
    found = sorted((site / "weights").glob("v*/model.safetensors"))
    return {path.parent.name: sha256_file(path) for path in found}


def test_two_replays_publish_the_same_bits(models, recording, tmp_path):
    """Also when they publish by time: it is the recording's."""
    train(models, tmp_path / "a", recording)
    time.sleep(0.1)
    train(models, tmp_path / "b", recording, trainer__metrics__every_s=0.01)
    assert (
        hashes(tmp_path / "a") == hashes(tmp_path / "b")
        and current_version(tmp_path / "a" / "weights") >= 3
    )
    train(models, tmp_path / "c", recording, trainer__pace__seed=1)
    assert hashes(tmp_path / "a").keys() == hashes(tmp_path / "c").keys() and hashes(
        tmp_path / "a"
    ) != hashes(tmp_path / "c")


@pytest.mark.parametrize("damage", ["flip", "zero", "truncate", "missing"])
def test_what_is_damaged_is_passed_over_and_the_rest_is_trained_on(
    models, tmp_path, caplog, damage
):
    recording = record(tmp_path / "r", models)
    whole = len(list(read_messages(recording)))
    path = recording_files(recording)[1]
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if damage == "flip":
        data[middle] ^= 4
    elif damage == "zero":
        data[middle : middle + 20_000] = bytes(20_000)
    elif damage == "truncate":
        del data[middle:]
    path.unlink() if damage == "missing" else path.write_bytes(data)
    daemon = train(models, tmp_path, recording)
    assert daemon.damage.count == 1 and str(path) in daemon.damage.texts[0]
    assert "at byte" in caplog.text and daemon.status(None)["damaged_records"] == 1
    counters = daemon.training.assembler.counters
    assert (
        whole - 100 < counters["messages"] < whole
        and daemon.training.samples["assembled"] >= REQUESTS - 8
    )
    assert daemon.training.steps > 10 and current_version(tmp_path / "weights")


def test_a_recording_keeps_its_own_pace():
    class At:
        def __init__(self, time_ns):
            self.header = self
            self.time_ns = time_ns

    began, times = time.monotonic(), []
    for record, _ in paced(iter([(n, At(n * 10**8)) for n in (5, 6, 8)]), lambda: False):
        times.append((record, time.monotonic() - began))
    assert [n for n, _ in times] == [5, 6, 8]
    assert [t for _, t in times] == pytest.approx([0, 0.1, 0.3], abs=0.08)
    # stopping does not wait
    assert len(list(paced(iter([(0, At(0)), (1, At(10**15))]), lambda: True))) == 2


def told(*times_s):
    """(session, seconds) as messages; a heartbeat if the session's name is in capitals."""
    for session, time_s in times_s:
        kind = "heartbeat" if session.isupper() else "verify"
        yield (
            0,
            SimpleNamespace(
                header=SimpleNamespace(
                    session=session.lower(), time_ns=int(time_s * 1e9), kind=kind
                )
            ),
        )


def on_clock(*times_s):
    return [round(m.header.time_ns / 1e9, 3) for _, m in on_one_clock(told(*times_s))]


def test_a_recordings_clock_is_nobodys_wrong_one():
    right = [("a", 100.0), ("a", 100.5), ("b", 101.0), ("A", 102.0), ("b", 103.0)]
    assert on_clock(*right) == [t for _, t in right]
    ahead = [("a", 100), ("b", 3701), ("a", 102), ("b", 3703), ("a", 104)]
    assert on_clock(*ahead) == [100, 100, 102, 102, 104]
    assert on_clock(("a", 100), ("b", -3499 + 3600), ("a", 102), ("a", 2**63 / 1e9),
    ("b", 103)) == [
        100, 101, 102, 102, 103
    ]  # fmt: skip
    behind = [("a", 5000), ("B", 1400), ("a", 5001), ("b", 1401), ("B", 1402)]
    assert on_clock(*behind) == [5000, 5000, 5001, 5001, 5002]
    # only a heartbeat did not wait on the way
    set_back = [("a", 5000), ("a", 1400), ("A", 1401), ("a", 1403)]
    assert on_clock(*set_back) == [5000, 1400, 5000, 5002]


def test_a_wrong_clock_in_a_recording_changes_nobody_elses_training(models, recording, tmp_path):
    """A second server whose clock is an hour ahead: the first one's open requests are not taken for
    idle.
    """
    mixed, parts = tmp_path / "mixed", [r.parts for r, _ in read_messages(recording)]
    about = dict(target=target_fingerprint(models / "target"), vocab=VOCAB, features=3 * HIDDEN)
    other = list(messages(**about, requests=2, session="z"))
    writer = Recording(mixed, RecordConfig())
    for number, part in enumerate(parts):
        writer.write(part)
        if number < len(other):
            header = msgspec.msgpack.decode(other[number][0])
            header["time_ns"] += 3600 * 10**9
            writer.write([msgspec.msgpack.encode(header), *other[number][1:]])
    writer.close()
    daemon = train(models, tmp_path, mixed)
    assert (
        daemon.training.assembler.counters["samples_idle"] == 0
        and not daemon.training.buffer.dropped["stale"]
    )
    assert daemon.training.samples["assembled"] == REQUESTS + 2


def test_a_recording_is_sent_to_a_live_trainer_more_than_once(recording, tmp_path):
    make_keys(tmp_path / "keys", ["server"])
    link = LinkConfig(
        endpoint=f"ipc://{tmp_path}/link",
        trainer_keys=tmp_path / "keys/trainer",
        server_keys=tmp_path / "keys/server",
    )
    receiver = Receiver(link, ReceiveConfig(), None)
    sent = [m for _, m in read_messages(recording)]
    try:
        for _ in range(2):
            counts = push(recording, link)
            got = []
            while len(got) < len(sent) and (message := receiver.get(5.0)) is not None:
                got.append(message)
            assert counts["messages"] == len(sent) == len(got)
            assert [m.header.requests for m in got] == [m.header.requests for m in sent]
            assert all(
                (a.arrays[n] == b.arrays[n]).all() for a, b in zip(got, sent) for n in b.arrays
            )
            assert abs(got[-1].header.time_ns / 1e9 - time.time()) < 60
        ledger = receiver.ledger()
        assert len(ledger["sessions"]) == 2 and not ledger["rejected"]
        assert all(
            e["lost"] == 0 and e["received"] == len(sent) for e in ledger["sessions"].values()
        )
    finally:
        receiver.close()


def recorder(models, out: Path, link: LinkConfig, **how) -> subprocess.Popen:
    sets = [
        f"link.endpoint={link.endpoint}",
        f"trainer.model.target={models}/target",
        "trainer.model.draft=unused",
    ]
    sets += ["trainer.record.file_bytes=100000", "trainer.metrics.every_s=0.05"]
    command = [sys.executable, "-m", "aurora_trainer", "record", "--out", str(out)]
    command += [a for s in sets for a in ("--set", s)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)
    assert "recorder ready" in process.stderr.readline()
    return process


def test_record_writes_what_comes_and_goes_on_after_a_kill(models, recording, tmp_path):
    link = LinkConfig(endpoint=f"ipc://{tmp_path}/link")
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = recorder(models, tmp_path / "out", link)
        total = push(recording, link)["messages"]
        last = next(
            line
            for line in iter(process.stderr.readline, "")
            if f"recording messages={total} " in line
        )
        assert (
            "lost=0 dropped_by_servers=0 rejected=0 not_recorded_full=0 not_recorded_disk=0" in last
        )
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    got = [m for _, m in read_messages(tmp_path / "out")]
    sent = [m for _, m in read_messages(recording)]
    assert [m.header.requests for m in got] == [m.header.requests for m in sent] * 2
    assert len({m.header.session for m in got}) == 2 and len(recording_files(tmp_path / "out")) > 2
    assert all(f.stat().st_mode & 0o77 == 0 for f in recording_files(tmp_path / "out"))


def test_a_full_disk_stops_nothing_but_the_recording(models, recording, tmp_path):
    link = LinkConfig(endpoint=f"ipc://{tmp_path}/link")
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    process = recorder(models, tmp_path / "out", link, **full)
    total = push(recording, link)["messages"]
    for line in iter(process.stderr.readline, ""):
        counts = dict(re.findall(r"(\w+)=(\d+)", line)) if " recording messages=" in line else {}
        if int(counts.get("messages", 0)) + int(counts.get("not_recorded_disk", 0)) == total:
            break
    # all were received
    assert int(counts["not_recorded_disk"]) > 0 and counts["lost"] == "0" == counts["rejected"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
    # nothing is damaged
    assert len(list(read_messages(tmp_path / "out"))) == int(counts["messages"]) > 10
