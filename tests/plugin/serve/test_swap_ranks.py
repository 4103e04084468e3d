"""Two tensor-parallel ranks, each a process, agree on the step of a swap; what one of them fails at
is undone on both.
"""

import multiprocessing
import socket

import torch
from reload_site import TARGET, Site, checkpoint

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.weights.writer import WeightsWriter


def rank(number, directory, port, results, breaks):
    """One of two tensor-parallel ranks; rank 1 sees each version some steps after rank 0. `breaks`:
    its first swap while it serves raises."""
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=number
    )
    writer, directory = directory / "writer", directory / f"rank{number}"
    site = Site(directory)
    world = torch.distributed.group.WORLD
    weights = WeightsConfig(directory=writer)
    reloader = Reloader(site.model, site.hot, weights, SwapConfig(poll_s=9), TARGET, world)
    steps = [(0, reloader.apply_at_start())]
    if breaks and number == 1:
        put = reloader._memory.put

        def fails(tensors):
            reloader._memory.put = put
            raise RuntimeError("no copy")

        reloader._memory.put = fails
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
    if breaks:
        site.assert_whole(1)
        assert reloader.version == 1 and reloader.counters()["refused_swap"] == 1
        # once
        written = site.count_writes()
        for _ in range(40):
            reloader.step()
        assert site.count_writes() == written
    results.put((number, steps))
    torch.distributed.destroy_process_group()


def two_ranks(tmp_path, breaks):
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
        spawn.Process(target=rank, args=(n, tmp_path, port, results, breaks), daemon=True)
        for n in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return found[0], found[1]


def test_ranks_swap_at_the_same_step(tmp_path):
    first, second = two_ranks(tmp_path, breaks=False)
    assert first == second
    assert [v for _, v in first] == [1, 2] and 41 < first[1][0] <= 41 + 2 * 8


def test_a_swap_that_fails_on_one_rank_is_undone_on_all(tmp_path):
    """Shards of two versions would accept nothing: rank 0 had swapped, rank 1 raised."""
    first, second = two_ranks(tmp_path, breaks=True)
    assert [v for _, v in first] == [1, 2] and [v for _, v in second] == [1]
