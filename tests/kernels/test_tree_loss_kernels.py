"""tree_loss's kernels against the references in float64: values and every gradient, for both kinds
of target.
"""

import aurora_kernels.tree_loss as module
import pytest
import torch
from aurora_kernels.topk_logprobs import topk_logprobs_ref
from aurora_kernels.tree_loss import DISTANCES, TreeLoss, tree_loss, tree_loss_exact
from aurora_kernels.tree_loss_ref import tree_loss_exact_ref, tree_loss_ref
from biggest import Biggest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_loss import EPS, case, mixtures
from test_tree_loss_exact import exact_case

ALL = {"forward_kl": 0.5, "reverse_kl": 0.7, "tv": 0.3, "greedy": 0.2}
# (draft vocabulary, vocabulary, K): the interpreter's tiles have 16 columns, kept logits 16 or 32
# places
SIZES = {
    "no tail": (9, 9, 9),
    "one kept": (16, 40, 1),
    "odd": (37, 45, 5),
    "padded": (70, 70, 21),
    "one token": (1, 3, 2),
}


def on(device, dtype, tensors):
    def moved(t):
        return t if t is None else t.to(device, dtype if t.is_floating_point() else t.dtype)

    return tuple(moved(t) for t in tensors)


def run(function, weights, *rest) -> tuple[TreeLoss, tuple]:
    """The result, and d(3 loss_sum) of the weights."""
    weights = tuple(w.detach().requires_grad_() for w in weights)
    result = function(*weights, *rest, EPS)
    return result, torch.autograd.grad(result.loss_sum * 3, weights)


def size_of_state(weights, weight) -> float:
    """What an error of d(state) is measured by, if d(logits) is as large as the row's weight.
    It may be far smaller, as a difference of probabilities, and the norm's backward pass leaves
    little of it behind few dimensions: its rounding stays."""
    state, norm, head = (w.detach() for w in weights)
    if not state.numel():
        return 0.0
    rms = (state.pow(2).mean(-1) + EPS).sqrt()
    return float(3 * weight.max() * (head * norm).abs().max() / rms.min())


def compare(have, want, of_state, atol=2e-5, rtol=2e-4, near_ties=0.0):
    """of_state: see size_of_state. near_ties: share of the rows whose two best draft tokens may be
    closer than rounding."""
    (result, grads), (expected, expected_grads) = have, want
    for name in ("loss_sum", "loss", "acceptance"):
        h, w = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(
            h.double(), w, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )
    for name in ("argmax", "greedy_match"):
        assert (getattr(result, name) != getattr(expected, name)).sum() <= near_ties * len(
            expected.argmax
        ), name
    greatest = max((float(w.abs().max()) for w in expected_grads if w.numel()), default=0.0) or 1.0
    for name, h, w in zip(("state", "norm", "head"), grads, expected_grads, strict=True):
        scale = max(float(w.abs().max()) if w.numel() else 0.0, 1e-2 * greatest)
        scale = max(scale, of_state) if name == "state" else scale
        torch.testing.assert_close(h.double() / scale, w / scale, atol=atol, rtol=rtol,
                                   msg=lambda m, name=name: f"d{name}: {m}")  # fmt: skip


def check_topk(weights, targets, mixture, device, dtype=torch.float32, **tolerance):
    """Kernels in dtype against the reference in float64, of the same (rounded) inputs."""
    weights, targets = on(device, dtype, weights), on(device, torch.float32, targets)
    have = run(tree_loss, weights, *targets, mixture)
    assert [g.dtype for g in have[1]] == [dtype] * 3
    weights, targets = double(weights), double(targets)
    expected = run(tree_loss_ref, weights, *targets, mixture)
    compare(have, expected, size_of_state(weights, targets[-1]), **tolerance)


