"""Attention of draft queries over a prefix of their sequence's slots and over their ancestors in the tree.

Dimensions: Q queries, T slots (packed sequences), M nodes, A ancestors, Hq query heads, Hkv key heads, D head.
"""

from __future__ import annotations

from aurora_kernels.tree_attention_ref import tree_attention_ref
from torch import Tensor


def tree_attention(
    q: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    node_k: Tensor | None,
    node_v: Tensor | None,
    slot_start: Tensor,
    slot_end: Tensor,
    ancestors: Tensor | None,
    scale: float,
) -> Tensor:
    """o [Q, Hq, D]: query i attends to slots slot_start[i] : slot_end[i] and to the nodes ancestors[i].

    q [Q, Hq, D]; slot_k, slot_v [T, Hkv, D]; node_k, node_v [M, Hkv, D]; slot_start, slot_end int64 [Q];
    ancestors int64 [Q, A], -1 for none, the query's own node included. Query head h reads key head h // (Hq // Hkv).
    A query that may see nothing gets zeros. Differentiable in q, slot_k, slot_v, node_k and node_v.
    """
    return tree_attention_ref(q, slot_k, slot_v, node_k, node_v, slot_start, slot_end, ancestors, scale)
