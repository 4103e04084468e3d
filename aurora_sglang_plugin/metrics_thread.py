"""The server's figures in SGLang's own /metrics (`--enable-metrics`), refreshed every second by a
thread of its own.

SGLang gathers the metrics of its processes through prometheus_client's multiprocess directory,
which it names in the environment before it starts them: hence the late import in
metric_families.py, and nothing else to set up here.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from aurora_sglang_plugin.metric_families import Exported
from aurora_sglang_plugin.metrics import OF_RANK, State, of_capture

if TYPE_CHECKING:
    from aurora_sglang_plugin.serve.capture import Capture
    from aurora_sglang_plugin.serve.control import Control
    from aurora_sglang_plugin.serve.swap import Reloader

log = logging.getLogger(__name__)

REFRESH_S = 1.0


class ServerMetrics:
    """Copies the counters of capture (None: off, or another rank's) and reloader to prometheus once
    a second.
    """

    def __init__(
        self,
        capture: Capture | None,
        reloader: Reloader,
        control: Control,
        tp_rank: int = 0,
        dp_rank: int = 0,
    ):
        self._capture, self._reloader, self._control = capture, reloader, control
        self._labels = {"tp_rank": str(tp_rank), "dp_rank": str(dp_rank)}
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="aurora-metrics", daemon=True)

    def start(self) -> None:
        families = dict(OF_RANK)
        if self._capture is not None:
            families |= of_capture(self._capture.num_steps)
        self._exported = Exported(families, constant=self._labels)
        self.refresh()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def refresh(self) -> None:
        """Bring every family up to date."""
        reloader, capture = self._reloader, self._capture
        link = capture.publisher.counters() if capture is not None else {}
        self._exported.report(State(self._control, reloader, reloader.counters(), capture, link))

    def _run(self) -> None:
        while not self._stop.wait(REFRESH_S):
            try:
                self.refresh()
            except Exception:
                # a full disk under the multiprocess directory must not end anything
                if not self._failed:
                    log.exception(
                        "aurora metrics failed: serving goes on, further failures are not logged"
                    )
                self._failed = True
