"""Final norm, draft head and the distance to the target's kept distribution, fused over chunks of rows.

Dimensions: R rows (queries with a target), H hidden, VD draft vocabulary, K kept target logits.

Gradients are computed in the forward pass, chunk by chunk, so that no [R, VD] tensor is ever kept. Everything beyond
the kept logits is one bucket, the tail. With a reduced draft vocabulary the target is restricted to it and
renormalised. Formulas are in README.md of this folder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DISTANCES = ("forward_kl", "reverse_kl", "tv", "greedy")
CHUNK_LOGITS = 1 << 21  # logits alive at a time
LOG_P_FLOOR = -100.0  # of a kept token, for reverse_kl
P_TAIL_FLOOR = 1e-7  # for reverse_kl: float32 cannot tell a smaller tail from none
MIN_COVERED = 1e-6  # rows whose draft vocabulary holds less of the target's mass teach nothing


class TreeLoss(NamedTuple):
    loss_sum: Tensor  # scalar, sum of weight * loss; differentiable in state, norm_weight and head_weight
    loss: Tensor  # [R], unweighted
    greedy_match: Tensor  # bool [R], the draft's first choice is the target's
    acceptance: Tensor  # [R], sum of min(p, q): probability of acceptance under rejection sampling (upper bound: tail)
    argmax: Tensor  # int64 [R], the draft's first choice, a draft id


def tree_loss_ref(state, norm_weight, head_weight, topk_ids, topk_logits, logsumexp, weight, distance, eps):
    """`tree_loss` in plain PyTorch, on any device. Computes in float32, or in float64 if state is."""
    mixture = {distance: 1.0} if isinstance(distance, str) else dict(distance)
    if not mixture or not set(mixture) <= set(DISTANCES):
        raise ValueError(f"distance {distance!r}: expected one of {DISTANCES}, or a weight for some of them")
    differentiate = torch.is_grad_enabled() and any(t.requires_grad for t in (state, norm_weight, head_weight))
    targets = topk_ids, topk_logits, logsumexp, weight
    return TreeLoss(*_TreeLoss.apply(state, norm_weight, head_weight, *targets, mixture, eps, differentiate))


class _TreeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, norm_weight, head_weight, topk_ids, topk_logits, logsumexp, weight, mixture, eps, grads):
        dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
        g, w = norm_weight.to(dtype), head_weight.to(dtype)
        rows, chunk = len(state), max(32, CHUNK_LOGITS // len(w))
        loss, acceptance = state.new_empty(rows, dtype=dtype), state.new_empty(rows, dtype=dtype)
        argmax = topk_ids.new_empty(rows)
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
            argmax[part], loss[part], acceptance[part] = _distance_(
                z, topk_ids[part], topk_logits[part].to(dtype), logsumexp[part].to(dtype), weight[part].to(dtype),
                mixture, grads,
            )  # fmt: skip
            if grads:  # z now holds d(loss_sum) / d(logits)
                dw.addmm_(z.T, y)
                dy = z @ w
                dg += (dy * x_hat).sum(0)
                dy *= g
                dstate[part] = dy.sub_(x_hat * (dy * x_hat).mean(-1, keepdim=True)).mul_(scale)
        if grads:
            ctx.save_for_backward(dstate, dg, dw)
            ctx.dtypes = state.dtype, norm_weight.dtype, head_weight.dtype
        match = argmax == topk_ids[:, 0]
        ctx.mark_non_differentiable(loss, match, acceptance, argmax)
        return (loss * weight.to(dtype)).sum(), loss, match, acceptance, argmax

    @staticmethod
    def backward(ctx, grad, *_):
        grads = (g.mul(grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None, None, None, None, None


def target_distribution(
    topk_ids: Tensor, topk_logits: Tensor, logsumexp: Tensor, draft_vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the draft is compared with: (p [R, K], p_tail [R], raw p [R, K], raw p_tail [R], covered [R]).

    Raw is the target's own: exp(logit - logsumexp), zero for tokens that the draft lacks, and one minus the sum over
    ALL kept tokens. p is raw / covered, where `covered` is the mass of kept draft tokens and the tail: the target
    restricted to the draft vocabulary. The tail counts as draft tokens, except where every draft token is kept.
    """
    kept = (topk_logits - logsumexp[:, None]).exp()
    real = topk_ids >= 0
    tail = (1 - kept.sum(-1)).clamp_min(0)
    tail = tail.masked_fill(real.sum(-1) == draft_vocab, 0)
    kept = kept * real
    covered = kept.sum(-1) + tail
    floor = covered.clamp_min(MIN_COVERED)
    return kept / floor[:, None], tail / floor, kept, tail, covered


