"""`aurora-trainer top`: one screen of what matters, from the /metrics of servers and trainer, for a
terminal.

    scrape.fetch()  two pages, some seconds apart  ->  Figures  ->  lines of text

Either side may be absent: its half says so, and why. Without a trainer's port its status file
serves, with less in it. Imports no torch, so that it starts at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import markup
from rich.console import Console
from rich.live import Live
from rich.text import Text

from aurora_trainer.terminal import escape, size
from aurora_trainer.tools.scrape import Figures, Page, fetch

# A line of text is in rich's markup: what came from elsewhere is escaped.
BOLD, RED, DIM, PLAIN = "[bold]", "[red]", "[dim]", "[/]"
# requests after a change for which it stands out
NEW_TRAFFIC = 100


def server_lines(f: Figures) -> list[str]:
    new = f.new
    versions = sorted({int(v) for _, v in new.series("aurora_draft_version")})
    mode = next((m for m, on in new.by("mode", "aurora_mode").items() if on), "?")
    refused = sum(new.by("cause", "aurora_weights_refused_total").values())
    lines = [
        f"{BOLD}SERVER{PLAIN}   {new.total('aurora_attached'):.0f} attached, {_plain(mode)}   draft"
        f" {' and '.join(f'v{v}' for v in versions)},"
        f" {_age(new.largest('aurora_weights_age_seconds'))} old   swaps"
        f" {new.largest('aurora_swaps_total') or 0:.0f}   {_alarm('refused', refused)}"
    ]
    if not new.series("aurora_captured_messages_total"):
        return [*lines, "  capture is off: no more is known"]
    length = f.mean("aurora_accept_length_tokens")
    roles = [
        f"{role} version {_number(new.largest('aurora_version_accept_length_tokens', role=role))} "
        f"({new.total('aurora_version_verify_steps', role=role):,.0f} steps)"
        for role in ("current", "previous")
    ]
    lines.append(f"  accept length    {BOLD}{_number(length)}{PLAIN}   {'   '.join(roles)}")
    name = "aurora_decode_rounds_total"
    rounds = {steps: f.rate(name, steps=steps) for steps in new.by("steps", name)}
    every = sum(rounds.values())
    shares = [f"{_steps(steps)} {rate / every:.0%}" for steps, rate in rounds.items() if rate]
    lines.append(
        f"  rounds           {'  '.join(shares) or 'none'}   tokens/s over plain decoding's"
        f" {_number(new.largest('aurora_speculation_gain_ratio'))}  "
        f" {_alarm('rolled back', new.largest('aurora_versions_rejected_total') or 0.0)}"
    )
    counted = f.rate("aurora_accept_length_tokens_count")
    by_position = new.by("position", "aurora_accepted_drafts_total")
    share = {
        p: f.rate("aurora_accepted_drafts_total", position=p) / counted if counted else 0.0
        for p in by_position
    }
    lines.append(
        "  by position      "
        + "  ".join(f"{_plain(p)} {_bar(s)} {s:4.0%}" for p, s in list(share.items())[:5])
    )
    captured, errors = (
        f.rate("aurora_capture_seconds_sum"),
        new.total("aurora_capture_errors_total"),
    )
    lines.append(
        f"  capture          {captured:.2%} of the scheduler's time, p99 of a step"
        f" {_age(f.quantile(0.99, 'aurora_capture_seconds', kind='verify'))}  "
        f" {_alarm('errors', errors)}"
    )
    dropped = new.by("cause", "aurora_dropped_messages_total")
    blocked = new.largest("aurora_link_blocked_seconds") or 0.0
    lines.append(
        f"  link             captured {f.rate('aurora_captured_messages_total'):.1f}/s  sent"
        f" {f.rate('aurora_sent_messages_total'):.1f}/s,"
        f" {size(f.rate('aurora_sent_bytes_total'))}/s  queued"
        f" {new.total('aurora_queued_messages'):.0f} ({size(new.total('aurora_queued_bytes'))})"
    )
    causes = " ".join(f"{_plain(cause)} {n:.0f}" for cause, n in dropped.items() if n)
    silence = (
        f"   {RED}no trainer takes anything for {_age(blocked)}{PLAIN}" if blocked > 10 else ""
    )
    lines.append(
        "  dropped         "
        f" {_alarm(causes or 'nothing', sum(dropped.values()), number=False)}{silence}"
    )
    lines.append(
        f"  new weights      freshness {_age(f.mean('aurora_freshness_seconds'))}   swap"
        f" {_age(f.mean('aurora_swap_seconds'))}, stall"
        f" {_age(f.mean('aurora_swap_stall_seconds'))}, p99"
        f" {_age(f.quantile(0.99, 'aurora_swap_stall_seconds'))}"
    )
    return lines


def trainer_lines(f: Figures) -> list[str]:
    new, p = f.new, "aurora_trainer_"
    activities = {
        a: f.rate(f"{p}time_seconds_total", activity=a)
        for a in new.by("activity", f"{p}time_seconds_total")
    }
    lengths = {w: f.mean(f"{p}batch_accept_length_tokens", when=w) for w in ("before", "after")}
    skipped = new.total(f"{p}skipped_steps_total")
    outcomes = new.by("outcome", f"{p}publications_total")
    refused = sum(n for outcome, n in outcomes.items() if outcome.startswith("refused"))
    rejected = sum(new.by("cause", f"{p}rejected_messages_total").values())
    losses = []
    for depth, nodes in new.by("depth", f"{p}scored_nodes_total", nodes="accepted").items():
        if nodes:
            losses.append(
                f"{_plain(depth)}:"
                f" {new.total(f'{p}node_loss_total', depth=depth, nodes='accepted') / nodes:.2f}"
            )
    return [
        (
            f"{BOLD}TRAINER{PLAIN}  optimizer step {new.total(f'{p}optimizer_step'):,.0f}  "
            f" published v{new.total(f'{p}draft_version'):.0f},"
            f" {_age(new.largest(f'{p}publication_age_seconds'))} ago   checkpoint"
            f" {_age(new.largest(f'{p}checkpoint_age_seconds'))} ago"
        ),
        (
            f"  accept length    {BOLD}{_number(lengths['before'])}{PLAIN} before,"
            f" {_number(lengths['after'])} after training on a batch   gate: served"
            f" {_number(new.largest(f'{p}gate_served_accept_length_tokens'))}, candidate"
            f" {_number(new.largest(f'{p}gate_candidate_accept_length_tokens'))}"
        ),
        (
            f"  training         {f.rate(f'{p}steps_total'):.2f} steps/s, "
            f"{f.rate(f'{p}trained_tokens_total'):,.0f} tokens/s   {_alarm('skipped', skipped)}   "
            f"gradient {_number(new.largest(f'{p}gradient_norm'))}   "
            f"learning rate {_number(new.largest(f'{p}learning_rate'), '.2g')}"
        ),
        f"  loss by depth    {'  '.join(losses[:8]) or '-'}   (mean since the start)",
        "  time             "
        + "  ".join(f"{_plain(a)} {_bar(s)} {s:.0%}" for a, s in activities.items() if s >= 0.005),
        (
            f"  stream           {new.total(f'{p}servers'):.0f} servers, heard"
            f" {_age(new.largest(f'{p}message_age_seconds'))} ago   received"
            f" {f.rate(f'{p}received_messages_total'):.1f}/s  "
            f" {_alarm('lost', new.total(f'{p}lost_messages_total'))}  "
            f" {_alarm('rejected', rejected)}"
        ),
        (
            f"  buffer           {new.total(f'{p}buffer_samples'):.0f} samples"
            f" ({size(new.total(f'{p}buffer_bytes'))}),"
            f" {new.total(f'{p}buffer_fresh_samples'):.0f} never used   open requests"
            f" {new.total(f'{p}open_requests'):.0f}   sample age"
            f" {_age(f.mean(f'{p}sample_age_seconds'))}"
        ),
        (
            f"  versions         {outcomes.get('published', 0):.0f} published, {refused:.0f}"
            f" refused by the gate, {outcomes.get('rolled_back', 0):.0f} rolled back   publishing"
            f" takes {_age(f.mean(f'{p}publish_seconds'))}"
        ),
        _traffic(
            new.total(f"{p}traffic_changes_total"),
            new.total(f"{p}samples_since_change"),
            new.total(f"{p}resting") > 0,
        ),
    ]


def status_lines(path: Path) -> list[str]:
    """What the trainer's status file knows. Raises ValueError if it cannot be read."""
    try:
        s: dict[str, Any] = json.loads(path.read_text())
        age = time.time() - s["time_unix_s"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"status file {path}: {error}") from None
    stale = f"{RED}written {_age(age)} ago{PLAIN}" if age > 30 else f"written {_age(age)} ago"
    return [
        f"{BOLD}TRAINER{PLAIN}  from {_plain(path)}, {stale}",
        (
            f"  optimizer step   {s.get('optimizer_step', 0):,}   published"
            f" v{s.get('draft_version', 0)}   {s.get('tokens_per_s', 0):,.0f} tokens/s  "
            f" {_alarm('skipped', s.get('skipped_updates', 0))}"
        ),
        (
            f"  accept length    {_number(s.get('accept_length'))} before training on a batch,"
            f" {_number(s.get('accept_length_traffic'))} of the traffic   loss"
            f" {_number(s.get('loss'))}"
        ),
        (
            f"  stream           received {s.get('received', 0):,}  "
            f" {_alarm('lost', s.get('lost', 0))}  "
            f" {_alarm('rejected', sum(s.get('rejected', {}).values()))}"
        ),
        _traffic(
            sum(s.get("traffic_changes", {}).values()),
            s.get("samples_since_change", 0),
            bool(s.get("resting")),
        ),
    ]


