"""A weights directory on a network file system: what stat says may be a minute old, its locks hold
no other machine, two machines' appends may hit each other, and it may be gone for a while.
"""

import errno
import fcntl
import importlib.util
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from published import FIELDS, read_current, tensors

from aurora_sglang_plugin.weights import atomic_files, manifest, reader, watcher
from aurora_sglang_plugin.weights.manifest import rejected_versions
from aurora_sglang_plugin.weights.reader import Expected
from aurora_sglang_plugin.weights.watcher import Watcher
from aurora_sglang_plugin.weights.writer import WeightsWriter

SHAPES = {"fc.weight": (4, 6), "norm.weight": (4,), "d2t": (5,)}
EXPECTED = Expected(FIELDS["target"], SHAPES, target_vocab=10, config={})
LOOPBACK = Path(__file__).parents[2] / "support" / "fuse_loopback.py"


def watch(directory: Path) -> tuple[Watcher, list[int]]:
    staged: list[int] = []
    found = Watcher(directory, 0.001, EXPECTED, lambda w: staged.append(w.manifest.version) or True)
    return found, staged


# ---- attributes and names from a cache


@contextmanager
def mounted(directory: Path, point: Path):
    """`directory` at `point`, with a cache of a minute of its own, as on another machine."""
    if importlib.util.find_spec("mfusepy") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no FUSE here: needs /dev/fuse, libfuse, and `pip install mfusepy`")
    point.mkdir()
    command = [sys.executable, LOOPBACK, directory, point]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not os.path.ismount(point):
            if process.poll() is not None:
                pytest.skip(f"no FUSE here: {process.stdout.read().strip()[-200:]}")
            time.sleep(0.02)
        yield point
    finally:
        if os.path.ismount(point):
            # though a watched file may be open
            subprocess.run(["umount", "--lazy", point], check=False)
        process.terminate()
        process.wait(10)


@contextmanager
def stale_stat(monkeypatch):
    """`os.stat` says for ever what it said of a name first; open and fstat are true, as on NFS."""
    true, cache = os.stat, {}

    def stat(path, **how):
        key = str(path)
        if key not in cache:
            cache[key] = true(path, **how)
        return cache[key]

    @contextmanager
    def other_machine():
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", stat)
            yield

    yield other_machine


@pytest.fixture(params=["simulated", "fuse"])
def other(request, tmp_path, monkeypatch):
    """(the directory as the trainer's machine sees it, as the server's does, a context for what
    happens on the server's).
    """
    (tmp_path / "disk").mkdir()
    if request.param == "simulated":
        with stale_stat(monkeypatch) as machine:
            yield tmp_path / "disk", tmp_path / "disk", machine
    else:
        with (
            mounted(tmp_path / "disk", tmp_path / "trainer") as trainer,
            mounted(tmp_path / "disk", tmp_path / "server") as server,
        ):
            yield trainer, server, nullcontext


def test_a_server_notices_by_opening_what_stat_does_not_know(other):
    here, there, on_server = other
    writing = WeightsWriter(here, keep=2)
    writing.publish(tensors(1.0), {}, **FIELDS)
    (here / "REJECTED").touch()
    found, staged = watch(there)
    for version in range(2, 6):
        with on_server():
            found.poll()
        writing.publish(tensors(float(version)), {}, **FIELDS | {"parent": version - 1})
        with on_server():
            found.poll()
            found.poll()
        assert staged == list(range(1, version + 1)) and not found.failures
    writing.close()


@pytest.mark.parametrize("other", ["simulated"], indirect=True)
def test_a_server_notices_a_rejection_of_another_machine(other):
    here, there, on_server = other
    writing = WeightsWriter(here)
    for version in (1, 2):
        writing.publish(tensors(float(version)), {}, **FIELDS | {"parent": version - 1})
    (here / "REJECTED").touch()
    found, staged = watch(there)
    with on_server():
        found.poll()
    elsewhere, _ = watch(here)
    elsewhere.reject(2, 1, write=True)
    elsewhere.poll()
    with on_server():
        found.poll()
    assert staged == [2, 1]
    writing.close()


def test_a_file_system_that_syncs_no_directory_is_published_to(tmp_path, monkeypatch):
    true = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "refused")
        true(descriptor)

    monkeypatch.setattr(atomic_files.os, "fsync", fsync)
    writing = WeightsWriter(tmp_path)
    number = errno.EINVAL
    assert writing.publish(tensors(1.0), {}, **FIELDS) == 1
    # a fault is a fault
    number = errno.EIO
    with pytest.raises(OSError):
        writing.publish(tensors(2.0), {}, **FIELDS)
    assert read_current(tmp_path) == (1, 1.0)


# ---- a file system that cannot be read now


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN])
@pytest.mark.parametrize("where", [watcher, manifest, reader], ids=lambda m: m.__name__)
def test_what_cannot_be_read_now_is_tried_again(tmp_path, monkeypatch, where, number):
    """A version is given up for what it is, never for what the file system does."""
    writing = WeightsWriter(tmp_path)
    found, staged = watch(tmp_path)
    writing.publish(tensors(1.0), {}, **FIELDS)
    found.poll()
    writing.publish(tensors(2.0), {}, **FIELDS)

    def refuse(path, *how, **more):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(where, "open", refuse, raising=False)
        for _ in range(3):
            found.poll()
    assert staged == [1] and found.failures == {"missing": 3} and found.seen_version == 1
    found.poll()
    found.poll()
    assert staged == [1, 2]


