"""Writing beside training: one at a time of a name, failures are the retry's, results are the
loop's.
"""

import gc
import threading
import time
import weakref

import pytest
import torch

from aurora_sglang_plugin.disk_faults import Retry
from aurora_trainer.background_writer import Background


def made(waits: bool = False):
    jobs = {"publish": Retry("publish"), "checkpoint": Retry("checkpoint")}
    return jobs, Background(jobs, waits)


def nothing(*_):
    pass


def test_the_loop_goes_on_while_a_job_is_written():
    _, background = made()
    go, done, threads = threading.Event(), [], []

    def write():
        threads.append(threading.current_thread())
        assert go.wait(10)
        return 7

    background.start("publish", lambda: write, done.append, nothing, 0.0)
    # the one before is still being written: no second snapshot is taken
    background.start("publish", lambda: pytest.fail("a snapshot"), nothing, nothing, 1.0)
    background.poll(1.0)
    assert background.busy("publish") and not done
    go.set()
    background.wait(2.0)
    assert done == [7] and not background.busy("publish")
    assert threads[0] is not threading.current_thread()
    background.close()


def test_what_fails_is_counted_and_due_again_with_a_new_snapshot():
    jobs, background = made()
    snapshots, failures = [], []

    def start(now_s: float, error: Exception | None):
        def write():
            if error:
                raise error

        def prepare():
            snapshots.append(now_s)
            return write

        background.start("publish", prepare, nothing, lambda: failures.append(now_s), now_s)
        background.wait(now_s)

    start(0.0, OSError("full"))
    # must wait
    start(0.5, None)
    assert snapshots == [0.0] and failures == [0.0] and jobs["publish"].faults == 1
    assert jobs["publish"].due(1.0) and jobs["checkpoint"].faults == 0
    start(1.0, None)
    assert snapshots == [0.0, 1.0] and not jobs["publish"].due(9.0)
    background.close()


def test_a_snapshot_that_raises_is_a_failure_and_none_is_nothing_to_do():
    jobs, background = made()
    failures = []

    def raises():
        raise RuntimeError("no memory")

    background.start("checkpoint", raises, nothing, lambda: failures.append(1), 0.0)
    assert jobs["checkpoint"].faults == 1 and failures == [1]
    background.start("checkpoint", lambda: None, pytest.fail, nothing, 5.0)
    assert not background.busy("checkpoint") and not jobs["checkpoint"].due(99.0)
    background.close()


def test_over_a_recording_a_job_ends_before_the_next_step():
    _, background = made(waits=True)
    done = []
    background.start("publish", lambda: lambda: time.sleep(0.05) or 3, done.append, nothing, 0.0)
    assert done == [3]
    background.close()


def test_what_failed_is_not_kept_in_memory():
    _, background = made()
    gc.disable()
    try:
        for number in range(3):
            snapshot = torch.zeros(1000)
            alive = weakref.ref(snapshot)

            def write(held=snapshot):
                raise OSError("full")

            def prepare(job=write):
                return job

            background.start("publish", prepare, nothing, nothing, 100.0 * number)
            background.wait(100.0 * number)
            del snapshot, write, prepare
            assert alive() is None
    finally:
        gc.enable()
    background.close()


def test_a_disk_that_does_not_answer_keeps_the_other_job_going(caplog, monkeypatch):
    monkeypatch.setattr("aurora_trainer.background_writer.SAY_AFTER_S", 0.05)
    monkeypatch.setattr("aurora_trainer.background_writer.MEANWHILE_S", 0.05)
    spoken: list[int] = []
    background = Background(made()[0], meanwhile=lambda: spoken.append(1))
    go, done = threading.Event(), []
    background.start("checkpoint", lambda: lambda: go.wait(10), done.append, nothing, 0.0)
    background.start("publish", lambda: lambda: 5, done.append, nothing, 0.0)
    for _ in range(200):
        background.poll(0.0)
        if done:
            break
        time.sleep(0.01)
    assert done == [5] and background.busy("checkpoint")
    threading.Timer(0.3, go.set).start()
    background.wait(0.0)
    assert "still being written: checkpoint" in caplog.text and done == [5, True]
    # other ranks would take silence for an end
    assert len(spoken) > 2
    background.close()
