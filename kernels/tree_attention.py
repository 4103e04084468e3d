"""Attention of draft queries over a prefix of their sequence's positions and over their ancestors
in the tree.

Dimensions: Q queries, T positions (packed sequences), M nodes, A ancestors, Hq query heads, Hkv key
    heads, D head.

On a GPU, Triton kernels (tree_attention_kernels.py, tree_attention_bwd_kernels.py) over queries
that are sorted by what they see. The indices are built on the device and never read from it; every
sum has one order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import torch
from aurora_kernels.dispatch import use_kernels
from aurora_kernels.tree_attention_bwd_kernels import (
    tree_attention_bwd_nodes_kernel,
    tree_attention_bwd_positions_kernel,
    tree_attention_bwd_q_kernel,
)
from aurora_kernels.tree_attention_kernels import tree_attention_fwd_kernel
from aurora_kernels.tree_attention_launch import constants, launch
from aurora_kernels.tree_attention_ref import tree_attention_ref
from torch import Tensor
from torch.autograd.function import once_differentiable


def tree_attention(
    q: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    node_k: Tensor | None,
    node_v: Tensor | None,
    context_start: Tensor,
    context_end: Tensor,
    ancestors: Tensor | None,
    scale: float,
) -> Tensor:
    """o [Q, Hq, D]: query i attends to positions context_start[i] : context_end[i] and to the nodes
    ancestors[i].

    q [Q, Hq, D]; context_k, context_v [T, Hkv, D]; node_k, node_v [M, Hkv, D]; context_start,
    context_end int64 [Q]; ancestors int64 [Q, A], -1 for none, the query's own node included. Query
    head h reads key head h // (Hq // Hkv). A query that may see nothing gets zeros. Differentiable
    in q, context_k, context_v, node_k and node_v.
    """
    if not use_kernels(q):
        return tree_attention_ref(
            q, context_k, context_v, node_k, node_v, context_start, context_end, ancestors, scale
        )
    if ancestors is None:
        ancestors, node_k, node_v = context_start.new_empty(len(q), 0), context_k[:0], context_v[:0]
    # the running maximum is taken before the scale
    if scale < 0:
        q, scale = -q, -scale
    tensors = (x.to(q.dtype).contiguous() for x in (q, context_k, context_v, node_k, node_v))
    indices = (x.to(torch.int64).contiguous() for x in (context_start, context_end, ancestors))
    return _TreeAttention.apply(*tensors, *indices, scale)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, context_k, context_v, node_k, node_v, context_start, context_end, ancestors, scale
    ):
        key, order = sort_queries(context_start, context_end)
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        tensors = {"q": q, "context_k": context_k, "context_v": context_v, "node_k": node_k,
        "node_v": node_v,
                   "ancestors": ancestors[order], "key": key, "order": order}  # fmt: skip
        launch(tree_attention_fwd_kernel, scale, **tensors, o=o, lse=lse)
        ctx.save_for_backward(*tensors.values(), o, lse)
        ctx.names, ctx.scale = (*tensors, "o", "lse"), scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        o, key, order, ancestors = (
            saved.pop("o"),
            saved["key"],
            saved["order"],
            saved.pop("ancestors"),
        )
        rows = saved | {"do": do.contiguous(), "delta": torch.empty_like(saved["lse"])}
        dq, dcontext_k, dcontext_v, dnode_k, dnode_v = (
            torch.empty_like(saved[name])
            for name in ("q", "context_k", "context_v", "node_k", "node_v")
        )
        # writes delta as well
        launch(tree_attention_bwd_q_kernel, ctx.scale, **rows, o=o, ancestors=ancestors, dq=dq)
        if any(ctx.needs_input_grad[1:3]):
            block = constants(tree_attention_bwd_positions_kernel, dq)[0]["BLOCK_N"]
            ranges = rows_of_positions(key, len(dcontext_k), block)
            launch(
                tree_attention_bwd_positions_kernel,
                ctx.scale,
                **rows,
                ranges=ranges,
                dcontext_k=dcontext_k,
                dcontext_v=dcontext_v,
            )
        if any(ctx.needs_input_grad[3:5]):
            first, query = queries_of_nodes(ancestors, order, len(dnode_k))
            launch(tree_attention_bwd_nodes_kernel, ctx.scale, **rows, first=first, query=query,
                    dnode_k=dnode_k, dnode_v=dnode_v)  # fmt: skip
        return dq, dcontext_k, dcontext_v, dnode_k, dnode_v, None, None, None, None


def sort_queries(context_start: Tensor, context_end: Tensor) -> tuple[Tensor, Tensor]:
    """(key, order) int64 [Q]: context_start << 32 | context_end in ascending order, and the queries
    in that order.
    """
    return torch.sort((context_start << 32) + context_end, stable=True)


def rows_of_positions(key: Tensor, positions: int, block: int) -> Tensor:
    """int64 [blocks of positions, 5], most queries first: the block's number, and four bounds in
    the sorted queries.

    Queries lo : hi are all that see a position of the block, perhaps among others; whole :
    whole_end of them see all of it.
    """
    first = torch.arange(0, positions, block, device=key.device)
    last = (first + block).clamp_max_(positions)
    starts_before_last, starts_by_first = torch.searchsorted(
        key, torch.stack([last, first + 1]) << 32
    )
    lo = (
        torch.searchsorted((key & 0xFFFFFFFF).cummax(0).values, first, right=True)
        if len(key)
        else first * 0
    )
    # The queries that start nearest before the block are sorted by their end.
    nearest = key[(starts_by_first - 1).clamp_min_(0)] >> 32 if len(key) else first
    whole = torch.searchsorted(key, (nearest << 32) + last)
    ranges = torch.stack(
        [first // block, lo, whole, torch.maximum(starts_by_first, whole), starts_before_last], 1
    )
    return ranges[torch.argsort(lo - starts_before_last, stable=True)]


def queries_of_nodes(ancestors: Tensor, order: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """(first int64 [M + 1], query int64 [Q * A]): the queries that name node n are query[first[n] :
    first[n + 1]].

    ancestors [Q, A] of the queries `order`.
    """
    node, entry = torch.sort(ancestors.flatten(), stable=True)
    first = torch.searchsorted(node, torch.arange(nodes + 1, device=node.device))
    return first, order[entry // max(ancestors.shape[1], 1)]
