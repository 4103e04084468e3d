"""The kernels of tree_attention against the reference in float64, which is tested against one query
at a time.
"""

import aurora_kernels.tree_attention_launch as tree_attention_launch
import pytest
import torch
from attention_inputs import compare, inputs, outputs, random_index, tree_index
from aurora_kernels.tree_attention import (
    queries_of_nodes,
    rows_of_positions,
    sort_queries,
    tree_attention,
)
from aurora_kernels.tree_attention_ref import tree_attention_ref
from biggest import Biggest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import NAMED_TREES, random_tree

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows and 16 keys: a few dozen of positions and queries make many of them."""
    monkeypatch.setattr(tree_attention_launch, "blocks", lambda *_: (16, 16, 4, 2))


# the device
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    queries=st.integers(0, 30),
    nodes=st.integers(0, 20),
    width=st.integers(0, 3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    dim=st.sampled_from([2, 5, 16]),
)
def test_outputs_and_gradients_equal_the_references(
    device, seed, lengths, queries, nodes, width, kv_heads, group, dim
):
    compare(
        inputs(device, queries, sum(lengths), nodes, kv_heads, group, dim, seed=seed),
        random_index(device, queries, lengths, nodes, width, seed),
    )


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8])
def test_many_blocks_and_several_sequences_in_each(device, small_blocks, group):
    lengths, queries = [37, 1, 5, 60, 2], 96 // group
    compare(
        inputs(device, queries, 105, 30, 1, group), random_index(device, queries, lengths, 30, 3)
    )


@pytest.mark.parametrize("dim", [2, 5, 40, 64, 96, 128])
def test_head_sizes(device, dim):
    compare(
        inputs(device, 20, 70, 9, 1, 4, dim), random_index(device, 20, [50, 20], 9, 2), dim**-0.5
    )


@pytest.mark.parametrize("positions", [1, 16, 100])
def test_one_sequence_causal(device, small_blocks, positions):
    """Level 0 of one sequence, without nodes: a single token, a whole block, many unmasked
    blocks.
    """
    index = [torch.zeros(positions, dtype=torch.int64), torch.arange(positions) + 1, None]
    tensors = inputs(device, positions, positions, 0, 1, 2)
    compare([*tensors], [x if x is None else x.to(device) for x in index])


@pytest.mark.parametrize(
    "queries, positions, nodes, width", [(0, 5, 3, 1), (3, 0, 4, 2), (4, 6, 0, 2), (4, 6, 3, 0)]
)
def test_nothing_of_something(device, queries, positions, nodes, width):
    """No queries, no positions, no nodes, no ancestors."""
    compare(
        inputs(device, queries, positions, nodes),
        random_index(device, queries, [positions], nodes, width),
    )


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(device):
    # an end before its start as well
    start, end = torch.tensor([0, 1, 4, 3]), torch.tensor([0, 4, 4, 2])
    ancestors = torch.tensor([[-1, -1], [-1, -1], [1, -1], [-1, -1]])
    tensors, index = inputs(device, 4, 4, 2), [x.to(device) for x in (start, end, ancestors)]
    compare(tensors, index)
    have = outputs(tree_attention, tensors, index, 0.3)
    assert (
        not have["o"][[0, 3]].any()
        and not have["dq"][[0, 3]].any()
        and not have["dnode_k"][0].any()
    )


def test_starts_that_overlap(device, small_blocks):
    """Windows instead of sequences, some inside of others: any start and end is allowed."""
    g = torch.Generator().manual_seed(3)
    start = torch.randint(0, 80, (70,), generator=g)
    end = (start + torch.randint(-2, 60, (70,), generator=g)).clamp(0, 90)
    index = [x.to(device) for x in (start, end, torch.full((70, 0), -1))]
    compare(inputs(device, 70, 90, 0, 1, 2), index)


def test_starts_that_differ_before_positions_that_all_see(device, small_blocks):
    """A masked part, an unmasked one, a masked one; none is counted twice."""
    own = torch.arange(8)
    index = [x.to(device) for x in (own * 3, own + 60, torch.full((8, 0), -1))]
    compare(inputs(device, 8, 70, 0, 1, 2), index)


def test_repeated_ancestors_count_as_often_as_they_are_named(device):
    ancestors = torch.tensor([[0, 0, 0], [1, 0, 1], [1, -1, 1]])
    index = [
        x.to(device)
        for x in (torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0, 1]), ancestors)
    ]
    compare(inputs(device, 3, 2, 2), index)


def test_named_trees(device):
    """Root only, a chain, a star, a ragged tree and one of 61 nodes, in two sequences."""
    trees = [(n % 2, 3 * n, parents) for n, parents in enumerate(NAMED_TREES.values())]
    index, nodes = tree_index(device, [20, 30], trees)
    compare(inputs(device, nodes, 50, nodes, 1, 4), index)


def test_a_small_tree_from_every_position(device, small_blocks):
    trees = [(0, position, random_tree(4, position)) for position in range(24)] + [
        (1, position, [-1, 0]) for position in range(9)
    ]
    index, nodes = tree_index(device, [24, 9], trees)
    compare(inputs(device, nodes, 33, nodes, 1, 2), index)


@pytest.mark.parametrize("depth", [1, 16])
def test_dense_levels(device, depth):
    """From every position a chain: the last of `depth` levels of test-time training."""
    positions = 20
    own = torch.arange(positions)
    index = [own * 0, own + 1, own[:, None] + positions * torch.arange(depth)]
    compare(
        inputs(device, positions, positions, positions * depth, 1, 4), [x.to(device) for x in index]
    )


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_any_scale(device, scale):
    compare(inputs(device, 12, 20, 5), random_index(device, 12, [20], 5, 2), scale)


def test_extreme_scores(device):
    """All scores of a query are near 1e4, or all near -1e4: what they differ by decides, and
    nothing overflows.
    """
    q, *others = inputs(device, 30, 29, 10)
    with torch.no_grad():
        q[..., 0] = torch.where(torch.arange(30, device=device) % 2 == 0, 200.0, -200.0)[:, None]
        for x in (others[0], others[2]):
            x[..., 0] = 200
    tensors, index = [q, *others], random_index(device, 30, [20, 9], 10, 3)
    have = outputs(tree_attention, tensors, index, 0.3)
    want = outputs(tree_attention_ref, tensors, index, 0.3, torch.float64)
    # a score near 1e4 is a multiple of 1e-3
    for name, x in have.items():
        assert (x.double() - want[name]).norm() <= 3e-2 * want[name].norm(), name


def test_scores_far_apart(device):
    """Differences of 1e4 and more: one key takes everything."""
    tensors, index = (
        inputs(device, 30, 29, 10, spread=100.0),
        random_index(device, 30, [20, 9], 10, 3),
    )
    have = outputs(tree_attention, tensors, index, 0.3)
    torch.testing.assert_close(
        have["o"], tree_attention_ref(*tensors, *index, 0.3), atol=1e-2, rtol=1e-3
    )
    assert all(x.isfinite().all() for x in have.values())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
def test_16_bit_inputs(device, dtype, tolerance):
    tensors, index = (
        inputs(device, 30, 50, 12, 1, 4, 64, dtype),
        random_index(device, 30, [30, 20], 12, 3),
    )
    compare(tensors, index, 0.125, tolerance)
    assert all(x.dtype == dtype for x in outputs(tree_attention, tensors, index, 0.125).values())


def test_inputs_that_are_not_contiguous(device):
    tensors, index = inputs(device, 9, 20, 5, 2, 2), random_index(device, 9, [20], 5, 2)
    turned = [
        x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in tensors
    ]
    assert not turned[0].is_contiguous()
    compare(turned, index)
    o = tree_attention(*turned, *index, 0.3)
    # a gradient of stride 0
    o.sum().backward()
    assert turned[0].grad.isfinite().all()


def test_the_same_inputs_give_the_same_bits(device):
    tensors, index = inputs(device, 20, 60, 7), random_index(device, 20, [40, 20], 7, 3)
    runs = [outputs(tree_attention, tensors, index, 0.3) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_without_gradients_none_are_kept(device):
    tensors, index = inputs(device, 5, 6, 2), random_index(device, 5, [6], 2, 1)
    with torch.no_grad():
        assert tree_attention(*tensors, *index, 0.3).grad_fn is None


@settings(max_examples=30, deadline=None)
@given(
    bounds=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=30),
    block=st.integers(1, 17),
)
def test_rows_of_positions_miss_nobody(bounds, block):
    positions = 40
    key, _ = sort_queries(*torch.tensor(bounds, dtype=torch.int64).view(-1, 2).T)
    start, end = key >> 32, key & 0xFFFFFFFF
    rank = torch.arange(len(key))
    ranges = rows_of_positions(key, positions, block)
    assert sorted(ranges[:, 0].tolist()) == list(range(-(-positions // block)))
    for number, lo, whole, whole_end, hi in ranges.tolist():
        first, last = number * block, min(number * block + block, positions)
        sees = (start < last) & (end > first) & (end > start)
        assert not (sees & ((rank < lo) | (rank >= hi))).any()
        assert ((start <= first) & (end >= last))[whole:whole_end].all()
        assert whole == whole_end or lo <= whole < whole_end <= hi


def test_queries_of_nodes():
    ancestors, order = torch.tensor([[2, -1, 0], [0, 0, 3]]), torch.tensor([7, 5])
    first, query = queries_of_nodes(ancestors, order, 5)
    named = [query[first[n] : first[n + 1]].tolist() for n in range(5)]
    assert named == [[7, 5, 5], [], [7], [5], []]


def test_memory_grows_with_tokens_not_with_their_square(device, small_blocks):
    """The biggest tensor of forward and backward, for 25 and 200 positions; 200 x 200 scores would
    be 64 times.
    """

    def biggest_bytes(positions):
        tensors, own = (
            inputs(device, positions, positions, positions, 1, 1, 4),
            torch.arange(positions, device=device),
        )
        with Biggest() as biggest:
            tree_attention(*tensors, own * 0, own + 1, own[:, None], 1.0).sum().backward()
        return biggest.nbytes

    assert biggest_bytes(200) <= 8.5 * biggest_bytes(25)


def test_32k_tokens_are_causal_attention(gpu):
    """bfloat16, Qwen3-8B's heads, against torch's flash attention."""
    positions, own = 1 << 15, torch.arange(1 << 15, device=gpu)
    q, k, v, *_ = inputs(gpu, positions, positions, 0, 8, 4, 128, torch.bfloat16)
    o = tree_attention(q, k, v, None, None, own * 0, own + 1, None, 128**-0.5)
    do = torch.randn_like(o)
    have = (o, *torch.autograd.grad(o, (q, k, v), do))
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        flash = torch.nn.functional.scaled_dot_product_attention(
            *batched, is_causal=True, enable_gqa=True
        )
    flash = flash[0].transpose(0, 1)
    want = (flash, *torch.autograd.grad(flash, (q, k, v), do))
    for name, a, b in zip(("o", "dq", "dk", "dv"), have, want):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_full_size_trees(gpu, dim, dtype):
    """Two sequences, 61-node trees every 16 positions, at the blocks of this GPU; the reference
    computes in float32.
    """
    trees = [(n % 2, 16 * (n // 2), random_tree(61, n)) for n in range(128)]
    index, nodes = tree_index(gpu, [1024, 1500], trees)
    tensors = inputs(gpu, nodes, 2524, nodes, 2, 4, dim, dtype)
    have = outputs(tree_attention, tensors, index, dim**-0.5)
    want = outputs(tree_attention_ref, tensors, index, dim**-0.5, torch.float32)
    for name, x in have.items():
        assert (x.float() - want[name]).norm() <= 1e-2 * want[name].norm(), name


def test_more_than_2_to_the_31_numbers(gpu):
    """Keys and values whose offsets need 64 bits: what the last positions give is what they give
    alone.
    """
    positions, tail = (1 << 21) + 100, 300
    tensors = [x.detach() for x in inputs(gpu, 64, tail, 4, 8, 1, 128, torch.bfloat16)]
    long = [torch.zeros(positions, 8, 128, dtype=torch.bfloat16, device=gpu) for _ in range(2)]
    for whole, part in zip(long, tensors[1:3]):
        whole[-tail:] = part
    start, end, ancestors = random_index(gpu, 64, [tail], 4, 2)
    shift = positions - tail
    moved = [
        x.requires_grad_() for x in (tensors[0].clone(), *long, *(t.clone() for t in tensors[3:]))
    ]
    have = outputs(tree_attention, moved, [start + shift, end + shift, ancestors], 0.1)
    want = outputs(
        tree_attention, [x.requires_grad_() for x in tensors], [start, end, ancestors], 0.1
    )
    for name, x in have.items():
        torch.testing.assert_close(x[-len(want[name]) :], want[name], atol=2e-2, rtol=2e-2)
    assert not have["dcontext_k"][:-tail].any()


def test_indices_of_32k_tokens_take_less_than_a_millisecond(gpu):
    queries = positions = 1 << 15
    start, end, ancestors = random_index(gpu, queries, [positions // 4] * 4, queries, 5)

    def build():
        key, order = sort_queries(start, end)
        return rows_of_positions(key, positions, 128), queries_of_nodes(
            ancestors[order], order, queries
        )

    times = []
    for _ in range(20):
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        build()
        finish.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(finish))
    assert sorted(times)[10] < 1.0, times
