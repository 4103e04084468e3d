"""What the lab's lines say: tables, and pictures of the curves.

    accept length   tokens over steps of the walks, of all requests of a span together
    requests to X   where the accept length of blocks of 20 requests, made monotone (isotonic
                    regression, weighted by steps), first comes to X, between the middles of blocks
    ratio r         of requests that an arm needs to come to what the other has at last, over those
                    that the other needs
    interval        95%, from 2,000 draws: seeds, then requests within each block of 20, the same
                    requests for both arms (they are paired: same requests, same order)

Dimensions: S seeds, N requests, B blocks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 20
DRAWS = 2000
# steps, tokens
Walks = np.ndarray


def walks(lines: Sequence[dict[str, Any]]) -> Walks:
    """float64 [S, N, 2] of one arm's lines; N of the shortest."""
    size = min(len(line["steps"]) for line in lines)
    return np.stack(
        [np.stack([line["steps"][:size], line["tokens"][:size]], -1) for line in lines]
    ).astype(float)


def accept_length(found: Walks) -> float:
    steps, tokens = found.reshape(-1, 2).sum(0)
    return float(tokens / steps) if steps else math.nan


def blocks(found: Walks) -> tuple[np.ndarray, np.ndarray]:
    """(accept length, steps) of each block of requests, all seeds together, [B]."""
    size = found.shape[1] // BLOCK
    sums = found[:, : size * BLOCK].reshape(len(found), size, BLOCK, 2).sum((0, 2))
    return sums[:, 1] / np.maximum(sums[:, 0], 1), sums[:, 0]


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
    """Requests after which the monotone curve [B] is at `aim`; infinite if it never is."""
    reached = np.flatnonzero(curve >= aim - 1e-12)
    if not len(reached):
        return math.inf
    first = int(reached[0])
    middle = (first + 0.5) * BLOCK
    if first == 0 or curve[first] == curve[first - 1]:
        return middle
    return middle - BLOCK * (curve[first] - aim) / (curve[first] - curve[first - 1])


def ratio(arm: Walks, other: Walks) -> float:
    """r of the arm, see above."""
    curves = [monotone(*blocks(found)) for found in (arm, other)]
    aim = float(curves[1][-1])
    return requests_to(curves[0], aim) / requests_to(curves[1], aim)


def drawn(pair: Sequence[Walks], generator: np.random.Generator) -> list[Walks]:
    """The same arms of seeds and requests drawn again."""
    size = min(found.shape[1] for found in pair) // BLOCK
    within = generator.integers(BLOCK, size=(size, BLOCK)) + np.arange(size)[:, None] * BLOCK
    some = within.reshape(-1)
    return [found[generator.integers(len(found), size=len(found))][:, some] for found in pair]


def interval(figures: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.array(figures), [0.025, 0.975], method="closest_observation")
    return float(low), float(high)


def compare(arm: Walks, other: Walks, span: slice, seed: int = 0) -> dict[str, Any]:
    """Figures of an arm against the other: change of the accept length in a span of requests, and
    r, each with its interval; and how often a draw of the change was not above 0 (one-sided p)."""
    generator = np.random.default_rng(seed)
    changes, ratios = [], []
    for _ in range(DRAWS):
        one, two = drawn((arm, other), generator)
        changes.append(accept_length(one[:, span]) / accept_length(two[:, span]) - 1)
        ratios.append(ratio(one, two))
    return {
        "change": accept_length(arm[:, span]) / accept_length(other[:, span]) - 1,
        "change_interval": interval(changes),
        "p": float(np.mean(np.array(changes) <= 0)),
        "ratio": ratio(arm, other),
        "ratio_interval": interval(ratios),
    }


def holm(p: dict[str, float]) -> dict[str, float]:
    """p values corrected for so many claims at once (Holm)."""
    ordered = sorted(p, key=p.__getitem__)
    corrected, highest = {}, 0.0
    for n, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(p) - n) * p[name]))
        corrected[name] = highest
    return corrected


