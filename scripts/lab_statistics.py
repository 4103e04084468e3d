"""The lab's statistics.

    accept length   tokens over steps of the walks, of all requests of a span together
    curve           of blocks of 24 requests, each divided by how easy the block is: what the frozen
                    initial draft accepts there, over its mean. Made monotone (isotonic regression,
                    weighted by steps)
    requests to X   those that the weights had learned from where the curve first comes to X,
                    between blocks; 0 if the initial draft has it
    ratio r         of requests that an arm needs to come to what the other has in its last 3
                    blocks, over those that the other needs
    interval        95%, from 2,000 draws: seeds, then requests within each block, the same requests
                    for both arms (they are paired). Of fewer than 3 seeds there is none: two of
                    them hide half of their variance

Dimensions: S seeds, N requests, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# as many as between two swaps
BLOCK = 24
# of the other arm's last blocks, that an arm has to come to
LAST = 3
DRAWS, FEWEST_SEEDS = 2000, 3
# requests over which what is served must not fall below the frozen draft
WINDOW = 20
# steps, tokens: float64 [S, N, 2]
Walks = np.ndarray


def walks(lines: Sequence[dict[str, Any]]) -> Walks:
    """Of one arm's lines; N of the shortest."""
    size = min(len(line["steps"]) for line in lines)
    return np.stack(
        [np.stack([line["steps"][:size], line["tokens"][:size]], -1) for line in lines]
    ).astype(float)


def accept_length(found: Walks) -> float:
    steps, tokens = found.reshape(-1, 2).sum(0)
    return float(tokens / steps) if steps else math.nan


def blocks(found: Walks, ease: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(accept length over the block's ease, steps) of each block, all seeds together, [B]."""
    size = found.shape[1] // BLOCK
    sums = found[:, : size * BLOCK].reshape(len(found), size, BLOCK, 2).sum((0, 2))
    length = sums[:, 1] / np.maximum(sums[:, 0], 1)
    return (length if ease is None else length / ease[:size]), sums[:, 0]


def ease_of(frozen: Walks) -> np.ndarray:
    """How easy each block is, [B], 1 on average."""
    return blocks(frozen)[0] / accept_length(frozen)


def monotone(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The closest sequence that never falls, by weighted squares (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append([value, max(weight, 1e-9), 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            last, before = pools.pop(), pools.pop()
            weight = before[1] + last[1]
            mean = (before[0] * before[1] + last[0] * last[1]) / weight
            pools.append([mean, weight, before[2] + last[2]])
    return np.concatenate([np.full(int(count), value) for value, _, count in pools])


def requests_to(curve: np.ndarray, aim: float) -> float:
    """Requests after which the monotone curve [B] is at `aim`; infinite if it never is. The weights
    of block b had learned from b blocks."""
    reached = np.flatnonzero(curve >= aim - 1e-12)
    if not len(reached):
        return math.inf
    first = int(reached[0])
    if first == 0 or curve[first] == curve[first - 1]:
        return first * BLOCK
    return BLOCK * (first - (curve[first] - aim) / (curve[first] - curve[first - 1]))


def ratio(arm: Walks, other: Walks, ease: np.ndarray | None = None) -> float:
    """r of the arm, see above."""
    values, weights = blocks(other, ease)
    aim = float(np.average(values[-LAST:], weights=weights[-LAST:]))
    one, two = (monotone(*blocks(found, ease)) for found in (arm, other))
    needed = requests_to(two, min(aim, float(two[-1])))
    return requests_to(one, aim) / needed if needed else math.nan


def drawn(pair: Sequence[Walks], generator: np.random.Generator) -> list[Walks]:
    """The same arms of seeds and requests drawn again."""
    size = min(found.shape[1] for found in pair) // BLOCK
    within = generator.integers(BLOCK, size=(size, BLOCK)) + np.arange(size)[:, None] * BLOCK
    some = within.reshape(-1)
    return [found[generator.integers(len(found), size=len(found))][:, some] for found in pair]


def interval(figures: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.array(figures), [0.025, 0.975], method="closest_observation")
    return float(low), float(high)


def compare(
    arm: Walks, other: Walks, ease: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """Figures of an arm against the other, over the requests that both have: change of the accept
    length in their later half, and r, each with its interval (None of too few seeds), and the
    one-sided p of r not being below a half."""
    size = min(arm.shape[1], other.shape[1]) // BLOCK * BLOCK
    arm, other = arm[:, :size], other[:, :size]
    figures: dict[str, Any] = {
        "change": accept_length(half(arm)) / accept_length(half(other)) - 1,
        "ratio": ratio(arm, other, ease),
        "change_interval": None,
        "ratio_interval": None,
        "p": None,
    }
    if min(len(arm), len(other)) < FEWEST_SEEDS:
        return figures
    generator, changes, ratios = np.random.default_rng(seed), [], []
    for _ in range(DRAWS):
        one, two = drawn((arm, other), generator)
        changes.append(accept_length(half(one)) / accept_length(half(two)) - 1)
        ratios.append(ratio(one, two, ease))
    above = sum(not r < 0.5 for r in ratios)
    figures |= {"change_interval": interval(changes), "ratio_interval": interval(ratios)}
    return figures | {"p": (1 + above) / (1 + DRAWS)}


def holm(p: dict[str, float]) -> dict[str, float]:
    """p values corrected for so many claims at once (Holm)."""
    ordered = sorted(p, key=p.__getitem__)
    corrected, highest = {}, 0.0
    for n, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(p) - n) * p[name]))
        corrected[name] = highest
    return corrected


def half(found: Walks) -> Walks:
    return found[:, found.shape[1] // 2 :]


def shifts(domains: Sequence[str]) -> list[tuple[int, int]]:
    """The first request of other traffic, and the first after which none of the old comes for
    WINDOW requests: those that run side by side end in any order."""
    found: list[tuple[int, int]] = []
    for n in range(1, len(domains)):
        if domains[n] != domains[n - 1]:
            joined = found and n - found[-1][1] < WINDOW
            found[-1 if joined else len(found) :] = [(found[-1][0] if joined else n, n)]
    return found


def ahead(
    own: Walks, other: Walks, changes: Sequence[tuple[int, int]]
) -> Iterator[tuple[float, int]]:
    """(difference of the accept lengths over WINDOW consecutive requests, the first of them) of two
    walks [N, 2]. Windows begin WINDOW requests after one of `shifts` ended at the earliest, and end
    before the next one begins."""
    ends = [*(begin for begin, _ in changes[1:]), min(len(own), len(other))]
    for (_, begin), end in zip(changes, ends):
        for first in range(begin + WINDOW, end - WINDOW + 1):
            span = slice(first, first + WINDOW)
            yield accept_length(own[span]) - accept_length(other[span]), first


def lowest(arm: Walks, frozen: Walks, domains: Sequence[str]) -> tuple[float, int]:
    """The least that any seed is ahead of the frozen draft, and the request where that begins; the
    start is a change too."""
    changes, still = [(0, 0), *shifts(domains)], frozen.sum(0)
    return min(window for own in arm for window in ahead(own, still, changes))