# ---- locks that hold nobody on another machine


@pytest.fixture(params=["of one machine", "none"])
def locks(request, monkeypatch):
    """A flock as on a file system that tells other machines nothing of it, or has none."""
    numbers = {"of one machine": None, "none": errno.ENOLCK}

    def flock(descriptor, how):
        if number := numbers[request.param]:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_trainer_that_began_last_writes(tmp_path, locks):
    """It was moved, and nobody knows whether the old one is gone."""
    old = WeightsWriter(tmp_path)
    old.publish(tensors(1.0), {}, **FIELDS)
    new = WeightsWriter(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"another trainer, process \d+ on .* began later"):
            old.publish(tensors(2.0), {}, **FIELDS)
    assert read_current(tmp_path) == (1, 1.0)
    assert new.publish(tensors(3.0), {}, **FIELDS) == 2
    assert read_current(tmp_path) == (2, 3.0)
    # also once the new one is gone, or is restarted
    new.close()
    with pytest.raises(ValueError, match="began later"):
        old.publish(tensors(2.0), {}, **FIELDS)
    # its operator wants it back
    assert WeightsWriter(tmp_path).publish(tensors(4.0), {}, **FIELDS) == 3


def test_a_lock_that_says_anything_is_another_ones(tmp_path, locks):
    writer = WeightsWriter(tmp_path)
    (tmp_path / "LOCK").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="began later"):
        writer.publish(tensors(1.0), {}, **FIELDS)
    writer.close()
    assert WeightsWriter(tmp_path).publish(tensors(1.0), {}, **FIELDS) == 1


def followed(directory: Path, moment: int) -> str | None:
    """A trainer publishes, and before its system call `moment` another begins and publishes. What
    came of it: "published" or an error's name; None if it was done by then.
    """
    new: list[WeightsWriter] = []
    steps = iter(range(100))

    def step(name):
        if next(steps) == moment:
            new.append(WeightsWriter(directory))
            new[0].publish(tensors(2.0), {}, **FIELDS)

    old = WeightsWriter(directory, step=step)
    try:
        old.publish(tensors(1.0), {}, **FIELDS)
        end = "published"
    except (OSError, ValueError) as error:
        end = type(error).__name__
        assert read_current(directory)[1] == 2.0 and len(list(directory.glob("v*"))) == 1
    old.close()
    if not new:
        return None
    assert new[0].publish(tensors(3.0), {}, **FIELDS) and read_current(directory)[1] == 3.0
    return end


def test_a_trainer_that_is_followed_while_it_publishes_takes_nothing_from_the_new_one(
    tmp_path, locks
):
    ends = []
    while end := followed(tmp_path / str(len(ends)), len(ends)):
        ends.append(end)
    # told in time, but for the last moments, of naming it CURRENT
    assert "ValueError" in ends and ends.count("published") <= 6 < len(ends) - 6


def test_a_fault_of_locking_is_a_fault(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError):
        WeightsWriter(tmp_path)


def test_what_cannot_be_removed_keeps_no_trainer_from_starting(tmp_path, monkeypatch):
    """On NFS a file that a reader of this machine has open stays, and its directory with it."""
    (tmp_path / "v000001.tmp-1-a").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(atomic_files.shutil, "rmtree", fail_to_remove)
        assert atomic_files.remove_temporaries(tmp_path) == []
        assert WeightsWriter(tmp_path).publish(tensors(1.0), {}, **FIELDS) == 1
    assert atomic_files.remove_temporaries(tmp_path) == ["v000001.tmp-1-a"]


def fail_to_remove(path, *how):
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))


# ---- two machines that append at once


def set_clock(monkeypatch) -> list[float]:
    """[now], of the watcher."""
    clock = [0.0]
    monkeypatch.setattr(watcher.time, "monotonic", lambda: clock[0])
    return clock


def test_a_rejection_that_another_machine_wrote_over_is_written_again(tmp_path, monkeypatch):
    clock = set_clock(monkeypatch)
    writing = WeightsWriter(tmp_path)
    for version in (1, 2, 3):
        writing.publish(tensors(float(version)), {}, **FIELDS | {"parent": version - 1})
    rejected = tmp_path / "REJECTED"
    found, staged = watch(tmp_path)
    found.poll()
    found.reject(3, 2, write=True)
    found.poll()
    assert rejected_versions(tmp_path) == {3}
    # appended where ours was
    other = json.dumps({"version": 9}) + "\n"
    rejected.write_text(other + rejected.read_text()[len(other) :])
    assert rejected_versions(tmp_path) == {9}
    for clock[0] in (0.1, 1.1, 1.2):
        found.poll()
        # whatever the file says
        assert found.seen_version == 2
    assert rejected_versions(tmp_path) == {9, 3}
    size = rejected.stat().st_size
    for clock[0] in (2.0, 20.0, 200.0):
        found.poll()
    assert rejected.stat().st_size == size and staged == [3]


def test_a_rejection_that_cannot_be_read_back_is_written_ever_less_often(tmp_path, monkeypatch):
    clock = set_clock(monkeypatch)
    found, _ = watch(tmp_path)
    monkeypatch.setattr(watcher, "rejected_versions", lambda directory: set())
    found.reject(3, 2, write=True)
    for clock[0] in range(0, 600, 2):
        found.poll()
    assert 8 <= len((tmp_path / "REJECTED").read_text().splitlines()) <= 16
