"""The top-K kernels, in Triton's interpreter or on a GPU (conftest.py says how), against a stable
sort in float64.
"""

import math

import pytest
import torch
from aurora_kernels.limits import MAX_KEPT
from aurora_kernels.topk_logprobs import BLOCK, group_size, topk_logprobs, topk_logprobs_ref
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = {dtype: torch.finfo(dtype).min for dtype in DTYPES}


@pytest.fixture(scope="module")
def where() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32, where="cpu", scale=4.0):
    return (
        (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale)
        .to(dtype)
        .to(where)
    )


def check(logits, k, rows=None):
    """Exact ids and logits, of equal logits the lowest ids; the log-sum-exp to float32's
    precision.
    """
    before = logits.clone()
    ids, kept, logsumexp = topk_logprobs(logits, k, rows)
    assert torch.equal(logits.nan_to_num(123.0), before.nan_to_num(123.0)), "the input was changed"
    logits = before if rows is None else before[rows]
    order = logits.float().sort(dim=-1, descending=True, stable=True)
    assert (ids.dtype, kept.dtype, logsumexp.dtype) == (torch.int32, logits.dtype, torch.float32)
    assert torch.equal(ids.long(), order.indices[:, :k])
    assert torch.equal(kept, logits.gather(1, ids.long()).clamp_min(LOW[logits.dtype]))
    expected = logits.double().logsumexp(-1).clamp_min(torch.finfo(torch.float32).min)
    torch.testing.assert_close(logsumexp.double(), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "k"),
    [
        (1, 1, 1),
        (2, 5, 9),
        (3, 33, 4),
        (1, 2, 2),
        (5, 127, 127),
        (3, 513, 128),
        (2, BLOCK + 1, 32),
        (1, 3 * BLOCK, 3),
    ],
)
def test_odd_sizes(rows, vocab, k, dtype, where):
    check(randn(rows, vocab, dtype=dtype, where=where), k)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_logits(data, where):
    """Few values and extreme ones: ties within groups, across groups and at the threshold."""
    rows, vocab = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 700))
    k, dtype = data.draw(st.integers(1, MAX_KEPT)), data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 1000))
    values = data.draw(
        st.lists(
            st.sampled_from([-math.inf, -1e4, -1.0, -0.0, 0.0, 1e-7, 1.0, 2.5, 1e4]), min_size=1
        )
    )
    pick = torch.randint(len(values), (rows, vocab), generator=torch.Generator().manual_seed(seed))
    check(torch.tensor(values)[pick].to(dtype).to(where), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_are_neighbours_or_one_in_every_group(dtype, where):
    """All of the K in one group, and each in a group of its own whose other members lose to nobody
    else's.
    """
    logits = randn(2, 4096, dtype=dtype, where=where)
    group = group_size(4096, 32)
    logits[0, 640:672] += 100
    logits[1, 5 : 5 + 32 * group : group] += 100
    check(logits, 32)


def test_equal_logits_keep_the_lowest_ids(where):
    check(torch.zeros(2, BLOCK + 700, device=where), 40)
    ids, *_ = topk_logprobs(torch.zeros(1, 9000, device=where), 128)
    assert ids[0].tolist() == list(range(128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits_come_out_finite(dtype, where):
    logits = torch.full((3, 1000), -math.inf, dtype=dtype, device=where)
    logits[0, 990], logits[1, :3] = 2.0, LOW[dtype]
    ids, kept, logsumexp = topk_logprobs(logits, 16)
    assert kept.isfinite().all() and logsumexp.isfinite().all()
    assert ids[0].tolist() == [990, *range(15)] and ids[2].tolist() == list(range(16))
    assert kept[0].tolist() == [2.0] + [LOW[dtype]] * 15 and logsumexp[0] == 2
    assert logsumexp[2] == torch.finfo(torch.float32).min == topk_logprobs_ref(logits, 16)[2][2]
    check(logits[:1], 16)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_nan_and_infinity_are_seen(bad, where):
    """First among the kept, and as the row's log-sum-exp, as from the reference; other rows have
    nothing of it.
    """
    logits = randn(2, 9000, where=where)
    logits[0, 8500] = bad
    for topk in (topk_logprobs, topk_logprobs_ref):
        ids, kept, logsumexp = topk(logits, 4)
        assert ids[0, 0] == 8500 and kept[0, 1:].isfinite().all()
        for value in (kept[0, 0].item(), logsumexp[0].item()):
            assert math.isnan(value) if math.isnan(bad) else value == bad
    check(logits[1:], 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_chosen_rows(dtype, where):
    wide = randn(6, 1000, dtype=dtype, where=where)
    check(wide[:, 8:909], 20)
    check(wide[::2, :77], 20)
    check(wide[:, :5].T, 3)
    check(wide[:, :999], 8, rows=torch.tensor([5, 0, 0, 3], device=where))
    assert topk_logprobs(wide, 8, rows=torch.tensor([], dtype=torch.int64, device=where))[
        0
    ].shape == (0, 8)


def test_large_logits_do_not_overflow(where):
    _, top, logsumexp = topk_logprobs(
        torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]], device=where), 3
    )
    assert top[0].tolist() == [1e4, 1e4, -1e4]
    torch.testing.assert_close(
        logsumexp.cpu(), torch.tensor([1e4 + math.log(2), -1e4 + math.log(3)])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab", "k"), [(4096, 32_000, 32), (96, 151_936, 32), (64, 200_064, 128)]
)
def test_full_size(rows, vocab, k, dtype, gpu):
    logits = randn(rows, vocab, dtype=dtype).to(gpu)
    check(logits, k)
    check(logits[:, :-1], k, rows=torch.arange(0, rows, 3, device=gpu))


def test_captured_in_a_cuda_graph(gpu):
    logits = randn(48, 32_000, dtype=torch.bfloat16, where=gpu)
    rows = torch.arange(0, 48, 2, device=gpu)
    # compiles
    topk_logprobs(logits, 32, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = topk_logprobs(logits, 32, rows)
    for seed in (1, 2):
        logits.copy_(randn(48, 32_000, seed=seed))
        graph.replay()
        for graphed, eager in zip(out, topk_logprobs(logits, 32, rows)):
            assert torch.equal(graphed, eager)
