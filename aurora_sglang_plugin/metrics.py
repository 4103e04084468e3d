"""The server's figures in SGLang's own /metrics (`--enable-metrics`), refreshed from the ledger by
a thread of its own.

SGLang gathers the metrics of its processes through prometheus_client's multiprocess directory,
which it names in the environment before it starts them: hence the late import in
metric_families.py, and nothing else to set up here. Scheduler and publisher only count in plain
attributes, as they do without metrics.

Every series has the labels tp_rank and dp_rank of its scheduler. Each tensor-parallel rank exports
what each rank does (attached, version, swaps); capture is rank 0's alone, so its sums count nothing
twice. docs/metrics.md explains all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aurora_sglang_plugin.link.reasons import DROPS, REFUSED_BY_TRAINER, REFUSED_WEIGHTS
from aurora_sglang_plugin.link.rows import CAUSES as ROW_CAUSES
from aurora_sglang_plugin.metric_families import Exported, Family, counter, gauge, histogram
from aurora_sglang_plugin.serve.acceptance import ROLES, accepted, mean_length
from aurora_sglang_plugin.serve.capture import KINDS, SECONDS
from aurora_sglang_plugin.serve.excluded import CAUSES
from aurora_sglang_plugin.serve.swap import FRESHNESS_S, STALL_S, SWAP_S

if TYPE_CHECKING:
    from aurora_sglang_plugin.serve.capture import Capture
    from aurora_sglang_plugin.serve.excluded import CAUSES
from aurora_sglang_plugin.serve.swap import Reloader

log = logging.getLogger(__name__)

REFRESH_S = 1.0
MODES = ("live", "shadow")
# Of every tensor-parallel rank.
OF_RANK: dict[str, Family] = {
    "aurora_attached": gauge("1 where AURORA runs in this scheduler process"),
    "aurora_mode": gauge(
        "1 for the present mode: live drafts, shadow only collects and follows", mode=MODES
    ),
    "aurora_draft_version": gauge(
        "Version of the draft's weights that drafts now, 0: those the server started with"
    ),
    "aurora_weights_age_seconds": gauge(
        "Time since the weights that draft now were published, or the server started"
    ),
    "aurora_swaps": counter("Swaps of the draft's weights, rollbacks included"),
    "aurora_prefix_renewals": counter(
        "Times that cached prefixes were given up because the draft had learned much since"
    ),
    "aurora_swap_stall_seconds": histogram(
        "Time that the scheduler's thread spent on a swap", STALL_S
    ),
    "aurora_swap_seconds": histogram(
        "Time from noticing a new version to drafting with it", SWAP_S
    ),
    "aurora_freshness_seconds": histogram(
        "At each swap: age of the newest verify step that the new weights were trained on",
        FRESHNESS_S,
    ),
    "aurora_target_changes": counter("Operator's calls that gave the server another target"),
    "aurora_weights_refused": counter(
        "Published versions that were not loaded, or not swapped in", cause=REFUSED_WEIGHTS
    ),
}


def of_capture(num_steps: int) -> dict[str, Family]:
    """Of the first tensor-parallel rank, which captures; trees have `num_steps` levels."""
    positions = [str(position) for position in range(1, num_steps + 1)]
    return {
        "aurora_captured_messages": counter("Messages captured: sent, dropped or still queued"),
        "aurora_sent_messages": counter("Captured messages sent to the trainer"),
        "aurora_sent_bytes": counter("Bytes sent to the trainer, heartbeats included"),
        "aurora_dropped_messages": counter("Captured messages dropped, never sent", cause=DROPS),
        "aurora_excluded_rows": counter(
            "Requests left out of a captured message: unfit to be used", cause=ROW_CAUSES
        ),
        "aurora_queued_messages": gauge("Captured messages that wait for the trainer"),
        "aurora_queued_bytes": gauge("Memory of the captured messages that wait for the trainer"),
        "aurora_link_blocked_seconds": gauge(
            "Time since the link to the trainer took a message or a heartbeat"
        ),
        "aurora_link_refused": counter(
            "Attempts to connect that failed at the trainer's handshake", cause=REFUSED_BY_TRAINER
        ),
        "aurora_capture_seconds": histogram(
            "Time that the scheduler's thread spent on capturing a message", SECONDS, kind=KINDS
        ),
        "aurora_capture_errors": counter("Steps whose capture failed; they were served as usual"),
        "aurora_excluded_requests": counter("Requests that are not captured, by why", cause=CAUSES),
        "aurora_skipped_prompt_tokens": counter(
            "Prompt tokens left out by plugin.capture.max_prompt_features"
        ),
        "aurora_accept_length_tokens": histogram(
            "Tokens committed by a verify step of a captured request, bonus included",
            range(1, num_steps + 2),
        ),
        "aurora_accepted_drafts": counter(
            "Draft tokens accepted, by position in the draft", position=positions
        ),
        "aurora_version_accept_length_tokens": gauge(
            "Mean accept length of all steps drafted by the current and by the previous version",
            role=ROLES,
        ),
        "aurora_version_acceptance_ratio": gauge(
            "Share of the version's verify steps that accepted this position",
            role=ROLES,
            position=positions,
        ),
        "aurora_version_verify_steps": gauge(
            "Verify steps that the two figures above rest on", role=ROLES
        ),
    }


class ServerMetrics:
    """Copies the counters of capture (None: off, or another rank's) and reloader to prometheus once
    a second.
    """

    def __init__(
        self,
        capture: Capture | None,
        reloader: Reloader,
        mode: Callable[[], str] = lambda: "live",
        tp_rank: int = 0,
        dp_rank: int = 0,
    ):
        self._capture, self._reloader, self._mode = capture, reloader, mode
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
        self._refresh_rank()
        if self._capture is not None:
            self._refresh_link()
            self._refresh_acceptance()

    def _refresh_rank(self) -> None:
        exported, reloader = self._exported, self._reloader
        swaps = reloader.counters()
        exported.set("aurora_attached", 1)
        mode = self._mode()
        for name in MODES:
            exported.set("aurora_mode", name == mode, name)
        exported.set("aurora_draft_version", swaps["draft_version"])
        exported.set("aurora_weights_age_seconds", max(0.0, time.time() - reloader.created_unix_s))
        exported.count_to("aurora_swaps", swaps["swaps"])
        exported.load("aurora_swap_stall_seconds", reloader.stalls)
        exported.load("aurora_swap_seconds", reloader.durations)
        exported.load("aurora_freshness_seconds", reloader.freshness)
        exported.count_to("aurora_target_changes", swaps["target_changes"])
        exported.count_to("aurora_prefix_renewals", swaps["prefix_renewals"])
        refused = {
            n.removeprefix("refused_"): count
            for n, count in swaps.items()
            if n.startswith("refused_")
        }
        exported.count_to("aurora_weights_refused", refused)

    def _refresh_link(self) -> None:
        exported, capture = self._exported, self._capture
        ledger = capture.publisher.counters()
        exported.count_to("aurora_captured_messages", ledger["captured"])
        exported.count_to("aurora_sent_messages", ledger["sent"])
        exported.count_to("aurora_sent_bytes", ledger["bytes_sent"])
        exported.count_to("aurora_dropped_messages", ledger["dropped"])
        exported.count_to("aurora_excluded_rows", ledger["excluded"])
        exported.set("aurora_queued_messages", ledger["queued"])
        exported.set("aurora_queued_bytes", ledger["queued_bytes"])
        exported.set("aurora_link_blocked_seconds", ledger["blocked_s"])
        exported.count_to("aurora_link_refused", ledger["refused"])
        for kind, tally in capture.seconds.items():
            exported.load("aurora_capture_seconds", tally, kind)
        exported.count_to("aurora_capture_errors", capture.errors)
        exported.count_to("aurora_excluded_requests", dict(capture.excluded))
        exported.count_to("aurora_skipped_prompt_tokens", capture.prompt_tokens_skipped)

    def _refresh_acceptance(self) -> None:
        exported, acceptance = self._exported, self._capture.acceptance
        exported.load("aurora_accept_length_tokens", acceptance.lengths())
        by_position = {str(n): count for n, count in enumerate(accepted(acceptance.by_length), 1)}
        exported.count_to("aurora_accepted_drafts", by_position)
        for role, by_length in acceptance.of_role.items():
            steps = sum(by_length)
            exported.set("aurora_version_verify_steps", steps, role)
            exported.set("aurora_version_accept_length_tokens", mean_length(by_length), role)
            for position, count in enumerate(accepted(by_length), 1):
                exported.set(
                    "aurora_version_acceptance_ratio",
                    count / steps if steps else 0.0,
                    role,
                    str(position),
                )

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
