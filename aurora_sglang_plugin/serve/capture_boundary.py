"""The boundary of what capture does on the scheduler's thread: timed, and never raising into
serving. What fails again and again rests, and tries again later.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from aurora_sglang_plugin.metric_families import Tally

logger = logging.getLogger(__name__)

# buckets
SECONDS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
# Failures of a part, without success, after which capture rests, how long at first, and at most.
FAILURES, REST_S, LONGEST_REST_S = 3, 60.0, 3600.0


class Boundary:
    """One of the two serving boundaries (style rule 10); used by the scheduler's thread alone.

    A part of a message is run inside `of(what)`, and calls `worked(what)` once it did something: a
    step that had nothing to do proves nothing. `kinds` end a message: what its parts took is
    observed then. What fails FAILURES times without having worked makes capture rest.
    """

    def __init__(self, kinds: Sequence[str], clock: Callable[[], float] = time.monotonic):
        # for each message
        self.seconds = {kind: Tally(SECONDS) for kind in kinds}
        self.errors = 0
        self._clock = clock
        # of the message that is being made
        self._spent_s = 0.0
        # by what failed, since it last worked
        self._failures: Counter[str] = Counter()
        self._rests_until: float | None = None
        self._rest_s = 0.0

    @property
    def resting(self) -> bool:
        """It failed several times in a row, and tries again later."""
        return self._rests_until is not None and self._clock() < self._rests_until

    def begin(self) -> None:
        """Another message: forget what an earlier one, which was not ended, had taken."""
        self._spent_s = 0.0

    def worked(self, what: str) -> None:
        """A part did what it is for."""
        if self._failures.pop(what, 0) and not self._failures:
            self._rest_s = 0.0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Time what is inside; count its failures, log the first, let serving go on."""
        start = time.perf_counter()
        try:
            yield
        except Exception:
            self._failed(what)
        self._spent_s += time.perf_counter() - start
        if what in self.seconds:
            self.seconds[what].observe(self._spent_s)
            self._spent_s = 0.0

    def _failed(self, what: str) -> None:
        self.errors += 1
        self._failures[what] += 1
        if self.errors == 1:
            logger.exception(
                "aurora capture failed what=%s: serving goes on, further failures are counted", what
            )
        if self._failures[what] >= FAILURES and not self.resting:
            self._rest_s = min(2 * self._rest_s or REST_S, LONGEST_REST_S)
            self._rests_until = self._clock() + self._rest_s
            logger.error(
                "aurora capture rests for %.0f s: %s failed %d times and did not work in between",
                self._rest_s, what, self._failures[what], exc_info=True,
            )  # fmt: skip
