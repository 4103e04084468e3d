"""Two ranks learn what one does, go on from its checkpoint and it from theirs; one that dies ends
the other, and torchrun starts both again.

Real processes, gloo, no GPU. Rank 0 of the first tests is this process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import failing_rank
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from serve import free_port
from traffic import HIDDEN, VOCAB, write_trace
from trainer_process import Server, command, config, status_when, traffic

from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.checkpoint import steps
from aurora_trainer.daemon import Daemon, open_daemon
from aurora_trainer.learn import drift, learner
from aurora_trainer.ranks import APART, RanksConfig, join

TIMEOUT = dict(trainer__ranks__timeout_s=60)
# everything that is held by rows, both ways of updating, and walks before and after an update
ADAMW = TIMEOUT | dict(
    trainer__optimizer__average=0.9,
    trainer__optimizer__schedule="cosine",
    trainer__optimizer__cosine_updates=30,
    trainer__metrics__rescore_every_steps=4,
    trainer__publish__every_steps=5,
    trainer__drift__limit=20,
)
MUON = dict(trainer__optimizer__kind="muon", trainer__model__dtype="bfloat16") | TIMEOUT
# which rank 1 is dealt
REFUSED = "e-16"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trace(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace"
    about = dict(target=target_fingerprint(models / "target"), vocab=VOCAB, features=3 * HIDDEN)
    write_trace(path, requests=40, **about)
    return path


def run(daemon: Daemon, trace, until: int) -> tuple[list, dict[str, torch.Tensor]]:
    """Its steps, and the checkpoint of the last one."""
    taken, trained = [], daemon.metrics.trained
    daemon.metrics.trained = lambda step, *rest: taken.append(step) or trained(step, *rest)
    daemon.run_recording(trace, until)
    path = daemon.checkpoints / f"step-{until:08d}"
    state = json.loads((path / "state.json").read_text())
    return taken, load_file(path / "state.safetensors") | {"state": state}


@contextmanager
def two_ranks(models, site, trace, monkeypatch, fault=(), ends=0, **settings):
    """This process as rank 0 and another one as rank 1; what rank 0 does is up to the caller.
    `fault`: of rank 1, as failing_rank.py takes it; `ends`: its exit code."""
    run = command(models, site, "replay", str(trace), **settings)
    if fault:
        run = [run[0], failing_rank.__file__, *fault, *run[3:]]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with open(site / "rank1.log", "w") as said:
        follower = subprocess.Popen(
            run,
            env=os.environ | about | {"RANK": "1"} | ONE_THREAD,
            stderr=said,
        )
    for name, value in (about | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    try:
        daemon = open_daemon(config(models, site, **settings))
        assert daemon.training.ranks.size == 2
        yield daemon
        assert follower.wait(60) == ends
    finally:
        print((site / "rank1.log").read_text())
        dist.destroy_process_group()
        monkeypatch.undo()
        follower.kill()
        follower.wait()


def assert_alike(one, two, weights: float, loss: float):
    """The same batches, counts and steps; losses within a part of them, weights within a figure."""
    (steps_1, end_1), (steps_2, end_2) = one, two
    assert len(steps_1) == len(steps_2) > 0
    for number, (a, b) in enumerate(zip(steps_1, steps_2)):
        assert a.update.loss == pytest.approx(b.update.loss, rel=loss), number
        assert torch.equal(a.score.count, b.score.count) and a.positions == b.positions
        assert (a.before is None) == (b.before is None) and (a.after is None) == (b.after is None)
    for name in ("steps", "positions", "buffer", "samples", "cursor", "rows", "failed_steps"):
        assert end_1["state"][name] == end_2["state"][name], name
    apart = {n: float((t - end_2[n]).abs().max()) for n, t in end_1.items() if n != "state"}
    assert all(difference <= weights for difference in apart.values()), apart


@contextmanager
def failing_once(monkeypatch, call: int):
    """This process cannot pack its share, once."""
    pack, calls = learner.pack, []

    def failing(*given):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("as on a device that is full")
        return pack(*given)

    with monkeypatch.context() as patch:
        patch.setattr(learner, "pack", failing)
        yield
    assert len(calls) > call


@pytest.fixture
def drifting():
    """In this process every request is a little of an alarm, and the gate is asked about the mean
    alone."""
    finite = learner.Learner.finite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "SLACK", -3.0)
        patch.setattr(drift, "WARM", 4)
        patch.setattr(learner.Learner, "finite", lambda own, most: finite(own, most)[1:])
        yield


def test_two_ranks_learn_what_one_does_and_one_goes_on(
    models, trace, tmp_path, monkeypatch, drifting
):
    """Over an alarm, after which schedule and mean begin again, and a version of the mean."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with failing_once(monkeypatch, 5):
        one = run(Daemon(config(models, tmp_path / "one", **ADAMW)), trace, 18)
    with two_ranks(models, tmp_path / "two", trace, monkeypatch, **ADAMW) as daemon:
        # what one rank cannot train on, all of them try again in parts
        with failing_once(monkeypatch, 5):
            first, middle = run(daemon, trace, 12)
        assert middle["state"]["failed_steps"] == [5] and any(s.after for s in first)
        # it held half of the rows, and saved all of them
        own = daemon.training.learner.mean.weights["lm_head.weight"]
        assert 2 * len(own) == len(middle["average/lm_head.weight"]) == VOCAB
        began = middle["state"]["average_began"]
        assert 0 < began == middle["state"]["optimizer"]["began"] < 12
        assert middle["state"]["published_roles"]["mean"] > 0
    second, end = run(Daemon(config(models, tmp_path / "two", **ADAMW)), trace, 18)
    assert_alike(one, (first + second, end), weights=1e-5, loss=1e-5)
    for name in ("average_began", "optimizer", "published_roles", "published"):
        assert one[1]["state"][name] == end["state"][name], name
    versions = [
        sorted((tmp_path / name / "weights").glob("*/*.safetensors")) for name in ("one", "two")
    ]
    assert len(versions[0]) == len(versions[1]) > 0
    for pair in zip(*versions):
        a, b = map(load_file, pair)
        assert all(float((t - b[n]).abs().max()) <= 1e-5 for n, t in a.items())