def table(lines: Sequence[dict[str, Any]], against: str) -> list[str]:
    """A table of all arms of one recording and one number of requests, in Markdown; the later half
    is compared with that of `against`."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_arm[line["arm"]].append(line)
    found = {arm: walks(own) for arm, own in by_arm.items()}
    rows = [
        f"| arm | seeds | accept length | second half | against `{against}` | r | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(found, key=lambda name: -accept_length(half(found[name]))):
        own = found[arm]
        cpu = np.mean([line["cpu_s"] for line in by_arm[arm]])
        change = fewer = ""
        if arm != against and against in found:
            size = min(own.shape[1], found[against].shape[1])
            figures = compare(own, found[against], slice(size // 2, size))
            low, high = figures["change_interval"]
            change = f"{figures['change']:+.1%} ({low:+.1%} to {high:+.1%})"
            low, high = figures["ratio_interval"]
            fewer = f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})"
        curve, _ = blocks(own)
        every = max(1, len(curve) // 5)
        points = " ".join(f"{x:.2f}" for x in fold(own, every))
        rows.append(
            f"| `{arm}` | {len(own)} | {points} | {accept_length(half(own)):.3f} | {change} |"
            f" {fewer} | {cpu:.0f} |"
        )
    return rows


def half(found: Walks) -> Walks:
    return found[:, found.shape[1] // 2 :]


def fold(found: Walks, every: int) -> list[float]:
    """Accept length of each `every` blocks."""
    size = found.shape[1] // BLOCK // every
    return [
        accept_length(found[:, n * every * BLOCK : (n + 1) * every * BLOCK]) for n in range(size)
    ]


def picture(path: Path, lines: Sequence[dict[str, Any]], title: str) -> None:
    """Accept length over requests, a curve for each arm; a moving mean of 40 requests."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from draw_curve import GRID, INK, MUTED, SURFACE

    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_arm[line["arm"]].append(line)
    figure, axes = plt.subplots(figsize=(11, 6), dpi=110, facecolor=SURFACE)
    axes.set_facecolor(SURFACE)
    last = []
    colours = plt.get_cmap("tab20").colors
    for n, (arm, own) in enumerate(by_arm.items()):
        sums = np.cumsum(np.pad(walks(own).sum(0), ((1, 0), (0, 0))), 0)
        end = np.arange(2, len(sums))
        start = np.maximum(0, end - 2 * BLOCK)
        steps, tokens = (sums[end] - sums[start]).T
        axes.plot(end, tokens / np.maximum(steps, 1), color=colours[n % 20], linewidth=1.6)
        last.append((tokens[-1] / max(steps[-1], 1), arm, colours[n % 20]))
    places = spread([value for value, _, _ in sorted(last)], axes.get_ylim())
    for place, (_, arm, colour) in zip(places, sorted(last), strict=True):
        axes.text(1.005, place, arm, color=colour, fontsize=8, va="center",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlabel("requests", color=MUTED)
    axes.set_ylabel("accept length, last 40 requests", color=MUTED)
    axes.set_title(title, loc="left", color=INK)
    axes.grid(axis="y", color=GRID)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def spread(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """The ascending values, moved up as far as their labels need room."""
    room, places = (limits[1] - limits[0]) / 32, []
    for value in values:
        places.append(max(value, places[-1] + room) if places else value)
    return places


def write(lines: Sequence[dict[str, Any]], directory: Path) -> None:
    """tables.md and a picture for each recording and number of requests."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["recording"], line["of_requests"]].append(line)
    text = ["# The lab's tables", "", "Printed by `python scripts/lab.py report` from lines.jsonl;"]
    text += ["docs/learning.md says what they mean.", ""]
    for (recording, requests), own in sorted(groups.items()):
        name = f"{recording}{f'-{requests}' if requests else ''}"
        arms = {line["arm"] for line in own}
        against = "today" if "today" in arms else min(arms)
        text += [f"## {recording}, {requests or 'all'} requests", "", *table(own, against), ""]
        picture(directory / f"{name}.png", own, f"{recording}: accept length by request")
        text += [f"![curves]({name}.png)", ""]
    (directory / "tables.md").write_text("\n".join(text).rstrip() + "\n")
