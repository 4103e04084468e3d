"""What drafting is worth: how many tokens a round of some draft steps commits, and what it costs.

A(s)   tokens that a round of s draft steps commits for a request: 1 + r1 + r1 r2 + ...
c(s)   time of such a round over that of a plain one, at the same number of requests
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

# steps of a round that leaves out the draft's passes as well
COLD = -1
# measurements of a cost that are kept, and request-steps after which rates halve their past
KEEP, HALVE_AT = 5, 4096
# Request-steps that what is expected of a version counts for, that an unknown draft is watched for,
# and that a draft which may be worth something is, before it is given up.
PRIOR, ENOUGH, SURE = 64, 32, 256
BUCKETS = 16


def bucket(batch_size: int) -> int:
    """0 for 1 request, 1 for 2, 2 for 3 and 4, 3 for 5 to 8, ..."""
    return min(BUCKETS - 1, max(0, batch_size - 1).bit_length())


def candidate_steps(most: int) -> list[int]:
    """The counts that are tried: all up to 4, then every second one, and the most."""
    return sorted({*range(min(most, 4) + 1), *range(6, most, 2), most})


class Rates:
    """Rates r_d of one version: `reached[d]` request-steps came to position d + 1, `kept[d]`
    accepted it. `predicted` is the accept length of all steps that it is expected to have, and
    counts like PRIOR request-steps of equal rates; nan: nothing is expected."""

    def __init__(self, steps: int, predicted: float = math.nan):
        self.reached, self.kept = [0.0] * steps, [0.0] * steps
        self.predicted = predicted
        # request-steps counted
        self.judged = 0
        self._rate = math.nan if math.isnan(predicted) else _equal_rate(steps, predicted)

    @property
    def known(self) -> bool:
        return self.judged >= ENOUGH or not math.isnan(self._rate)

    def add(self, steps: int, accepted: Sequence[int]) -> None:
        """Request-steps of a round that drafted `steps` tokens each."""
        self.judged += len(accepted)
        for d in range(steps):
            self.reached[d] += sum(n >= d for n in accepted)
            self.kept[d] += sum(n > d for n in accepted)
        if self.reached[0] > HALVE_AT:
            self.reached = [n / 2 for n in self.reached]
            self.kept = [n / 2 for n in self.kept]

    def length(self, steps: int, errors: float = 0.0, prior: bool = True) -> float:
        """A(steps), with each rate lowered by so many standard errors (raised, if negative);
        `prior` False: as counted, without what was expected."""
        length = product = 1.0
        rate = 0.0
        for d in range(steps):
            reached, kept = self.reached[d], self.kept[d]
            if prior and not math.isnan(self._rate):
                expected = PRIOR * self._rate**d
                reached, kept = reached + expected, kept + expected * self._rate
            # a position that no round came to is as good as the one before
            if reached >= 1:
                rate = kept / reached
                rate -= errors * math.sqrt(max(rate * (1 - rate), 0.25 / reached) / reached)
            product *= min(1.0, max(0.0, rate))
            length += product
        return length


def _equal_rate(steps: int, length: float) -> float:
    """The rate that gives `length` tokens a round if every position has it."""
    low, high = 0.0, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        short = sum(rate**d for d in range(steps + 1)) < length
        low, high = (rate, high) if short else (low, rate)
    return low


@dataclass
class Cost:
    """c(s) of one bucket: measured ratios, newest last; COLD is 1 by definition."""

    measured: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, steps: int, ratio: float) -> None:
        self.measured.setdefault(steps, deque(maxlen=KEEP)).append(ratio)

    def knows(self, steps: int) -> bool:
        return steps == COLD or steps in self.measured

    def times(self, steps: int) -> int:
        """How often it was measured, of late."""
        return len(self.measured.get(steps, ()))

    def of(self, steps: int) -> float:
        """Measured, or on the line through what was measured beside it; nan if nothing was. No
        round costs less than one that leaves out the draft's passes."""
        if steps == COLD:
            return 1.0
        # a plain round that keeps the draft's KV costs next to nothing more
        measured = {s: max(1.0, median(ratios)) for s, ratios in self.measured.items()}
        points = {0: 1.0} | measured
        if steps in points:
            return points[steps]
        if len(points) < 2:
            return math.nan
        known = sorted(points)
        above = next((s for s in known if s > steps), known[-1])
        below = known[known.index(above) - 1]
        slope = (points[above] - points[below]) / (above - below)
        return points[below] + slope * (steps - below)
