"""The backward Triton kernels of tree_attention: gradients of queries, of positions and of nodes.

Letters, rows, indices and how blocks of rows walk: tree_attention_kernels.py, the forward kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from aurora_kernels.tree_attention_kernels import (
    _SIZES,
    _ancestors,
    _count,
    _dot,
    _load,
    _next,
    _positions,
    _rows,
    _store,
    _visible,
    _walk,
)


@triton.jit
def _q_gradient(
    q_rows, do_rows, k, v, visible, lse_rows, delta_rows, acc, qk_scale, MASKED: tl.constexpr
):
    """acc + dS K, dS without the scale."""
    exponent = _dot(q_rows, tl.trans(k)) * qk_scale - lse_rows[:, None]
    if MASKED:
        exponent = tl.where(visible, exponent, float("-inf"))
    dp = _dot(do_rows, tl.trans(v))
    ds = tl.exp2(exponent) * (dp - delta_rows[:, None])
    return _dot(ds.to(k.dtype), k, acc)


@triton.jit(do_not_specialize=_SIZES)
def tree_attention_bwd_q_kernel(
    q, context_k, context_v, node_k, node_v, ancestors, key, order, o, lse, do, delta, dq,
    scale, qk_scale, queries, width, kv_heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of rows: dq, and delta for the kernels after this one.

    Walks as the forward kernel does.
    """
    kv_head = tl.program_id(0) % kv_heads
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    row, live, index, start, end = _rows(block, kv_head, key, order, queries, kv_heads, G, BLOCK_M)
    do_rows = _load(do, index * D, live, D, BLOCK_D, True)
    o_rows = _load(o, index * D, live, D, BLOCK_D, True)
    delta_rows = tl.sum(o_rows.to(tl.float32) * do_rows.to(tl.float32), 1)
    tl.store(delta + index, delta_rows, mask=live)
    q_rows = _load(q, index * D, live, D, BLOCK_D, True)
    lse_rows = tl.load(lse + index, mask=live, other=float("inf"))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    lo, whole, whole_end, hi = _walk(start, end, BLOCK_N)
    # no positions: their probabilities are 0
    context_lse = tl.where(end > start, lse_rows, float("inf"))
    for at in range(whole, whole_end, BLOCK_N):
        k = _positions(context_k, at, hi, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, False)
        v = _positions(context_v, at, hi, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, False)
        acc = _q_gradient(
            q_rows, do_rows, k, v, None, context_lse, delta_rows, acc, qk_scale, False
        )
    at = _next(lo, start, end, whole, whole_end, hi)
    for _ in range(_count(at, start, end, whole, whole_end, hi, BLOCK_N)):
        stop = tl.where(at < whole, whole, hi)
        k = _positions(context_k, at, stop, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, True)
        v = _positions(context_v, at, stop, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, True)
        visible = _visible(at, stop, start, end, BLOCK_N)
        acc = _q_gradient(q_rows, do_rows, k, v, visible, lse_rows, delta_rows, acc, qk_scale, True)
        at = _next(at + BLOCK_N, start, end, whole, whole_end, hi)

    # the first of each row's
    column = row // G * width
    stop = tl.minimum(tl.max(column, 0) + width, queries * width)
    for at in range(tl.min(column, 0), stop, BLOCK_N):
        node, there = _ancestors(ancestors, at, stop, kv_head, kv_heads, BLOCK_N)
        k = _load(node_k, node * D, there, D, BLOCK_D, True)
        v = _load(node_v, node * D, there, D, BLOCK_D, True)
        visible = _visible(at, stop, column, column + width, BLOCK_N) & there[None, :]
        acc = _q_gradient(q_rows, do_rows, k, v, visible, lse_rows, delta_rows, acc, qk_scale, True)
    _store(dq, index * D, (acc * scale).to(dq.dtype.element_ty), live, D, BLOCK_D)


