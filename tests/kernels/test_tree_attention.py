import aurora_kernels.tree_attention_ref as module
import pytest
import torch
from aurora_kernels.tree_attention import tree_attention
from biggest import Biggest
from hypothesis import given, settings
from hypothesis import strategies as st


def naive(q, context_k, context_v, node_k, node_v, context_start, context_end, ancestors, scale):
    """One query and one head at a time, over a list of what it sees."""
    out = []
    group = q.shape[1] // context_k.shape[1]
    for i in range(len(q)):
        nodes = [a for a in ancestors[i].tolist() if a >= 0]
        for h in range(q.shape[1]):
            k = torch.cat(
                [
                    context_k[context_start[i] : context_end[i], h // group],
                    node_k[nodes, h // group],
                ]
            )
            v = torch.cat(
                [
                    context_v[context_start[i] : context_end[i], h // group],
                    node_v[nodes, h // group],
                ]
            )
            out.append(torch.softmax(k @ q[i, h] * scale, 0) @ v if len(k) else q[i, h] * 0)
    return torch.stack(out).view(q.shape) if out else q * 0


def case(
    seed, lengths, queries, nodes, width, kv_heads, group, dim, dtype=torch.float64, spread=1.0
):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (
            (torch.randn(*shape, generator=g, dtype=torch.float64) * spread)
            .to(dtype)
            .requires_grad_()
        )

    positions = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    sequence = torch.randint(len(lengths), (queries,), generator=g)
    start = bounds[sequence]
    end = start + (torch.rand(queries, generator=g) * (bounds[sequence + 1] - start + 1)).long()
    ancestors = (
        torch.randint(-1, nodes, (queries, width), generator=g)
        if nodes
        else torch.full((queries, width), -1)
    )
    tensors = (
        normal(queries, kv_heads * group, dim),
        normal(positions, kv_heads, dim), normal(positions, kv_heads, dim),
        normal(nodes, kv_heads, dim), normal(nodes, kv_heads, dim),
    )  # fmt: skip
    return tensors, (start, end, ancestors, dim**-0.5)


def compare(tensors, rest, tolerance=1e-10):
    expected = naive(*tensors, *rest)
    o = tree_attention(*tensors, *rest)
    torch.testing.assert_close(o, expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((expected * weight).sum(), tensors, allow_unused=True)
    have = torch.autograd.grad((o * weight).sum(), tensors)
    for name, w, h in zip(
        ("q", "context_k", "context_v", "node_k", "node_v"), want, have, strict=True
    ):
        w = torch.zeros_like(h) if w is None else w
        torch.testing.assert_close(
            h, w, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"d{name}: {m}"
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    queries=st.integers(0, 70),
    nodes=st.integers(0, 30),
    width=st.integers(0, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([2, 5, 16]),
)
def test_outputs_and_gradients_equal_the_naive_ones(
    seed, lengths, queries, nodes, width, kv_heads, group, dim
):
    """Unsorted queries, empty prefixes, missing and repeated ancestors, no queries at all."""
    compare(*case(seed, lengths, queries, nodes, width, kv_heads, group, dim))


@pytest.mark.parametrize("scores", [1, 200, 5000])
def test_blocks_of_any_size_agree(scores, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SCORES", scores)
    monkeypatch.setattr(module, "BLOCK_QUERIES", 7)
    compare(*case(3, [50, 1, 33], 90, 20, 3, 2, 2, 8))


def test_level_0_is_causal_attention():
    tensors, _ = case(0, [6, 3], 9, 0, 0, 2, 2, 4)
    start = torch.tensor([0] * 6 + [6] * 3)
    o = tree_attention(*tensors[:3], None, None, start, torch.arange(9) + 1, None, 0.5)
    for rows in (slice(0, 6), slice(6, 9)):
        q, k, v = (t[rows].transpose(0, 1)[None] for t in tensors[:3])
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.5, enable_gqa=True
        )
        torch.testing.assert_close(o[rows], want[0].transpose(0, 1))


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    tensors, (_, _, _, scale) = case(0, [4], 3, 2, 2, 1, 1, 4)
    start, end = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 0])
    ancestors = torch.tensor([[-1, -1], [-1, -1], [1, -1]])
    compare(tensors, (start, end, ancestors, scale))
    assert not tree_attention(*tensors, start, end, ancestors, scale)[0].any()


def test_extreme_scores_stay_finite():
    # scores of about 1e4
    tensors, rest = case(5, [20, 9], 30, 10, 3, 2, 1, 8, dtype=torch.float32, spread=100.0)
    o = tree_attention(*tensors, *rest)
    torch.testing.assert_close(o, naive(*tensors, *rest), atol=1e-2, rtol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), tensors))


def test_bfloat16_computes_in_float32():
    tensors, rest = case(5, [20, 9], 30, 10, 3, 2, 1, 8, dtype=torch.bfloat16)
    o = tree_attention(*tensors, *rest)
    want = naive(*(t.double() for t in tensors), *rest)
    torch.testing.assert_close(o.double(), want, atol=1e-2, rtol=1e-2)


def test_memory_grows_with_tokens_not_with_their_square(monkeypatch):
    """The biggest tensor of forward and backward, for 300 and 2400 positions; 2400 x 2400 scores
    would be 64 times.
    """
    monkeypatch.setattr(module, "BLOCK_SCORES", 1 << 14)

    def biggest_bytes(positions):
        tensors, _ = case(0, [positions], positions, positions, 0, 1, 1, 4, dtype=torch.float32)
        start, end = torch.zeros(positions, dtype=torch.int64), torch.arange(positions) + 1
        ancestors = torch.arange(positions)[:, None]
        with Biggest() as biggest:
            tree_attention(*tensors, start, end, ancestors, 1.0).sum().backward()
        return biggest.nbytes

    assert biggest_bytes(2400) <= 8.5 * biggest_bytes(300)
