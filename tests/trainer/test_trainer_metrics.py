"""The trainer's /metrics, of a real daemon that trains over a recording: complete, documented, and
right.
"""

import json
import math
import time
import urllib.request

import pytest
from metric_pages import documented, exported, values
from models import make_random_target
from serve import free_port
from traffic import write_trace

from aurora_sglang_plugin.weights.manifest import read_manifest, target_fingerprint, version_name
from aurora_trainer.config import load_trainer_config
from aurora_trainer.daemon import Daemon
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.learn.optimizer import Update
from aurora_trainer.learn.step_record import Step
from aurora_trainer.metrics import FAMILIES, Clock, Metrics, MetricsConfig

VOCAB, HIDDEN = 64, 32


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory with a target, a draft and a recording."""
    site = tmp_path_factory.mktemp("site")
    target = make_random_target(site / "target", vocab=VOCAB, hidden=HIDDEN)
    init_draft(target, site / "draft", "random")
    fingerprint = target_fingerprint(target)
    write_trace(site / "trace", target=fingerprint, vocab=VOCAB, features=3 * HIDDEN, requests=40)
    return site


def run(site, steps=None):
    """(the daemon, its status, its page) after training over the recording."""
    port = free_port()
    settings = {
        "link.endpoint": f"ipc://{site}/link", "weights.directory": site / "weights",
        "trainer.model.target": site / "target", "trainer.model.draft": site / "draft",
        "trainer.checkpoint.directory": site / "checkpoints", "trainer.checkpoint.every_steps": 10,
        "trainer.metrics.status_file": site / "status.json", "trainer.metrics.port": port,
        "trainer.metrics.rescore_every_steps": 3, "trainer.publish.every_s": 0,
        "trainer.publish.every_steps": 10,
        "trainer.pace.new_positions_per_step": 20, "trainer.pace.nice": 0,
        "trainer.batch.max_positions": 256,
        "trainer.optimizer.lr": 4e-3, "trainer.assemble.eos_token_ids": [VOCAB - 1],
        "trainer.loss.rejected": 0.5,
        "trainer.gate.requests": 4, "trainer.gate.min_requests": 2, "trainer.gate.z": 0,
    }  # fmt: skip
    daemon = Daemon(load_trainer_config(None, [f"{k}={v}" for k, v in settings.items()]))
    daemon.run_recording(site / "trace", steps)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        page = response.read().decode()
    return daemon, json.loads((site / "status.json").read_text()), page


@pytest.fixture(scope="module")
def first(site):
    return run(site, 30)


def test_documentation_is_what_is_exported(first):
    assert exported(first[2], "aurora_trainer_") == documented("Trainer")


def test_every_family_is_filled_from_somewhere(first):
    found = values(first[2])
    # test_daemon_live.py
    live = ("received", "lost", "rejected", "reported", "receive_queue", "servers", "message_age")
    # the same
    live += ("refused_peers", "recorded", "unrecorded", "recording")
    # intake/test_prefixes.py, and assembly's own tests
    faults = (
        "prefix_positions",
        "skipped_steps",
        "checkpoint_errors",
        "unusable_samples",
        "assembly_events",
        "bad_rows",
        "faults",
        # learn/test_publishing.py
        "traffic_changes",
    )
    untouched = {f"aurora_trainer_{name}" for name in faults}
    for name in FAMILIES:
        if name not in untouched and not name.removeprefix("aurora_trainer_").startswith(live):
            series = [v for k, v in found.items() if k.startswith(name)]
            assert any(v == v for v in series), name
            assert FAMILIES[name].kind != "counter" or sum(series) > 0, name


def test_figures_agree_with_the_status(first):
    daemon, status, page = first
    found = values(page)
    assert found["aurora_trainer_steps_total"] == status["steps"] == 30
    assert found["aurora_trainer_trained_tokens_total"] == status["tokens"]
    published = status["published"]["published"]
    assert found["aurora_trainer_draft_version"] == status["draft_version"] == published >= 2
    assert found['aurora_trainer_publications_total{outcome="published"}'] == published
    assert found["aurora_trainer_publish_seconds_count"] == published
    assert found["aurora_trainer_checkpoint_seconds_count"] >= 3
    assert found["aurora_trainer_step_seconds_count"] == 30
    assert (
        found["aurora_trainer_gradient_norm"] > 0 and found["aurora_trainer_learning_rate"] == 4e-3
    )
    before, after = (
        found[f'aurora_trainer_batch_accept_length_tokens_sum{{when="{w}"}}']
        / found[f'aurora_trainer_batch_accept_length_tokens_count{{when="{w}"}}']
        for w in ("before", "after")
    )
    assert 1 <= before < after <= 3
    rescored = found['aurora_trainer_batch_accept_length_tokens_count{when="after"}']
    # of 10 batches, those with an unseen sample
    assert 5 <= rescored <= 10
    # two levels, the second also of rejected nodes
    for depth in "12":
        nodes = found[f'aurora_trainer_scored_nodes_total{{depth="{depth}",nodes="accepted"}}']
        loss = found[f'aurora_trainer_node_loss_total{{depth="{depth}",nodes="accepted"}}']
        matches = found[f'aurora_trainer_greedy_matches_total{{depth="{depth}",nodes="accepted"}}']
        assert 0 < matches < nodes and 0.1 < loss / nodes < math.log(VOCAB) + 2
    assert found['aurora_trainer_scored_nodes_total{depth="2",nodes="rejected"}'] > 0
    manifest = read_manifest(daemon.training.writer.directory / version_name(published))
    assert 0 < manifest.trained_until_ns <= daemon.training.trained_until_ns


def test_a_resumed_trainer_counts_from_its_own_start(site, first):
    daemon, status, page = run(site)
    found = values(page)
    assert daemon.resumed.step == 30 and status["steps"] > 40
    assert (
        found["aurora_trainer_publications_total" + '{outcome="published"}']
        == status["published"]["published"] - first[1]["published"]["published"]
    )
    assert found["aurora_trainer_trained_tokens_total"] == status["tokens"] - first[1]["tokens"]
    assert found["aurora_trainer_step_seconds_count"] == status["steps"] - 30


def test_a_step_that_was_skipped_is_counted_by_what_was_not_finite(first):
    metrics = Metrics(MetricsConfig())
    # any: a skipped step's score is not looked at
    score = first[0].training.step
    for loss, norm in ((math.nan, math.nan), (1.0, math.inf), (2.0, math.nan)):
        update = Update(applied=False, grad_norm=norm, lr=0.1, loss=loss)
        step = Step(update, score, positions=1, before=None, after=None, time_ns=[0], staleness=[])
        metrics.trained(step, 0.1, 1.0)
    value = metrics.registry.get_sample_value
    assert value("aurora_trainer_skipped_steps_total", {"cause": "loss"}) == 1
    assert value("aurora_trainer_skipped_steps_total", {"cause": "gradient"}) == 2
    assert math.isnan(value("aurora_trainer_loss"))


def test_the_clock_loses_nothing():
    began = time.monotonic()
    clock = Clock()
    for activity in ("wait", "train", "wait"):
        clock.turn_to(activity)
        time.sleep(0.02)
    clock.turn_to("other")
    assert sum(clock.seconds.values()) == pytest.approx(time.monotonic() - began, abs=5e-3)
    assert clock.seconds["wait"] >= 0.04 > 0.03 > clock.seconds["other"]


def test_a_taken_port_is_one_message(first):
    port = free_port()
    Metrics(MetricsConfig(port=port))
    with pytest.raises(ValueError, match="expected a free port"):
        Metrics(MetricsConfig(port=port))


def test_the_port_is_of_the_host_that_is_set(first):
    """Loopback unless another is said: a pod's figures are scraped from another machine."""
    port = free_port()
    with pytest.raises(ValueError, match="of an address of this machine"):
        # nobody's: TEST-NET-1
        Metrics(MetricsConfig(port=port, host="192.0.2.1"))
    Metrics(MetricsConfig(port=port, host="127.0.0.2"))
    with urllib.request.urlopen(f"http://127.0.0.2:{port}/metrics") as response:
        assert b"aurora_trainer_" in response.read()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
