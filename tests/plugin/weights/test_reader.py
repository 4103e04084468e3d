"""The watcher: cheap when nothing changed, stubborn only if trying again can help, and never
raising.
"""

import logging
import time

import pytest
import torch

from aurora_sglang_plugin.config import CanaryConfig
from aurora_sglang_plugin.weights import watcher as watch
from aurora_sglang_plugin.weights.manifest import ManifestError
from aurora_sglang_plugin.weights.reader import Expected, canonical_name, read_weights
from aurora_sglang_plugin.weights.watcher import Watcher
from aurora_sglang_plugin.weights.writer import WeightsWriter

EXPECTED = Expected("t", {"fc.weight": (2, 3)}, target_vocab=10, config={"hidden_size": 2})


def publish(directory, fill, **fields):
    writer = WeightsWriter(directory)
    fields = {"target": "t", "parent": 0, "optimizer_step": 1} | fields
    version = writer.publish(
        {"fc.weight": torch.full((2, 3), float(fill))}, {"hidden_size": 2}, **fields
    )
    writer.close()
    return version


def test_every_version_is_staged_once(tmp_path):
    staged = []
    watcher = Watcher(
        tmp_path, 0.001, EXPECTED, lambda w: staged.append(w.manifest.version) or True
    )
    watcher.poll()
    for fill in (1, 2):
        publish(tmp_path, fill)
        watcher.poll()
        watcher.poll()
    assert staged == [1, 2] and not watcher.failures


def test_an_unchanged_current_is_not_read_again(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(watch, "current_version", lambda d: reads.append(d) or 0)
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: True)
    publish(tmp_path, 1)
    for _ in range(5):
        watcher.poll()
    assert len(reads) == 1


def test_a_rolled_back_version_gives_way_to_its_parent(tmp_path):
    for fill in (1, 2, 3):
        publish(tmp_path, fill, parent=fill - 1)
    rejected = tmp_path / "REJECTED"
    rejected.write_text('{"version": 2}\n{"version": 3}\n')
    staged = []
    restarted = Watcher(
        tmp_path, 0.001, EXPECTED, lambda w: staged.append(w.manifest.version) or True
    )
    restarted.poll()
    restarted.poll()
    assert staged == [1] and restarted.failures == {"rejected": 2}
    rejected.write_text('{"version": 1}\n{"version": 2}\n{"version": 3}\n')
    # the initial draft is what the server started with
    Watcher(tmp_path, 0.001, EXPECTED, staged.append).poll()
    assert staged == [1]
    publish(tmp_path, 4, parent=1)
    restarted.poll()
    assert staged == [1, 4]


def test_no_room_is_asked_again(tmp_path):
    answers = iter([False, False, True])
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: next(answers))
    publish(tmp_path, 1)
    for _ in range(5):
        watcher.poll()
    assert next(answers, None) is None and watcher.seen_version == 1


def test_nothing_is_read_while_there_is_no_room(tmp_path, monkeypatch):
    """A server may idle so for long."""
    staged, read, free = [], [], False

    def reading(*args):
        read.append(args)
        return read_weights(*args)

    monkeypatch.setattr(watch, "read_weights", reading)
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: not staged.append(w), free=lambda: free)
    publish(tmp_path, 1)
    for _ in range(5):
        watcher.poll()
    assert not read and watcher.seen_version == 0
    free = True
    watcher.poll()
    watcher.poll()
    assert len(read) == len(staged) == 1 and watcher.seen_version == 1


def test_a_failing_stage_is_counted_and_logged_once(tmp_path, caplog):
    def stage(weights):
        raise RuntimeError("out of memory")

    watcher = Watcher(tmp_path, 0.001, EXPECTED, stage)
    publish(tmp_path, 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            watcher.poll()
    assert watcher.failures == {"stage": 1}
    assert [r.message for r in caplog.records] == [
        "weights refused version=1 cause=stage error=out of memory"
    ]


@pytest.mark.parametrize("text", ["", "v1", "../../etc", "v000001 x", "\x00\xff" * 40])
def test_garbage_in_current(tmp_path, text):
    (tmp_path / "CURRENT").write_text(text)
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: True)
    watcher.poll()
    assert watcher.failures == {"current": 1}
    (tmp_path / "CURRENT").unlink()
    publish(tmp_path, 1)
    watcher.poll()
    assert watcher.seen_version == 1


def test_a_version_that_appears_late_is_found(tmp_path):
    publish(tmp_path, 1)
    (tmp_path / "v000001").rename(tmp_path / "away")
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: True)
    watcher.poll()
    assert watcher.failures == {"missing": 1}
    (tmp_path / "away").rename(tmp_path / "v000001")
    watcher.poll()
    assert watcher.seen_version == 1


