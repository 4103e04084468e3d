"""The status record's part that is about training: numbers, and numbers by cause."""

from __future__ import annotations

import logging
from typing import Any

from aurora_trainer.learn.trainer import Training
from aurora_trainer.metric_families.intake import EVENTS

log = logging.getLogger(__name__)


def status_of(training: Training) -> dict[str, Any]:
    """Every figure of what was assembled, trained and published."""
    decided, drift = training.gate.newest, training.arrivals.drift
    return {
        "steps": training.steps,
        "optimizer_step": training.updates,
        "draft_version": training.served.version,
        "tokens": training.positions,
        # loss; accept_length: of samples before they were trained on
        **training.shown,
        "accept_length_served": decided.served if decided else None,
        "accept_length_candidate": decided.candidate if decided else None,
        "accept_length_initial": decided.initial if decided else None,
        "gate_requests": decided.requests if decided else None,
        "gate_held": training.gate.held.samples,
        "accept_length_traffic": training.traffic["tokens"] / max(training.traffic["steps"], 1),
        "traffic": dict(training.traffic),
        "published": dict(training.published),
        "published_roles": dict(training.published_roles),
        "gate": dict(training.gate.decisions),
        "watched_samples": drift.samples,
        "traffic_changes": dict(drift.changes),
        "change_score": drift.sum / drift.config.limit,
        "samples_since_change": training.samples["assembled"] - (drift.changed_at or 0),
        "resting": int(training.arrivals.resting),
        "rows": dict(training.rows),
        "samples": dict(training.samples),
        "unusable": {cause: n for cause, n in training.samples.items() if cause != "assembled"},
        "assembler": dict(training.assembler.counters),
        "bad_rows": dict(training.assembler.bad_rows),
        "assembly_events": {event: training.assembler.counters[event] for event in EVENTS},
        "prefix_positions": dict(training.assembler.prefixes.positions),
        "open_requests": training.assembler.open_requests,
        "open_bytes": training.assembler.nbytes,
        "buffer": training.buffer.stats(),
        "buffer_dropped": dict(training.buffer.dropped),
        "skipped_updates": training.optimizer.skipped,
    }


class Lessons:
    """Says so if samples came and none of them had a row to learn from."""

    def __init__(self):
        # at the last look
        self._samples = self._rows = 0

    def look(self, training: Training) -> None:
        samples, rows = training.samples["assembled"], training.rows["with_target"]
        if samples > self._samples and rows == self._rows:
            unusable = {k: n for k, n in training.samples.items() if k != "assembled"}
            log.warning(
                "nothing to learn from: samples=%d unusable=%s rows=%s; see"
                ' docs/troubleshooting.md, "Nothing is learned"',
                samples - self._samples, unusable, dict(training.rows),
            )  # fmt: skip
        self._samples, self._rows = samples, rows