class Side:
    """One half of the screen: remembers the page before, for rates."""

    def __init__(self, name: str, urls: Sequence[str], lines: Callable[[Figures], list[str]]):
        self.name, self.urls, self.lines = name, urls, lines
        self.page: Page | None = None

    def look(self) -> list[str]:
        try:
            before, self.page = self.page, fetch(self.urls)
        except ValueError as error:
            self.page = None
            return [_absent(self.name, error)]
        return self.lines(Figures(before or self.page, self.page))


def show(
    servers: Sequence[str], trainer: str | None, status: Path | None, every_s: float, once: bool
) -> bool:
    """Draw frames until interrupted, or one of them.

    Returns whether both sides were there in the last one.
    """
    server = Side("SERVER", servers, server_lines)
    trained = Side("TRAINER", [trainer] if trainer else [], trainer_lines)
    console = Console(highlight=False)

    def halves() -> tuple[list[str], list[str]]:
        if trainer or not status:
            return server.look(), (
                trained.look() if trainer else [f"{BOLD}TRAINER{PLAIN}  not asked for"]
            )
        try:
            return server.look(), status_lines(status)
        except ValueError as error:
            return server.look(), [_absent("TRAINER", error)]

    def frame() -> tuple[Text, bool]:
        """One look at both sides, and whether both are there."""
        time.sleep(every_s)
        one, other = halves()
        head = f"{DIM}aurora top  {time.strftime('%H:%M:%S')}{PLAIN}"
        text = Text.from_markup("\n".join([head, "", *one, "", *other]))
        return text, not any("absent" in side[0] for side in (one, other))

    # rates need a page before
    halves()
    while once or not console.is_terminal:
        text, there = frame()
        # a pipe has no width
        console.print(text, soft_wrap=True)
        if once:
            return there
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(frame()[0], refresh=True)


