"""An evaluation as figures with intervals (a plain record, for JSON), as a table and as a picture.

Intervals are percentiles of a bootstrap over requests; every draft sees the same resamples, so that
differences are paired. Means are ratios of sums: tokens over steps, as a server's own accept length
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aurora_trainer.lab.evaluate import NO_DOMAIN, Evaluation, Request
from aurora_trainer.learn.accept_length import WALK
from aurora_trainer.terminal import columns, ranges

RESAMPLES = 1000
# resamples at a time: counts of [CHUNK, n requests] are alive
CHUNK = 50
LEVEL = 0.95
ALL = "all"
STEPS, TOKENS, REACHED, QUERIES, MATCHES, OVERLAP = range(len(WALK))


def report(evaluation: Evaluation, seed: int = 0) -> dict[str, Any]:
    """Every figure: {"mean", "low", "high"} if it has an interval (low and high None below two
    requests).
    """
    by_domain: dict[str, list[Request]] = {ALL: evaluation.requests}
    for request in evaluation.requests:
        by_domain.setdefault(request.domain, []).append(request)
    if set(by_domain) == {ALL, NO_DOMAIN}:
        del by_domain[NO_DOMAIN]
    order = sorted(by_domain, key=lambda name: (name != ALL, -len(by_domain[name]), name))
    return {
        "recording": str(evaluation.recording),
        "target": evaluation.target,
        "drafts": evaluation.drafts,
        "draft_steps": evaluation.depth,
        "recorded": {
            # nodes 0: a chain
            **dict(zip(("num_steps", "topk", "nodes"), evaluation.shape)),
            "draft_versions": sorted(evaluation.versions),
        },
        "samples": dict(evaluation.samples),
        "damaged_records": evaluation.damaged_records,
        "interval": f"{LEVEL:.0%}, bootstrap over requests, {RESAMPLES} resamples, seed {seed}",
        "domains": {name: _domain(by_domain[name], evaluation, seed) for name in order},
    }


def table(figures: dict[str, Any]) -> str:
    """The record for people."""
    drafts, domains = figures["drafts"], figures["domains"]
    pairs = list(domains[ALL]["differences"])
    drawn = f"chains of {figures['draft_steps']} draft steps"
    if figures["recorded"]["topk"] > 1:
        drawn = "trees of {num_steps} draft steps, topk {topk}, {nodes} nodes".format(
            **figures["recorded"]
        )
    lines = [
        f"accept length: tokens per verify step, with {drawn}",
        figures["interval"],
        "",
        *columns(
            ["domain", "requests", *drafts, *pairs, "live"],
            [
                [
                    name,
                    str(d["requests"]),
                    *(_interval(d["drafts"][draft]["accept_length"]) for draft in drafts),
                    *(_interval(d["differences"][pair], "+") for pair in pairs),
                    _interval(d["live"]["accept_length"]),
                ]
                for name, d in domains.items()
            ],
        ),
        "",
        (
            "live: the server's own steps, with draft versions"
            f" {ranges(figures['recorded']['draft_versions'])}"
        ),
    ]
    for draft in drafts:
        by_depth = domains[ALL]["drafts"][draft]["as_chains"]
        sampling = domains[ALL]["drafts"][draft]["rejection_sampling"]
        lines += [
            "",
            (
                f"{draft} as chains, all domains; with rejection sampling at most about"
                f" {_interval(sampling)}"
            ),
            *columns(
                ["draft steps", "accept length", "reached", "agrees", "sum min(p, q) at most"],
                [
                    [
                        str(row["draft_steps"]),
                        _interval(row["accept_length"]),
                        f"{row['reached']:.3f}",
                        f"{row['agreement']:.3f}",
                        f"{row['overlap']:.3f}",
                    ]
                    for row in by_depth
                ],
            ),
        ]
    lines += [
        "",
        "samples: " + ", ".join(f"{name} {count}" for name, count in figures["samples"].items()),
    ]
    if figures["damaged_records"]:
        lines.append(f"damaged records passed over: {figures['damaged_records']}")
    return "\n".join(lines)


def picture(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG: accept length by domain and by number of draft steps, a colour for each
    draft.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drafts, domains = figures["drafts"], figures["domains"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=120, sharey=True)
    names = list(domains)
    for number, draft in enumerate(drafts):
        shift = (number - (len(drafts) - 1) / 2) * min(0.16, 0.7 / len(drafts))
        values = [domains[name]["drafts"][draft]["accept_length"] for name in names]
        style = dict(fmt="o", capsize=3, color=f"C{number}", label=draft)
        left.errorbar(
            np.arange(len(names)) + shift, [v["mean"] for v in values], yerr=_bars(values), **style
        )
        values = [row["accept_length"] for row in domains[ALL]["drafts"][draft]["as_chains"]]
        steps = np.arange(1, len(values) + 1)
        right.errorbar(
            steps, [v["mean"] for v in values], yerr=_bars(values), **(style | {"fmt": "o-"})
        )
    live = [domains[name]["live"]["accept_length"]["mean"] for name in names]
    left.plot(range(len(names)), live, "_", color="black", markersize=22, label="live, as recorded")
    left.set_xticks(
        range(len(names)), [f"{name}\n{domains[name]['requests']} requests" for name in names]
    )
    left.set_xlim(-0.6, len(names) - 0.4)
    left.set_ylabel("accept length")
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("draft steps, as chains")
    right.set_xticks(range(1, figures["draft_steps"] + 1))
    for axes in (left, right):
        axes.grid(axis="y", linewidth=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(
        f"Expected accept length, {figures['interval'].split(',')[0]} intervals over requests",
        fontsize=11,
    )
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# ---- figures


def _domain(requests: list[Request], evaluation: Evaluation, seed: int) -> dict[str, Any]:
    chains = np.stack([r.chains for r in requests])  # [n, D, WALK, S]
    served, sampling, live = (
        np.stack([getattr(r, name) for r in requests]) for name in ("served", "sampling", "live")
    )
    # Denominators and numerators side by side, so that one pass over the resamples serves all.
    under = [
        served[:, :, 0],
        sampling[:, :, 0],
        chains[:, :, STEPS].reshape(len(requests), -1),
        live[:, :1],
    ]
    over = [
        served[:, :, 1],
        sampling[:, :, 1],
        chains[:, :, TOKENS].reshape(len(requests), -1),
        live[:, 1:],
    ]
    above, below = np.concatenate(over, 1), np.concatenate(under, 1)
    resampled = _resample(above, below, seed)  # [RESAMPLES, columns]
    means = _ratio(above.sum(0), below.sum(0))
    count, depth = len(evaluation.drafts), evaluation.depth

    def interval(column: int) -> dict[str, float | None]:
        return _bounds(means[column], resampled[:, column])

    drafts = {}
    for d, name in enumerate(evaluation.drafts):
        sums = chains[:, d].sum(0)
        rows = [
            {
                "draft_steps": k + 1,
                "accept_length": interval(2 * count + d * depth + k),
                "reached": _number(sums[REACHED, k] / max(sums[STEPS, depth - 1], 1)),
                "agreement": _number(sums[MATCHES, k] / max(sums[QUERIES, k], 1)),
                "overlap": _number(sums[OVERLAP, k] / max(sums[QUERIES, k], 1)),
            }
            for k in range(depth)
        ]
        drafts[name] = {
            "accept_length": interval(d),
            "steps": int(served[:, d, 0].sum()),
            "tokens": int(served[:, d, 1].sum()),
            "rejection_sampling": interval(count + d),
            "as_chains": rows,
        }
    differences = {}
    for d in range(1, count):
        label = f"{evaluation.drafts[d]} - {evaluation.drafts[0]}"
        differences[label] = _bounds(means[d] - means[0], resampled[:, d] - resampled[:, 0])
    own = {
        "accept_length": interval(-1),
        "steps": int(live[:, 0].sum()),
        "tokens": int(live[:, 1].sum()),
    }
    return {"requests": len(requests), "drafts": drafts, "differences": differences, "live": own}


def _resample(over: np.ndarray, under: np.ndarray, seed: int) -> np.ndarray:
    n, random = len(over), np.random.default_rng(seed)
    if n < 2:
        return np.full((1, over.shape[1]), np.nan)
    out = []
    for _ in range(RESAMPLES // CHUNK):
        times = random.multinomial(n, np.full(n, 1 / n), size=CHUNK).astype(np.float64)
        out.append(_ratio(times @ over, times @ under))
    return np.concatenate(out)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full_like(over, np.nan, dtype=np.float64), where=under > 0)


def _bounds(mean: float, resampled: np.ndarray) -> dict[str, float | None]:
    resampled = resampled[np.isfinite(resampled)]
    low, high = (
        np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if len(resampled)
        else (np.nan, np.nan)
    )
    return {"mean": _number(mean), "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(float(value), 6) if np.isfinite(value) else None


# ---- text


def _interval(value: dict[str, float | None], sign: str = "") -> str:
    if value["mean"] is None:
        return "-"
    text = f"{value['mean']:{sign}.3f}"
    return (
        text
        if value["low"] is None
        else f"{text} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
    )


def _bars(values: Sequence[dict[str, float | None]]) -> np.ndarray:
    mean, low, high = np.array(
        [[v[k] for v in values] for k in ("mean", "low", "high")], dtype=np.float64
    )
    return np.nan_to_num(np.stack([mean - low, high - mean])).clip(0)
