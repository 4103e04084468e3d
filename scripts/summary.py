"""What a demo says at its end: summary.json, with the same keys for every demo, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import draw_curve
import numpy as np
from measure_target import distinct_fraction
from passes import PICTURE, SUMMARY, WINDOW, Pass, Site, mean
from safetensors import safe_open

# requests in each of the means that show the curve as figures
BIN = 50


def report(
    site: Site,
    live: Pass,
    frozen: Pass | None,
    learned: Pass | None,
    plain: Pass | None,
    *,
    init: str,
    tokens: int,
    sampling: str,
    shift: int | None = None,
    every: int = 1,
) -> None:
    """Write and print the summary, draw the picture.

    `init`: how the draft started; `tokens`: the most of a request; `sampling`: who decides how, in
    words. `shift`: requests before the traffic changed its domain. The other passes served 1 in
    `every` of the live requests.
    """
    home = site.home
    summary = {
        "model": site.model,
        "init": init,
        "draft_vocabulary": vocabulary(site.last, live),
        "draft_steps": site.num_steps,
        "tokens_per_request": tokens,
        "clients": site.clients,
        "sampling": sampling,
    } | figures(live, frozen, learned, plain, shift)
    (home / SUMMARY).write_text(json.dumps(summary, indent=1))
    domains = (
        [] if shift is None else [(0, live.replies[0].domain), (shift, live.replies[-1].domain)]
    )
    different = ", ".join(
        f"{name} {share:.0%}" for name, share in summary["distinct_4grams"].items()
    )
    draw_curve.draw(
        home / PICTURE,
        live.lengths,
        frozen.lengths if frozen else [],
        frozen_every=every,
        swaps=live.swaps,
        domains=domains,
        title=f"{start(init)} while SGLang serves {site.model}",
        subtitle=f"chain of {site.num_steps} draft steps, {sampling}, at most {tokens} tokens a "
        f"request, {site.clients} clients; distinct 4-grams: {different}",
        ceiling=site.num_steps + 1,
        window=WINDOW,
    )
    print("\nsummary")
    show(summary)
    print(f"  picture: {home / PICTURE}")


def start(init: str) -> str:
    if init == "none":
        return "A draft that the server did not have is made and learns"
    return f"An untrained draft ({init} initialisation) learns"


def vocabulary(draft: Path, live: Pass) -> dict[str, float]:
    """Tokens that the draft can propose, of how many, and the share that they are of the output."""
    config = json.loads((draft / "config.json").read_text())
    size, of = config["draft_vocab_size"], config["vocab_size"]
    generated = [token for reply in live.replies for token in reply.tokens]
    with safe_open(draft / "model.safetensors", "np") as file:
        ids = np.arange(size) + (file.get_tensor("d2t") if "d2t" in file.keys() else 0)
    return {
        "tokens": size,
        "of": of,
        "covers": float(np.isin(generated, ids).mean()) if generated else 0.0,
    }


def figures(
    live: Pass,
    frozen: Pass | None,
    learned: Pass | None,
    plain: Pass | None,
    shift: int | None,
) -> dict[str, Any]:
    """The keys after the settings; None if a demo has no such thing."""
    lengths = live.lengths
    reached = (
        i + 1
        for i, m in enumerate(draw_curve.moving_mean(lengths, WINDOW))
        if i >= WINDOW and m >= 2.0
    )
    status = live.status()
    return {
        "requests": len(lengths),
        "swaps": len(live.swaps),
        f"accept_length_first_{WINDOW}": mean(lengths[:WINDOW]),
        f"accept_length_means_of_{BIN}": [
            mean(lengths[i : i + BIN]) for i in range(0, len(lengths), BIN)
        ],
        "accept_length_requests_260_to_300": mean(lengths[260:300])
        if len(lengths) >= 300
        else None,
        "requests_until_2.0": next(reached, None),
        "accept_length_before_shift": None
        if shift is None
        else mean(lengths[max(0, shift - WINDOW) : shift]),
        "accept_length_after_shift": None
        if shift is None
        else mean(lengths[shift : shift + WINDOW]),
        f"accept_length_last_{WINDOW}": mean(lengths[-WINDOW:]),
        "accept_length_frozen": mean(frozen.lengths) if frozen else None,
        # The first 300 outputs of a domain together (it falls with their number), and an
        # output by itself.
        "distinct_4grams": {
            domain: distinct_fraction([r.tokens for r in live.replies if r.domain == domain][:300])
            for domain in dict.fromkeys(r.domain for r in live.replies)
        },
        "distinct_4grams_in_one_output": mean(
            [distinct_fraction([r.tokens]) for r in live.replies]
        ),
        # unknown if the trainer never wrote its status
        "dropped": status["dropped"] if status else None,
        "lost": status["lost"] if status else None,
        "optimizer_steps": status["optimizer_step"] if status else None,
        # Tokens a second; every client is busy, but in the live pass, in which users may pause.
        "passes": {
            "live": live.figures(),
            f"live_last_{WINDOW}": live.figures(WINDOW),
            "frozen": frozen.figures() if frozen else None,
            "learned": learned.figures() if learned else None,
            "plain": plain.figures() if plain else None,
        },
    }


def show(summary: dict[str, Any]) -> None:
    """One line a figure, on the terminal."""
    for name, value in summary.items():
        if name == "passes":
            for which, found in value.items():
                if found:
                    about = f"{found['tokens_per_s']:6.1f} tokens/s  {found['requests']} requests"
                    about += f"  accept length {found['accept_length']:.2f}"
                    print(f"  {which:36} {about}")
        else:
            print(f"  {name:36} {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " ".join(_text(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(v)}" for name, v in value.items()) or "none"
    return str(value)
