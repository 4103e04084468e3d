"""Reloading into a module that loads as SGLang's EAGLE3 draft does: fused qkv and gate_up, shared
embedding.

Every file goes through the real directory, watcher and checks.
"""

import threading
import time

import numpy as np
import pytest
import torch
from reload_site import TARGET, VD, Draft, H, Site, V, checkpoint
from torch import nn

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.serve.staging import make_staging_copy
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.weights.manifest import read_manifest, version_name


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_swap_keeps_addresses_and_the_embedding(site):
    assert site.step() is None and site.reloader.version == 0
    for seed in (1, 2, 3):
        assert site.publish(checkpoint(seed)) == seed
        assert site.step() == seed
        site.assert_whole(seed)
        assert site.step() is None
    assert site.reloader.counters()["swaps"] == 3 and site.reloader.version == 3


def test_a_starting_server_takes_the_newest(site):
    site.publish(checkpoint(1))
    site.publish(checkpoint(2))
    assert site.reloader.apply_at_start() == 2
    site.assert_whole(2)


def test_newest_wins_over_a_staged_version_that_nobody_took(site):
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        site.reloader._watcher.poll()
    assert site.reloader.apply_pending() == 2
    site.assert_whole(2)


def test_staging_copy_is_not_written_while_a_swap_reads_it(site):
    site.publish(checkpoint(1))
    site.reloader._watcher.poll()
    site.reloader._state = "applying"
    site.publish(checkpoint(2))
    # no room: nothing staged, nothing forgotten, nothing counted
    site.reloader._watcher.poll()
    assert {
        p.mean().item()
        for n, p in site.reloader._memory.staging.named_parameters()
        if n == "model.norm.weight"
    } == {1.0}
    site.reloader._state = "free"
    assert site.step() == 2 and not site.reloader._watcher.failures


def test_exchange(site):
    """The version that drafts and the one before change places, there and back."""
    written = [site.count_writes()]
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        site.step()
        written.append(site.count_writes())
    site.reloader.exchange()
    assert (site.reloader.version, site.reloader.previous_version) == (1, 2)
    # Who keeps a copy of a parameter sees each write.
    assert written == [written[0] + n for n in range(3)] and site.count_writes() == written[0] + 3
    site.assert_whole(1)
    site.reloader.exchange()
    assert (site.reloader.version, site.reloader.previous_version) == (2, 1)
    site.assert_whole(2)
    site.publish(checkpoint(3))
    assert site.step() == 3
    site.assert_whole(3)


def test_old_or_new_but_never_half_while_the_watcher_runs(site):
    done = threading.Event()

    def publish_all():
        for seed in range(1, 16):
            site.publish(checkpoint(seed))
        done.set()

    publisher = threading.Thread(target=publish_all)
    publisher.start()
    seen = []
    while not (done.is_set() and seen and seen[-1] == 15):
        version = site.reloader.step()
        if version is not None:
            site.assert_whole(version)
            seen.append(version)
        time.sleep(0.0005)
    publisher.join()
    site.reloader.close()
    assert seen == sorted(set(seen)) and len(seen) > 3 and not site.reloader._watcher.failures


class Watched:
    """A control that trusts what drafts, or does not, and counts what it is told."""

    holds, trusts = False, True

    def __init__(self):
        self.told = []

    def let_go(self):
        self.told.append("let_go")
        return self.trusts

    def swapped(self, manifest, first, trusted):
        assert trusted == self.trusts
        self.told.append("swapped")


def test_what_drafts_is_copied_aside_a_step_before_the_swap(site):
    """Between two steps there is one copy; a staged version waits meanwhile, whatever comes."""
    reloader = site.reloader
    reloader._watching = True
    reloader.control = control = Watched()
    site.publish(checkpoint(1))
    reloader._watcher.poll()
    written = site.count_writes()
    assert reloader.step() is None and reloader.version == 0 and control.told == ["let_go"]
    # what drafts was only read, and nothing can be gone back to
    assert site.count_writes() == written and reloader.previous_version is None
    site.publish(checkpoint(2))
    reloader._watcher.poll()
    assert reloader.step() == 1 and control.told == ["let_go", "swapped"]
    site.assert_whole(1)
    # an older version stays what would be gone back to: nothing is copied aside
    control.trusts = False
    reloader._watcher.poll()
    assert reloader.step() == 2 and reloader.previous_version == 0
    site.assert_whole(2)
    control.trusts = True
    site.publish(checkpoint(3))
    reloader._watcher.poll()
    assert reloader.step() is None
    # another target comes between the two steps
    reloader.retarget("e" * 32)
    assert reloader.step() is None and reloader.version == 2
    site.assert_whole(2)
    site.publish(checkpoint(4), target="e" * 32)
    reloader._watcher.poll()
    assert reloader.step() is None and reloader.step() == 4 and reloader.previous_version == 2
    site.assert_whole(4)
    reloader.exchange()
    site.assert_whole(2)


