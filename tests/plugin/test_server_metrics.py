"""The server's families: two tensor-parallel ranks in SGLang's kind of registry, and the counting
underneath.
"""

import subprocess
import sys

import numpy as np
import pytest
from metric_pages import documented, exported, values
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from aurora_sglang_plugin.metric_families import Exported, Tally, counter, gauge, histogram
from aurora_sglang_plugin.serve.accepted_counts import Acceptance, accepted, mean_length

# One rank's process: swaps on both, capture on rank 0 alone, as worker.py has it.
RANK = """
import sys
from collections import defaultdict
from types import SimpleNamespace
import numpy as np
import torch
from aurora_sglang_plugin.serve.capture import Capture
from aurora_sglang_plugin.config import CaptureConfig, PublishConfig
from aurora_sglang_plugin.metric_families import Tally
from aurora_sglang_plugin.metrics_thread import ServerMetrics
from aurora_sglang_plugin.link.send_queue import SendQueue
from aurora_sglang_plugin.serve.swap_times import FRESHNESS_S, STALL_S, SWAP_S
from aurora_sglang_plugin.serve.snapshot import End

rank = int(sys.argv[1])
# a counter that is new is 0
counts = defaultdict(int)
counts |= {"draft_version": 3, "swaps": 2 + rank, "target_changes": 1, "prefix_renewals": 2}
counts |= {"refused_hash": 1, "refused_swap": rank, "refused_new_cause": 4}
times = SimpleNamespace(
    stalls=Tally(STALL_S), durations=Tally(SWAP_S), freshness=Tally(FRESHNESS_S)
)
reloader = SimpleNamespace(counters=lambda: counts, created_unix_s=0.0, times=times)
capture = None
if rank == 0:
    send_queue = SendQueue(PublishConfig(queue_messages=2))
    ledger = send_queue.counters
    send_queue.counters = lambda: ledger() | {"refused": {"key": 2}}  # as the publisher's are
    capture = Capture(CaptureConfig(), send_queue, torch.device("cpu"), num_steps=3, topk=1)
    for n in range(5):
        send_queue.put("end", End(7), {"draft_version": 3})
    capture.boundary.seconds["verify"].observe(0.0003)
    capture.acceptance.add(2, np.array([1, 1, 4]))
    capture.acceptance.add(3, np.array([4, 3]))
    capture.publisher = send_queue
control = SimpleNamespace(
    mode="live", rounds=lambda: {"cold": 4, "3": 5},
    canary=SimpleNamespace(suspected=2, rejected=1),
    speculation=SimpleNamespace(explored=8, gain=lambda: 1.5),
    audit=SimpleNamespace(results={"same": 3}),
)
metrics = ServerMetrics(capture, reloader, control, tp_rank=rank)
metrics.start()
counts["swaps"] += 1
times.stalls.observe(0.004)
metrics.refresh()
metrics.refresh()
metrics.close()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What SGLang's /metrics would say of two ranks."""
    directory = tmp_path_factory.mktemp("multiproc")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(n)], env={"PROMETHEUS_MULTIPROC_DIR": str(directory)}
        )
        for n in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return generate_latest(registry).decode()


def test_documentation_is_what_is_exported(page):
    assert exported(page, "aurora_") == documented("Server")


def test_every_rank_is_right_and_nothing_counts_twice(page):
    found = values(page)
    swaps = {n: found[f'aurora_swaps_total{{dp_rank="0",tp_rank="{n}"}}'] for n in (0, 1)}
    assert swaps == {0: 3, 1: 4}
    assert [v for k, v in found.items() if k.startswith("aurora_captured_messages")] == [5]
    assert found['aurora_dropped_messages_total{cause="queue_full",dp_rank="0",tp_rank="0"}'] == 3
    assert found['aurora_dropped_messages_total{cause="no_buffer",dp_rank="0",tp_rank="0"}'] == 0
    assert found['aurora_link_refused_total{cause="key",dp_rank="0",tp_rank="0"}'] == 2
    assert found['aurora_queued_messages{dp_rank="0",tp_rank="0"}'] == 2
    assert found['aurora_mode{dp_rank="0",mode="live",tp_rank="1"}'] == 1
    assert found['aurora_decode_rounds_total{dp_rank="0",steps="cold",tp_rank="0"}'] == 4
    assert found['aurora_versions_rejected_total{dp_rank="0",tp_rank="0"}'] == 1
    assert found['aurora_weights_refused_total{cause="other",dp_rank="0",tp_rank="1"}'] == 4
    for n in (0, 1):
        rank = f'dp_rank="0",le="0.005",tp_rank="{n}"'
        assert found[f"aurora_swap_stall_seconds_bucket{{{rank}}}"] == 1
        assert found[
            f'aurora_swap_stall_seconds_sum{{dp_rank="0",tp_rank="{n}"}}'
        ] == pytest.approx(0.004)