def check_exact(weights, target, weight, mixture, device, dtype=torch.float32, **tolerance):
    weights, target, weight = (
        on(device, dtype, weights),
        on(device, dtype, target),
        weight.to(device, torch.float32),
    )
    have = run(tree_loss_exact, weights, *target, weight, mixture)
    weights = double(weights)
    expected = run(tree_loss_exact_ref, weights, *double(target), weight.double(), mixture)
    compare(have, expected, size_of_state(weights, weight), **tolerance)


def double(tensors):
    return on(tensors[0].device, torch.float64, tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "mixture", [*({d: 1.0} for d in DISTANCES), ALL], ids=lambda m: "+".join(m)
)
def test_losses_and_gradients_equal_the_references(size, mixture, device, poison):
    draft_vocab, vocab, k = SIZES[size]
    check_topk(*case(0, 3, 7, draft_vocab, vocab, k), mixture, device)
    check_exact(*exact_case(0, 3, 7, draft_vocab, vocab), mixture, device)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 3),
    hidden=st.integers(1, 20),
    draft_vocab=st.integers(1, 40),
    outside=st.integers(0, 6),
    k=st.integers(1, 40),
    mixture=mixtures,
)
def test_any_size(seed, rows, hidden, draft_vocab, outside, k, mixture):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_topk(*case(seed, rows, hidden, draft_vocab, draft_vocab + outside, k), mixture, device)
    check_exact(
        *exact_case(seed, rows, hidden, draft_vocab, draft_vocab + outside), mixture, device
    )