def test_two_ranks_go_on_from_ones_checkpoint(models, trace, tmp_path, monkeypatch):
    """Over a sample that cannot be trained on, which rank 1 was dealt: it costs itself."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(learner, "pack", failing_rank.without(REFUSED))
    one = run(Daemon(config(models, tmp_path / "one", **MUON)), trace, 17)
    first, _ = run(Daemon(config(models, tmp_path / "two", **MUON)), trace, 7)
    site = tmp_path / "two"
    with two_ranks(models, site, trace, monkeypatch, ("sample", REFUSED), **MUON) as daemon:
        # it lets the other one know that it is there, however little there is to do
        monkeypatch.setattr(daemon.training.ranks, "_speaks_s", 0.02)
        second, end = run(daemon, trace, 17)
    said = (site / "rank1.log").read_text()
    assert said.count("rank 1 cannot train on its share") > 1 and "Traceback" not in said
    assert end["state"]["buffer"]["dropped"]["failed"] == 1
    # the last bit of bfloat16 at 1.0
    assert_alike(one, (first + second, end), weights=1 / 128, loss=1e-3)


def test_an_update_that_raises_at_one_rank_ends_both(models, trace, tmp_path, monkeypatch):
    """They are apart then: torchrun starts them again, from the last checkpoint."""
    settings = TIMEOUT | dict(trainer__checkpoint__every_steps=2)
    fault = ("update", "4")
    with two_ranks(models, tmp_path, trace, monkeypatch, fault, APART, **settings) as daemon:
        with pytest.raises(SystemExit) as ended:
            run(daemon, trace, 9)
    assert ended.value.code == APART
    # before that update
    assert daemon.training.steps == 4 and steps(tmp_path / "checkpoints") == [2]
    assert "failed where all take part" in (tmp_path / "rank1.log").read_text()


def test_a_silent_rank_ends_the_other(tmp_path, monkeypatch, caplog):
    script = (
        "import os, time; from aurora_trainer.ranks import RanksConfig, join;"
        "open('ready', 'w').close(); join(RanksConfig(timeout_s=30), 'cpu'); time.sleep(60)"
    )
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    silent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | about | {"RANK": "1"}
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for name, value in (about | {"RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        ranks, began = join(RanksConfig(timeout_s=3), "cpu"), time.monotonic()
        with pytest.raises(SystemExit) as ended:
            ranks.sum_(torch.zeros(1))
        assert ended.value.code == APART and time.monotonic() - began < 20
        assert "another one is gone or silent" in caplog.text
    finally:
        dist.destroy_process_group()
        silent.kill()
        silent.wait()


def test_a_rank_that_dies_ends_the_job_and_torchrun_starts_it_again(models, tmp_path):
    """From the checkpoint, with the same endpoint; SIGTERM ends it with one of its last step."""
    run = command(models, tmp_path, "run", **TIMEOUT)
    torchrun = [*run[:2], "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    server = Server(tmp_path)
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [*torchrun, "--max-restarts", "1", "--monitor-interval", "0.1", *run[1:]],
            env=os.environ | ONE_THREAD,
            stderr=log,
        )
    try:
        server.send(traffic(models, 14, "first"))
        status = status_when(tmp_path, lambda s: steps(tmp_path / "checkpoints"))
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        (other,) = [int(pid) for pid in children if int(pid) != status["pid"]]
        os.kill(other, signal.SIGKILL)
        saved = steps(tmp_path / "checkpoints")[-1]
        status_when(tmp_path, lambda s: s["pid"] != status["pid"])
        server.send(traffic(models, 14, "second"))
        again = status_when(tmp_path, lambda s: s["steps"] > saved + 2)
        job.send_signal(signal.SIGTERM)
        # torchrun's own, for a signal
        assert job.wait(90) not in (0, -signal.SIGKILL)
    finally:
        print(
            "\n".join(s for s in (tmp_path / "log").read_text().splitlines() if "buffer" not in s)
        )
        job.kill()
        job.wait()
        server.socket.close()
    said = (tmp_path / "log").read_text()
    assert "rank 0 of 2 ends, another one is gone or silent" in said
    last = json.loads((tmp_path / "status.json").read_text())["steps"]
    assert f"resumed step={saved}" in said and again["steps"] <= last
    assert steps(tmp_path / "checkpoints")[-1] == last
    # what all do, one of them says
    assert said.count("trainer ready") == 2 and said.count("trainer ended") == 1