@triton.jit
def _position_gradients(
    row, position, k, v, dk, dv, q, do, lse, delta, key, order, qk_scale, queries, kv_head,
    kv_heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dk + dS^T Q (dS without the scale) and dv + P^T dO of a block of positions, over the rows
    from `row` on.
    """
    row += tl.arange(0, BLOCK_M)
    live = row < queries * G if MASKED else None
    index = (
        tl.load(order + row // G, mask=live, other=0 if MASKED else None) * (kv_heads * G)
        + kv_head * G
        + row % G
    )
    q_rows = _load(q, index * D, live, D, BLOCK_D, MASKED)
    lse_rows = tl.load(lse + index, mask=live)
    exponent = _dot(k, tl.trans(q_rows)) * qk_scale - lse_rows[None, :]
    if MASKED:
        bounds = tl.load(key + row // G, mask=live, other=0)
        start, end = (bounds >> 32).to(tl.int32), (bounds & 0xFFFFFFFF).to(tl.int32)
        visible = (position[:, None] >= start[None, :]) & (position[:, None] < end[None, :])
        exponent = tl.where(visible, exponent, float("-inf"))
    p = tl.exp2(exponent)  # [BLOCK_N, BLOCK_M]
    do_rows = _load(do, index * D, live, D, BLOCK_D, MASKED)
    dv = _dot(p.to(do_rows.dtype), do_rows, dv)
    dp = _dot(v, tl.trans(do_rows))
    ds = p * (dp - tl.load(delta + index, mask=live, other=0.0 if MASKED else None)[None, :])
    return _dot(ds.to(q_rows.dtype), q_rows, dk), dv


@triton.jit(do_not_specialize=_SIZES)
def tree_attention_bwd_positions_kernel(
    q, context_k, context_v, do, lse, delta, key, order, ranges, dcontext_k, dcontext_v,
    scale, qk_scale, queries, positions, kv_heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of positions: dk and dv, over the sorted rows that may see it (`ranges`, see
    rows_of_positions).
    """
    kv_head = tl.program_id(0) % kv_heads
    ranges += tl.program_id(0) // kv_heads * 5
    at = tl.load(ranges).to(tl.int32) * BLOCK_N
    lo, hi = (tl.load(ranges + 1) * G).to(tl.int32), (tl.load(ranges + 4) * G).to(tl.int32)
    whole, whole_end = (
        (tl.load(ranges + 2) * G).to(tl.int32),
        (tl.load(ranges + 3) * G).to(tl.int32),
    )
    whole = lo + tl.cdiv(tl.maximum(whole - lo, 0), BLOCK_M) * BLOCK_M
    length = tl.maximum(whole_end - whole, 0) // BLOCK_M * BLOCK_M
    whole = tl.where(length > 0, whole, lo)
    whole_end = whole + length
    position = at + tl.arange(0, BLOCK_N)
    k = _positions(context_k, at, positions, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, True)
    v = _positions(context_v, at, positions, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    before = (whole - lo) // BLOCK_M
    for i in range(before + tl.cdiv(tl.maximum(hi - whole_end, 0), BLOCK_M)):
        row = tl.where(i < before, lo, whole_end - before * BLOCK_M) + i * BLOCK_M
        dk, dv = _position_gradients(row, position, k, v, dk, dv, q, do, lse, delta, key, order,
        qk_scale,
        queries,
                                 kv_head, kv_heads, G, D, BLOCK_D, BLOCK_M, True)  # fmt: skip
    for row in range(whole, whole_end, BLOCK_M):
        dk, dv = _position_gradients(row, position, k, v, dk, dv, q, do, lse, delta, key, order,
        qk_scale,
        queries,
                                 kv_head, kv_heads, G, D, BLOCK_D, BLOCK_M, False)  # fmt: skip
    offset = (position.to(tl.int64) * kv_heads + kv_head) * D
    _store(
        dcontext_k,
        offset,
        (dk * scale).to(dcontext_k.dtype.element_ty),
        position < positions,
        D,
        BLOCK_D,
    )
    _store(dcontext_v, offset, dv.to(dcontext_v.dtype.element_ty), position < positions, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def tree_attention_bwd_nodes_kernel(
    q, node_k, node_v, do, lse, delta, first, query, dnode_k, dnode_v,
    scale, qk_scale, nodes, kv_heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of nodes: dk and dv, each over the queries that name it (see queries_of_nodes)."""
    kv_head = tl.program_id(0) % kv_heads
    node = tl.program_id(0) // kv_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    real = node < nodes
    entry = tl.load(first + node, mask=real, other=0)
    end = tl.load(first + node + 1, mask=real, other=0)
    offset = (node.to(tl.int64) * kv_heads + kv_head) * D
    k = _load(node_k, offset, real, D, BLOCK_D, True).to(tl.float32)
    v = _load(node_v, offset, real, D, BLOCK_D, True).to(tl.float32)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in range(tl.max(end - entry, 0)):
        there = entry < end
        index = tl.load(query + entry, mask=there, other=0) * (kv_heads * G) + kv_head * G
        for _g in range(G):
            q_rows = _load(q, index * D, there, D, BLOCK_D, True).to(tl.float32)
            do_rows = _load(do, index * D, there, D, BLOCK_D, True).to(tl.float32)
            lse_rows = tl.load(lse + index, mask=there, other=float("inf"))
            p = tl.exp2(tl.sum(q_rows * k, 1) * qk_scale - lse_rows)
            ds = p * (tl.sum(do_rows * v, 1) - tl.load(delta + index, mask=there, other=0.0))
            dk += ds[:, None] * q_rows
            dv += p[:, None] * do_rows
            index += 1
        entry += 1
    _store(dnode_k, offset, (dk * scale).to(dnode_k.dtype.element_ty), real, D, BLOCK_D)
    _store(dnode_v, offset, dv.to(dnode_v.dtype.element_ty), real, D, BLOCK_D)
