"""Tree attention: ours, compiled flex_attention with its block mask, SDPA with a dense mask, and
the ceiling, which is plain causal flash attention. The rate counts visible pairs alone: 4 D FLOP
per pair and head forward, 2.5 times that backward.

One sequence of T positions; all nodes of all its trees are the queries of one call, in depth-first
order, so that a node's descendants are the nodes behind it up to `last`: flex tests ancestry with
two comparisons. The other sides get keys of positions and nodes already concatenated. Flex needs a
new mask for every batch: its time counts the mask, and is given without it as well.

Dimensions: T positions, Q queries = M nodes, A ancestors (itself included), Hq query heads, Hkv key
    heads, D head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from aurora_kernels.tree_attention import (
    queries_of_nodes,
    rows_of_positions,
    sort_queries,
    tree_attention,
)
from kernel_timing import Bench, compiled, flash_only, relative_error
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SHAPES = {"Qwen3-8B 32/8x128": (32, 8, 128), "small 8/4x64": (8, 4, 64), "tiny": (4, 2, 16)}
# Parents of a tree's nodes in depth-first order; -1 hangs from the position, which is the root
CHAIN = [-1, 0, 1, 2, 3]
# topk 4, depth 5: the 15 nodes below the root
BEAMS = [-1, 0, 1, 2, 3, 1, 5, 0, 7, 8, -1, 10, 11, 10, -1]
# 15 deep, with branches near its root
LONG = [-1, *range(14), 4, 3, 2, 1, 0, 0]
# 63 below the root
WIDE = [at + parent if parent >= 0 else -1 for at in (0, 21, 42) for parent in LONG]
TREES = {
    "positions": (None, 1),
    "chain 5": (CHAIN, 1),
    "topk 4 x 5 x 16": (BEAMS, 4),
    "64 nodes": (WIDE, 16),
}
FIRST = [("Qwen3-8B 32/8x128", 8192, tree) for tree in TREES]
REST = [
    (shape, positions, tree)
    for shape, positions in (
        ("Qwen3-8B 32/8x128", 32_768),
        ("Qwen3-8B 32/8x128", 2048),
        ("small 8/4x64", 8192),
    )
    for tree in TREES
]
TINY = [("tiny", 48, tree) for tree in TREES]
# elements of a dense mask
MAX_DENSE = 4 << 30
# queries that are checked; relative error in bfloat16
CHECKED, LIMIT = 64, 5e-2


@dataclass
class Case:
    # q [Q, Hq, D], context_k, context_v [T, Hkv, D], node_k, node_v [M, Hkv, D]
    tensors: tuple[Tensor, ...]
    start: Tensor  # [Q]
    end: Tensor  # [Q]
    ancestors: Tensor | None  # [Q, A]
    # [M] last descendant
    last: Tensor
    # q [1, Hq, Q, D], k, v [1, Hkv, T + M, D]
    heads_first: tuple[Tensor, Tensor, Tensor]

    @property
    def pairs(self) -> int:
        nodes = 0 if self.ancestors is None else int((self.ancestors >= 0).sum())
        return int((self.end - self.start).sum()) + nodes

    def dense_mask(self, queries: slice | Tensor = slice(None)) -> Tensor:
        """bool [queries, T + M]"""
        positions = torch.arange(len(self.tensors[1]), device=self.start.device)
        mask = (positions >= self.start[queries, None]) & (positions < self.end[queries, None])
        if self.ancestors is None:
            return mask
        ancestors = self.ancestors[queries]
        nodes = torch.zeros(
            len(ancestors), len(self.last) + 1, dtype=torch.bool, device=mask.device
        )
        nodes.scatter_(1, torch.where(ancestors < 0, len(self.last), ancestors), True)
        return torch.cat([mask, nodes[:, :-1]], 1)


def make_case(
    positions: int, parents: list[int] | None, every: int, shape: tuple[int, int, int], device: str
) -> Case:
    """Trees hang from every `every`-th position; without parents the positions themselves are the
    queries.
    """
    heads, kv_heads, dim = shape
    generator = torch.Generator(device).manual_seed(0)
    if parents is None:
        end = torch.arange(1, positions + 1, device=device)
        ancestors, last, nodes, queries = None, end[:0], 0, positions
    else:
        paths, lasts = [], list(range(len(parents)))
        for node, parent in enumerate(parents):
            paths.append((paths[parent] if parent >= 0 else []) + [node])
            for ancestor in paths[node]:
                lasts[ancestor] = node
        depth = max(len(path) for path in paths)
        one = torch.tensor([path + [-1] * (depth - len(path)) for path in paths], device=device)
        roots = torch.arange(0, positions, every, device=device)
        first = torch.arange(len(roots), device=device) * len(parents)
        ancestors = torch.where(one < 0, -1, one + first[:, None, None]).flatten(0, 1)
        last = (torch.tensor(lasts, device=device) + first[:, None]).flatten()
        end = (roots + 1).repeat_interleave(len(parents))
        queries = nodes = len(end)

    def normal(*size):
        x = torch.randn(*size, device=device, generator=generator)
        return x.to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_()

    q, context_k, context_v = (
        normal(queries, heads, dim),
        normal(positions, kv_heads, dim),
        normal(positions, kv_heads, dim),
    )
    node_k, node_v = normal(nodes, kv_heads, dim), normal(nodes, kv_heads, dim)
    joined = q, torch.cat([context_k, node_k]), torch.cat([context_v, node_v])
    heads_first = tuple(
        x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in joined
    )
    return Case(
        (q, context_k, context_v, node_k, node_v),
        torch.zeros_like(end),
        end,
        ancestors,
        last,
        heads_first,
    )


def flex_mask(case: Case) -> BlockMask:
    positions, start, end, last = (
        len(case.tensors[1]),
        case.start.int(),
        case.end.int(),
        case.last.int(),
    )

    def prefix(b, h, i, j):
        return (j >= start[i]) & (j < end[i])

    def visible(b, h, i, j):
        node = torch.where(j < positions, 0, j - positions)
        return torch.where(j < positions, prefix(b, h, i, j), (node <= i) & (i <= last[node]))

    device = case.start.device
    sizes = len(case.start), positions + len(last)
    mask_mod = visible if len(last) else prefix
    return create_block_mask(
        mask_mod, None, None, *sizes, device=device, _compile=device.type == "cuda"
    )


def expected(case: Case, queries: Tensor, do: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(o of some queries, gradients of q, k, v [T + M] from their do) in float32, with a dense
    mask.
    """
    q, k, v = (
        x.detach().float().requires_grad_() for x in (case.tensors[0][queries], *_joined(case))
    )
    group = q.shape[1] // k.shape[1]
    score = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    p = score.masked_fill_(~case.dense_mask(queries), -torch.inf).softmax(-1)
    o = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1))
    return o.detach(), list(torch.autograd.grad(o, (q, k, v), do.float()))