def test_acceptance_by_position_and_version(page):
    found = values(page)

    def value(name, **labels):
        pairs = sorted({"dp_rank": "0", "tp_rank": "0", **labels}.items())
        return found[name + "{" + ",".join(f'{k}="{v}"' for k, v in pairs) + "}"]

    assert (
        value("aurora_accept_length_tokens_count") == 5
        and value("aurora_accept_length_tokens_sum") == 13
    )
    assert value("aurora_accept_length_tokens_bucket", le="1.0") == 2
    assert [value("aurora_accepted_drafts_total", position=p) for p in "123"] == [3, 3, 2]
    assert value("aurora_version_accept_length_tokens", role="previous") == 2
    assert value("aurora_version_accept_length_tokens", role="current") == 3.5
    assert value("aurora_version_acceptance_ratio", role="current", position="3") == 0.5
    assert value("aurora_version_verify_steps", role="previous") == 3


def test_a_version_that_comes_back_keeps_what_it_had():
    a = Acceptance(2)
    a.add(1, np.array([3, 3]))
    a.add(2, np.array([1]))
    assert mean_length(a.of_role["previous"]) == 3
    # 2 was rolled back
    a.add(1, np.array([1, 1]))
    assert mean_length(a.of_role["current"]) == 2 and mean_length(a.of_role["previous"]) == 1
    a.add(5, np.array([2]))
    assert mean_length(a.of_role["previous"]) == 2 and sum(a.of_role["current"]) == 1
    assert sum(a.by_length) == 6 and accepted(a.by_length) == [3, 2]


def test_a_tally_is_the_histogram_that_prometheus_would_have_made():
    bounds, seen = (0.5, 1, 2), [0.5, 0.500001, 1, 2, 2.5, 0]
    registry = CollectorRegistry()
    exported = Exported(
        {"ours": histogram("h", bounds=bounds), "theirs": histogram("h", bounds=bounds)}, registry
    )
    tally = Tally(bounds)
    for value in seen:
        tally.observe(value)
        exported.load("ours", tally)
        exported.child("theirs").observe(value)
    ours, theirs = (
        [(s.labels, s.value) for s in family.samples if "_created" not in s.name]
        for family in registry.collect()
    )
    assert ours == theirs and [value for _, value in ours][:5] == [2, 4, 5, 6, 6]


def test_counters_go_on_from_before_and_never_back():
    registry = CollectorRegistry()
    families = {"a": counter("a"), "b": counter("b", cause=("x", "y")), "g": gauge("g")}
    exported = Exported(families, registry)
    # there before the first event
    assert registry.get_sample_value("b_total", {"cause": "y"}) == 0
    # NaN: not known yet
    assert registry.get_sample_value("g") != registry.get_sample_value("g")
    exported.count_to("a", 100, before=True)
    for total in (103, 99, 100):
        exported.count_to("a", total)
    assert registry.get_sample_value("a_total") == 4
    exported.count_to("b", {"x": 2, "invented": 3, "by a stranger": 4})
    exported.count_to("b", {"x": 2, "invented": 5, "by a stranger": 4})
    assert registry.get_sample_value("b_total", {"cause": "other"}) == 9
    assert registry.get_sample_value("b_total", {"cause": "x"}) == 2
    assert registry.get_sample_value("b_total", {"cause": "invented"}) is None