def _absent(side: str, error: ValueError) -> str:
    return f"{BOLD}{side}{PLAIN}  {RED}absent{PLAIN}: {_plain(error)}"


def _plain(text: object) -> str:
    """What came from elsewhere: without control characters, and no markup."""
    return markup.escape(escape(text, 300))


def _steps(steps: str) -> str:
    """A label of aurora_decode_rounds_total, in words."""
    plain = {"cold": "cold", "0": "plain"}
    return plain.get(steps) or f"{_plain(steps)} step{'s' if steps != '1' else ''}"


def _traffic(changes: float, samples: float, resting: bool) -> str:
    """How often traffic changed, how many samples ago, and what training makes of it."""
    changed = f"changed {changes:.0f} times, {samples:,.0f} samples ago" if changes else "as it was"
    if changes and samples < NEW_TRAFFIC:
        changed = f"{RED}{changed}{PLAIN}"
    pace = "training rests, nothing is gained" if resting else "training at full pace"
    return f"  traffic          {changed}   {pace}"


def _alarm(what: str, count: float, number: bool = True) -> str:
    text = f"{what} {count:,.0f}" if number else what
    return f"{RED}{text}{PLAIN}" if count else text


def _bar(share: float, width: int = 8) -> str:
    full = min(width, max(0, round(share * width)))
    return "█" * full + "░" * (width - full)


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or value != value else format(value, form)


def _age(seconds: float | None) -> str:
    """A duration in the unit that suits it."""
    if seconds is None:
        return "-"
    units = (
        (1e-3, "us", 1e-6),
        (1, "ms", 1e-3),
        (120, "s", 1),
        (7200, "min", 60),
        (172800, "h", 3600),
    )
    for limit, unit, length in units:
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
