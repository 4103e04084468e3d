"""What the lab's lines say: tables, and pictures of the curves, by lab_statistics.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab_statistics import (
    BLOCK,
    WINDOW,
    Walks,
    accept_length,
    compare,
    ease_of,
    half,
    holm,
    lowest,
    shifts,
    walks,
)

TODAY, FROZEN = "today", "frozen-copying"


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


def floors(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Rows for the recordings whose domain comes in stretches: how far below the frozen draft."""
    rows, frozen = [], [line for line in lines if line["arm"] == FROZEN]
    for arm in sorted({line["arm"] for line in lines} - {FROZEN}):
        own = [line for line in lines if line["arm"] == arm]
        domains = own[0]["domains"]
        changes = shifts(domains)
        # else it is mixed traffic
        if frozen and changes and sum(end - begin for begin, end in changes) < len(domains) / 2:
            by, at = lowest(walks(own), walks(frozen), domains)
            rows.append(f"| `{arm}` | {len(own)} | {len(changes)} | {by:+.3f} | {at} |")
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
