import aurora_kernels.tree_loss_ref as module
import pytest
import torch
from aurora_kernels.topk_logprobs import topk_logprobs
from aurora_kernels.tree_loss import DISTANCES, tree_loss
from biggest import Biggest
from hypothesis import given, settings
from hypothesis import strategies as st

EPS = 1e-5


def naive(state, norm_weight, head, ids, logits, lse, weight, mixture):
    """(loss_sum, loss, acceptance), row by row, over explicit outcomes: every kept draft token, and
    the tail.
    """
    losses, acceptances = [], []
    for r in range(len(state)):
        x = state[r] / (state[r].pow(2).mean() + EPS).sqrt() * norm_weight
        log_q = torch.log_softmax(head @ x, 0)
        kept = [
            (i, (value - lse[r]).exp()) for i, value in zip(ids[r].tolist(), logits[r], strict=True)
        ]
        inside = [i for i, _ in kept if i >= 0]
        others = [i for i in range(len(head)) if i not in inside]
        tail = (
            (1 - sum(p for _, p in kept)).clamp(min=0)
            if others
            else torch.zeros((), dtype=state.dtype)
        )
        outcomes = [(p, log_q[i]) for i, p in kept if i >= 0]
        if others:
            outcomes.append((tail, log_q[others].logsumexp(0)))
        covered = sum(p for p, _ in outcomes)
        acceptances.append(sum(torch.minimum(p, q.exp()) for p, q in outcomes))
        if covered < module.MIN_COVERED:
            losses.append(state[r].sum() * 0)
            continue
        pairs = [(p / covered, q) for p, q in outcomes]
        distances = {
            "forward_kl": sum(torch.xlogy(p, p) - p * q for p, q in pairs),
            "reverse_kl": sum(q.exp() * (q - p.clamp(min=1e-7 if others and k == len(pairs) - 1
                                                     else 1e-43).log())
                              for k, (p, q) in enumerate(pairs)),
            "tv": 0.5 * sum((p - q.exp()).abs() for p, q in pairs),
            "greedy": -log_q[ids[r, 0]] if ids[r, 0] >= 0 else log_q.sum() * 0,
        }  # fmt: skip
        losses.append(sum(share * distances[name] for name, share in mixture.items()))
    loss = torch.stack(losses)
    return (loss * weight).sum(), loss, torch.stack(acceptances)


