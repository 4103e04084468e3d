"""Goodness of fit: do sequences of tokens follow the distribution that they should?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# how often a test rejects what is right
FALSE_ALARM = 1e-6


def continuations(
    first: torch.Tensor, following: Callable[[Sequence[int]], torch.Tensor], length: int
) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of `length` tokens; `following(tokens so far)` gives [V]."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for seen, weight in found.items():
            row = following(seen) if seen else first
            longer |= {(*seen, i): weight * float(p) for i, p in enumerate(row) if p > 0}
        found = longer
    assert abs(sum(found.values()) - 1) < 1e-4
    return found


def p_value(drawn: torch.Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square of sequences [draws, length]; those expected fewer than 5 times are a
    cell.

    0.0 if a sequence was drawn that cannot be.
    """
    counts = dict.fromkeys(expected, 0)
    for row in map(tuple, drawn.tolist()):
        if row not in counts:
            return 0.0
        counts[row] += 1
    draws = len(drawn)
    often = [seen for seen in expected if draws * expected[seen] >= 5]
    rest = [seen for seen in expected if draws * expected[seen] < 5]
    cells = [(counts[seen], draws * expected[seen]) for seen in often]
    cells.append((sum(counts[seen] for seen in rest), draws * sum(expected[seen] for seen in rest)))
    cells = [(seen, wanted) for seen, wanted in cells if wanted > 0]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
