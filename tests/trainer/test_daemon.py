"""The loop on a trace: it learns, survives kills to the bit, goes on from what is there, and leaves
out what does not fit.
"""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from traffic import HIDDEN, VOCAB, messages, write_trace
from trainer_process import command, config

from aurora_sglang_plugin.link.wire import decode
from aurora_sglang_plugin.weights.manifest import (
    current_version,
    read_manifest,
    target_fingerprint,
    version_name,
)
from aurora_trainer.checkpoint import steps
from aurora_trainer.daemon import Daemon, Schedule
from aurora_trainer.learn import trainer


@pytest.fixture(scope="module")
def trace(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace"
    write_trace(
        path,
        target=target_fingerprint(models / "target"),
        vocab=VOCAB,
        features=3 * HIDDEN,
        requests=40,
    )
    return path


def last_checkpoint(site: Path):
    path = site / "checkpoints" / f"step-{steps(site / 'checkpoints')[-1]:08d}"
    return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())


def assert_same_end(a: Path, b: Path):
    (tensors, state), (others, other) = last_checkpoint(a), last_checkpoint(b)
    assert tensors.keys() == others.keys()
    for name, t in tensors.items():
        assert torch.equal(t, others[name]), name
    # Everything but what was published and scored, which a kill may have happened once more to.
    for name in (
        "steps",
        "cursor",
        "positions",
        "pending_tokens",
        "optimizer",
        "buffer",
        "samples",
        "traffic",
        "earlier_updates",
    ):
        assert state[name] == other[name], name


def test_a_trace_is_learnt_and_published(models, trace, tmp_path):
    Daemon(config(models, tmp_path)).run_recording(trace)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["samples"] == {"assembled": 40} and status["skipped_updates"] == 0
    assert (
        status["steps"] > 40
        and status["published"]["published"] == current_version(tmp_path / "weights") > 2
    )
    # of at most 3; untrained it is about 1.02
    assert status["accept_length"] > 2.0
    manifest = read_manifest(tmp_path / "weights" / version_name(status["draft_version"]))
    assert manifest.gate["reason"] == "better" and manifest.gate["candidate"] > 1.5
    assert manifest.parent == manifest.version - 1 and not any(
        "embed" in n for n in manifest.tensors
    )


