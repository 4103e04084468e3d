"""Final norm, draft head and the distance to the target's distribution in plain PyTorch, chunk by
chunk of rows.

Dimensions: R rows (queries with a target), H hidden, VD draft vocabulary, V target vocabulary, K
    kept target logits.

Gradients are computed in the forward pass, so that no [R, VD] tensor is ever kept. A top-K
target's mass beyond the kept logits is one bucket, the tail; an exact target has none. With a
reduced draft vocabulary the target is restricted to it and renormalised. Formulas are in README.md
of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DISTANCES = ("forward_kl", "reverse_kl", "tv", "greedy")
# logits alive at a time
CHUNK_LOGITS = 1 << 21
# of a kept token, for reverse_kl
LOG_P_FLOOR = -100.0
# for reverse_kl: float32 cannot tell a smaller tail from none
P_TAIL_FLOOR = 1e-7
# rows whose draft vocabulary holds less of the target's mass teach nothing
MIN_COVERED = 1e-6


class TreeLoss(NamedTuple):
    # scalar, sum of weight * loss; differentiable in state, norm_weight and head_weight
    loss_sum: Tensor
    # [R], unweighted
    loss: Tensor
    # bool [R], the draft's first choice is the target's
    greedy_match: Tensor
    # [R], sum of min(p, q): probability of acceptance under rejection sampling (upper bound: tail)
    acceptance: Tensor
    # int64 [R], the draft's first choice, a draft id
    argmax: Tensor


def tree_loss_ref(
    state, norm_weight, head_weight, topk_ids, topk_logits, logsumexp, weight, distance, eps
):
    """`tree_loss` in plain PyTorch, on any device.

    Computes in float32, or in float64 if state is.
    """
    shares = shares_of(distance)

    def score(part: slice, z: Tensor, row_weight: Tensor, grads: bool):
        targets = topk_ids[part], topk_logits[part].to(z.dtype), logsumexp[part].to(z.dtype)
        return topk_distance_(z, *targets, row_weight, shares, grads)

    return _chunked(state, norm_weight, head_weight, weight, eps, score, len(head_weight))


def tree_loss_exact_ref(
    state, norm_weight, head_weight, target_state, target_head, target_ids, weight, distance, eps
) -> TreeLoss:
    """`tree_loss_exact` in plain PyTorch, on any device.

    Computes in float32, or in float64 if state is.
    """
    shares = shares_of(distance)
    check_vocabularies(head_weight, target_head, target_ids)
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    target_head = target_head.detach().to(dtype)
    if target_ids is None:
        target_ids = torch.arange(len(target_head), device=state.device)
    draft_ids = draft_ids_of(target_ids, len(target_head))

    def score(part: slice, z: Tensor, row_weight: Tensor, grads: bool):
        t = target_state[part].detach().to(z.dtype) @ target_head.T
        return exact_distance_(z, t, target_ids, draft_ids, row_weight, shares, grads)

    return _chunked(
        state, norm_weight, head_weight, weight, eps, score, len(head_weight) + len(target_head)
    )


def shares_of(distance: str | Mapping[str, float]) -> tuple[float, float, float, float]:
    """Shares of DISTANCES, in their order. Raises ValueError for a distance that does not exist."""
    mixture = {distance: 1.0} if isinstance(distance, str) else dict(distance)
    if not mixture or not set(mixture) <= set(DISTANCES):
        raise ValueError(
            f"distance {distance!r}: expected one of {DISTANCES}, or a weight for some of them"
        )
    return tuple(float(mixture.get(name, 0)) for name in DISTANCES)


def check_vocabularies(head_weight: Tensor, target_head: Tensor, target_ids: Tensor | None) -> None:
    """Raises ValueError if target_ids does not name a target token for every draft token."""
    named = len(target_head) if target_ids is None else len(target_ids)
    if named != len(head_weight):
        raise ValueError(
            f"target_ids: the draft head has {len(head_weight)} tokens, expected as many target"
            f" ids, got {named}"
            + (" (None: the target's whole vocabulary)" if target_ids is None else "")
        )


def draft_ids_of(target_ids: Tensor, vocab: int) -> Tensor:
    """int64 [V]: the draft's id of every target id, -1 if it has none."""
    draft_ids = torch.full((vocab,), -1, dtype=torch.int64, device=target_ids.device)
    return draft_ids.scatter_(
        0, target_ids, torch.arange(len(target_ids), device=target_ids.device)
    )


