"""Faults of disk and device: they end nothing, are counted, leave nothing half-written, and what
failed comes later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from published import FIELDS, read_current, tensors
from test_checkpoint import assert_content, content
from traffic import HIDDEN, VOCAB, write_trace
from trainer_process import command, config, live, status_when, traffic

from aurora_sglang_plugin.disk_faults import Retry
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.weights.manifest import read_manifest, target_fingerprint
from aurora_sglang_plugin.weights.writer import WeightsWriter, versions
from aurora_trainer.checkpoint import load_newest, save_checkpoint, steps
from aurora_trainer.daemon import Daemon
from aurora_trainer.learn import learner


def temporaries(directory: Path) -> list[str]:
    return [p.name for p in directory.rglob("*.tmp*")]


def at_step(number: int, error: int):
    """A `step` that fails before the system call of that number."""
    count = iter(range(1000))

    def step(name: str) -> None:
        if next(count) == number:
            raise OSError(error, os.strerror(error), name)

    return step


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_version_that_fails_at_any_step_leaves_old_or_new(tmp_path, error):
    for number in range(1000):
        directory = tmp_path / str(number)
        writer = WeightsWriter(directory, keep=2)
        for fill in (1, 2):
            writer.publish(tensors(fill), {}, **FIELDS)
        writer.step, failed = at_step(number, error), False
        try:
            writer.publish(tensors(3), {}, **FIELDS)
        except OSError:
            failed = True
        assert read_current(directory) in [(2, 2.0), (3, 3.0)] and not (
            failed and temporaries(directory)
        )
        for version in versions(directory):
            read_manifest(directory / f"v{version:06d}")
        assert versions(directory)[-1] == read_current(directory)[0], (
            "a version that nobody was given"
        )
        writer.step = lambda name: None
        # the same weights, though the first time failed
        again = writer.publish(tensors(3), {}, **FIELDS)
        assert (again is not None) == failed and read_current(directory)[1] == 3.0
        assert writer.publish(tensors(4), {}, **FIELDS) > 3
        assert len(versions(directory)) == 2 and not temporaries(directory)
        writer.close()
        if number > 25:
            break


def test_a_checkpoint_that_fails_at_any_step_leaves_the_one_before(tmp_path):
    for number in range(25):
        directory = tmp_path / str(number)
        directory.mkdir()
        for step in (1, 2):
            save_checkpoint(directory, step, *content(step), keep=2)
        with contextlib.suppress(OSError):
            save_checkpoint(
                directory, 3, *content(3), keep=2, on_step=at_step(number, errno.ENOSPC)
            )
        newest = load_newest(directory)
        assert_content(newest, newest.step)
        save_checkpoint(directory, 3, *content(3), keep=2)
        assert steps(directory) == [2, 3] and not temporaries(directory)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB that can be filled and made read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_and_a_read_only_disk(small_disk):
    writer = WeightsWriter(small_disk / "weights")
    writer.publish(tensors(1), {}, **FIELDS)
    (small_disk / "rest").write_bytes(
        bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize)
    )
    with pytest.raises(OSError, match="No space left"):
        writer.publish(tensors(2), {}, **FIELDS)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small_disk, 1, *content(1), keep=2)
    assert not temporaries(small_disk) and read_current(small_disk / "weights") == (1, 1.0)
    (small_disk / "rest").unlink()
    subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        writer.publish(tensors(2), {}, **FIELDS)
    subprocess.run(["umount", small_disk], check=True)
    assert writer.publish(tensors(2), {}, **FIELDS) == 2 and read_current(
        small_disk / "weights"
    ) == (2, 2.0)


def test_a_directory_that_came_back_as_another_writers_is_left_to_it(tmp_path):
    writer = WeightsWriter(tmp_path / "weights")
    writer.publish(tensors(1), {}, **FIELDS)
    (tmp_path / "weights").rename(tmp_path / "away")
    with pytest.raises(OSError):
        writer.publish(tensors(2), {}, **FIELDS)
    other = WeightsWriter(tmp_path / "weights")
    with pytest.raises(ValueError, match="written by another trainer"):
        writer.publish(tensors(2), {}, **FIELDS)
    other.close()
    # the other one ended; what it left may have gone on: a start decides, not the next publication
    with pytest.raises(ValueError, match="start it again"):
        writer.publish(tensors(2), {}, **FIELDS)
    writer.close()
    again = WeightsWriter(tmp_path / "weights")
    assert again.publish(tensors(2), {}, **FIELDS) == 1
    again.close()


def limit(process: subprocess.Popen, nbytes: int) -> None:
    """No file of the process may grow beyond: as a full disk refuses it."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def test_the_loop_survives_the_disk(models, tmp_path):
    """A real trainer: its directories go away, come back, fill up; it goes on, and catches up each
    time.
    """
    weights, checkpoints = tmp_path / "weights", tmp_path / "checkpoints"
    settings = dict(
        trainer__gate__enabled="false",
        trainer__publish__every_steps=3,
        trainer__metrics__every_s=0.1,
    )
    with live(models, tmp_path, **settings) as (process, server):
        sessions = iter(range(100))

        def when(condition) -> dict:
            """The status, while traffic goes on."""
            for _ in range(60):
                server.send(traffic(models, 3, f"t{next(sessions)}"))
                try:
                    return status_when(tmp_path, condition, 1.0)
                except AssertionError:
                    assert process.poll() is None, process.stderr.read()
            raise AssertionError("not within a minute")

        when(lambda s: s["draft_version"] >= 1 and steps(checkpoints))
        for directory, job in ((weights, "publish"), (checkpoints, "checkpoint")):
            directory.rename(tmp_path / "away")
            before = when(lambda s, job=job: s["faults"][job] >= 1)
            directory.write_text("not a directory")
            when(lambda s, before=before, job=job: s["faults"][job] > before["faults"][job])
            directory.unlink()
            (tmp_path / "away").rename(directory)
            when(lambda s, before=before: s["draft_version"] > before["draft_version"])

        before = when(lambda s: True)
        limit(process, 30_000)
        when(
            lambda s: all(
                s["faults"][job] > before["faults"][job] for job in ("publish", "checkpoint")
            )
        )
        assert not temporaries(weights) and not [
            n for n in temporaries(checkpoints) if "ledger" not in n
        ]
        newest = steps(checkpoints)[-1]
        limit(process, resource.RLIM_INFINITY)
        after = when(
            lambda s: (
                s["draft_version"] > before["draft_version"] and steps(checkpoints)[-1] > newest
            )
        )
        assert after["published"]["failed"] >= 2 and after["steps"] > before["steps"]

        (weights / "REJECTED").mkdir()
        when(lambda s: s["faults"]["rejected"] >= 1)
        (weights / "REJECTED").rmdir()
        (weights / "REJECTED").write_text(json.dumps({"version": after["draft_version"]}) + "\n")
        when(
            lambda s: (
                s["published"].get("rolled_back") or s["draft_version"] > after["draft_version"]
            )
        )
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
    assert (
        2 <= log.count("publish failed") <= 6
        and "publish works again" in log
        and "Traceback" not in log
    )