def test_a_copy_aside_that_fails_leaves_what_drafts(site):
    site.publish(checkpoint(1))
    site.step()
    site.publish(checkpoint(2))
    site.reloader._watcher.poll()
    site.reloader._watching = True

    def fails():
        site.reloader._memory.previous[0].fill_(7)
        raise RuntimeError("no copy")

    site.reloader._memory.keep = fails
    for _ in range(3):
        assert site.reloader.step() is None and site.reloader.version == 1
        site.assert_whole(1)
    assert site.reloader.counters()["refused_swap"] == 1
    # not from the copy that is half of two versions
    spoilt = site.reloader._memory.live[0]
    spoilt.data.fill_(-9)
    site.reloader.restore()
    assert (spoilt != 7).all()


def test_a_swap_that_fails_halfway_is_undone(site):
    site.publish(checkpoint(1))
    site.step()
    put = site.reloader._memory.put

    def fails(tensors):
        site.reloader._memory.put = put
        put([torch.full_like(t, 7) for t in tensors])
        raise RuntimeError("no copy")

    site.reloader._memory.put = fails
    # no thread beside this one
    site.reloader._watching = True
    for seed in (2, 3):
        site.publish(checkpoint(seed))
        site.reloader._watcher.poll()
        for _ in range(2):
            assert site.reloader.step() is None and site.reloader.version == 1
            site.assert_whole(1)
    assert site.reloader.counters()["refused_swap"] == 1


def test_a_whole_vocabulary_needs_no_offsets(tmp_path):
    site = Site(tmp_path)
    site.model.config.vocab_size = VD
    site.reloader = Reloader(
        site.model, site.hot, WeightsConfig(directory=tmp_path), SwapConfig(), TARGET
    )
    site.hot.fill_(-1)
    site.publish({n: t for n, t in checkpoint(5).items() if n not in ("d2t", "t2d")})
    assert site.step() == 1
    site.assert_whole(5)


def test_a_server_in_inference_mode(tmp_path):
    with torch.inference_mode():
        site = Site(tmp_path)
    site.publish(checkpoint(1))
    # as the watcher's thread, which is not in that mode
    site.reloader._watcher.poll()
    with torch.inference_mode():
        assert site.reloader.apply_pending() == 1, site.reloader.counters()
        site.assert_whole(1)


def test_disabled_swap_never_loads(tmp_path):
    site = Site(tmp_path, enabled=False)
    site.publish(checkpoint(1))
    assert site.reloader.apply_at_start() is None
    assert site.reloader.step() is None and not site.reloader._watcher._thread.is_alive()


def test_staging_copy_shares_the_embedding_and_keeps_loaders():
    model = Draft(nn.Parameter(torch.zeros(V, H)))
    staged = make_staging_copy(model)
    assert staged.model.embed_tokens.weight is model.model.embed_tokens.weight
    live, other = model.model.layers[0], staged.model.layers[0]
    assert live.mlp.gate_up_proj.weight.data_ptr() != other.mlp.gate_up_proj.weight.data_ptr()
    assert (
        other.self_attn.qkv_proj.weight.weight_loader
        is live.self_attn.qkv_proj.weight.weight_loader
    )
    assert dict(staged.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_an_exchange_is_exact_after_many_swaps(site):
    rng = np.random.default_rng(0)
    tensors = checkpoint(1)
    for _ in range(3):
        for t in tensors.values():
            if t.is_floating_point():
                t.copy_(torch.from_numpy(rng.standard_normal(t.shape)))
        before = [p.detach().clone() for p in site.model.parameters()]
        site.publish(tensors)
        assert site.step()
        site.reloader.exchange()
        assert all(torch.equal(a, b) for a, b in zip(before, site.model.parameters(), strict=True))


def test_durations_and_freshness_of_swaps_while_it_serves(tmp_path):
    site = Site(tmp_path)
    site.publish(checkpoint(1))
    # an old version that lay there says nothing about either
    site.reloader.apply_at_start()
    assert (
        sum(site.reloader.times.durations.counts) == sum(site.reloader.times.freshness.counts) == 0
    )
    # serving begins
    site.reloader.step()
    seen_ns = time.time_ns() - 20 * 10**9
    site.writer.publish(
        checkpoint(2),
        {"hidden_size": H},
        target=TARGET,
        parent=1,
        optimizer_step=2,
        trained_until_ns=seen_ns,
    )
    deadline = time.monotonic() + 20
    while site.reloader.step() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    site.reloader.close()
    assert (
        sum(site.reloader.times.stalls.counts) == 2
        and sum(site.reloader.times.durations.counts) == 1
    )
    assert (
        20 <= site.reloader.times.freshness.sum < 45 and 0 < site.reloader.times.durations.sum < 25
    )
    created = [read_manifest(tmp_path / version_name(version)).created_unix_s for version in (1, 2)]
    assert site.reloader.created_unix_s == created[1]
    site.reloader.exchange()
    assert site.reloader.created_unix_s == created[0]
