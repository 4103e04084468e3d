"""The forward Triton kernel of tree_attention, and the device functions that it shares with the
backward kernels (tree_attention_bwd_kernels.py).

Dimensions: Q queries, T positions, M nodes, A ancestors (`width`), Hq query heads, Hkv key heads, D
    head, G = Hq / Hkv.

A row is one sorted query and one of the G heads that read key head h, so that a block of rows
shares the keys that it
loads: row r of h is sorted query r // G, head h * G + r % G. Blocks are cut from the sorted rows
    wherever they fall;
one that spans several sequences masks. `key` and `order` are tree_attention.sort_queries',
`ancestors` those of the sorted queries; `lse` (to base 2) and `delta` are [Q, Hq]. Offsets of rows
are int64, within a block int32. Nothing is summed by atomics: the same inputs give the same bits.
Formulas are in README.md of this folder.
"""

from __future__ import annotations

import triton
import triton.language as tl

# of the data: they must not choose what is compiled
_SIZES = ["queries", "positions", "nodes", "width", "kv_heads"]
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc=None):
    """acc + a @ b in float32; float32 inputs are not rounded."""
    # which multiplies the bits of bfloat16 as if they were integers
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(pointer, offset, there, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] from `offset` [rows]; if MASKED, zeros where not `there`.

    Zeros in columns from D on.
    """
    d = tl.arange(0, BLOCK_D)
    pointers = pointer + offset[:, None] + d[None, :]
    if MASKED:
        return tl.load(pointers, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _store(pointer, offset, value, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(pointer + offset[:, None] + d[None, :], value, mask=there[:, None] & (d < D)[None, :])


@triton.jit
def _positions(pointer, at, stop, kv_head, kv_heads, D: tl.constexpr, BLOCK_D: tl.constexpr,
BLOCK_N: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_D] positions from `at` on, of one head; if MASKED, zeros from `stop` on."""
    n = tl.arange(0, BLOCK_N)
    pointer += (tl.cast(at, tl.int64) * kv_heads + kv_head) * D
    return _load(pointer, n * (kv_heads * D), at + n < stop, D, BLOCK_D, MASKED)


