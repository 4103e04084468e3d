"""The one home of the rule for faults from outside: of a disk that is full, read-only or gone, of a
device without memory.

They end nothing. They are counted, logged once for each episode, and the job is tried again later,
ever less often.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0


class Retry:
    """One kind of job, by name.

    `faults` is how often it failed; `now_s` any clock that goes forward.
    """

    def __init__(
        self, name: str, first_wait_s: float = FIRST_WAIT_S, longest_wait_s: float = LONGEST_WAIT_S
    ):
        self.name = name
        self.faults = 0
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._wait_s = 0.0
        self._next_s = 0.0

    def due(self, now_s: float) -> bool:
        """Whether the last try failed, and it is time for the next one."""
        return self._wait_s > 0 and now_s >= self._next_s

    def waits(self, now_s: float) -> bool:
        """Whether the last try failed, and the next one is still to come."""
        return self._wait_s > 0 and now_s < self._next_s

    def run(self, job: Callable[[], Any], now_s: float, at_once: bool = False) -> bool:
        """Do the job, unless it must wait (`at_once`: even then). True if it was done."""
        if self.waits(now_s) and not at_once:
            return False
        try:
            job()
        except Exception as error:
            # whatever it is, the loop around this job is worth going on with
            self.failed(error, now_s)
            return False
        self.succeeded()
        return True

    def succeeded(self) -> None:
        """The job, which was done elsewhere, went well."""
        if self._wait_s:
            log.info("%s works again faults=%d", self.name, self.faults)
            self._wait_s = 0.0

    def failed(self, error: BaseException, now_s: float) -> None:
        """The job, which was done elsewhere, raised."""
        self.faults += 1
        if not self._wait_s:
            log.error(
                "%s failed, going on and trying again (counted, logged once) error=%s",
                self.name, error, exc_info=None if isinstance(error, OSError) else error,
            )  # fmt: skip
        self._wait_s = min(self._longest_wait_s, 2 * self._wait_s or self._first_wait_s)
        self._next_s = now_s + self._wait_s
