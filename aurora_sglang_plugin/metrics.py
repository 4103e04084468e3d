"""The server's figures in SGLang's own /metrics (`--enable-metrics`), refreshed from the books by a thread of its own.

SGLang gathers the metrics of its processes through prometheus_client's multiprocess directory, which it names in the
environment before it starts them: hence the late import, and nothing else to set up here. The scheduler thread only
counts in plain attributes, as it does without metrics.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aurora_sglang_plugin.capture import Capture
    from aurora_sglang_plugin.reload import Reloader

log = logging.getLogger(__name__)

REFRESH_S = 1.0

# name -> (kind, help, label)
FAMILIES = {
    "aurora_attached": ("gauge", "1 where AURORA runs in this server", None),
    "aurora_draft_version": ("gauge", "Version of the draft's weights that drafts now, 0 for the initial one", None),
    "aurora_swaps": ("counter", "Swaps of the draft's weights, rollbacks included", None),
    "aurora_swap_seconds": ("counter", "Time of the scheduler's thread spent on swaps", None),
    "aurora_weights_refused": ("counter", "Published versions that were not loaded", "cause"),
    "aurora_captured_messages": ("counter", "Messages captured: sent, dropped or queued", None),
    "aurora_sent_messages": ("counter", "Captured messages sent to the trainer", None),
    "aurora_sent_bytes": ("counter", "Bytes sent to the trainer", None),
    "aurora_dropped_messages": ("counter", "Captured messages dropped", "cause"),
    "aurora_queued_bytes": ("gauge", "Bytes waiting for the trainer", None),
    "aurora_capture_seconds": ("counter", "Time of the scheduler's thread spent on capture", None),
    "aurora_capture_errors": ("counter", "Steps whose capture failed", None),
    "aurora_skipped_prompt_tokens": ("counter", "Prompt tokens left out by plugin.capture.max_prompt_features", None),
}


class ServerMetrics:
    """Copies the counters of capture, publisher and reloader to prometheus once a second."""

    def __init__(self, capture: Capture | None, reloader: Reloader):
        self._capture = capture
        self._reloader = reloader
        self._families: dict[str, object] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aurora-metrics", daemon=True)

    def start(self) -> None:
        from prometheus_client import Counter, Gauge

        for name, (kind, text, label) in FAMILIES.items():
            labels = [label] if label else []
            if kind == "gauge":
                self._families[name] = Gauge(name, text, labels, multiprocess_mode="mostrecent")
            else:
                self._families[name] = Counter(name, text, labels)
        self.refresh()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def refresh(self) -> None:
        """Bring every family up to date; a counter moves by what its source moved."""
        for name, cause, value in self._values():
            family = self._families[name]
            if cause:
                family = family.labels(cause)
            if FAMILIES[name][0] == "gauge":
                family.set(value)
            else:
                family.inc(value - self._last.get((name, cause), 0.0))
                self._last[name, cause] = value

    def _values(self) -> Iterator[tuple[str, str, float]]:
        yield "aurora_attached", "", 1
        swaps = self._reloader.counters()
        yield "aurora_draft_version", "", swaps["draft_version"]
        yield "aurora_swaps", "", swaps["swaps"]
        yield "aurora_swap_seconds", "", swaps["swap_seconds_sum"]
        for name, count in swaps.items():
            if name.startswith("refused_"):
                yield "aurora_weights_refused", name.removeprefix("refused_"), count
        if self._capture is None:
            return
        books = self._capture.publisher.counters()
        yield "aurora_captured_messages", "", books["captured"]
        yield "aurora_sent_messages", "", books["sent"]
        yield "aurora_sent_bytes", "", books["bytes_sent"]
        yield "aurora_queued_bytes", "", books["queued_bytes"]
        for cause, count in books["dropped"].items():
            yield "aurora_dropped_messages", cause, count
        yield "aurora_capture_seconds", "", self._capture.seconds
        yield "aurora_capture_errors", "", self._capture.errors
        yield "aurora_skipped_prompt_tokens", "", self._capture.prompt_tokens_skipped

    def _run(self) -> None:
        while not self._stop.wait(REFRESH_S):
            try:
                self.refresh()
            except Exception:  # a full disk under the multiprocess directory must not end anything
                log.exception("aurora metrics failed")
                return
