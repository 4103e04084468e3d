"""Whichever draft is best on what comes is published, the initial one as often as it takes, and
training goes on; a change of traffic wakes it, to the bit over a recording.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_training import open_training, train
from traffic import HIDDEN, VOCAB, write_trace
from trainer_process import config

from aurora_sglang_plugin.weights.manifest import (
    REJECTED,
    read_manifest,
    target_fingerprint,
    version_name,
)
from aurora_trainer.checkpoint import Checkpoint, load_newest
from aurora_trainer.daemon import Daemon
from aurora_trainer.learn import drift
from aurora_trainer.learn.drift import Event
from aurora_trainer.learn.trainer import Training

GATE = (
    "trainer.gate.enabled=true",
    "trainer.gate.requests=6",
    "trainer.gate.min_requests=3",
)
AVERAGE = "trainer.optimizer.average=0.9"


@pytest.fixture(scope="module")
def learned(models, stream, tmp_path_factory):
    """A draft that was trained on the stream, as the initial one of others."""
    site = tmp_path_factory.mktemp("learned")
    training = open_training(models, site, "float32")
    train(training, stream, 60)
    training.draft.save(site / "draft", torch.float32)
    training.close()
    return site / "draft"


def serve_noise(training) -> None:
    """As a version that was published and is worse than what it came from."""
    tensors = training.draft.checkpoint(training.served.dtype)
    tensors = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in tensors.items()}
    about = dict(target=training.target, parent=training.parent, optimizer_step=training.updates)
    version = training.writer.publish(tensors, training.draft.config.to_json("float32"), **about)
    training.parent = version
    training.served.take(version, tensors, "live")
    training.gate.restart()
    training.arrivals.drift.serve()


def forget_all(training) -> None:
    """What is trained is nothing that the gate lets pass."""
    with torch.no_grad():
        training.optimizer.masters["fc.weight"].zero_()


def feed(training, messages) -> list[int]:
    """Feed, publish what is asked for at once; numbers of the samples at which it was."""
    asked = []
    for number, message in enumerate(messages):
        training.feed(message, number)
        if training.urgent:
            asked.append(training.samples["assembled"])
            training.publish()
    return asked


def test_the_initial_draft_comes_back_at_once_and_again(models, stream, learned, tmp_path):
    """Nothing is trained meanwhile, so that nothing else can be better."""
    site = "trainer.pace.enabled=false", f"trainer.model.draft={learned}"
    training = open_training(models, tmp_path, "float32", *GATE, *site)
    forget_all(training)
    masters = {name: m.clone() for name, m in training.optimizer.masters.items()}
    half = len(stream) // 2
    for turn, version, messages in ((1, 2, stream[:half]), (2, 4, stream[half:])):
        serve_noise(training)
        before = training.samples["assembled"]
        (asked,) = feed(training, messages)
        assert asked - before <= 10 and training.published_roles == {"initial": turn}
        assert training.served.version == training.parent == version
        assert training.served.draft is training.served.initial
        manifest = read_manifest(tmp_path / "weights" / version_name(version))
        assert manifest.gate["reason"] == manifest.gate["role"] == "initial"
        assert manifest.gate["initial"] > manifest.gate["served"] + 0.3
        assert manifest.parent == version - 1
    saved, own = load_file(learned / "model.safetensors"), training.served.initial.checkpoint()
    assert torch.equal(saved["fc.weight"], own["fc.weight"])
    # training was left as it was
    for name, master in training.optimizer.masters.items():
        assert torch.equal(master, masters[name])
    training.close()
    # a trainer that starts again knows what is served
    again = open_training(models, tmp_path, "float32", *GATE, *site)
    assert again.served.version == 4 and again.served.draft is again.served.initial
    again.close()


def back_at_the_initial_draft(models, stream, learned, tmp_path):
    """A training that published noise and then, as version 2, the initial draft; its settings."""
    site = "trainer.pace.enabled=false", f"trainer.model.draft={learned}"
    training = open_training(models, tmp_path, "float32", *GATE, *site)
    forget_all(training)
    serve_noise(training)
    feed(training, stream)
    assert training.served.version == 2
    return training, site


def test_an_initial_draft_that_a_server_rolled_back_waits_for_other_traffic(
    models, stream, learned, tmp_path
):
    half = len(stream) // 2
    training, _ = back_at_the_initial_draft(models, stream[:half], learned, tmp_path)
    (tmp_path / "weights" / REJECTED).write_text(json.dumps({"version": 2}) + "\n")
    training.apply_rollbacks()
    assert training.served.version == 1 and training.served.initial_barred
    assert feed(training, stream[half:]) == [] and training.published_roles == {"initial": 1}
    assert training.arrivals.drift.samples > 40
    training.close()


def test_a_rollback_while_no_trainer_ran_is_heeded_by_the_next_one(
    models, stream, learned, tmp_path
):
    """Of the initial draft by its weights: another one is not barred by it."""
    half = len(stream) // 2
    training, site = back_at_the_initial_draft(models, stream[:half], learned, tmp_path)
    tensors, state = training.checkpoint()
    found = Checkpoint(training.steps, dict(tensors), json.loads(json.dumps(state)), 0)
    training.close()
    (tmp_path / "weights" / REJECTED).write_text(json.dumps({"version": 2}) + "\n")
    again = open_training(models, tmp_path, "float32", *GATE, *site)
    again.restore(found, live=True)
    again.apply_rollbacks()
    assert again.served.version == again.parent == 1 and again.served.initial_barred
    # it trains what servers went back to
    noise = again.served.draft.checkpoint()["fc.weight"]
    assert torch.equal(again.draft.checkpoint()["fc.weight"], noise)
    assert again.published["rolled_back"] == 1
    assert feed(again, stream[half:]) == []
    state = json.loads(json.dumps(again.checkpoint()[1]))
    again.close()
    # nothing but the directory is left: what is there says the same
    (bare := open_training(models, tmp_path, "float32", *GATE, *site)).apply_rollbacks()
    assert bare.served.initial_barred
    bare.close()
    other = open_training(models, tmp_path, "float32", *GATE, site[0])
    other.restore(Checkpoint(found.step, found.tensors, state, 0), live=True)
    other.apply_rollbacks()
    assert other.served.barred and not other.served.initial_barred
    assert other.published["rolled_back"] == 1
    other.close()


def test_what_is_urgent_stays_so_until_servers_have_it(models, stream, learned, tmp_path):
    """The disk refuses once, no update comes, and another event comes while it is tried again."""
    site = "trainer.pace.enabled=false", f"trainer.model.draft={learned}"
    training = open_training(models, tmp_path, "float32", *GATE, *site)
    forget_all(training)
    serve_noise(training)
    messages = iter(enumerate(stream))
    while not training.urgent:
        number, message = next(messages)
        training.feed(message, number)
    weights = tmp_path / "weights"
    training._offered_at = training.updates
    offer = training.offer()
    weights.rename(tmp_path / "away")
    weights.write_text("no directory")
    with pytest.raises(OSError):
        offer.write()
    weights.unlink()
    (tmp_path / "away").rename(weights)
    assert training.urgent and training.checkpoint()[1]["urgent"]
    offer = training.offer()
    assert offer.role == "initial"
    changed = [Event("changed", 0)]
    training.arrivals.look = lambda now, *_: changed
    training._look(behind=False)
    training.written(offer, offer.write())
    assert training.served.version == 2 and training.urgent == 1
    # it is answered by what is refused, too
    assert training.offer() is None and not training.urgent
    training.close()


def test_an_initial_draft_that_the_trainer_made_is_neither_walked_nor_published(
    models, stream, tmp_path
):
    training = open_training(models, tmp_path, "float32", *GATE, "trainer.pace.enabled=false")
    model = training.config.trainer.model.model_copy(update={"draft": None})
    trainer = training.config.trainer.model_copy(update={"model": model})
    training.config = training.config.model_copy(update={"trainer": trainer})
    walked = []
    training.arrivals._walk = lambda role, samples: (
        walked.append(role) or training._walk(role, samples)
    )
    serve_noise(training)
    assert feed(training, stream) == [] and set(walked) == {"served"}
    training.close()


def test_the_best_of_weights_and_mean_is_published(models, stream, tmp_path):
    training = open_training(models, tmp_path, "float32", *GATE, AVERAGE)
    for number, message in enumerate(stream):
        training.feed(message, number)
        while training.due():
            training.step()
    offer = training.offer()
    weights = {"live": training.optimizer.masters, "mean": training.mean.weights}[offer.role]
    assert torch.equal(offer.tensors["fc.weight"], weights["fc.weight"])
    other = {"live": training.mean.weights, "mean": training.optimizer.masters}[offer.role]
    assert not torch.equal(offer.tensors["fc.weight"], other["fc.weight"])
    training.written(offer, offer.write())
    assert training.published_roles == {offer.role: 1}
    training.close()


def test_a_change_of_traffic_wakes_training(models, stream, tmp_path):
    site = "trainer.optimizer.schedule=cosine", "trainer.optimizer.cosine_updates=40"
    training = open_training(models, tmp_path, "float32", *GATE, AVERAGE, *site)
    train(training, stream, 60)
    per_step = training.new_positions_per_step
    training.arrivals._follow((0, 0), [Event("rests", 0)])
    assert training.new_positions_per_step == 4 * per_step
    held = training.gate.held.samples
    assert held and training.mean.began == training.optimizer.began == 0
    changed = [Event("changed", training.samples["assembled"] + 1), Event("works", 0)]
    training.arrivals.look = lambda now, *_: training.arrivals._follow(now, changed) or changed
    training._look(behind=False)
    assert training.new_positions_per_step == per_step and training.urgent
    assert training.gate.held.samples == 0
    assert training.mean.began == training.optimizer.began == training.optimizer.updates == 60
    for name, master in training.optimizer.masters.items():
        assert torch.equal(training.mean.weights[name], master)
    training.close()


def test_a_resumed_run_over_a_recording_follows_the_same_events(models, tmp_path, monkeypatch):
    """With a slack below zero every request is a little of an alarm, so that there are some."""
    monkeypatch.setattr(drift, "SLACK", -3.0)
    monkeypatch.setattr(drift, "WARM", 4)
    path = tmp_path / "trace"
    about = dict(target=target_fingerprint(models / "target"), vocab=VOCAB, features=3 * HIDDEN)
    write_trace(path, requests=60, **about)
    settings = {
        "trainer__drift__limit": 20,
        "trainer__drift__rest_samples": 3,
        "trainer__drift__rest_factor": 2,
        "trainer__optimizer__average": 0.9,
        "trainer__optimizer__schedule": "cosine",
        "trainer__optimizer__cosine_updates": 30,
    }
    ends = {}
    for name, counts in (("whole", (None,)), ("parts", (20, 45, None))):
        (tmp_path / name).mkdir()
        for count in counts:
            daemon = Daemon(config(models, tmp_path / name, **settings))
            daemon.run_recording(path, count)
            assert count is None or daemon.training.steps == count
        ends[name] = load_newest(tmp_path / name / "checkpoints")
    whole, parts = ends["whole"], ends["parts"]
    assert whole.state["arrivals"]["events"] == parts.state["arrivals"]["events"]
    kinds = {kind for _, _, kind, _ in whole.state["arrivals"]["events"]}
    assert kinds >= {"changed", "rests", "works"}, kinds
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name]), name
    for name in ("steps", "pending_tokens", "optimizer", "buffer", "average_began", "samples"):
        assert whole.state[name] == parts.state[name], name


def test_a_resting_trainer_takes_no_more_than_a_batch_has_room_for(models, tmp_path):
    """Half of a batch is for what is new, and prompts, which have no targets, fill it too."""
    training = Training(config(models, tmp_path))
    trainer = training.config.trainer
    worked = training.new_positions_per_step
    training.arrivals._resting = True
    training._given = [100, 400]
    room = trainer.batch.max_positions * trainer.buffer.fresh_fraction / 4
    rested = worked * trainer.drift.rest_factor
    assert training.new_positions_per_step == max(worked, min(rested, int(room)))
    training._given = [400, 400]
    assert training.new_positions_per_step > worked
    training.close()
