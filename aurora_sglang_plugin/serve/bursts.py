"""What a round of other draft steps takes: bursts of 8 rounds between rounds of the present count.

For a batch size that is new they begin at once, later for at most a share of all rounds. Times are
compared within some tens of rounds: a round of today tells little of one of an hour ago, whose
contexts were of other lengths.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from aurora_sglang_plugin.serve.worth import BUCKETS, COLD, Cost

# rounds of a burst, and between two decisions
EVERY = 8
# rounds after a change whose time says nothing: the launch of one overlaps the other
SETTLE = 2
# bursts for a batch size that is new, which the share does not bound
TRIES = 8


@dataclass(frozen=True)
class _Round:
    size: int
    steps: int
    # rounds since the count of steps changed
    since: int
    seconds: float


@dataclass
class _Burst:
    bucket: int
    steps: int
    base: int
    ended: bool = False


class Bursts:
    """`share` of all rounds may be of bursts. `costs` are c(s) by bucket (worth.py)."""

    def __init__(self, share: float):
        self.costs = [Cost() for _ in range(BUCKETS)]
        # rounds that bursts took
        self.explored = 0
        self._share, self._saved = share, 0.0
        self._tries = [0] * BUCKETS
        self._log: deque[_Round] = deque(maxlen=8 * EVERY)
        self._burst: _Burst | None = None

    @property
    def runs(self) -> bool:
        """A burst, or the rounds of the present count behind it."""
        return self._burst is not None

    def round(self, size: int, steps: int, since: int, seconds: float) -> None:
        self._log.append(_Round(size, steps, since, seconds))

    def save(self) -> None:
        """Every 8 rounds."""
        self._saved = min(self._saved + EVERY * self._share, 2.0 * EVERY)

    def settled(self, since: int) -> bool:
        """Whether there are rounds of the present count to compare a burst with."""
        return since >= SETTLE + EVERY - 1

    def begin(self, at: int, steps: int, base: int, urgent: bool) -> None:
        """Unless it is not this batch size's turn."""
        affordable = self._saved >= EVERY
        if affordable or (urgent and self._tries[at] < TRIES):
            self._tries[at] += 1
            self._saved = max(0.0, self._saved - EVERY)
            self._burst = _Burst(at, steps, base)

    def enter(self, plan: list[int]) -> None:
        """The burst's steps instead of those of its bucket."""
        if self._burst is not None and not self._burst.ended:
            self.explored += EVERY
            plan[self._burst.bucket] = self._burst.steps

    def end(self, at: int) -> None:
        """Rounds of the present count follow the burst, then it is measured."""
        burst = self._burst
        assert burst is not None
        if at == burst.bucket and not burst.ended:
            burst.ended = True
            return
        self._burst = None
        if at == burst.bucket:
            self._measure(burst)

    def _measure(self, burst: _Burst) -> None:
        """c(s) from the burst's rounds and those before and after it."""
        settled = [r for r in self._log if r.since >= SETTLE]
        inside = [r for r in settled if r.steps == burst.steps]
        if not inside:
            return
        size = median(r.size for r in inside)
        alike = [r for r in settled if abs(r.size - size) <= 0.15 * size]
        own = [r.seconds for r in alike if r.steps == burst.steps]
        around = [r.seconds for r in alike if r.steps == burst.base]
        if min(len(own), len(around)) < 4:
            return
        ratio = median(own) / median(around)
        cost = self.costs[burst.bucket]
        if burst.steps == COLD:
            cost.add(burst.base, 1 / ratio)
        elif burst.steps == 0 and cost.knows(0):
            cost.add(burst.base, cost.of(0) / ratio)
        elif cost.knows(burst.base):
            cost.add(burst.steps, ratio * cost.of(burst.base))