def test_the_thread_ends_when_closed(tmp_path):
    staged = []
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: staged.append(1) or True)
    watcher.start()
    publish(tmp_path, 1)
    deadline = time.monotonic() + 5
    while not staged and time.monotonic() < deadline:
        time.sleep(0.005)
    watcher.close()
    assert staged == [1] and not watcher._thread.is_alive()


def test_a_reader_of_an_old_version_is_undisturbed(tmp_path):
    publish(tmp_path, 1)
    weights = read_weights(tmp_path / "v000001", EXPECTED)
    for fill in range(2, 9):
        publish(tmp_path, fill)
    assert not (tmp_path / "v000001").exists()
    assert (weights.tensors["fc.weight"][1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_found_in_the_file(tmp_path, dtype, value):
    weights = torch.ones(2, 3, dtype=dtype)
    weights[1, 2] = float(value)
    about = {"target": "t", "parent": 0, "optimizer_step": 1}
    WeightsWriter(tmp_path).publish({"fc.weight": weights}, {}, **about)
    with pytest.raises(ManifestError, match="values"):
        read_weights(tmp_path / "v000001", EXPECTED)


def test_canonical_names():
    assert canonical_name("model.midlayer.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert canonical_name("aux_norm_mid.weight") == "fc_norm.1.weight"
    assert canonical_name("lm_head.weight") == "lm_head.weight"


def test_others_wait_for_what_the_first_servers_find(tmp_path, monkeypatch):
    """What waited long enough is staged, what was rejected meanwhile is not, and neither is what is
    gone by then."""
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    publish(tmp_path, 1)
    staged = []
    watcher = Watcher(
        tmp_path, 0.001, EXPECTED, lambda w: staged.append(w.manifest.version) or True, wait_s=30
    )
    # there when the server starts
    watcher.poll()
    assert staged == [1]
    for version, at in ((2, 10.0), (3, 20.0), (4, 30.0)):
        now = at
        publish(tmp_path, version, parent=version - 1)
        watcher.poll()
    assert staged == [1]
    now = 41.0
    watcher.poll()
    assert staged == [1, 2]
    (tmp_path / "REJECTED").write_text('{"version": 3}\n')
    now = 51.0
    watcher.poll()
    assert staged == [1, 2]
    now = 61.0
    watcher.poll()
    watcher.poll()
    assert staged == [1, 2, 4] and watcher.failures == {} and not watcher._waiting
    # the one that it serves is rejected by another server
    (tmp_path / "REJECTED").write_text('{"version": 3}\n{"version": 4}\n')
    watcher.poll()
    assert staged[3:] == [2] and watcher.seen_version == 2


def test_what_waits_is_not_forgotten_when_another_is_refused(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    staged = []
    watcher = Watcher(
        tmp_path, 0.001, EXPECTED, lambda w: staged.append(w.manifest.version) or True, wait_s=30
    )
    watcher.poll()
    for version, at in ((1, 0.0), (2, 10.0)):
        now = at
        publish(tmp_path, version, target="another" if version == 1 else "t")
        watcher.poll()
    now = 31.0
    watcher.poll()
    assert watcher.failures == {"target": 1} and not staged
    now = 41.0
    watcher.poll()
    assert staged == [2]
    # nobody knows what drafts: CURRENT is read at once
    watcher.look_again(0)
    watcher.poll()
    assert staged == [2, 2]


def test_the_first_version_of_all_waits_too(tmp_path):
    staged = []
    watcher = Watcher(tmp_path, 0.001, EXPECTED, lambda w: staged.append(1) or True, wait_s=0.2)
    watcher.poll()
    publish(tmp_path, 1)
    watcher.poll()
    assert not staged
    time.sleep(0.25)
    watcher.poll()
    assert staged == [1]


def test_a_share_of_the_servers_goes_first():
    servers = [f"host-{n}:30000" for n in range(1000)]
    few = [s for s in servers if CanaryConfig(share=0.1).waits(s) == 0]
    assert 60 < len(few) < 140
    assert all(CanaryConfig(share=0.2).waits(s) == 0 for s in few)
    assert not any(CanaryConfig().waits(s) for s in servers)
    assert CanaryConfig(share=0, wait_s=7).waits("host:1") == 7


@pytest.mark.parametrize(
    "line", [b"\xff", b'{"version": 1e400}', b"[" * 5000, b'{"version": null}', b"7"]
)
def test_a_line_of_rejected_that_is_nobodys_stops_nothing(tmp_path, line):
    for version in (1, 2):
        publish(tmp_path, version, parent=version - 1)
    (tmp_path / "REJECTED").write_bytes(line + b'\n{"version": 2}\n')
    staged = []
    Watcher(tmp_path, 0.001, EXPECTED, lambda w: staged.append(w.manifest.version) or True).poll()
    assert staged == [1]