def _joined(case: Case) -> tuple[Tensor, Tensor]:
    _, context_k, context_v, node_k, node_v = case.tensors
    return torch.cat([context_k, node_k]), torch.cat([context_v, node_v])


def bench(run: Bench, shape: str, positions: int, tree: str) -> None:
    parents, every = TREES[tree]
    case = make_case(positions, parents, every, SHAPES[shape], run.device)
    setting = f"{shape} T={positions} {tree}"
    if parents is None:
        ceiling(run, setting, case)
    bench_case(run, setting, case)


def ceiling(run: Bench, setting: str, case: Case) -> None:
    def causal(q, k, v):
        with flash_only(run.device):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    both_passes(run, setting, "causal flash (ceiling)", case, causal, case.heads_first)


def bench_case(run: Bench, setting: str, case: Case) -> None:
    q, context_k = case.tensors[:2]
    scale = q.shape[2] ** -0.5

    def ours(*tensors):
        q, context_k, context_v, *nodes = tensors
        nodes = nodes if case.ancestors is not None else (None, None)
        return tree_attention(
            q, context_k, context_v, *nodes, case.start, case.end, case.ancestors, scale
        )

    both_passes(
        run,
        setting,
        "ours",
        case,
        ours,
        case.tensors if case.ancestors is not None else case.tensors[:3],
    )

    def index():
        key, order = sort_queries(case.start, case.end)
        rows_of_positions(key, len(context_k), 128)
        if case.ancestors is not None:
            queries_of_nodes(case.ancestors[order], order, len(case.last))

    run.row("tree_attention index", setting, "ours, within the above", 0, index)
    built = run.row("tree_attention mask", setting, "flex: block mask", 0, lambda: flex_mask(case))
    if built["ms"] is not None:
        mask, attend = flex_mask(case), compiled(flex_attention, run.device)
        flex = partial(attend, block_mask=mask, enable_gqa=True)
        both_passes(run, setting, "flex, compiled", case, flex, case.heads_first, built["ms"])
    if len(q) * case.heads_first[1].shape[2] > MAX_DENSE:
        gib = len(q) * case.heads_first[1].shape[2] / 2**30
        for op in ("tree_attention fwd", "tree_attention fwd+bwd"):
            run.absent(op, setting, "SDPA, dense mask", f"the mask alone takes {gib:.0f} GiB")
        return
    dense = case.dense_mask()

    # its kernels with masks know nothing of grouped heads
    def sdpa(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    both_passes(run, setting, "SDPA, dense mask", case, sdpa, case.heads_first)


def both_passes(
    run: Bench,
    setting: str,
    side: str,
    case: Case,
    attend: Callable,
    inputs: tuple,
    extra_ms: float = 0.0,
) -> None:
    """Rows of forward, and of forward + backward; inputs begin with q, and are heads first but for
    ours.
    """
    ours, (heads, dim) = inputs[0] is case.tensors[0], case.tensors[0].shape[1:]
    work = 4.0 * case.pairs * heads * dim
    generator = torch.Generator().manual_seed(1)
    queries = torch.randperm(len(case.start), generator=generator)[:CHECKED].to(case.start.device)
    do = torch.randn(case.tensors[0].shape, generator=generator).to(case.tensors[0])
    # gradients of the checked queries alone
    few = torch.zeros_like(do).index_copy_(0, queries, do[queries])

    def laid_out(x: Tensor) -> Tensor:
        return x if ours else x.transpose(0, 1)[None].contiguous()

    # on a GPU as in training, which also spares flex a second compilation; on a CPU it has no
    # backward
    def forward():
        return attend(*(inputs if run.device == "cuda" else (x.detach() for x in inputs)))

    def backward(upstream: Tensor):
        return torch.autograd.grad(attend(*inputs), inputs, upstream)

    def tokens_first(x: Tensor) -> Tensor:
        return x if ours else x[0].transpose(0, 1)

    def check_forward() -> float:
        return relative_error(
            tokens_first(forward())[queries], expected(case, queries, do[queries])[0]
        )

    def check_backward() -> float:
        dq, *rest = (tokens_first(g) for g in backward(laid_out(few)))
        dk, dv = (torch.cat(rest[0::2]), torch.cat(rest[1::2])) if ours else rest
        found = dq[queries], dk, dv
        return max(
            relative_error(a, b) for a, b in zip(found, expected(case, queries, do[queries])[1])
        )

    call = partial(backward, laid_out(do))
    run.row("tree_attention fwd", setting, side, work, forward, check_forward, LIMIT, extra_ms)
    run.row(
        "tree_attention fwd+bwd", setting, side, 3.5 * work, call, check_backward, LIMIT, extra_ms
    )
