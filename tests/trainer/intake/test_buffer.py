"""The buffer: fresh first, bounded, each sample at most max_uses times, deterministic."""

import json
from collections import Counter

import pytest
import torch

from aurora_trainer.intake.buffer import Buffer, BufferConfig
from aurora_trainer.intake.sample import Sample


def sample(number, positions=10, time_s=None, domain="", session="e"):
    z = torch.zeros(0, dtype=torch.int64)
    return Sample(
        request=str(number), session=session, domain=domain, attempt=0, start=0, prompt_len=1,
        reason="stop",
        time_ns=int((number if time_s is None else time_s) * 1e9),
        tokens=torch.zeros(positions + 1, dtype=torch.int64),
        features=torch.zeros(positions, 4),
        position_version=torch.zeros(positions, dtype=torch.int32),
        position_node=torch.full((positions,), -1), node_token=z, node_parent=z, node_depth=z,
        node_position=z,
        node_accepted=z.bool(), node_altered=z.bool(), topk_ids=z.view(0, 2),
        topk_logits=torch.zeros(0, 2),
        logsumexp=torch.zeros(0), tree_first=z, tree_version=z.int(), num_steps=3, topk=1,
    )  # fmt: skip


def names(batch):
    return [int(s.request) for s in batch]


def filled(count, **config):
    buffer = Buffer(BufferConfig(**config), seed=1)
    for number in range(count):
        buffer.put(sample(number))
    return buffer


def test_the_freshest_come_first():
    buffer = filled(10)
    assert names(buffer.take(30)) == [9, 8, 7]


def test_a_batch_mixes_fresh_and_used():
    buffer = filled(20, fresh_fraction=0.5, max_uses=9)
    buffer.take(40)
    batch = names(buffer.take(40))
    assert batch[:2] == [15, 14] and set(batch[2:]) < {16, 17, 18, 19} and len(batch) == 4


@pytest.mark.parametrize("max_uses", [1, 3])
def test_nothing_is_used_more_often_than_it_may_be_and_all_is_used(max_uses):
    buffer = filled(13, max_uses=max_uses)
    uses = Counter()
    while batch := buffer.take(25):
        assert len(set(names(batch))) == len(batch) and sum(len(s.features) for s in batch) <= 25
        uses.update(names(batch))
    assert uses == {number: max_uses for number in range(13)}
    assert (
        buffer.dropped == {"used_up": 13} and len(buffer) == buffer.nbytes == buffer.positions == 0
    )


def test_bounded_in_bytes_the_oldest_goes():
    size = sample(0).nbytes
    buffer = filled(3, max_bytes=5 * size)
    # uses number 2
    buffer.take(10)
    for number in range(3, 9):
        buffer.put(sample(number))
        assert buffer.nbytes <= 5 * size
    assert buffer.dropped == {"evicted": 3, "replaced": 1}
    assert sorted(names(buffer.take(1000))) == [4, 5, 6, 7, 8]


def test_a_sample_larger_than_the_buffer_is_counted_and_not_kept():
    buffer = filled(0, max_bytes=100)
    buffer.put(sample(0))
    assert len(buffer) == 0 and buffer.dropped == {"evicted": 1}


def test_stale_samples_go():
    buffer = filled(0, max_age_s=60)
    for time_s in (0, 50, 61, 200):
        buffer.put(sample(time_s))
    assert names(buffer.take(1000)) == [200] and buffer.dropped == {"stale": 3}


def test_a_sample_larger_than_a_batch_comes_alone():
    buffer = filled(0, max_uses=2)
    buffer.put(sample(0))
    buffer.put(sample(1, positions=500))
    assert names(buffer.take(100)) == [1]
    assert names(buffer.take(100))[0] == 0


def test_packing_fills_the_batch_past_one_that_does_not_fit():
    buffer = filled(0)
    for number, positions in enumerate((10, 60, 30)):
        buffer.put(sample(number, positions))
    assert names(buffer.take(50)) == [2, 0]


def test_draws_repeat_from_a_saved_state():
    def go_on(buffer, first):
        out = []
        for number in range(first, first + 30):
            buffer.put(sample(number))
            out.append(names(buffer.take(60)))
        return out

    buffer = filled(40, max_uses=5)
    go_on(buffer, 40)
    state = json.loads(json.dumps(buffer.state()))
    copies = [Buffer(buffer.config, seed=seed) for seed in (7, 8)]
    for copy in copies:
        copy.restore(state)
        assert copy.dropped["lost"] == len(buffer) and copy.put_count == 70
    one, two = (go_on(copy, 70) for copy in copies)
    assert one == two
    assert one != go_on(Buffer(buffer.config, seed=9), 70)


def test_stats():
    buffer = filled(4)
    buffer.take(10)
    stats = buffer.stats()
    assert (
        stats["samples"],
        stats["fresh_samples"],
        stats["fresh_positions"],
        stats["positions"],
    ) == (
        4,
        3,
        30,
        40,
    )
    assert (stats["age_mean_s"], stats["age_max_s"]) == (1.5, 3.0)