def _distance_(z, topk_ids, topk_logits, logsumexp, weight, mixture, grads) -> tuple[Tensor, Tensor, Tensor]:
    """(argmax, loss, acceptance) of logits z [R, VD], which become weight * d(loss) / dz where `grads`, else waste."""
    real = topk_ids >= 0
    ids = topk_ids.clamp_min(0)
    p, p_tail, raw_p, raw_tail, covered = target_distribution(topk_ids, topk_logits, logsumexp, z.shape[1])
    top, argmax = z.max(-1)
    z_kept = z.gather(1, ids)
    e = z.sub_(top[:, None]).exp_()
    e_kept = e.gather(1, ids) * real
    e.scatter_add_(1, ids, -e_kept)  # e is now the tail alone, whose sum loses nothing to cancellation
    e_tail = e.sum(-1)
    total = e_kept.sum(-1) + e_tail
    e_tail = e_tail.clamp_min(torch.finfo(z.dtype).tiny)
    log_q = z_kept - (top + total.log())[:, None]
    log_q_tail = e_tail.log() - total.log()
    q, q_tail = e_kept / total[:, None], e_tail / total
    has_tail = real.sum(-1) < z.shape[1]
    q_tail = q_tail * has_tail
    acceptance = torch.minimum(raw_p, q).sum(-1) + torch.minimum(raw_tail, q_tail)

    # a = d(loss) / d(log q) with the log q taken as independent; README.md turns it into d(loss) / dz
    loss, a, a_tail = torch.zeros_like(total), torch.zeros_like(q), torch.zeros_like(total)
    for name, share in mixture.items():
        if name == "forward_kl":
            entropy = torch.xlogy(p, p).sum(-1) + torch.xlogy(p_tail, p_tail)
            loss += share * (entropy - (p * log_q).sum(-1) - p_tail * log_q_tail)
            a -= share * p
            a_tail -= share * p_tail
        elif name == "reverse_kl":
            log_p = (topk_logits - logsumexp[:, None]).clamp_min(LOG_P_FLOOR)
            log_p = log_p - covered.clamp_min(MIN_COVERED).log()[:, None]
            part, part_tail = q * (log_q - log_p), q_tail * (log_q_tail - p_tail.clamp_min(P_TAIL_FLOOR).log())
            loss += share * (part.sum(-1) + part_tail)
            a += share * part
            a_tail += share * part_tail
        elif name == "tv":
            loss += share * (1 - torch.minimum(p, q).sum(-1) - torch.minimum(p_tail, q_tail))
            a -= share * q * (q < p)
            a_tail -= share * q_tail * (q_tail < p_tail)
        else:  # greedy: the target's first choice as a hard label
            loss -= share * log_q[:, 0] * real[:, 0]
            a[:, 0] -= share * real[:, 0]
    taught = covered > MIN_COVERED
    loss.masked_fill_(~taught, 0)
    if grads:
        row = weight * taught
        sum_a = a.sum(-1) + a_tail
        e.mul_((row * (a_tail / e_tail - sum_a / total))[:, None])
        e.scatter_add_(1, ids, (a - q * sum_a[:, None]) * real * row[:, None])
    return argmax, loss, acceptance.clamp_max(1)
