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
from aurora_trainer.ranks import APART

TIMEOUT = dict(trainer__ranks__timeout_s=60)
# everything that is held by rows, both ways of updating, and walks before and after an update
ADAMW = dict(trainer__optimizer__average=0.9, trainer__metrics__rescore_every_steps=4) | TIMEOUT
MUON = dict(trainer__optimizer__kind="muon", trainer__model__dtype="bfloat16") | TIMEOUT
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
def two_ranks(models, site, trace, monkeypatch, **settings):
    """This process as rank 0 and another one as rank 1; what rank 0 does is up to the caller."""
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    follower = subprocess.Popen(
        command(models, site, "replay", str(trace), **settings),
        env=os.environ | about | {"RANK": "1"} | ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
    )
    for name, value in (about | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    try:
        daemon = open_daemon(config(models, site, **settings))
        assert daemon.training.ranks.size == 2
        yield daemon, follower
    finally:
        dist.destroy_process_group()
        monkeypatch.undo()
        follower.kill()
        follower.wait()


def assert_alike(one, two, tolerance: float, loss_tolerance: float):
    (steps_1, end_1), (steps_2, end_2) = one, two
    assert len(steps_1) == len(steps_2) > 0
    for number, (a, b) in enumerate(zip(steps_1, steps_2)):
        assert a.update.loss == pytest.approx(b.update.loss, rel=loss_tolerance), number
        assert torch.equal(a.score.count, b.score.count) and a.positions == b.positions
        assert (a.before is None) == (b.before is None) and (a.after is None) == (b.after is None)
    for name in ("steps", "positions", "buffer", "samples", "cursor", "rows"):
        assert end_1["state"][name] == end_2["state"][name], name
    for name, tensor in end_1.items():
        if name != "state" and tensor.is_floating_point():
            assert torch.allclose(tensor, end_2[name], rtol=0, atol=tolerance), (
                name,
                float((tensor - end_2[name]).abs().max()),
            )


def test_two_ranks_learn_what_one_does_and_one_goes_on(models, trace, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = run(Daemon(config(models, tmp_path / "one", **ADAMW)), trace, 24)
    with two_ranks(models, tmp_path / "two", trace, monkeypatch, **ADAMW) as (daemon, follower):
        whole = daemon.training.learner.mean.weights["lm_head.weight"].shape
        first, middle = run(daemon, trace, 13)
        assert follower.wait(60) == 0, follower.stderr.read()
        # rank 0 held half of the rows, and saved all of them
        assert whole[0] == middle["average/lm_head.weight"].shape[0] // 2
    second, end = run(Daemon(config(models, tmp_path / "two", **ADAMW)), trace, 24)
    assert_alike(one, (first + second, end), 1e-3, 1e-4)
    assert any(s.after for s in first)


def test_two_ranks_go_on_from_ones_checkpoint(models, trace, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = run(Daemon(config(models, tmp_path / "one", **MUON)), trace, 20)
    first, _ = run(Daemon(config(models, tmp_path / "two", **MUON)), trace, 7)
    with two_ranks(models, tmp_path / "two", trace, monkeypatch, **MUON) as (daemon, follower):
        # a batch that one rank cannot train on is both ranks' fault, and tried again in parts
        second, end = run(daemon, trace, 20)
        assert follower.wait(60) == 0, follower.stderr.read()
    assert_alike(one, (first + second, end), 1e-2, 1e-2)
