"""The reference of exact targets against softmaxes written out, and against top-K targets with
everything kept.
"""

import aurora_kernels.tree_loss_ref as module
import pytest
import torch
from aurora_kernels.tree_loss import DISTANCES, tree_loss, tree_loss_exact
from biggest import Biggest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_loss import EPS, mixtures

# hidden size of the targets
SHARED = 6


def exact_case(seed, rows, hidden, draft_vocab, vocab, spread=1.0, dtype=torch.float64):
    """Draft weights, (target_state, target_head, target_ids) and weight; a reduced vocabulary if
    it is smaller.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * spread

    weights = normal(rows, hidden), 1 + 0.3 * normal(hidden), normal(draft_vocab, hidden)
    target = normal(rows, SHARED), normal(vocab, SHARED)
    ids = torch.randperm(vocab, generator=g)[:draft_vocab] if draft_vocab < vocab else None
    weight = torch.rand(rows, generator=g, dtype=torch.float64)
    return (
        tuple(w.to(dtype).requires_grad_() for w in weights),
        (*(t.to(dtype) for t in target), ids),
        weight.to(dtype),
    )


def naive(weights, target, weight, mixture):
    """(loss_sum, loss, acceptance, greedy_match), from whole softmaxes; gradients are
    autograd's.
    """
    state, norm_weight, head = weights
    target_state, target_head, ids = target
    ids = torch.arange(len(head)) if ids is None else ids
    q = torch.softmax(
        torch.nn.functional.rms_norm(state, norm_weight.shape, norm_weight, EPS) @ head.T, -1
    )
    whole = torch.softmax(target_state @ target_head.T, -1)
    raw = whole[:, ids]
    p = raw / raw.sum(-1, keepdim=True)
    label = whole.argmax(-1, keepdim=True)
    is_label = (ids[None] == label).to(q.dtype)
    distances = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "tv": 0.5 * (p - q).abs().sum(-1),
        "greedy": -(is_label * q.log()).sum(-1),
    }
    loss = sum(share * distances[name] for name, share in mixture.items())
    return (
        (loss * weight).sum(),
        loss,
        torch.minimum(raw, q).sum(-1),
        ids[q.argmax(-1)] == label[:, 0],
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    hidden=st.integers(1, 7),
    draft_vocab=st.integers(1, 12),
    outside=st.integers(0, 6),
    mixture=mixtures,
)
def test_losses_and_gradients_equal_those_of_softmaxes(
    seed, rows, hidden, draft_vocab, outside, mixture
):
    weights, target, weight = exact_case(seed, rows, hidden, draft_vocab, draft_vocab + outside)
    result = tree_loss_exact(*weights, *target, weight, mixture, EPS)
    total, loss, acceptance, match = naive(weights, target, weight, mixture)
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.acceptance, acceptance.detach().clamp(max=1))
    assert torch.equal(result.greedy_match, match)
    want = torch.autograd.grad(total * 3, weights)
    have = torch.autograd.grad(result.loss_sum * 3, weights)
    for name, w, h in zip(("state", "norm", "head"), want, have, strict=True):
        torch.testing.assert_close(h, w, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("draft_vocab", "vocab"), [(33, 33), (20, 33)])
def test_it_equals_the_top_k_form_with_everything_kept(distance, draft_vocab, vocab):
    weights, target, weight = exact_case(1, 40, 5, draft_vocab, vocab)
    logits = target[0] @ target[1].T
    kept, ids = logits.topk(vocab, -1)
    to_draft = torch.arange(vocab) if target[2] is None else module.draft_ids_of(target[2], vocab)
    a = tree_loss(*weights, to_draft[ids], kept, logits.logsumexp(-1), weight, distance, EPS)
    b = tree_loss_exact(*weights, *target, weight, distance, EPS)
    assert torch.equal(a.greedy_match, b.greedy_match) and torch.equal(a.argmax, b.argmax)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.acceptance, b.acceptance)
    grads = (torch.autograd.grad(r.loss_sum, weights) for r in (a, b))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_a_first_choice_that_the_draft_lacks_teaches_greedy_nothing():
    weights, (state, head, _), weight = exact_case(0, 2, 4, 5, 6)
    state[1] = -state[0]
    # the first row's first choice, and the second's last
    head[5] = 50 * state[0]
    result = tree_loss_exact(*weights, state, head, torch.arange(5), weight, "greedy", EPS)
    assert result.loss[0] == 0 and not result.greedy_match[0] and result.loss[1] > 0
    grad = torch.autograd.grad(result.loss_sum, weights[0])[0]
    assert not grad[0].any() and grad[1].any()


def test_a_target_that_the_draft_vocabulary_lacks_teaches_nothing():
    weights, (state, head, _), weight = exact_case(0, 2, 4, 5, 6)
    head[5] = 1e3 * state[0]
    for distance in DISTANCES:
        result = tree_loss_exact(*weights, state, head, torch.arange(5), weight, distance, EPS)
        assert result.loss[0] == 0 and result.acceptance[0] < 1e-6
        assert not torch.autograd.grad(result.loss_sum, weights[0])[0][0].any()


def test_the_target_gets_no_gradients():
    weights, (state, head, ids), weight = exact_case(0, 3, 4, 6, 6)
    state.requires_grad_(), head.requires_grad_()
    result = tree_loss_exact(*weights, state, head, ids, weight, "tv", EPS)
    assert torch.autograd.grad(result.loss_sum, (state, head), allow_unused=True) == (None, None)


@pytest.mark.parametrize("ids", [None, torch.arange(4)])
def test_vocabularies_that_do_not_fit_are_refused(ids):
    weights, (state, head, _), weight = exact_case(0, 3, 4, 5, 6)
    with pytest.raises(ValueError, match="target_ids"):
        tree_loss_exact(*weights, state, head, ids, weight, "tv", EPS)


def test_memory_grows_with_rows_not_with_rows_times_vocabulary(monkeypatch):
    """The target's logits are a chunk's too, however much larger than the draft's its vocabulary
    is.
    """
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1 << 12)
    weights, target, weight = exact_case(0, 4096, 4, 16, 128, dtype=torch.float32)
    with Biggest() as biggest:
        tree_loss_exact(
            *weights, *target, weight, {"forward_kl": 1.0, "tv": 1.0}, EPS
        ).loss_sum.backward()
    assert biggest.nbytes < 4096 * 128 * 4 / 16
