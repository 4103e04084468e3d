"""Attention of draft queries over a prefix of their sequence's positions and over their ancestors
in the tree.

Dimensions: Q queries, T positions (packed sequences), M nodes, A ancestors, Hq query heads, Hkv key
    heads, D head.

One softmax runs over both parts. Level 0 (every position over the positions before it) is the same
call without ancestors. Memory is linear in Q + T + M: blocks of query rows are scored against their
own prefix, `o` and the log-sum-exp of every row are kept, and the backward pass computes the scores
again. Formulas are in README.md of this folder.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK_QUERIES = 64
# scores alive at a time, over all heads
BLOCK_SCORES = 1 << 20
_Group = tuple[Tensor, Tensor, Tensor, int, list[tuple[int, int]]]


def tree_attention_ref(
    q, context_k, context_v, node_k, node_v, context_start, context_end, ancestors, scale
) -> Tensor:
    """`tree_attention` in plain PyTorch, on any device.

    Computes in float32, or in float64 if q is.
    """
    if ancestors is None:
        ancestors = q.new_empty((len(q), 0), dtype=torch.int64)
        node_k = node_v = context_k[:0]
    elif not len(node_k):
        ancestors = ancestors[:, :0]
    return _TreeAttention.apply(
        q, context_k, context_v, node_k, node_v, context_start, context_end, ancestors, scale
    )


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, context_k, context_v, node_k, node_v, context_start, context_end, ancestors, scale
    ):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        groups = _plan(context_start, context_end, q.shape[1])
        o, lse = _forward(
            *(x.to(dtype) for x in (q, context_k, context_v, node_k, node_v)),
            ancestors,
            scale,
            groups,
        )
        ctx.save_for_backward(q, context_k, context_v, node_k, node_v, ancestors, o, lse)
        ctx.groups, ctx.scale, ctx.dtype = groups, scale, dtype
        return o.to(q.dtype)

    @staticmethod
    def backward(ctx, grad):
        *inputs, ancestors, o, lse = ctx.saved_tensors
        wide = (x.to(ctx.dtype) for x in inputs)
        grads = _backward(*wide, ancestors, ctx.scale, ctx.groups, o, lse, grad.to(ctx.dtype))
        return *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None, None, None, None


def _plan(context_start: Tensor, context_end: Tensor, heads: int) -> list[_Group]:
    """Blocks of queries of one sequence with similar prefixes, in groups of blocks with prefixes of
    similar length.

    A group is (rows [B, R], -1 where padded; keys [B, C]; limit [B, R]: keys that each row sees;
    the number of keys that every row sees; spans: each block's (first position, positions)).
    """
    device = context_start.device
    start, end = context_start.cpu().numpy(), context_end.cpu().numpy()
    order = np.lexsort((end, start))
    order = order[end[order] > start[order]]
    if not len(order):
        return []
    start, end = start[order], end[order]
    longest = int((end - start).max())
    block = int(np.clip(BLOCK_SCORES // (heads * longest), 1, BLOCK_QUERIES))
    first_of_sequence = np.flatnonzero(np.r_[True, start[1:] != start[:-1]])
    rank = np.arange(len(order)) - np.repeat(
        first_of_sequence, np.diff(np.r_[first_of_sequence, len(order)])
    )
    first = np.flatnonzero(rank % block == 0)
    rows = np.diff(np.r_[first, len(order)])
    # the last row of a block sees most
    positions = end[first + rows - 1] - start[first]
    by_length = np.argsort(-positions, kind="stable")
    groups, at = [], 0
    while at < len(by_length):
        most = int(positions[by_length[at]])
        width = max(1, BLOCK_SCORES // (heads * block * most))
        members = by_length[at : at + width]
        members = members[positions[members] >= 0.75 * most - 16]
        at += len(members)
        within = np.arange(int(rows[members].max()))
        real = within < rows[members, None]
        index = np.minimum(first[members, None] + within, len(order) - 1)
        keys = np.minimum(start[first[members], None] + np.arange(most), int(end.max()) - 1)
        limit = np.where(real, end[index] - start[index], most)
        spans = list(zip(start[first[members]].tolist(), positions[members].tolist(), strict=True))
        host = (np.where(real, order[index], -1), keys, limit)
        groups.append(
            (
                *(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in host),
                int(limit.min()),
                spans,
            )
        )
    return groups


def _blocks(x: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """Rows of x [Q, Hq, D] as [B * Hkv, G * R, D]."""
    (b, r), (_, heads, d) = rows.shape, x.shape
    x = x.index_select(0, rows.clamp_min(0).flatten()).view(b, r, kv_heads, heads // kv_heads, d)
    return x.permute(0, 2, 3, 1, 4).reshape(b * kv_heads, -1, d)


def _unblock(x: Tensor, rows: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_blocks` without the padding: row numbers [N] and values [N, Hq, D]."""
    b, r = rows.shape
    x = (
        x.view(b, kv_heads, -1, r, x.shape[-1])
        .permute(0, 3, 1, 2, 4)
        .reshape(b * r, -1, x.shape[-1])
    )
    rows = rows.flatten()
    real = (rows >= 0).nonzero().squeeze(1)
    return rows[real], x[real]


def _key_blocks(x: Tensor, keys: Tensor) -> Tensor:
    """Rows of x [T, Hkv, D] as [B * Hkv, C, D]."""
    b, c = keys.shape
    return (
        x.index_select(0, keys.flatten())
        .view(b, c, *x.shape[1:])
        .transpose(1, 2)
        .reshape(-1, c, x.shape[2])
    )


def _scores(q: Tensor, k: Tensor, limit: Tensor, shared: int) -> Tensor:
    """Scores [B * Hkv, G * R, C] of scaled queries, -inf beyond each row's limit."""
    scores = torch.bmm(q, k.transpose(1, 2))
    b, r = limit.shape
    # [B, R, C - shared]
    hidden = torch.arange(shared, k.shape[1], device=k.device) >= limit[..., None]
    scores.view(b, -1, r, k.shape[1])[..., shared:].masked_fill_(hidden[:, None], -torch.inf)
    return scores


def _forward(q, context_k, context_v, node_k, node_v, ancestors, scale, groups):
    (n, heads, _), kv_heads = q.shape, context_k.shape[1]
    o, lse = torch.zeros_like(q), q.new_full((n, heads), -torch.inf)
    for rows, keys, limit, shared, _ in groups:
        p = _scores(_blocks(q, rows, kv_heads) * scale, _key_blocks(context_k, keys), limit, shared)
        top = p.amax(-1, keepdim=True).clamp_min_(torch.finfo(p.dtype).min)
        p.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        block_o = torch.bmm(p, _key_blocks(context_v, keys)).div_(
            total.clamp_min(torch.finfo(p.dtype).tiny)
        )
        index, block_o = _unblock(block_o, rows, kv_heads)
        o[index] = block_o
        lse[index] = _unblock(total.log_().add_(top), rows, kv_heads)[1].squeeze(-1)
    if ancestors.shape[1]:
        scores = _node_scores(q, node_k, ancestors, scale)
        whole = torch.logaddexp(lse, scores.logsumexp(-1))
        whole.masked_fill_(whole == -torch.inf, torch.inf)
        o *= (lse - whole).exp_()[..., None]
        p = scores.sub_(whole[..., None]).exp_()
        for a in range(ancestors.shape[1]):
            _per_key_head(o, kv_heads).addcmul_(
                _per_key_head(p[:, :, a, None], kv_heads), _of(node_v, ancestors[:, a])
            )
        return o, whole
    # +inf: a row that sees nothing has probabilities 0
    return o, lse.masked_fill_(lse == -torch.inf, torch.inf)


def _per_key_head(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1))  # [Q, Hkv, G, ..]