HOUR_S = 3600


@pytest.mark.parametrize("ahead_s", [HOUR_S + 60, -HOUR_S - 60, 2**63 / 1e9 - 100])
@pytest.mark.parametrize("share_by", [(), ("domain", "server")])
def test_a_wrong_clock_harms_no_other_server(ahead_s, share_by):
    buffer = filled(0, max_age_s=HOUR_S, share_by=share_by)
    for number in range(10):
        buffer.put(sample(number, time_s=100_000 + number, session="right"))
        buffer.put(sample(100 + number, time_s=max(0, 100_000 + number + ahead_s), session="wrong"))
    assert len(buffer) == 20 and not buffer.dropped and buffer.stats()["age_max_s"] <= 10
    # and its own age as ever
    buffer.put(sample(20, time_s=100_003 + HOUR_S + 0.5, session="right"))
    assert buffer.dropped == {"stale": 4}


def test_a_clock_that_is_put_right_harms_its_own_server_once_at_most():
    buffer = filled(0, max_age_s=HOUR_S)
    for number, time_s in enumerate([10_000, 10_001, 20_000, 10_002, 10_003]):
        buffer.put(sample(number, time_s=time_s))
    assert buffer.dropped == {"stale": 2} and len(buffer) == 3


def held(buffer):
    return Counter(e.sample.domain for e in buffer._entries.values())


def test_a_flood_takes_from_its_own_domain_only():
    size = sample(0).nbytes
    buffer = filled(0, max_bytes=20 * size)
    for number in range(6):
        buffer.put(sample(number, domain="code" if number % 2 else ""))
    for number in range(10, 300):
        buffer.put(sample(number, domain="flood"))
    assert held(buffer) == {"": 3, "code": 3, "flood": 14} and buffer.nbytes <= 20 * size
    assert [n for n in sorted(names([e.sample for e in buffer._entries.values()])) if n > 9] == [
        *range(286, 300)
    ]
    # and the fresh part of a batch is shared as well
    batch = buffer.take(60)
    assert Counter(s.domain for s in batch) == {"": 2, "code": 2, "flood": 2}


def test_a_flood_of_labels_leaves_others_their_shares():
    size = sample(0).nbytes
    buffer = filled(0, max_bytes=90 * size)
    for number in range(8):
        buffer.put(sample(number, domain="code" if number % 2 else ""))
    for number in range(10, 2000):
        buffer.put(sample(number, domain=f"label-{number}"))
    assert held(buffer)["code"] == held(buffer)[""] == 4
    assert {"", "code"} <= {s.domain for s in buffer.take(200)}


def test_servers_share_a_domain():
    size = sample(0).nbytes
    buffer = filled(0, max_bytes=10 * size)
    for number in range(3):
        buffer.put(sample(number, session="small"))
    for number in range(10, 100):
        buffer.put(sample(number, session="flood"))
    assert Counter(e.sample.session for e in buffer._entries.values()) == {"small": 3, "flood": 7}
    off = filled(0, max_bytes=10 * size, share_by=())
    for number in range(30):
        off.put(sample(number, session="small" if number < 3 else "flood"))
    assert names(off.take(1000)) == [*range(29, 19, -1)]


def test_while_unseen_samples_are_lost_batches_hold_no_repeats():
    size = sample(0).nbytes
    buffer = filled(40, max_bytes=40 * size)
    buffer.take(100)
    mixed = names(buffer.take(100))
    assert set(mixed) & set(range(30, 40)), "half of a batch is a repeat"
    for number in range(40, 60):
        # as many unseen ones leave
        buffer.put(sample(number))
    assert buffer.dropped["evicted"] > 0
    assert names(buffer.take(100)) == [*range(59, 49, -1)]
    # nothing more was lost: as ever
    again = names(buffer.take(100))
    assert (
        again[:5] == [*range(49, 44, -1)]
        and len(set(again) & set(range(50, 60)) | set(again) & set(range(40))) == 5
    )


def test_the_one_sample_at_fault_goes_and_all_others_are_trained_on():
    buffer, trained = filled(40, max_uses=2), Counter()
    for _ in range(200):
        if not (batch := buffer.take(80)):
            break
        if 17 in names(batch):
            buffer.failed()
        else:
            trained.update(names(batch))
    assert buffer.dropped == {"failed": 1, "used_up": 39} and len(buffer) == buffer.nbytes == 0
    assert set(trained) == set(range(40)) - {17} and all(uses == 2 for uses in trained.values())


def test_a_sample_that_fails_after_it_has_left_is_counted_once():
    buffer = filled(4, max_uses=1)
    while buffer.take(80):
        buffer.failed()
    assert sum(buffer.dropped.values()) == buffer.put_count == 4