@triton.jit
def _rows(block, kv_head, key, order, queries, kv_heads, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """(row, it exists, its query and head in [Q, Hq], first position, end of positions), each
    [BLOCK_M].

    A row that sees no positions has the bounds 2^31 - 1 and 0, which no minimum or maximum notices.
    """
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < queries * G
    query = tl.load(order + row // G, mask=live, other=0)
    bounds = tl.load(key + row // G, mask=live, other=0)
    start, end = (bounds >> 32).to(tl.int32), (bounds & 0xFFFFFFFF).to(tl.int32)
    sees = end > start
    index = query * (kv_heads * G) + kv_head * G + row % G
    return row, live, index, tl.where(sees, start, 2147483647), tl.where(sees, end, 0)


@triton.jit
def _walk(start, end, BLOCK_N: tl.constexpr):
    """(lo, whole, whole_end, hi): the positions that a block of rows sees are in lo : hi, and every
    row that sees any sees whole : whole_end, a number of blocks."""
    lo, hi = tl.min(start, 0), tl.max(end, 0)
    whole = tl.max(tl.where(end > start, start, 0), 0)
    seen_by_all = tl.min(tl.where(end > start, end, hi), 0)
    length = tl.maximum(seen_by_all - whole, 0) // BLOCK_N * BLOCK_N
    whole = tl.where(length > 0, whole, lo)
    return lo, whole, whole + length, hi


@triton.jit
def _next(at, start, end, whole, whole_end, hi):
    """The first position from `at` on that some row sees, outside of whole : whole_end; hi if there
    is none.
    """
    at = tl.min(tl.where(end > at, tl.maximum(start, at), hi), 0)
    return tl.where((at >= whole) & (at < whole_end), whole_end, at)


@triton.jit
def _count(at, start, end, whole, whole_end, hi, BLOCK_N: tl.constexpr):
    """How many blocks of positions _next leads through from `at` on.

    Known ahead, loads of the next block can be early.
    """
    count = 0
    while at < hi:
        at = _next(at + BLOCK_N, start, end, whole, whole_end, hi)
        count += 1
    return count


@triton.jit
def _visible(at, stop, start, end, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]"""
    position = (at + tl.arange(0, BLOCK_N))[None, :]
    return (position >= start[:, None]) & (position < end[:, None]) & (position < stop)


@triton.jit
def _ancestors(ancestors, at, stop, kv_head, kv_heads, BLOCK_N: tl.constexpr):
    """(node and key head in [M, Hkv], it exists), each [BLOCK_N], of a block of columns.

    A column is one ancestor of one sorted query. All rows of a block meet the columns of all of its
    queries on tensor cores, which costs less than products of their own outside of them, and G rows
    share what is gathered.
    """
    column = at + tl.arange(0, BLOCK_N)
    node = tl.load(ancestors + column, mask=column < stop, other=-1)
    return node * kv_heads + kv_head, node >= 0


@triton.jit
def _attend(q_rows, k, v, visible, top, total, acc, qk_scale, MASKED: tl.constexpr):
    """One step of the online softmax: (top, total, acc) after these keys."""
    scores = _dot(q_rows, tl.trans(k))
    if MASKED:
        scores = tl.where(visible, scores * qk_scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # nothing seen so far: no -inf minus -inf
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - shift[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * qk_scale)
        shift = higher
        p = tl.exp2(scores * qk_scale - shift[:, None])
    shrink = tl.exp2(top - shift)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=_SIZES)
def tree_attention_fwd_kernel(
    q, context_k, context_v, node_k, node_v, ancestors, key, order, o, lse,
    qk_scale, queries, width, kv_heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of rows: o and lse. The last blocks of a sequence see most, so they start first."""
    kv_head = tl.program_id(0) % kv_heads
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // kv_heads
    row, live, index, start, end = _rows(block, kv_head, key, order, queries, kv_heads, G, BLOCK_M)
    q_rows = _load(q, index * D, live, D, BLOCK_D, True)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    lo, whole, whole_end, hi = _walk(start, end, BLOCK_N)
    for at in range(whole, whole_end, BLOCK_N):
        k = _positions(context_k, at, hi, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, False)
        v = _positions(context_v, at, hi, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, False)
        top, total, acc = _attend(q_rows, k, v, None, top, total, acc, qk_scale, False)
    # the others took part in the loop above
    sees = end > start
    top, total = tl.where(sees, top, float("-inf")), tl.where(sees, total, 0.0)
    acc = tl.where(sees[:, None], acc, 0.0)
    at = _next(lo, start, end, whole, whole_end, hi)
    for _ in range(_count(at, start, end, whole, whole_end, hi, BLOCK_N)):
        stop = tl.where(at < whole, whole, hi)
        k = _positions(context_k, at, stop, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, True)
        v = _positions(context_v, at, stop, kv_head, kv_heads, D, BLOCK_D, BLOCK_N, True)
        visible = _visible(at, stop, start, end, BLOCK_N)
        top, total, acc = _attend(q_rows, k, v, visible, top, total, acc, qk_scale, True)
        at = _next(at + BLOCK_N, start, end, whole, whole_end, hi)

    # the first of each row's
    column = row // G * width
    stop = tl.minimum(tl.max(column, 0) + width, queries * width)
    for at in range(tl.min(column, 0), stop, BLOCK_N):
        node, there = _ancestors(ancestors, at, stop, kv_head, kv_heads, BLOCK_N)
        k = _load(node_k, node * D, there, D, BLOCK_D, True)
        v = _load(node_v, node * D, there, D, BLOCK_D, True)
        visible = _visible(at, stop, column, column + width, BLOCK_N) & there[None, :]
        top, total, acc = _attend(q_rows, k, v, visible, top, total, acc, qk_scale, True)

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    _store(o, index * D, (acc / total[:, None]).to(o.dtype.element_ty), live, D, BLOCK_D)
    tl.store(lse + index, tl.where(nothing, float("inf"), top + tl.log2(total)), mask=live)
