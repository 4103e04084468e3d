"""The trainer's figures: one status record as a JSON file and a log line, and Prometheus metrics on
its own port.

    what happens    trained(), published(), saved(), Clock    observed when it happens
    what is so      report(status)                            read from the daemon's status
                                                              every `every_s`

metric_families/ declares each metric with its reader.
Counters count from this process's start, whatever a checkpoint remembers: a restart is an ordinary
counter reset.
"""

from __future__ import annotations

import json
import logging
import time
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
from aurora_sglang_plugin.disk_faults import Retry
from aurora_sglang_plugin.metric_families import Exported, Family
from aurora_sglang_plugin.weights.atomic_files import replace_file
from aurora_trainer.metric_families.intake import RECORDING, SAMPLES, STREAM
from aurora_trainer.metric_families.learning import ACTIVITIES, TRAINING, VERSIONS
from aurora_trainer.metric_families.readers import Trained, Written
from aurora_trainer.tensorboard import TensorBoard

if TYPE_CHECKING:
    from aurora_trainer.learn.step_record import Step

log = logging.getLogger(__name__)

NAMESPACE = "aurora_trainer"
FAMILIES: dict[str, Family] = STREAM | RECORDING | SAMPLES | TRAINING | VERSIONS


class MetricsConfig(Section):
    """Where the figures go."""

    # that the figures are served on; `0.0.0.0` for every interface. There is no password: let a
    # firewall or a NetworkPolicy keep strangers out
    host: str = "127.0.0.1"
    # of http://HOST:PORT/metrics; 0: none
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    # JSON, replaced whole
    status_file: Path | None = None
    # directory of TensorBoard's event files, every number of the status; needs `pip install
    # tensorboard`. `wandb sync DIRECTORY` takes them to Weights & Biases
    tensorboard: Path | None = None
    # how often the status is logged, written and exported
    every_s: Annotated[float, Field(gt=0)] = 2.0
    # score every n-th batch after training too, one more forward; 0: never
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
    """Raises ValueError if the port is taken, or the host is not this machine's."""

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
                start_http_server(config.port, config.host, self.registry)
            except OSError as error:
                raise ValueError(
                    f"trainer.metrics.port {config.port} of trainer.metrics.host {config.host}:"
                    f" {error}; expected a free port, or 0 for none, of an address of this machine"
                ) from None

    def begin(self, status: dict[str, Any]) -> None:
        """What was counted before this process began: from a checkpoint, or the ledger."""
        self._exported.report(status, before=True)

    def report(self, status: dict[str, Any], line: tuple[str, ...]) -> None:
        """Publish a status record; `line` names the keys that make the log line."""
        fields = {k: status[k] for k in line if status.get(k) is not None}
        log.info("trainer %s", " ".join(f"{k}={_short(v)}" for k, v in fields.items()))
        self.clock.turn_to("other")
        now = time.monotonic()
        own = {
            "time_s": self.clock.seconds,
            "publication_age_s": now - self._published_at,
            "checkpoint_age_s": now - self._saved_at,
        }
        self._exported.report(status | own)
        if (file := self.config.status_file) is not None:
            text = json.dumps(status, sort_keys=True).encode()
            self.jobs["status"].run(lambda: replace_file(file, text), now)
        if (board := self._board) is not None:
            self.jobs["tensorboard"].run(lambda: board.write(status), now)

    def trained(self, step: Step, seconds: float, now_s: float) -> None:
        """After a step that took `seconds`; `now_s` is the wall clock, or a recording's own."""
        self._exported.happened("step", Trained(step, seconds, now_s))

    def published(self, seconds: float) -> None:
        """A version was written in `seconds`."""
        self._exported.happened("publish", Written(seconds))
        self._published_at = time.monotonic()

    def saved(self, seconds: float, whole: bool) -> None:
        """A checkpoint was written in `seconds`, or could not be."""
        self._exported.happened("checkpoint", Written(seconds, whole))
        if whole:
            self._saved_at = time.monotonic()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_short(v)}" for k, v in value.items()) + "}"
    return str(value)
