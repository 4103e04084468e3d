"""Attention over scattered KV slots against naive attention, and the slots that requests and drafts
are given.
"""

import pytest
import torch

from aurora_sglang_plugin.cpu_engine import attention, slots

SLOTS, HEADS, KV_HEADS, D = 300, 6, 2, 16
SCALE = 0.3


class Pool:
    """A KV pool in which requests' slots are scattered, and slots that no request owns hold NaN."""

    def __init__(self, lens):
        torch.manual_seed(1)
        self.lens = torch.tensor(lens)
        self.k = torch.full((SLOTS, KV_HEADS, D), float("nan"))
        self.v = self.k.clone()
        free = torch.randperm(SLOTS)
        self.rows = torch.randperm(8)[: len(lens)]
        # stale entries behind every sequence
        self.table = torch.randint(0, SLOTS, (8, 100), dtype=torch.int32)
        for row, length in zip(self.rows, lens):
            owned, free = free[:length], free[length:]
            self.table[row, :length] = owned.int()
            self.k[owned], self.v[owned] = torch.randn(2, length, KV_HEADS, D)

    def naive(self, request, query, visible):
        """query [Hq, D] attends to the first positions of a request where visible [L] is True."""
        own = self.table[self.rows[request], : self.lens[request]].long()[visible]
        k, v = (x[own].repeat_interleave(HEADS // KV_HEADS, 1) for x in (self.k, self.v))
        weights = torch.softmax(torch.einsum("hd,lhd->hl", query, k) * SCALE, -1)
        return torch.einsum("hl,lhd->hd", weights, v)


def decode(pool, q, k=None, v=None, cache_loc=None):
    out = torch.empty_like(q)
    attention.decode_attention_cpu(
        q, pool.k, pool.v, 1.0, 1.0, out, k, v, cache_loc, None, pool.table, pool.rows, pool.lens,
        SCALE,
        0.0, False, 0, None, None,
    )  # fmt: skip
    return out


def extend(pool, q, counts, mask=None):
    out, counts = torch.empty_like(q), torch.tensor(counts, dtype=torch.int32)
    attention.extend_attention_cpu(
        q, None, None, out, pool.k, pool.v, 1.0, 1.0, pool.table, pool.rows, pool.lens, counts,
        counts.cumsum(0) - counts, int(counts.max()), SCALE, 0.0, False, 0, None, None, mask, True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("lens", [[1], [7, 1, 40], [33] * 4])
def test_decode_is_attention_to_the_whole_sequence(lens):
    pool = Pool(lens)
    q = torch.randn(len(lens), HEADS, D)
    expected = torch.stack([pool.naive(r, q[r], slice(None)) for r in range(len(lens))])
    torch.testing.assert_close(decode(pool, q), expected)


def test_decode_stores_the_new_token_first():
    pool = Pool([5, 9])
    last = pool.table[pool.rows, pool.lens - 1].long()
    k, v = torch.randn(2, 2, KV_HEADS, D)
    q = torch.randn(2, HEADS, D)
    out = decode(pool, q, k.view(2, -1), v.view(2, -1), last)
    assert torch.equal(pool.k[last], k) and torch.equal(pool.v[last], v)
    torch.testing.assert_close(
        out, torch.stack([pool.naive(r, q[r], slice(None)) for r in range(2)])
    )


@pytest.mark.parametrize(
    "lens, counts",
    [
        ([12], [12]),
        ([12, 7, 20], [12, 2, 5]),
        ([9, 30], [4, 4]),
        ([5, 5], [5, 5]),
        ([90], [90]),
        ([95, 80], [70, 70]),
    ],
)
def test_extend_is_causal(lens, counts):
    pool = Pool(lens)
    q = torch.randn(sum(counts), HEADS, D)
    expected = [
        pool.naive(r, q[sum(counts[:r]) + i], torch.arange(lens[r]) <= lens[r] - counts[r] + i)
        for r in range(len(lens))
        for i in range(counts[r])
    ]
    torch.testing.assert_close(extend(pool, q, counts), torch.stack(expected))


def test_verify_sees_ancestors_only():
    parents = [-1, 0, 0, 1, 1, 2]
    # the first request has no prefix
    n, lens = len(parents), [6, 11, 50]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i, parent in enumerate(parents):
        mask[i] = mask[parent] if parent >= 0 else False
        mask[i, i] = True
    masks = torch.stack([mask, torch.tril(torch.ones(n, n, dtype=torch.bool)), mask])
    pool = Pool(lens)
    q = torch.randn(len(lens) * n, HEADS, D)
    expected = [
        pool.naive(
            r, q[r * n + i], torch.cat([torch.ones(lens[r] - n, dtype=torch.bool), masks[r, i]])
        )
        for r in range(len(lens))
        for i in range(n)
    ]
    torch.testing.assert_close(extend(pool, q, [n] * 3, masks.flatten()), torch.stack(expected))


def test_what_is_not_built_is_refused():
    pool = Pool([4])
    q = torch.randn(1, HEADS, D)
    with pytest.raises(NotImplementedError, match="sliding windows"):
        attention.decode_attention_cpu(
            q, pool.k, pool.v, 1.0, 1.0, q, None, None, None, None, pool.table, pool.rows,
            pool.lens, SCALE,
            0.0, False, 128, None, None,
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="QLEN_ONLY"):
        extend(pool, q, [1], torch.ones(5, dtype=torch.bool))


# Slots


def test_slots_are_written_and_read_per_request():
    rows, table = torch.tensor([3, 1]), torch.zeros(4, 10, dtype=torch.int32)
    start, end, owned = (
        torch.tensor([2, 0]),
        torch.tensor([5, 2]),
        torch.tensor([11, 12, 13, 14, 15]),
    )
    slots.assign_req_to_token_pool_cpu(rows, table, start, end, owned, 10)
    assert table[3].tolist() == [0, 0, 11, 12, 13, 0, 0, 0, 0, 0] and table[1, :3].tolist() == [
        14,
        15,
        0,
    ]
    packed = torch.zeros(5, dtype=torch.long)
    slots.assign_extend_cache_locs_cpu(rows, table, start, end, packed, 10)
    assert torch.equal(packed, owned)
    lanes = torch.zeros(8, dtype=torch.long)
    slots.assign_draft_cache_locs_contiguous_cpu(rows, table, torch.tensor([1, 0]), lanes, 10, 2, 2)
    assert lanes.tolist() == [0, 11, 12, 13, 14, 15, 0, 0]


def test_a_lane_is_the_sequence_and_its_own_draft_slots():
    table = torch.arange(60, dtype=torch.int32).view(3, 20)
    lanes = slots.build_draft_decode_metadata_cpu(
        table, torch.tensor([2, 0]), torch.tensor([3, 1]), 2, 3, 20
    )
    assert lanes.tolist() == [
        [40, 41, 42, 43, 44, 45],
        [40, 41, 42, 46, 47, 48],
        [0, 1, 2, 3, 0, 0],
        [0, 4, 5, 6, 0, 0],
    ]


def test_accepted_nodes_move_to_the_front():
    path = torch.tensor([[0, 2, -1], [3, -1, -1]])
    front = torch.full((4,), -7)
    slots.fill_accept_out_cache_loc_cpu(path, torch.tensor([10, 11, 12, 13, 14, 15]), front)
    assert front.tolist() == [10, 12, 13, -7]
    bonus = torch.zeros(2, dtype=torch.int32)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    slots.fill_bonus_tokens_cpu(tokens, torch.tensor([2, 1], dtype=torch.int32), bonus, 3)
    assert bonus.tolist() == [2, 4]
    ids = torch.tensor([1, 2, 3, 4, 5])
    slots.rotate_input_ids_cpu(
        ids, torch.tensor([0, 3]), torch.tensor([3, 2]), torch.tensor([[8], [9]])
    )
    assert ids.tolist() == [2, 3, 8, 5, 9]


def test_kv_rows_move_by_address_and_overlap_safely():
    layers = [torch.randn(20, 2, 3), torch.randn(20, 5).to(torch.bfloat16)]
    before = [layer.clone() for layer in layers]
    source, target = torch.tensor([4, 5, 9]), torch.tensor([3, 4, 5])
    addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)
    strides = torch.tensor([layer[0].numel() * layer.element_size() for layer in layers])
    slots.copy_all_layer_kv_cache_cpu(addresses, strides, target, source)
    for layer, old in zip(layers, before):
        expected = old.clone()
        expected[target] = old[source]
        assert torch.equal(layer, expected)
