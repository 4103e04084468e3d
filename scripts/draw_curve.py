"""The demo's picture: accept length over requests, live against frozen, with the swaps marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SURFACE, INK, MUTED, GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e4e3df"
LIVE, FROZEN = "#2a78d6", "#eb6834"


def moving_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values at each place (fewer at the beginning)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (sums[end] - sums[start]) / (end - start)


def draw(
    path: Path,
    live: Sequence[float],
    frozen: Sequence[float],
    *,
    frozen_every: int = 1,
    swaps: Sequence[int],
    domains: Sequence[tuple[int, str]],
    title: str,
    subtitle: str,
    ceiling: float,
    window: int = 40,
) -> None:
    """Write a PNG.

    `live`, `frozen`: accept length per request in order of finishing, of every request or of 1 in
    `frozen_every`. `swaps`: requests done at each swap. `domains`: (first request, name) of each
    stretch of traffic. `ceiling`: the largest possible accept length.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5.6), dpi=120, facecolor=SURFACE)
    axes.set_facecolor(SURFACE)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, length=0)
    frozen_name = "frozen initial draft, trainer off" + (
        f", 1 request in {frozen_every}" if frozen_every > 1 else ""
    )
    for values, every, color, name in (
        (live, 1, LIVE, "Aurora"),
        (frozen, frozen_every, FROZEN, frozen_name),
    ):
        if not len(values):
            continue
        x = np.arange(1, len(values) + 1) * every
        axes.scatter(x, values, s=7, color=color, alpha=0.18, linewidths=0)
        smooth = moving_mean(values, window)
        axes.plot(x, smooth, color=color, linewidth=2, label=f"{name} (mean of the last {window})")
        axes.annotate(
            f" {smooth[-1]:.2f}", (x[-1], smooth[-1]), color=color, va="center", fontsize=11
        )
    top = min(ceiling, max([*live, *frozen, 2.0])) + 0.12
    for first, name in domains:
        if first:
            axes.axvline(first, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f" {name} traffic", (first, top), color=MUTED, va="top", fontsize=10)
    marks = dict(color=INK, markersize=7, markeredgewidth=0.8, label="weights swapped in")
    axes.plot(swaps, [0.965] * len(swaps), "|", **marks)
    axes.set_ylim(0.93, top)
    axes.set_xlim(0, max(len(live), len(frozen)) * 1.04 + 1)
    axes.set_xlabel("requests finished", color=MUTED)
    axes.set_ylabel(f"accept length (of at most {ceiling:g})", color=MUTED)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.95), labelcolor=INK)
    figure.suptitle(title, x=0.065, y=0.975, ha="left", color=INK, fontsize=14)
    figure.text(0.065, 0.905, subtitle, color=MUTED, fontsize=9.5, va="center")
    figure.subplots_adjust(left=0.065, right=0.97, top=0.87, bottom=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor=SURFACE)
    plt.close(figure)