def case(seed, rows, hidden, draft_vocab, vocab, k, spread=1.0, dtype=torch.float64):
    """Draft weights and targets; a reduced vocabulary if draft_vocab < vocab."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * spread

    weights = (normal(rows, hidden), 1 + 0.3 * normal(hidden), normal(draft_vocab, hidden))
    to_draft = torch.full((vocab,), -1)
    to_draft[torch.randperm(vocab, generator=g)[:draft_vocab]] = torch.arange(draft_vocab)
    logits = 2 * normal(rows, vocab)
    kept, ids = logits.topk(min(k, vocab), -1)
    targets = (
        to_draft[ids],
        kept,
        logits.logsumexp(-1),
        torch.rand(rows, generator=g, dtype=torch.float64),
    )
    return (
        tuple(w.to(dtype).requires_grad_() for w in weights),
        tuple(t.to(dtype) if t.is_floating_point() else t for t in targets),
    )


def compare(weights, targets, mixture):
    result = tree_loss(*weights, *targets, mixture, EPS)
    total, loss, acceptance = naive(*weights, *targets, mixture)
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(result.loss_sum, total)
    torch.testing.assert_close(result.acceptance, acceptance.clamp(max=1))
    x = torch.nn.functional.rms_norm(weights[0], weights[1].shape, weights[1], EPS)
    assert torch.equal(result.argmax, (x @ weights[2].T).argmax(-1))
    assert torch.equal(result.greedy_match, result.argmax == targets[0][:, 0])
    want = torch.autograd.grad(total * 3, weights)
    have = torch.autograd.grad(result.loss_sum * 3, weights)
    for name, w, h in zip(("state", "norm", "head"), want, have, strict=True):
        torch.testing.assert_close(h, w, msg=lambda m, name=name: f"d{name}: {m}")


mixtures = st.one_of(
    st.sampled_from([{d: 1.0} for d in DISTANCES]),
    st.fixed_dictionaries({}, optional={d: st.floats(0.1, 2) for d in DISTANCES}).filter(bool),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    hidden=st.integers(1, 7),
    draft_vocab=st.integers(1, 12),
    outside=st.integers(0, 6),
    k=st.integers(1, 20),
    mixture=mixtures,
)
def test_losses_and_gradients_equal_the_naive_ones(
    seed, rows, hidden, draft_vocab, outside, k, mixture
):
    """Full and reduced vocabularies, kept tokens outside the draft's, everything kept (K = V), no
    tail.
    """
    compare(*case(seed, rows, hidden, draft_vocab, draft_vocab + outside, k), mixture)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("chunk_logits", [1, 40 * 33, 1 << 20])
def test_chunks_of_any_size_agree(distance, chunk_logits, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    compare(*case(1, 90, 6, 33, 40, 5), {distance: 1.0})


@pytest.mark.parametrize("distance", ["forward_kl", "reverse_kl"])
def test_with_everything_kept_it_is_the_divergence_over_the_whole_vocabulary(distance):
    weights, _ = case(2, 4, 5, 9, 9, 9)
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, kept, lse = topk_logprobs(logits, 9)
    result = tree_loss(*weights, ids.long(), kept, lse.double(), torch.ones(4), distance, EPS)
    x = torch.nn.functional.rms_norm(weights[0], weights[1].shape, weights[1], EPS)
    log_q, log_p = torch.log_softmax(x @ weights[2].T, -1), torch.log_softmax(logits, -1)
    a, b = (log_p, log_q) if distance == "forward_kl" else (log_q, log_p)
    torch.testing.assert_close(result.loss, (a.exp() * (a - b)).sum(-1), atol=1e-6, rtol=1e-6)


def test_a_reduced_vocabulary_is_taught_the_renormalised_target():
    """At p restricted to the draft's tokens and renormalised, the gradient vanishes; acceptance is
    the covered mass.
    """
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    ids = torch.tensor([[0, -1, 1, 2]])
    q = torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64) / 0.7
    head = (q.log()[:, None]).requires_grad_()
    state = torch.ones(1, 1, dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    result = tree_loss(state, one, head, ids, p.log(), zero, one, "forward_kl", 0.0)
    assert result.loss.abs() < 1e-12
    assert torch.autograd.grad(result.loss_sum, head)[0].abs().max() < 1e-12
    assert result.acceptance.item() == pytest.approx(0.7)


def test_a_target_that_the_draft_vocabulary_lacks_teaches_nothing():
    weights, (ids, kept, lse, weight) = case(0, 2, 4, 6, 6, 3)
    kept, lse = torch.full_like(kept, -60.0), torch.zeros_like(lse)
    # all of the mass, on a token that the first row's draft lacks
    kept[:, 0] = 0.0
    ids[0, 0] = -1
    result = tree_loss(*weights, ids, kept, lse, weight, "forward_kl", EPS)
    assert result.loss[0] == 0 and result.loss[1] > 0
    grad = torch.autograd.grad(result.loss_sum, weights[0])[0]
    assert not grad[0].any() and grad[1].any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_extreme_logits_stay_finite(distance):
    """Draft and target logits of about 1e4 in both directions, and a kept logit at the lowest
    number.
    """
    weights, (ids, kept, lse, weight) = case(0, 8, 6, 30, 40, 7, dtype=torch.float32)
    with torch.no_grad():
        weights[2].mul_(1e4)
    kept = kept * 1e4
    lse = kept.logsumexp(-1)
    kept[0, -1] = torch.finfo(torch.float32).min
    result = tree_loss(*weights, ids, kept, lse, weight, distance, EPS)
    assert result.loss.isfinite().all() and (result.loss >= 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(result.loss_sum, weights))


def test_float32_agrees_with_float64():
    weights, targets = case(3, 40, 16, 200, 200, 20)
    low_weights, low_targets = case(3, 40, 16, 200, 200, 20, dtype=torch.float32)
    for distance in DISTANCES:
        high = tree_loss(*weights, *targets, distance, EPS)
        low = tree_loss(*low_weights, *low_targets, distance, EPS)
        torch.testing.assert_close(low.loss.double(), high.loss, atol=1e-5, rtol=1e-4)
        for a, b in zip(
            torch.autograd.grad(low.loss_sum, low_weights),
            torch.autograd.grad(high.loss_sum, weights),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-3)


def test_without_gradients_none_are_computed(monkeypatch):
    weights, targets = case(0, 3, 4, 6, 6, 3)
    with torch.no_grad():
        result = tree_loss(*weights, *targets, "tv", EPS)
    assert not result.loss_sum.requires_grad
    torch.testing.assert_close(result.loss, naive(*weights, *targets, {"tv": 1.0})[1])


def test_no_rows():
    weights, targets = case(0, 1, 4, 6, 6, 3)
    result = tree_loss(weights[0][:0], *weights[1:], *(t[:0] for t in targets), "tv", EPS)
    assert result.loss_sum == 0 and not torch.autograd.grad(result.loss_sum, weights[2])[0].any()


def test_an_unknown_distance_is_refused():
    weights, targets = case(0, 1, 4, 6, 6, 3)
    for distance in ("kl", {}, {"tv": 1.0, "l2": 1.0}):
        with pytest.raises(ValueError, match="distance"):
            tree_loss(*weights, *targets, distance, EPS)


def test_memory_grows_with_rows_not_with_rows_times_vocabulary(monkeypatch):
    """No tensor of forward or backward is as large as a fraction of [R, VD]."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1 << 12)
    weights, targets = case(0, 4096, 4, 128, 128, 3, dtype=torch.float32)
    with Biggest() as biggest:
        tree_loss(*weights, *targets, {"forward_kl": 1.0, "tv": 1.0}, EPS).loss_sum.backward()
    assert biggest.nbytes < 4096 * 128 * 4 / 16