@pytest.mark.parametrize("k", [64, 127, 128])
def test_many_kept_logits(k, device, poison):
    check_topk(*case(3, 2, 5, 150, 160, k), ALL, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_inputs(dtype, device, poison):
    """y and d(logits) are rounded to the head's dtype, sums are not; bfloat16 with tiny weights."""
    tolerance = {"atol": 2e-2, "rtol": 2e-2}
    weights, (*targets, weight) = case(4, 5, 9, 37, 45, 6, spread=0.5)
    tiny = weight * 1e-7 if dtype == torch.bfloat16 else weight
    check_topk(weights, (*targets, tiny), ALL, device, dtype, **tolerance)
    check_exact(*exact_case(4, 5, 9, 37, 45, spread=0.5), ALL, device, dtype, **tolerance)


def test_small_weights_do_not_vanish_in_float16(device):
    """As under a loss scale: weights far below float16's smallest number, scaled up again in the
    backward pass.
    """
    weights, (*targets, weight) = case(4, 5, 9, 37, 45, 6, spread=0.5)
    grads = []
    for scale in (1.0, 2.0**-30):
        half = tuple(w.detach().to(device, torch.float16).requires_grad_() for w in weights)
        small = on(device, torch.float32, (*targets, weight * scale))
        loss = tree_loss(*half, *small, ALL, EPS).loss_sum
        grads.append(torch.autograd.grad(loss / scale, half))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and a.any()


def test_a_head_of_another_dtype_than_the_state(device):
    weights, targets = case(4, 4, 9, 37, 45, 6, spread=0.5)
    targets = on(device, torch.float32, targets)
    for state, head in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        mixed = tuple(
            w.to(device, dtype) for w, dtype in zip(weights, (state, state, head), strict=True)
        )
        have = run(tree_loss, mixed, *targets, "forward_kl")
        assert [g.dtype for g in have[1]] == [state, state, head]
        expected = run(tree_loss_ref, double(mixed), *double(targets), "forward_kl")
        size = size_of_state(double(mixed), targets[-1])
        compare(have, expected, size, atol=2e-2, rtol=2e-2)


def test_rows_that_teach_nothing(device, poison):
    """No kept token in the draft and no tail; a weight of zero; nothing kept but a tail; no rows at
    all.
    """
    weights, (ids, kept, lse, weight) = case(0, 4, 4, 20, 24, 3)
    kept, lse = torch.full_like(kept, -60.0), torch.zeros_like(lse)
    kept[:, 0] = 0.0
    ids[0] = -1
    weight[1] = 0
    ids[2], kept[2] = -1, -3.0
    check_topk(weights, (ids, kept, lse, weight), ALL, device)
    check_topk(weights, (ids, kept, lse, torch.zeros_like(weight)), ALL, device)
    check_topk(
        (weights[0][:0], *weights[1:]), (ids[:0], kept[:0], lse[:0], weight[:0]), ALL, device
    )
    weights, (state, head, _), weight = exact_case(0, 3, 4, 20, 21)
    state[1] = -state[0]
    # the draft lacks it: all of the first row's mass, none of the second's
    head[20] = 1e3 * state[0]
    weight[2] = 0
    check_exact(weights, (state, head, torch.arange(20)), weight, ALL, device)
    check_exact(
        (weights[0][:0], *weights[1:]), (state[:0], head, torch.arange(20)), weight[:0], ALL, device
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_extreme_logits(distance, device, poison):
    """Draft and target logits of about 1e4 in both directions, and a kept logit at the lowest
    number: finite, and equal to float64's as far as float32 holds logits of this size (1e-3)."""
    weights, (ids, kept, lse, weight) = case(0, 4, 6, 30, 40, 7)
    weights = (*weights[:2], weights[2].detach() * 1e4)
    kept = (kept * 1e4).float().double()
    lse = kept.logsumexp(-1)
    kept[0, -1] = torch.finfo(torch.float32).min
    check_topk(weights, (ids, kept, lse, weight), distance, device, atol=5e-3, rtol=5e-3)
    weights, (state, head, target_ids), weight = exact_case(0, 4, 6, 30, 40)
    weights = (*weights[:2], weights[2].detach() * 1e3)
    check_exact(
        weights, (state, head * 1e3, target_ids), weight, distance, device, atol=5e-3, rtol=5e-3
    )


def test_nan_shows(device):
    weights, targets = case(0, 3, 4, 20, 24, 3, dtype=torch.float32)
    weights[0].data[1, 2] = torch.nan
    result = tree_loss(
        *on(device, torch.float32, weights), *on(device, torch.float32, targets), "forward_kl", EPS
    )
    assert result.loss.isnan().tolist() == [False, True, False] and result.loss_sum.isnan()


def test_exact_equals_top_k_with_everything_kept(device):
    weights, (state, head, _), weight = exact_case(1, 3, 5, 33, 33, dtype=torch.float32)
    ids, kept, lse = topk_logprobs_ref(state @ head.T, 33)
    on_device = on(device, torch.float32, (ids.long(), kept, lse, weight, state, head))
    weights = tuple(w.detach().to(device) for w in weights)
    a = run(tree_loss, weights, *on_device[:4], ALL)
    b = run(tree_loss_exact, weights, *on_device[4:], None, on_device[3], ALL)
    torch.testing.assert_close(a[0].loss, b[0].loss, atol=1e-5, rtol=1e-4)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_without_gradients_none_are_computed(device, monkeypatch):
    weights, targets = case(0, 3, 4, 20, 24, 3, dtype=torch.float32)
    weights, targets = on(device, torch.float32, weights), on(device, torch.float32, targets)
    want = tree_loss(*weights, *targets, "tv", EPS)
    monkeypatch.setattr(module, "_add_product", None)
    with torch.no_grad():
        result = tree_loss(*weights, *targets, "tv", EPS)
    assert not result.loss_sum.requires_grad and torch.equal(result.loss, want.loss)
    # no product for its gradient
    frozen = tree_loss(weights[0], weights[1], weights[2].detach(), *targets, "tv", EPS)
    a, b = (torch.autograd.grad(r.loss_sum, weights[:2]) for r in (frozen, want))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_first_of_equal_logits_is_the_argmax(device):
    (state, norm, head), (ids, kept, lse, weight) = case(0, 3, 4, 40, 40, 3, dtype=torch.float32)
    # the first is kept in the second row alone
    ids[0], ids[1] = torch.tensor([3, 2, 1]), torch.tensor([0, 20, 39])
    inputs = on(device, torch.float32, (state, norm, torch.zeros_like(head)))
    result = tree_loss(*inputs, *on(device, torch.float32, (ids, kept, lse, weight)), "tv", EPS)
    assert result.argmax.tolist() == [0, 0, 0]
    target = on(device, torch.float32, (state, torch.zeros_like(head), None, weight))
    result = tree_loss_exact(*inputs, *target, "tv", EPS)
    assert result.argmax.tolist() == [0, 0, 0] and result.greedy_match.all()


@pytest.mark.parametrize("chunk_logits", [1, 3 * 40])
def test_chunks_of_any_size_agree(chunk_logits, device, monkeypatch, poison):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(module, "WEIGHT_GROUPS", 3)
    check_topk(*case(1, 8, 6, 33, 40, 5), ALL, device)
    check_exact(*exact_case(1, 4, 6, 17, 20), ALL, device)


@pytest.mark.parametrize("kind", ["topk", "exact"])
def test_memory_grows_with_rows_not_with_rows_times_vocabulary(kind, device, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1 << 7)
    rows, vocab = 32, 64
    if kind == "topk":
        function, (weights, rest) = tree_loss, case(0, rows, 4, vocab, vocab, 3)
    else:
        function, (weights, target, weight) = tree_loss_exact, exact_case(0, rows, 4, vocab, vocab)
        rest = *target, weight
    weights = tuple(w.detach().requires_grad_() for w in on(device, torch.float32, weights))
    rest = on(device, torch.float32, rest)
    with Biggest() as biggest:
        function(*weights, *rest, ALL, EPS).loss_sum.backward()
    assert biggest.nbytes < rows * vocab * 4 / 5


@pytest.mark.parametrize("kind", ["topk", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_full_size(kind, dtype, gpu):
    """A vocabulary of Qwen3's size, but odd, in several chunks; fp32 means without TF32, which is
    torch's default.
    """
    tolerance = {"atol": 1e-4, "rtol": 1e-3, "near_ties": 0.005}
    if dtype == torch.bfloat16:
        tolerance = {"atol": 2e-2, "rtol": 5e-2, "near_ties": 0.1}
    rows, vocab = 2000, 151_929
    if kind == "topk":
        check_topk(*case(0, rows, 64, vocab, vocab, 32, spread=0.3), ALL, gpu, dtype, **tolerance)
    else:
        check_exact(
            *exact_case(0, rows, 64, 32_001, vocab, spread=0.3), ALL, gpu, dtype, **tolerance
        )


@pytest.mark.parametrize("kind", ["topk", "exact"])
def test_peak_memory_at_full_size(kind, gpu):
    """Above the inputs: two bytes for the gradient and four for the logits of a chunk, d(head), and
    little else.
    """
    rows, hidden, vocab = 4096, 64, 151_936
    weights = tuple(torch.randn(*shape, device=gpu, dtype=torch.bfloat16, requires_grad=True)
                    for shape in ((rows, hidden), (hidden,), (vocab, hidden)))  # fmt: skip
    weight = torch.ones(rows, device=gpu)
    if kind == "topk":
        ids = torch.arange(32, device=gpu).expand(rows, 32).contiguous()
        function, target = (
            tree_loss,
            (ids, torch.randn(rows, 32, device=gpu), torch.full((rows,), 9.0, device=gpu)),
        )
    else:
        function, target = tree_loss_exact, (weights[0].detach(), weights[2].detach(), None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*weights, *target, weight, ALL, EPS).loss_sum.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < module.CHUNK_LOGITS * 6 + vocab * hidden * 6 + rows * hidden * 16 + (64 << 20)
    # not even the logits in bf16
    assert peak < rows * vocab * 2
