"""The trainer's figures: one status record, as a JSON file, as a log line, and as Prometheus gauges.

The record is made by the daemon (`daemon.status`); its numbers become `aurora_trainer_<key>`, those of a nested record
`aurora_trainer_<key>{cause=...}`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

from prometheus_client import Gauge, start_http_server
from pydantic import Field

from aurora_sglang_plugin.config import Section
from aurora_trainer.durable import replace_file

log = logging.getLogger(__name__)


class MetricsConfig(Section):
    """Where the figures go."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0  # of http://127.0.0.1:PORT/metrics; 0: none
    status_file: Path | None = None  # JSON, replaced whole
    every_s: Annotated[float, Field(gt=0)] = 2.0


class Metrics:
    """Raises ValueError where the port is taken."""

    def __init__(self, config: MetricsConfig):
        self.config = config
        self._gauges: dict[str, Gauge] = {}
        if config.status_file is not None:
            config.status_file.parent.mkdir(parents=True, exist_ok=True)
        if config.port:
            try:
                start_http_server(config.port, "127.0.0.1")
            except OSError as error:
                raise ValueError(
                    f"trainer.metrics.port {config.port}: {error}; expected a free port, or 0 for none"
                ) from None

    def report(self, status: dict[str, Any], line: tuple[str, ...]) -> None:
        """Publish a status record; `line` names the keys that make the log line."""
        fields = {k: status[k] for k in line if status.get(k) is not None}
        log.info("trainer %s", " ".join(f"{k}={_short(v)}" for k, v in fields.items()))
        if self.config.status_file is not None:
            try:
                replace_file(self.config.status_file, json.dumps(status, sort_keys=True).encode())
            except OSError as error:  # a full disk must not end training
                log.warning("status file not written error=%s", error)
        if self.config.port:
            for key, value in status.items():
                self._set(key, value)

    def _set(self, key: str, value: Any) -> None:
        numbers = value if isinstance(value, dict) else {"": value}
        for cause, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if key not in self._gauges:
                labels = ["cause"] if cause else []
                self._gauges[key] = Gauge(f"aurora_trainer_{key}", f"{key} of the trainer's status", labels)
            (self._gauges[key].labels(cause) if cause else self._gauges[key]).set(number)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_short(v)}" for k, v in value.items()) + "}"
    return str(value)