def test_a_last_checkpoint_that_is_not_written_is_an_error(models, tmp_path):
    """Over a recording and live: what was learnt is lost, and both log and exit code say so."""
    about = dict(target=target_fingerprint(models / "target"), vocab=VOCAB, features=3 * HIDDEN)
    write_trace(tmp_path / "trace", requests=6, **about)
    directory = tmp_path / "checkpoints"
    refused = ["prlimit", "--fsize=20000:", *command(models, tmp_path, "replay")]
    ended = subprocess.run(
        [*refused, str(tmp_path / "trace"), "--steps", "3"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "no checkpoint of the last" in line]
    assert errors and all("step, 3, in" in e and str(directory) in e for e in errors)
    # what the disk takes ends well
    subprocess.run(
        [*command(models, tmp_path, "replay"), str(tmp_path / "trace"), "--steps", "3"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert steps(directory) == [3]

    with live(models, tmp_path, trainer__checkpoint__every_steps=0) as (process, server):
        server.send(traffic(models, 3, "t"))
        status_when(tmp_path, lambda s: s["steps"] > 3)
        limit(process, 20_000)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in log, log
    assert "no checkpoint of the last step, " in log and str(directory) in log


def test_one_sample_that_cannot_be_trained_on_costs_itself(models, tmp_path, caplog):
    """One makes every step raise that it is part of, another one's loss is not finite."""
    daemon = Daemon(
        config(
            models, tmp_path, trainer__pace__new_positions_per_step=10, trainer__buffer__max_uses=3
        )
    )
    training = daemon.training
    for parts in traffic(models, 24, "e"):
        training.feed(wire.decode(parts, max_bytes=1 << 20), 0.0)
    samples = [entry.sample for entry in training.buffer._entries.values()]
    raises, infinite = samples[-3], samples[7]
    raises.topk_ids = raises.topk_ids + 10**6
    infinite.features = infinite.features * torch.nan
    while training.due():
        daemon._step(time.time(), replay=False)
    status = daemon.status(None)
    assert status["buffer_dropped"] == {"failed": 2, "used_up": status["buffer_dropped"]["used_up"]}
    assert (
        status["buffer_dropped"]["used_up"] >= 12
        and status["faults"]["step"] >= 2
        and training.updates > 10
    )
    assert all(bool(p.isfinite().all()) for p in training.draft.parameters())
    assert (
        1
        <= sum("step failed" in r.getMessage() for r in caplog.records)
        <= status["faults"]["step"]
    )


def test_what_raises_after_the_update_does_not_undo_it(models, tmp_path, monkeypatch):
    """The batch is learnt, counted so, and not tried again in parts."""
    site = config(
        models, tmp_path, trainer__metrics__rescore_every_steps=1, trainer__optimizer__average=0.9
    )
    daemon = Daemon(site)
    training = daemon.training
    for parts in traffic(models, 12, "e"):
        training.feed(wire.decode(parts, max_bytes=1 << 20), 0.0)
    exact, steps_taken = learner.losses, []
    trained = daemon.metrics.trained
    daemon.metrics.trained = lambda step, *rest: steps_taken.append(step) or trained(step, *rest)

    def losses(*given):
        if not torch.is_grad_enabled():
            raise MemoryError("as on a device that is full")
        return exact(*given)

    def full(*given):
        raise MemoryError("as on a device that is full")

    # before it: it is tried again, and what was never trained on is still unseen
    with monkeypatch.context() as patch:
        patch.setattr(learner, "pack", full)
        daemon._step(time.time(), replay=False)
    assert training.updates == 0 and len(training._failed_steps) == 1
    daemon._step(time.time(), replay=False)
    assert training.updates == 1 and steps_taken[-1].before is not None
    # the walk after the update
    with monkeypatch.context() as patch:
        patch.setattr(learner, "losses", losses)
        daemon._step(time.time(), replay=False)
    step = steps_taken[-1]
    assert step.after is None and step.before is not None and step.update.applied
    assert training.updates == 2 and training.positions == sum(s.positions for s in steps_taken)
    # the update itself, in the middle
    with monkeypatch.context() as patch:
        patch.setattr(training.mean, "update", full)
        daemon._step(time.time(), replay=False)
    assert training.updates == 3 and daemon.status(None)["faults"]["step"] == 2
    assert not training.buffer._again and len(training._failed_steps) == 1
    training.close()


def test_retry_waits_longer_each_time_and_logs_an_episode_once(caplog):
    caplog.set_level("INFO")
    job, done = Retry("job"), []

    def fails():
        raise OSError(errno.EROFS, "Read-only file system")

    tried = [now for now in range(300) if not job.waits(now) and not job.run(fails, now)]
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243] and job.faults == 10
    assert (
        not job.run(lambda: done.append(1), 300)
        and job.due(303)
        and job.run(lambda: done.append(1), 303)
    )
    assert not job.due(1e9) and done == [1]
    assert [r.getMessage().split(" error")[0] for r in caplog.records] == [
        "job failed, going on and trying again (counted, logged once)", "job works again faults=10",
    ]  # fmt: skip
