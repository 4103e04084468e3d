"""A draft tree as text: what was drafted, what the target accepted, what it would have said
instead.

    * " return"         target " self" 0.71, " x" 0.12
    └─ ✓ " self" 0.71   target "." 0.98, ")" 0.01
       ├─ ✗ ")" 0.01    target " x" 0.40, "." 0.30
       └─ ✓ "." 0.98    target "name" 0.33, "value" 0.21
          └─ + "name" bonus

The number behind a token is the target's probability of it after its parent; `<0.01` if it is
less than that of every kept token. Dimensions: N nodes, P path columns, K kept target logits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# parent of a node that the server's tree has no use for
UNUSED = -2


def draw_tree(
    tokens: np.ndarray,
    parents: np.ndarray,
    path: np.ndarray,
    accept_length: int,
    next_tokens: np.ndarray,
    topk_ids: np.ndarray,
    probabilities: np.ndarray,
    name: Callable[[int], str],
    top: int = 1,
) -> list[str]:
    """Lines of one tree, as the wire's verify message has it.

    tokens, parents int [N]; path, next_tokens int [P]; topk_ids int [N, K] with the target's
    probabilities [N, K];
    name: a token's text, fit for a terminal; top: how many of the target's own choices to show
        beside each node.
    """
    on_path = set(path[:accept_length].tolist())
    bonus = int(next_tokens[accept_length - 1])
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            children.setdefault(parent, []).append(node)
    lines: list[tuple[str, str]] = []

    def choices(node: int) -> str:
        best = [
            f"{name(int(i))} {p:.2f}"
            for i, p in zip(topk_ids[node][:top], probabilities[node][:top])
        ]
        return f"target {', '.join(best)}" if best else ""

    def probability(node: int) -> str:
        kept = probabilities[parents[node]][topk_ids[parents[node]] == tokens[node]]
        return f"{kept[0]:.2f}" if len(kept) else f"<{probabilities[parents[node]].min():.2f}"

    # node, what stands before its own line, before its children's lines
    stack = [(0, "", "")]
    while stack:
        node, own, below = stack.pop()
        if node < 0:
            lines.append((f"{own}+ {name(bonus)} bonus", ""))
            continue
        mark = "*" if node == 0 else f"{'✓' if node in on_path else '✗'}"
        told = name(int(tokens[node])) + ("" if node == 0 else f" {probability(node)}")
        lines.append((f"{own}{mark} {told}", choices(node)))
        under = children.get(node, []) + ([-1] if node == path[accept_length - 1] else [])
        for at, child in reversed(list(enumerate(under))):
            last = at == len(under) - 1
            stack.append(
                (child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))
            )
    width = max(len(left) for left, right in lines if right or top == 0) + 2
    return [f"{left.ljust(width)}{right}".rstrip() for left, right in lines]