def test_a_killed_run_resumes_to_the_same_bits(models, trace, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for site in (whole, killed):
        site.mkdir()
    subprocess.run(command(models, whole, "replay", str(trace)), check=True, capture_output=True)
    kills = 0
    # kill -9 some time after checkpoints of these steps, between and within steps
    for at in (7, 21):
        process = subprocess.Popen(
            command(models, killed, "replay", str(trace)), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (steps(killed / "checkpoints") or [0])[-1] < at:
            time.sleep(0.001)
        time.sleep(0.003)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills == 2
    run = subprocess.run(
        command(models, killed, "replay", str(trace)), capture_output=True, text=True, check=True
    )
    assert "resumed step=" in run.stderr
    assert_same_end(whole, killed)


def test_steps_of_a_trace_can_be_taken_in_two_runs(models, trace, tmp_path):
    for site in ("whole", "parts"):
        (tmp_path / site).mkdir()
    Daemon(config(models, tmp_path / "whole")).run_recording(trace, 30)
    for count in (11, 30):
        daemon = Daemon(config(models, tmp_path / "parts"))
        daemon.run_recording(trace, count)
        assert daemon.training.steps == count
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_another_trace_than_the_checkpoints_is_refused(models, trace, tmp_path):
    Daemon(config(models, tmp_path)).run_recording(trace, 20)
    fingerprint = target_fingerprint(models / "target")
    for name, requests in (("other", 40), ("short", 3)):
        write_trace(
            tmp_path / name,
            target=fingerprint,
            vocab=VOCAB,
            features=3 * HIDDEN,
            requests=requests,
            seed=5,
            outputs=31,
        )
        daemon = Daemon(config(models, tmp_path))
        with pytest.raises(ValueError, match="expected the"):
            daemon.run_recording(tmp_path / name)
        daemon.training.close()


def test_traffic_that_teaches_nothing_says_so_and_moves_nothing(models, tmp_path, caplog):
    """Every row under a grammar: no step, no drift of momentum, and a counter, a cause and a line
    of log.
    """
    about = dict(target=target_fingerprint(models / "target"), vocab=VOCAB, features=3 * HIDDEN)
    write_trace(tmp_path / "altered", requests=10, flag=1, **about)
    daemon = Daemon(config(models, tmp_path))
    before = daemon.training.draft.checkpoint()
    daemon.run_recording(tmp_path / "altered")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["steps"] == status["optimizer_step"] == 0 and status["unusable"] == {
        "altered": 10
    }
    assert status["rows"]["with_target"] == 0 and status["rows"]["altered"] > 100
    after = daemon.training.draft.checkpoint()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "nothing to learn from: samples=" in caplog.text and "'altered': " in caplog.text


def test_a_rejected_version_is_left_for_its_parent(models, trace, tmp_path):
    daemon = Daemon(config(models, tmp_path))
    training = daemon.training
    daemon.run_recording(trace, 45)
    newest = training.served.version
    training.apply_rollbacks()
    assert training.parent == newest >= 3
    (tmp_path / "weights" / "REJECTED").write_text(json.dumps({"version": newest}) + "\n")
    training.apply_rollbacks()
    assert (
        training.parent == training.served.version == newest - 1
        and training.published["rolled_back"] == 1
    )
    parent = load_file(tmp_path / "weights" / version_name(newest - 1) / "model.safetensors")
    assert all(torch.equal(parent[n], p.detach()) for n, p in training.draft.named_parameters())
    # once is enough
    training.apply_rollbacks()
    assert training.published["rolled_back"] == 1
    # a new trainer does not go back to it either
    again = Daemon(config(models, tmp_path)).training
    assert again.served.version == newest - 1


def test_without_a_checkpoint_it_goes_on_from_what_is_served(models, trace, tmp_path):
    first = Daemon(config(models, tmp_path))
    first.run_recording(trace, 45)
    daemon = Daemon(config(models, tmp_path, trainer__checkpoint__directory=tmp_path / "new"))
    daemon.training.resume_from_published()
    assert daemon.training.parent == first.training.served.version
    served = load_file(
        tmp_path / "weights" / version_name(daemon.training.parent) / "model.safetensors"
    )
    assert all(
        torch.equal(served[n], p.detach()) for n, p in daemon.training.draft.named_parameters()
    )


def test_samples_that_do_not_fit_are_counted_and_left_out(models, tmp_path):
    training = Daemon(config(models, tmp_path)).training
    about = {"target": training.target, "requests": 3}
    for parts in messages(**about, vocab=VOCAB, features=2 * HIDDEN, session="narrow"):
        training.feed(decode(parts, max_bytes=1 << 20), 0.0)
    for parts in messages(**about, vocab=3 * VOCAB, features=3 * HIDDEN, session="wide"):
        training.feed(decode(parts, max_bytes=1 << 20), 0.0)
    assert (
        training.samples["wrong_feature_width"] == 3
        and training.samples["token_out_of_vocabulary"] >= 2
    )
    assert (
        len(training.buffer)
        == training.samples["assembled"] - 3 - training.samples["token_out_of_vocabulary"]
    )


def test_a_sample_that_raises_takes_none_that_came_with_it(models, tmp_path, monkeypatch):
    """Four requests that fall silent together become samples together."""
    daemon = Daemon(config(models, tmp_path, trainer__gate__enabled="false"))
    training, usable = daemon.training, trainer.unusable
    about = dict(target=training.target, vocab=VOCAB, features=3 * HIDDEN, requests=1)
    for name in "abcd":
        for parts in list(messages(**about, session=name))[:-1]:
            training.feed(decode(parts, max_bytes=1 << 20), 0.0)

    def raising(sample, *rest):
        if sample.session == "b":
            raise MemoryError("as on a device that is full")
        return usable(sample, *rest)

    monkeypatch.setattr(trainer, "unusable", raising)
    daemon._jobs["message"].run(lambda: training.idle(1e9), 1e9)
    assert {entry.sample.session for entry in training.buffer._entries.values()} == {*"acd"}
    assert daemon.status(None)["faults"]["message"] == 1
    assert training.assembler.open_requests == 0
    training.close()


def test_cadence():
    by_both = Schedule(10.0, 5)
    by_both.restart(0.0, 0)
    assert (
        not by_both.due(9.0, 4)
        and by_both.due(9.0, 5)
        and not by_both.due(18.0, 9)
        and by_both.due(19.0, 9)
    )
    assert not Schedule(0, 0).due(1e9, 10**9)
