"""What the lab's lines say: tables, and pictures of the curves.

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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# as many as between two swaps
BLOCK = 24
# of the other arm's last blocks, that an arm has to come to
LAST = 3
DRAWS, FEWEST_SEEDS = 2000, 3
# requests over which what is served must not fall below the frozen draft
WINDOW = 20
TODAY, FROZEN = "today", "frozen-copying"
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


def bar(found: dict[str, Walks]) -> str | None:
    """The reference as it does best here: its own uses of each request, its rate and step chosen
    among those that were tried."""
    own = [arm for arm in found if arm.startswith("ref-") and not arm.startswith("ref-uses")]
    return max(own, key=lambda arm: accept_length(half(found[arm])), default=None)


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A table of all arms of one recording, in Markdown."""
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_arm[line["arm"]].append(line)
    found = {arm: walks(own) for arm, own in by_arm.items()}
    size = min(own.shape[1] for own in found.values()) // BLOCK * BLOCK
    found = {arm: own[:, :size] for arm, own in found.items()}
    ease = ease_of(found[FROZEN]) if FROZEN in found else None
    reference = bar(found)
    rows = [
        f"The first {size} requests of each run.",
        "",
        f"| arm | seeds | accept length by quarters | later half | against `{TODAY}` |"
        f" r against `{reference}` | updates a request | CPU s a request |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(found, key=lambda name: -accept_length(half(found[name]))):
        own, change, fewer = found[arm], "", ""
        if arm != TODAY and TODAY in found:
            figures = compare(own, found[TODAY], ease)
            change = _with(f"{figures['change']:+.1%}", figures["change_interval"], "+.1%")
        if reference is not None and arm != reference:
            figures = compare(own, found[reference], ease)
            fewer = _with(f"{figures['ratio']:.2f}", figures["ratio_interval"], ".2f")
        each = [accept_length(half(seed[None])) for seed in own]
        later = " ".join(f"{length:.3f}" for length in each)
        quarters = " ".join(f"{accept_length(part):.2f}" for part in np.array_split(own, 4, 1))
        # runs may be of different lengths
        updates, cpu = (
            np.mean([line[name] / len(line["steps"]) for line in by_arm[arm]])
            for name in ("updates", "cpu_s")
        )
        rows.append(
            f"| `{arm}` | {len(own)} | {quarters} | {later} | {change} | {fewer} | {updates:.2f} |"
            f" {cpu:.2f} |"
        )
    return rows


def _with(figure: str, interval_: tuple[float, float] | None, form: str) -> str:
    if interval_ is None:
        return figure
    return f"{figure} ({interval_[0]:{form}} to {interval_[1]:{form}})"


def claims(lines: Sequence[dict[str, Any]], named: Sequence[dict[str, str]]) -> list[str]:
    """Rows of the claims that were named before their recordings were opened: that an arm needs
    less than half of the requests of another one."""
    p, rows = {}, {}
    for claim in named:
        pair = [
            [
                line
                for line in lines
                if (line["arm"], line["recording"]) == (arm, claim["recording"])
            ]
            for arm in (claim["arm"], claim["against"])
        ]
        if not all(pair):
            continue
        frozen = [
            line
            for line in lines
            if (line["arm"], line["recording"]) == (FROZEN, claim["recording"])
        ]
        figures = compare(
            walks(pair[0]), walks(pair[1]), ease_of(walks(frozen)) if frozen else None
        )
        name = f"`{claim['arm']}` against `{claim['against']}` on {claim['recording']}"
        if figures["p"] is not None:
            p[name] = figures["p"]
        rows[name] = _with(f"{figures['ratio']:.2f}", figures["ratio_interval"], ".2f")
    corrected = holm(p)
    head = ["| claim: r below 0.5 | r | p (Holm) |", "|---|---|---|"]
    body = [f"| {n} | {r} | {corrected.get(n, math.nan):.4f} |" for n, r in rows.items()]
    return [*head, *body] if rows else []


def by_lag(lines: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Accept length of the later half by the requests between two swaps, of runs that were scored
    at several distances."""
    found: dict[int, list[Any]] = defaultdict(list)
    for line in lines:
        if "by_lag" in line:
            found[line["how"]["swap_every"]].append(line)
            for lag, scores in line["by_lag"].items():
                found[int(lag)].append(scores)
    return {lag: accept_length(half(walks(own))) for lag, own in sorted(found.items())}


def ahead(own: Walks, other: Walks, changes: Sequence[int]) -> Iterator[tuple[float, int]]:
    """(difference of the accept lengths over WINDOW consecutive requests, the first of them) of two
    walks [N, 2]. Windows begin WINDOW requests after a change of traffic at the earliest, and end
    before the next one; `changes` are the first requests of other traffic."""
    for begin, end in zip(changes, [*changes[1:], min(len(own), len(other))]):
        for first in range(begin + WINDOW, end - WINDOW + 1):
            span = slice(first, first + WINDOW)
            yield accept_length(own[span]) - accept_length(other[span]), first


def lowest(arm: Walks, frozen: Walks, domains: Sequence[str]) -> tuple[float, int]:
    """The least that any seed is ahead of the frozen draft, and the request where that begins; the
    start is a change too."""
    changes = [n for n in range(1, len(domains)) if domains[n] != domains[n - 1]]
    still = frozen.sum(0)
    return min(window for own in arm for window in ahead(own, still, [0, *changes]))


def floors(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Rows for the recordings whose domain comes in stretches: how far below the frozen draft."""
    rows, frozen = [], [line for line in lines if line["arm"] == FROZEN]
    for arm in sorted({line["arm"] for line in lines} - {FROZEN}):
        own = [line for line in lines if line["arm"] == arm]
        domains = own[0]["domains"]
        changes = sum(one != two for one, two in zip(domains, domains[1:]))
        if frozen and 0 < changes < len(domains) / (2 * WINDOW):
            by, at = lowest(walks(own), walks(frozen), domains)
            rows.append(f"| `{arm}` | {len(own)} | {changes} | {by:+.3f} | {at} |")
    head = [
        f"| arm | seeds | changes of domain | lowest over {WINDOW} requests, from {WINDOW} after a"
        " change, against the frozen draft | from request |",
        "|---|---|---|---|---|",
    ]
    return [*head, *rows] if rows else []


def picture(path: Path, lines: Sequence[dict[str, Any]], title: str) -> None:
    """Accept length over requests, a curve for each arm; a moving mean of two blocks."""
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
    last.sort(key=lambda item: item[0])
    places = spread([value for value, _, _ in last], axes.get_ylim())
    for place, (_, arm, colour) in zip(places, last, strict=True):
        axes.text(1.005, place, arm, color=colour, fontsize=8, va="center",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlabel("requests", color=MUTED)
    axes.set_ylabel(f"accept length, last {2 * BLOCK} requests", color=MUTED)
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


def write(
    lines: Sequence[dict[str, Any]], named: Sequence[dict[str, str]], directory: Path
) -> None:
    """tables.md, and a picture for each recording."""
    by_recording: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_recording[line["recording"]].append(line)
    text = ["# The lab's tables", "", "Printed by `make lab ARGS=report` from lines.jsonl;"]
    text += ["[learning.md](../../learning.md) says what they mean.", ""]
    for recording, own in sorted(by_recording.items()):
        text += [f"## {recording}", "", *table(own), ""]
        picture(directory / f"{recording}.png", own, f"{recording}: accept length by request")
        text += [f"![curves]({recording}.png)", ""]
        if found := floors(own):
            text += [*found, ""]
        if lags := by_lag(own):
            text += ["| requests between swaps | accept length of the later half |", "|---|---|"]
            text += [f"| {lag} | {length:.3f} |" for lag, length in lags.items()] + [""]
    if claimed := claims(lines, named):
        text += ["## Claims", "", *claimed, ""]
    (directory / "tables.md").write_text("\n".join(text).rstrip() + "\n")
