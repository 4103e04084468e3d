"""The trainer's figures: one status record as a JSON file and a log line, and Prometheus metrics on
its own port.

    what happens    trained(), published(), saved(), Clock       observed when it happens
    what is so      report(status)                               copied from the daemon's status
                    every `every_s`

Counters count from this process's start, whatever a checkpoint remembers: a restart is an ordinary
counter reset.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prometheus_client import (
    CollectorRegistry,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from pydantic import Field

from aurora_sglang_plugin.config import Section
from aurora_sglang_plugin.metric_families import Exported
from aurora_sglang_plugin.retry import Retry
from aurora_sglang_plugin.weights.atomic_files import replace_file
from aurora_trainer.metric_families import ACTIVITIES, COUNTED, FAMILIES, NODES, SHOWN, WHEN
from aurora_trainer.tensorboard import TensorBoard

if TYPE_CHECKING:
    from aurora_trainer.learn.step_record import Step

log = logging.getLogger(__name__)

NAMESPACE = "aurora_trainer"


class MetricsConfig(Section):
    """Where the figures go."""

    # of http://127.0.0.1:PORT/metrics; 0: none
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    # JSON, replaced whole
    status_file: Path | None = None
    # directory of event files; needs the package
    tensorboard: Path | None = None
    every_s: Annotated[float, Field(gt=0)] = 2.0
    # score every n-th batch once more after training; 0: never
    rescore_every_steps: Annotated[int, Field(ge=0)] = 16


class Clock:
    """Where the process's time goes. The seconds add up to the time since it was made."""

    def __init__(self):
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = "other", time.monotonic()

    def turn_to(self, activity: str) -> None:
        now = time.monotonic()
        self.seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now


class Metrics:
    """Raises ValueError where the port is taken."""

    def __init__(self, config: MetricsConfig):
        self.config = config
        self.clock = Clock()
        self.jobs = {name: Retry(name) for name in ("status", "tensorboard")}
        # one more series for each, which says what process_start_time_seconds says
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._exported = Exported(FAMILIES, self.registry)
        ProcessCollector(namespace=NAMESPACE, registry=self.registry)
        self._published_at = self._saved_at = time.monotonic()
        self._board = None if config.tensorboard is None else TensorBoard(config.tensorboard)
        if config.status_file is not None:
            config.status_file.parent.mkdir(parents=True, exist_ok=True)
        if config.port:
            try:
                start_http_server(config.port, "127.0.0.1", self.registry)
            except OSError as error:
                raise ValueError(
                    f"trainer.metrics.port {config.port}: {error}; expected a free port, or 0 for"
                    " none"
                ) from None

    def begin(self, status: dict[str, Any]) -> None:
        """What was counted before this process began: from a checkpoint, or the ledger."""
        for name, path in COUNTED.items():
            self._count(name, status, path, before=True)

    def report(self, status: dict[str, Any], line: tuple[str, ...]) -> None:
        """Publish a status record; `line` names the keys that make the log line."""
        fields = {k: status[k] for k in line if status.get(k) is not None}
        log.info("trainer %s", " ".join(f"{k}={_short(v)}" for k, v in fields.items()))
        for name, path in COUNTED.items():
            self._count(name, status, path)
        for name, path in SHOWN.items():
            value = _find(status, path)
            if value is not None:
                self._exported.set(name, value)
        self.clock.turn_to("other")
        self._exported.count_to("aurora_trainer_time_seconds", self.clock.seconds)
        now = time.monotonic()
        self._exported.set("aurora_trainer_publication_age_seconds", now - self._published_at)
        self._exported.set("aurora_trainer_checkpoint_age_seconds", now - self._saved_at)
        if (file := self.config.status_file) is not None:
            text = json.dumps(status, sort_keys=True).encode()
            self.jobs["status"].run(lambda: replace_file(file, text), now)
        if (board := self._board) is not None:
            self.jobs["tensorboard"].run(lambda: board.write(status), now)

    def trained(self, step: Step, seconds: float, now_s: float) -> None:
        """After a step that took `seconds`; `now_s` is the wall clock, or a recording's own."""
        update, exported = step.update, self._exported
        exported.child("aurora_trainer_step_seconds").observe(seconds)
        exported.set("aurora_trainer_learning_rate", update.lr)
        for time_ns in step.time_ns:
            exported.child("aurora_trainer_sample_age_seconds").observe(
                max(0.0, now_s - time_ns / 1e9)
            )
        for versions in step.staleness:
            exported.child("aurora_trainer_staleness_versions").observe(max(0, versions))
        for when, lengths in zip(WHEN, (step.before, step.after), strict=True):
            if lengths is not None and lengths[0]:
                steps, tokens = lengths
                exported.child("aurora_trainer_batch_accept_length_tokens", when).observe(
                    tokens / steps
                )
        if not update.applied:
            cause = "gradient" if math.isfinite(update.loss) else "loss"
            exported.child("aurora_trainer_skipped_steps", cause).inc()
            return
        exported.set("aurora_trainer_loss", update.loss)
        exported.set("aurora_trainer_gradient_norm", update.grad_norm)
        sums = {
            "aurora_trainer_scored_nodes": step.score.count,
            "aurora_trainer_node_loss": step.score.loss,
            "aurora_trainer_greedy_matches": step.score.greedy_match,
            "aurora_trainer_overlap": step.score.overlap,
        }
        for name, by_depth in sums.items():
            for depth, both in enumerate(by_depth.tolist()):
                for nodes, value in zip(NODES, both, strict=True):
                    if value > 0 and math.isfinite(value):
                        exported.child(name, str(depth + 1), nodes).inc(value)

    def published(self, seconds: float) -> None:
        """A version was written in `seconds`."""
        self._exported.child("aurora_trainer_publish_seconds").observe(seconds)
        self._published_at = time.monotonic()

    def saved(self, seconds: float, whole: bool) -> None:
        """A checkpoint was written in `seconds`, or could not be."""
        if not whole:
            self._exported.child("aurora_trainer_checkpoint_errors").inc()
            return
        self._exported.child("aurora_trainer_checkpoint_seconds").observe(seconds)
        self._saved_at = time.monotonic()

    def _count(self, name: str, status: dict[str, Any], path: str, before: bool = False) -> None:
        totals = _find(status, path)
        if totals is not None:
            self._exported.count_to(name, totals, before)


def _find(status: Mapping[str, Any], path: str) -> Any:
    """status["a"]["b"] of "a.b", None where there is none."""
    found: Any = status
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_short(v)}" for k, v in value.items()) + "}"
    return str(value)