def _of(nodes: Tensor, index: Tensor) -> Tensor:
    """[Q, Hkv, 1, D]; what a missing ancestor reads does not matter."""
    return nodes.index_select(0, index.clamp_min(0))[:, :, None]


def _node_scores(q, node_k, ancestors, scale) -> Tensor:
    """[Q, Hq, A], -inf for missing ancestors."""
    grouped = _per_key_head(q, node_k.shape[1])
    scores = [
        (grouped * _of(node_k, ancestors[:, a])).sum(-1).flatten(1)
        for a in range(ancestors.shape[1])
    ]
    return torch.stack(scores, -1).mul_(scale).masked_fill_((ancestors < 0)[:, None], -torch.inf)


def _backward(q, context_k, context_v, node_k, node_v, ancestors, scale, groups, o, lse, do):
    kv_heads = context_k.shape[1]
    dq, dcontext_k, dcontext_v, dnode_k, dnode_v = map(
        torch.zeros_like, (q, context_k, context_v, node_k, node_v)
    )
    delta = (o * do).sum(-1)  # [Q, Hq]
    for rows, keys, limit, shared, spans in groups:
        block_q, block_do = _blocks(q, rows, kv_heads) * scale, _blocks(do, rows, kv_heads)
        k, v = _key_blocks(context_k, keys), _key_blocks(context_v, keys)
        row_lse = _blocks(lse[..., None], rows, kv_heads)
        # padding: no gradient
        row_lse.view(len(rows), -1, rows.shape[1]).masked_fill_((rows < 0)[:, None], torch.inf)
        p = _scores(block_q, k, limit, shared).sub_(row_lse).exp_()
        dv = torch.bmm(p.transpose(1, 2), block_do)
        ds = (
            torch.bmm(block_do, v.transpose(1, 2))
            .sub_(_blocks(delta[..., None], rows, kv_heads))
            .mul_(p)
        )
        index, block_dq = _unblock(torch.bmm(ds, k), rows, kv_heads)
        dq[index] = block_dq.mul_(scale)
        dk = torch.bmm(ds.transpose(1, 2), block_q)
        for whole, part in ((dcontext_k, dk), (dcontext_v, dv)):
            part = part.view(len(spans), kv_heads, -1, part.shape[-1])
            # blocks of one sequence overlap, hence one by one
            for b, (first, positions) in enumerate(spans):
                whole[first : first + positions] += part[b, :, :positions].transpose(0, 1)
    if ancestors.shape[1]:
        p = _node_scores(q, node_k, ancestors, scale).sub_(lse[..., None]).exp_()
        grouped_q, grouped_do = _per_key_head(q, kv_heads), _per_key_head(do, kv_heads)
        for a in range(ancestors.shape[1]):
            index = ancestors[:, a].clamp_min(0)
            # [Q, Hkv, G, 1], 0 for missing ancestors
            p_a = _per_key_head(p[:, :, a, None], kv_heads)
            dp = (grouped_do * _of(node_v, index)).sum(-1, keepdim=True)
            ds = (dp - _per_key_head(delta[..., None], kv_heads)).mul_(p_a).mul_(scale)
            _per_key_head(dq, kv_heads).addcmul_(ds, _of(node_k, index))
            dnode_v.index_add_(0, index, (p_a * grouped_do).sum(2))
            dnode_k.index_add_(0, index, (ds * grouped_q).sum(2))
    return dq, dcontext_k, dcontext_v, dnode_k, dnode_v