def _chunked(
    state, norm_weight, head_weight, weight, eps, score: Callable, logits_per_row: int
) -> TreeLoss:
    """score(part, z, weight, grads) -> (argmax, loss, acceptance, the target's first choice as a
    draft id or -1) of the rows `part` from their logits z [r, VD], which become weight * d(loss) /
    dz if `grads`, else waste."""
    grads = torch.is_grad_enabled() and any(
        t.requires_grad for t in (state, norm_weight, head_weight)
    )
    return TreeLoss(
        *_TreeLoss.apply(state, norm_weight, head_weight, weight, eps, score, logits_per_row, grads)
    )


class _TreeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, norm_weight, head_weight, weight, eps, score, logits_per_row, grads):
        dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
        g, w = norm_weight.to(dtype), head_weight.to(dtype)
        rows, chunk = len(state), max(32, CHUNK_LOGITS // logits_per_row)
        loss, acceptance = state.new_empty(rows, dtype=dtype), state.new_empty(rows, dtype=dtype)
        argmax, label = (state.new_empty(rows, dtype=torch.int64) for _ in range(2))
        if grads:
            dstate = torch.empty_like(state, dtype=dtype)
            dg, dw = torch.zeros_like(g), torch.zeros_like(w)
        for at in range(0, rows, chunk):
            part = slice(at, at + chunk)
            x = state[part].to(dtype)
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x_hat = x * scale
            y = x_hat * g
            z = y @ w.T
            argmax[part], loss[part], acceptance[part], label[part] = score(
                part, z, weight[part].to(dtype), grads
            )
            # z now holds d(loss_sum) / d(logits)
            if grads:
                dw.addmm_(z.T, y)
                dy = z @ w
                dg += (dy * x_hat).sum(0)
                dy *= g
                dstate[part] = dy.sub_(x_hat * (dy * x_hat).mean(-1, keepdim=True)).mul_(scale)
        if grads:
            ctx.save_for_backward(dstate, dg, dw)
            ctx.dtypes = state.dtype, norm_weight.dtype, head_weight.dtype
        match = argmax == label
        ctx.mark_non_differentiable(loss, match, acceptance, argmax)
        return (loss * weight.to(dtype)).sum(), loss, match, acceptance, argmax

    @staticmethod
    def backward(ctx, grad, *_):
        grads = (
            g.mul(grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def target_distribution(
    topk_ids: Tensor, topk_logits: Tensor, logsumexp: Tensor, draft_vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the draft is compared with: (p [R, K], p_tail [R], raw p [R, K], raw p_tail [R], covered
    [R]).

    Raw is the target's own: exp(logit - logsumexp), zero for tokens that the draft lacks, and one
    minus the sum over ALL kept tokens. p is raw / covered, where `covered` is the mass of kept
    draft tokens and the tail: the target restricted to the draft vocabulary. The tail counts as
    draft tokens, unless every draft token is kept.
    """
    kept = (topk_logits - logsumexp[:, None]).exp()
    real = topk_ids >= 0
    tail = (1 - kept.sum(-1)).clamp_min(0)
    tail = tail.masked_fill(real.sum(-1) == draft_vocab, 0)
    kept = kept * real
    covered = kept.sum(-1) + tail
    floor = covered.clamp_min(MIN_COVERED)
    return kept / floor[:, None], tail / floor, kept, tail, covered


def topk_distance_(z, topk_ids, topk_logits, logsumexp, weight, shares, grads):
    """What `_chunked` asks of a score, in place of z: from K kept target logits and one bucket for
    the rest.
    """
    forward_kl, reverse_kl, tv, greedy = shares
    lowest = torch.finfo(z.dtype).min
    real = topk_ids >= 0
    ids = topk_ids.clamp_min(0)
    p, p_tail, raw_p, raw_tail, covered = target_distribution(
        topk_ids, topk_logits, logsumexp, z.shape[1]
    )
    argmax = z.argmax(-1)
    z_kept = z.gather(1, ids).masked_fill_(~real, -torch.inf)
    z.scatter_add_(1, ids, z.new_zeros(()).expand_as(p).masked_fill(real, -torch.inf))
    # z is now the tail alone. It has its own maximum: it loses nothing to cancellation, nor when
    # it is tiny.
    tail_top = z.amax(-1).clamp_min_(lowest)
    e = z.sub_(tail_top[:, None]).exp_()
    e_sum = e.sum(-1)
    # not > 0: NaN is to show
    has_tail = e_sum != 0
    # a sum holds its maximum's own 1
    log_tail = tail_top + e_sum.clamp_min(1).log()
    log_tail = log_tail.masked_fill(~has_tail, -torch.inf)
    lse = torch.logaddexp(z_kept.logsumexp(-1), log_tail)
    log_q, log_q_tail = z_kept - lse[:, None], log_tail - lse
    q, q_tail = log_q.exp(), log_q_tail.exp()
    log_q, log_q_tail = log_q.masked_fill(~real, 0), log_q_tail.masked_fill(~has_tail, 0)
    acceptance = torch.minimum(raw_p, q).sum(-1) + torch.minimum(raw_tail, q_tail)

    # a = d(loss) / d(log q) with the log q taken as independent; README.md turns it into d(loss) /
    # dz
    loss, a, a_tail = torch.zeros_like(lse), torch.zeros_like(q), torch.zeros_like(lse)
    if forward_kl:
        entropy = torch.xlogy(p, p).sum(-1) + torch.xlogy(p_tail, p_tail)
        loss += forward_kl * (entropy - (p * log_q).sum(-1) - p_tail * log_q_tail)
        a -= forward_kl * p
        a_tail -= forward_kl * p_tail
    if reverse_kl:
        log_p = (topk_logits - logsumexp[:, None]).clamp_min(LOG_P_FLOOR)
        log_p = log_p - covered.clamp_min(MIN_COVERED).log()[:, None]
        part, part_tail = (
            q * (log_q - log_p),
            q_tail * (log_q_tail - p_tail.clamp_min(P_TAIL_FLOOR).log()),
        )
        loss += reverse_kl * (part.sum(-1) + part_tail)
        a += reverse_kl * part
        a_tail += reverse_kl * part_tail
    if tv:
        loss += tv * (1 - torch.minimum(p, q).sum(-1) - torch.minimum(p_tail, q_tail))
        a -= tv * q * (q < p)
        a_tail -= tv * q_tail * (q_tail < p_tail)
    # the target's first choice as a hard label
    if greedy:
        loss -= greedy * log_q[:, 0] * real[:, 0]
        a[:, 0] -= greedy * real[:, 0]
    taught = covered > MIN_COVERED
    loss.masked_fill_(~taught, 0)
    if grads:
        row = weight * taught
        sum_a = a.sum(-1) + a_tail
        e.mul_((row * (a_tail - q_tail * sum_a) / e_sum.clamp_min(1))[:, None])
        e.scatter_add_(1, ids, (a - q * sum_a[:, None]) * real * row[:, None])
    return argmax, loss, acceptance.clamp_max(1), topk_ids[:, 0]


def exact_distance_(z, t, target_ids, draft_ids, weight, shares, grads):
    """What `_chunked` asks of a score, in place of z: from the target's logits t [r, V]."""
    forward_kl, reverse_kl, tv, greedy = shares
    argmax = z.argmax(-1)
    label = draft_ids[t.argmax(-1)]
    known = label >= 0
    lse = t.logsumexp(-1)
    t = t.index_select(1, target_ids)
    restricted = t.logsumexp(-1)
    covered = (restricted - lse).exp()
    log_p, log_q = t.sub_(restricted[:, None]), z.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_q_label = log_q.gather(1, label.clamp_min(0)[:, None])[:, 0]
    acceptance = torch.minimum(covered[:, None] * p, q).sum(-1)
    loss, a = torch.zeros_like(lse), torch.zeros_like(q)
    if forward_kl:
        loss += forward_kl * (p * (log_p - log_q)).sum(-1)
        a -= forward_kl * p
    if reverse_kl:
        part = q * (log_q - log_p)
        loss += reverse_kl * part.sum(-1)
        a += reverse_kl * part
    if tv:
        loss += tv * (p - q).clamp_min(0).sum(-1)
        a -= tv * q * (q < p)
    if greedy:
        loss -= greedy * log_q_label * known
        a.scatter_add_(1, label.clamp_min(0)[:, None], -greedy * known.to(a.dtype)[:, None])
    taught = covered > MIN_COVERED
    loss.masked_fill_(~taught, 0)
    if grads:
        torch.mul((a - q * a.sum(-1, keepdim=True)), (weight * taught)[:, None], out=z)
    return argmax, loss, acceptance.clamp_max(1), label
