"""Reloading into a module that loads as SGLang's EAGLE3 draft does: fused qkv and gate_up, shared
embedding.

Every file goes through the real directory, watcher and checks.
"""

import json
import multiprocessing
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from reload_site import TARGET, VD, Draft, H, Site, V, checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.serve.staging import make_staging_copy
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.weights.manifest import read_manifest, version_name
from aurora_sglang_plugin.weights.writer import WeightsWriter


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
        for n, p in site.reloader._staging.named_parameters()
        if n == "model.norm.weight"
    } == {1.0}
    site.reloader._state = "free"
    assert site.step() == 2 and not site.reloader._watcher.failures


def test_rollback(site):
    written = [site.count_writes()]
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        site.step()
        written.append(site.count_writes())
    assert site.reloader.rollback() == 1
    # Who keeps a copy of a parameter sees each write.
    assert written == [written[0] + n for n in range(3)] and site.count_writes() == written[0] + 3
    site.assert_whole(1)
    assert site.reloader.rollback() is None
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


def rank(number, directory, port, results):
    """One of two tensor-parallel ranks; rank 1 sees each version some steps after rank 0."""
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=number
    )
    writer, directory = directory / "writer", directory / f"rank{number}"
    site = Site(directory)
    world = torch.distributed.group.WORLD
    weights = WeightsConfig(directory=writer)
    reloader = Reloader(site.model, site.hot, weights, SwapConfig(poll_s=9), TARGET, world)
    steps = [(0, reloader.apply_at_start())]
    for step in range(1, 101):
        if step == 10:
            if number == 0:
                publisher = WeightsWriter(writer)
                publisher.publish(checkpoint(2), {}, target=TARGET, parent=1, optimizer_step=2)
            torch.distributed.barrier()
        if step in (10, 33) and number == 0 or step == 41:
            reloader._watcher.poll()
        version = reloader.step()
        if version is not None:
            site.assert_whole(version)
            steps.append((step, version))
    results.put(steps)
    torch.distributed.destroy_process_group()


def test_ranks_swap_at_the_same_step(tmp_path):
    (tmp_path / "writer").mkdir()
    writer = WeightsWriter(tmp_path / "writer")
    writer.publish(checkpoint(1), {}, target=TARGET, parent=0, optimizer_step=1)
    writer.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not forked: this process has threads by now, whose locks a forked one would wait for.
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [
        spawn.Process(target=rank, args=(n, tmp_path, port, results), daemon=True) for n in (0, 1)
    ]
    for process in ranks:
        process.start()
    first, second = results.get(timeout=300), results.get(timeout=300)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert first == second
    assert [v for _, v in first] == [1, 2] and 41 < first[1][0] <= 41 + 2 * 8


def test_fp16_overflow_is_refused(tmp_path):
    site = Site(tmp_path)
    # a server in float16: 1e6 is finite in the file and infinite there
    site.model.half()
    site.reloader = Reloader(
        site.model, site.hot, WeightsConfig(directory=tmp_path), SwapConfig(), TARGET
    )
    site.publish(checkpoint(1) | {"norm.weight": torch.full((H,), 1e6)})
    assert site.step() is None and site.reloader.counters()["refused_values"] == 1


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


def test_a_draft_with_the_targets_head_is_refused(tmp_path):
    model = Draft(nn.Parameter(torch.zeros(V, H)))
    model.load_lm_head_from_target = True
    with pytest.raises(ValueError, match="lm_head"):
        Reloader(model, None, WeightsConfig(directory=tmp_path), SwapConfig(), TARGET)


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


def bad_tensors(change):
    tensors = checkpoint(2)
    change(tensors)
    return lambda site: site.publish(tensors)


def spoil(edit):
    def make(site):
        site.publish(checkpoint(2))
        edit(site.directory / "v000002")

    return make


def edit_manifest(version_dir, **fields):
    path = version_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip_byte(version_dir):
    path = version_dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def swap_two_tensors(version_dir):
    path = version_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"], tensors["midlayer.hidden_norm.weight"] = torch.ones(H), torch.zeros(H)
    save_file(tensors, path)


