"""Is the version that was swapped in worse than the one before? Then the one before goes back.

Every tensor-parallel rank runs this test on the same integers, without communication, and comes to
the same answer at the same step.

Requests are the independent units: verify steps of one request are alike. With t_i accepted drafts
in s_i verify steps of request i, a version accepts A = sum t / sum s, with a standard error e of
sqrt(sum (t_i - A s_i)^2) / sum s. The difference of two versions, of n requests the new one, lies
within

    reach = sqrt(e_old^2 + e_new^2) sqrt((n + RHO) / n * ln((n + RHO) / (RHO error_rate^2)))

of its expectation at all n at once, but for a probability of about `error_rate` (normal mixture,
Robbins 1970; Howard et al., "Time-uniform, nonparametric, nonasymptotic confidence sequences",
2021), so that it may be looked at again and again. Where

    A_new + reach < A_old - margin

the new version is suspected. The traffic may have changed and not the draft: so the old version
goes back for a trial. If it accepts what it did before, rather than what the new one did, it stays
and the new one is rejected; else the new one comes back. Serving loses nothing by a trial.

The old version is the newest one that served 8 requests unsuspected. Only requests count that began
with the version in question: behind KV that another one wrote any version drafts worse.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from aurora_sglang_plugin.config import CanaryConfig

logger = logging.getLogger(__name__)

# rounds between two looks
LOOK = 16
# requests that are kept of a version, that a comparison needs of either, after which a version is
# done with, and after which a trial ends whatever it says
KEPT, FEWEST, DONE, LONGEST = 400, 8, 200, 96
RHO = 5.0
# standard errors by which a trial must be nearer to one answer than to the other
CLEAR = 2.0

Action = Literal["exchange", "reject"]


class Accepted:
    """What requests accepted of one version's drafts: of each request, how often it accepted n
    drafts in rounds of s draft steps."""

    def __init__(self, most: int):
        self._most = most
        # [most + 1, most + 1] numbers a request: by s, by n
        self._requests: deque[list[list[int]]] = deque(maxlen=KEPT)
        self.steps = 0

    def add(self, steps: int, accepted: Sequence[int], reqs: Sequence[Any]) -> None:
        for count, req in zip(accepted, reqs):
            owner, mine = getattr(req, "aurora_accepted", (None, None))
            if owner is not self:
                mine = [[0] * (self._most + 1) for _ in range(self._most + 1)]
                self._requests.append(mine)
                req.aurora_accepted = self, mine
            mine[steps][count] += 1
        self.steps += len(accepted)

    def __len__(self) -> int:
        return len(self._requests)

    def per_request(self, cut: int) -> np.ndarray:
        """float64 [n, 2]: verify steps of at least `cut` draft steps, and the drafts that they
        accepted, at most `cut` of each; of requests that have any."""
        counts = np.array(self._requests, np.float64).reshape(-1, self._most + 1, self._most + 1)
        by_accepted = counts[:, cut:].sum(1)
        worth = np.minimum(np.arange(self._most + 1), cut)
        found = np.stack([by_accepted.sum(1), by_accepted @ worth], 1)
        return found[found[:, 0] > 0]


class Canary:
    """`judged` is told every verify step that drafted, `let_go` and `swapped` every swap; an answer
    of `judged` asks for

    exchange  the version that drafts and the one before change places: for a trial, or back
    reject    what drafts now stays, and the other one is bad
    """

    def __init__(self, config: CanaryConfig, most: int):
        self.config, self._most = config, most
        self.suspected = self.rejected = 0
        # the version before, until the one that drafts has proved itself
        self.old: Accepted | None = None
        self.new = Accepted(most)
        # while the old version is back: what it accepts now
        self.trial: Accepted | None = None
        self._rounds = 0

    @property
    def testing(self) -> bool:
        """Whether the version that drafts is still compared with the one before."""
        return self.old is not None and self.trial is None and len(self.new) < DONE

    def let_go(self) -> bool:
        """Another version is about to draft. Returns True if then the one that drafts is what may
        be gone back to, and the older one is not from now on; False if the older one still is."""
        assert self.trial is None
        trusted = self.old is None or len(self.new) >= FEWEST
        if trusted:
            self.old = None
        return trusted

    def swapped(self, trusted: bool) -> None:
        """Another version drafts; `trusted` as `let_go` said."""
        assert self.trial is None
        if trusted:
            self.old = self.new
        self.new = Accepted(self._most)

    def forget(self) -> None:
        """There is no version to go back to."""
        self.old, self.new, self.trial = None, Accepted(self._most), None

    def judged(self, steps: int, accepted: Sequence[int], reqs: Sequence[Any]) -> Action | None:
        """Drafts that these requests accepted in a round of `steps` > 0 of the version that
        drafts."""
        if not self.config.enabled:
            return None
        (self.new if self.trial is None else self.trial).add(steps, accepted, reqs)
        self._rounds += 1
        if self._rounds % LOOK:
            return None
        if self.trial is not None:
            return self._verdict(self.trial)
        return self._suspect() if self.testing else None

    def _suspect(self) -> Action | None:
        assert self.old is not None
        cut = self._cut(self.old, self.new)
        if not cut:
            return None
        (old, old_error), (new, new_error) = (
            mean(of.per_request(cut)) for of in (self.old, self.new)
        )
        n = len(self.new)
        width = (n + RHO) / n * math.log((n + RHO) / (RHO * self.config.error_rate**2))
        reach = math.sqrt(width) * math.hypot(old_error, new_error)
        if new + reach >= old - self.config.margin:
            return None
        self.suspected += 1
        self.trial = Accepted(self._most)
        logger.warning(
            "draft suspected accepted=%.3f before=%.3f reach=%.3f steps=%d: the version before goes"
            " back for a trial",
            new, old, reach, self.new.steps,
        )  # fmt: skip
        return "exchange"

    def _verdict(self, trial: Accepted) -> Action | None:
        assert self.old is not None
        cut = self._cut(trial, self.new)
        if not cut or not self._cut(self.old, trial):
            return None
        (old, _), (new, _), (back, error) = (
            mean(of.per_request(cut)) for of in (self.old, self.new, trial)
        )
        middle = (old + new) / 2
        if abs(back - middle) < CLEAR * error and len(trial) < LONGEST:
            return None
        worse = back > middle
        logger.warning(
            "draft %s accepted=%.3f the version before=%.3f, before that=%.3f",
            "rejected" if worse else "acquitted", new, back, old,
        )  # fmt: skip
        # what either accepted before the traffic changed compares with nothing
        self.old, self.new, self.trial = trial, Accepted(self._most), None
        if not worse:
            return "exchange"
        self.rejected += 1
        self.old, self.new = None, trial
        return "reject"

    def _cut(self, one: Accepted, other: Accepted) -> int:
        """The largest count of drafts that both have enough requests of, 0 if there is none."""
        for cut in range(self._most, 0, -1):
            if min(len(of.per_request(cut)) for of in (one, other)) >= FEWEST:
                return cut
        return 0


def mean(per_request: np.ndarray) -> tuple[float, float]:
    """(accepted drafts a verify step, its standard error) of steps and drafts [n, 2], n > 1."""
    steps, drafts = per_request.sum(0)
    ratio = drafts / steps
    residuals = per_request[:, 1] - ratio * per_request[:, 0]
    n = len(per_request)
    # few requests may look alike by chance
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / steps * (1 + 1 / n)
    return float(ratio), error
