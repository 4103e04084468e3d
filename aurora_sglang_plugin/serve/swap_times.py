"""What swaps take: of the device, from noticing a version, and from the traffic that taught it."""

from __future__ import annotations

import time

from aurora_sglang_plugin.metric_families import Tally
from aurora_sglang_plugin.serve.stopwatch import Stopwatch
from aurora_sglang_plugin.weights.manifest import Manifest

# buckets, in seconds
STALL_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
SWAP_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
FRESHNESS_S = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


class SwapTimes:
    """`stopwatch` times the copies into the draft that is served."""

    def __init__(self, stopwatch: Stopwatch):
        self._stopwatch = stopwatch
        # of the copies, on the device; `observe` asks what is done
        self.stalls = Tally(STALL_S)
        # from noticing a version to drafting with it
        self.durations = Tally(SWAP_S)
        # from the capture of the newest step that it was trained on
        self.freshness = Tally(FRESHNESS_S)

    def observe(self) -> None:
        """Once a step: waits for nothing."""
        for _, seconds in self._stopwatch.finished():
            self.stalls.observe(seconds)

    def served(self, manifest: Manifest, noticed_at: float) -> None:
        """A version that was noticed then (monotonic) drafts now."""
        took_s = time.monotonic() - noticed_at
        self.durations.observe(took_s)
        # by the trainer's clock, and this one's only for what took place here
        if manifest.trained_until_ns:
            trained_s = manifest.created_unix_s - manifest.trained_until_ns / 1e9
            self.freshness.observe(max(0.0, trained_s + took_s))