NAN = torch.tensor(float("nan"))
BAD = {
    "missing manifest": ("missing", spoil(lambda d: (d / "manifest.json").unlink())),
    "missing weights": ("missing", spoil(lambda d: (d / "model.safetensors").unlink())),
    "truncated": ("size", spoil(lambda d: (d / "model.safetensors").write_bytes(b"x" * 99))),
    "empty manifest": ("manifest", spoil(lambda d: (d / "manifest.json").write_bytes(b""))),
    "unknown field": ("manifest", spoil(lambda d: edit_manifest(d, more=1))),
    "future format": ("format", spoil(lambda d: edit_manifest(d, format=2))),
    "renamed": ("name", spoil(lambda d: edit_manifest(d, version=7))),
    "bit flip": ("hash", spoil(flip_byte)),
    "other config, same size": (
        "hash",
        spoil(
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace("8", "9")
            )
        ),
    ),
    "other content": ("hash", spoil(swap_two_tensors)),
    "other target": ("target", lambda site: site.publish(checkpoint(2), target="0" * 32)),
    "other config": ("config", lambda site: site.publish(checkpoint(2), {"hidden_size": 16})),
    "other aux layers": (
        "config",
        lambda site: site.publish(
            checkpoint(2), {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}
        ),
    ),
    "nan": ("values", bad_tensors(lambda t: t["fc.weight"].view(-1)[3].copy_(NAN))),
    "bf16 inf": (
        "values",
        bad_tensors(lambda t: t.update({"norm.weight": (NAN / 1).to(torch.bfloat16).repeat(H)})),
    ),
    "missing name": ("names", bad_tensors(lambda t: t.pop("midlayer.self_attn.k_proj.weight"))),
    "unknown name": ("names", bad_tensors(lambda t: t.update({"layers.0.extra": torch.ones(2)}))),
    "same name twice": (
        "names",
        bad_tensors(lambda t: t.update({"model.norm.weight": torch.ones(H)})),
    ),
    "missing d2t": ("names", bad_tensors(lambda t: t.pop("d2t"))),
    "wrong shape": ("shape", bad_tensors(lambda t: t.update({"norm.weight": torch.ones(1)}))),
    "wrong dtype": (
        "dtype",
        bad_tensors(lambda t: t.update({"norm.weight": torch.ones(H, dtype=torch.int64)})),
    ),
    "d2t out of range": (
        "d2t",
        bad_tensors(lambda t: t.update({"d2t": torch.full((VD,), V - VD + 1)})),
    ),
    "d2t maps twice": ("d2t", bad_tensors(lambda t: t["d2t"][1].fill_(int(t["d2t"][0]) - 1))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_counted_and_forgotten(site, case):
    site.publish(checkpoint(1))
    assert site.step() == 1
    cause, make = BAD[case]
    make(site)
    for _ in range(3):
        assert site.step() is None
    site.assert_whole(1)
    counted = site.reloader._watcher.failures
    assert set(counted) == {cause} and counted[cause] == (3 if cause == "missing" else 1)
    # the next good one is taken
    site.publish(checkpoint(4))
    site.assert_whole(1)
    assert site.step() == 3
    site.assert_whole(4)


def test_rollback_is_exact_after_many_swaps(site):
    rng = np.random.default_rng(0)
    tensors = checkpoint(1)
    for _ in range(3):
        for t in tensors.values():
            if t.is_floating_point():
                t.copy_(torch.from_numpy(rng.standard_normal(t.shape)))
        before = [p.detach().clone() for p in site.model.parameters()]
        site.publish(tensors)
        assert site.step()
        site.reloader.rollback()
        assert all(torch.equal(a, b) for a, b in zip(before, site.model.parameters(), strict=True))


def test_durations_and_freshness_of_swaps_while_it_serves(tmp_path):
    site = Site(tmp_path)
    site.publish(checkpoint(1))
    # an old version that lay there says nothing about either
    site.reloader.apply_at_start()
    assert sum(site.reloader.durations.counts) == sum(site.reloader.freshness.counts) == 0
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
    assert sum(site.reloader.stalls.counts) == 2 and sum(site.reloader.durations.counts) == 1
    assert 20 <= site.reloader.freshness.sum < 45 and 0 < site.reloader.durations.sum < 25
    created = [read_manifest(tmp_path / version_name(version)).created_unix_s for version in (1, 2)]
    assert site.reloader.created_unix_s == created[1]
    site.reloader.rollback()
    assert site.reloader.created_unix_s == created[0]


def test_an_operator_takes_a_version_back(site):
    """The runbook's two commands: a line in REJECTED and a touch of CURRENT."""
    site.publish(checkpoint(1))
    site.step()
    site.writer.publish(
        checkpoint(2), {"hidden_size": H}, target=TARGET, parent=1, optimizer_step=2
    )
    assert site.step() == 2
    subprocess.run(
        """echo '{"version": 2}' >> REJECTED && touch CURRENT""",
        shell=True,
        check=True,
        cwd=site.directory,
    )
    assert site.step() == 1
    site.assert_whole(1)
    assert site.reloader.counters()["refused_rejected"] == 1


# What an operator's calls do to a draft


def spoil(site):
    for name, p in site.model.named_parameters():
        if "embed_tokens" not in name:
            p.data.fill_(-9.0)
    site.hot.fill_(-9)


def test_what_drafts_is_put_back(site):
    """The draft that the server began with, a version, what a rollback left: each from its copy."""
    initial = {n: p.detach().clone() for n, p in site.model.named_parameters()}
    spoil(site)
    site.reloader.restore()
    assert all(torch.equal(p, initial[n]) for n, p in site.model.named_parameters())
    assert torch.equal(site.hot, torch.arange(VD))
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        assert site.step() == seed
        spoil(site)
        site.reloader.restore()
        site.assert_whole(seed)
    site.reloader.rollback()
    spoil(site)
    site.reloader.restore()
    site.assert_whole(1)
    assert site.reloader.counters()["swaps"] == 3


def test_what_no_copy_holds_is_read_again(site):
    """The staging copy was given a version that failed, and CURRENT names the one that drafts
    again.
    """
    site.publish(checkpoint(1))
    site.publish(checkpoint(2))
    site.step()
    # as a staging that failed leaves it
    site.reloader._in_staging = None
    spoil(site)
    site.reloader.restore()
    assert site.step() == 2
    site.assert_whole(2)


def test_another_target(site):
    """What was staged for the old target is not swapped in, what was refused is looked at again."""
    site.publish(checkpoint(1))
    site.step()
    site.publish(checkpoint(2))
    # staged, not yet swapped
    site.reloader._watcher.poll()
    site.reloader.retarget("e" * 32)
    assert site.reloader.apply_pending() is None and site.reloader.version == 1
    site.assert_whole(1)
    assert site.step() is None and site.reloader._watcher.failures == {"target": 1}
    site.publish(checkpoint(3), target="e" * 32)
    assert site.step() == 3
    site.publish(checkpoint(4))
    assert site.step() is None
    site.reloader.retarget(TARGET)
    assert site.step() == 4
    site.assert_whole(4)
    refused = dict(site.reloader._watcher.failures)
    site.reloader.retarget("e" * 32)
    # what drafts goes on, and is no news
    assert site.step() is None
    assert site.reloader._watcher.failures == refused
    assert site.reloader.counters()["target_changes"] == 3


def test_a_rejection_by_another_server_is_heeded_while_the_version_drafts(site):
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        site.step()
    path = site.directory / version_name(2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parent": 1}))
    assert site.step() is None
    with open(site.directory / "REJECTED", "a") as file:
        file.write('{"version": 2}\n')
    assert site.step() == 1
    site.assert_whole(1)
    site.publish(checkpoint(3))
    assert site.step() == 3
