"""What the samples that come say of the served draft, before anything was trained on them: that
traffic changed, that the initial draft suits it better, that training gains nothing any more.

Each sample, a request or a part of a long one, is walked when it comes (accept_length.py), with the
served draft and the initial one. Its accept length x is its tokens over its steps.

**Traffic changed.** A CUSUM of what the served draft accepts (Page, 1954), of x against its own
running mean m and standard deviation s of about BASE samples:

    S = max(0, S + min(CLIP, (m - x) / s) - SLACK),   alarm where S > `limit`

SLACK 0.5 looks for a fall of one standard deviation (Montgomery, Statistical Quality Control,
"Tabular CUSUM": half of the shift that matters). At a limit of 8 normal x give a false alarm in
some 20,000 samples, and a real model's, which are skew and cannot fall below 1, in more than
100,000; a fall by two standard deviations is seen in 5 to 8 samples, by one in some 16
(tests/trainer/learn/test_drift.py). What rises is no alarm: nothing is lost by it. A worse version
looks the same as worse traffic; what follows is right for both. The change began where S was last
0.

**The initial draft is ahead.** Paired differences of the last samples, all of them walked with the
draft that is served now: at most RECENT, at least AT_ONCE, and their mean above BOUND errors.
After an alarm those since the change, at least SOON, and one standard error, as the gate asks of
any draft: a test that could see 0.05 tokens would need hundreds of samples, so both are in doubt
for a while, and the wrong one of two that are alike costs nothing.

**Training rests** where the mean x of the last `rest_samples` is not above that of as many before
by a standard error, and works again where it is by two, or at an alarm. A draft that accepts less
than BEGUN has not begun to learn, and does not rest. A log-like curve, as the reference's (+0.2 at
each doubling of samples), comes to that after 1,000 to 2,000 samples.

Plain numbers: what is walked and what follows is for learn/arrivals.py to see to.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import Section
from aurora_trainer.learn.accept_length import accept_length, difference
from aurora_trainer.learn.gate import Decision

log = logging.getLogger(__name__)

# samples that the running mean is over, and those before which nothing is an alarm
BASE, WARM = 128, 24
SLACK, CLIP = 0.5, 3.0
# of a standard deviation: a draft that accepts nothing has none
LEAST_SPREAD = 0.05
# a sample of fewer verify steps says nothing
LEAST_STEPS = 4
RECENT, AT_ONCE, SOON = 24, 8, 4
# standard errors. A look at each sample: of equal drafts the initial one is called ahead some 12
# times in 1,000 samples, of one that is worse by 0.05 three times, by 0.1 once
BOUND = 1.28
BEGUN = 1.2
REST_BELOW, WAKE_ABOVE = 1.0, 2.0

# steps, tokens
Walked = tuple[float, float]
# number of the sample, walk with the served draft, walk with the initial one
Pair = tuple[int, Walked, Walked]


class DriftConfig(Section):
    """What is made of what the draft accepts of samples that just came. Off where the gate is."""

    # false: nobody looks at them before a version is offered
    enabled: bool = True
    # of the CUSUM that says that traffic changed, in standard deviations of a sample; 8: one false
    # alarm in some 20,000 samples
    limit: Annotated[float, Field(gt=0)] = 8.0
    # training rests if the served draft accepts no more of so many samples than of as many before;
    # 0: it never rests
    rest_samples: Annotated[int, Field(ge=0)] = 192
    # while it rests: factor on pace.new_positions_per_step, as far as a batch takes what is new
    rest_factor: PositiveInt = 4


@dataclass(frozen=True)
class Event:
    """`kind`: changed, initial, rests or works; `since`: number of the first sample of it."""

    kind: str
    since: int


class Drift:
    """State of the three tests. Numbers of samples rise, and need not be without gaps."""

    def __init__(self, config: DriftConfig):
        self.config = config
        self.changes: Counter[str] = Counter()
        self.samples = 0
        # number of the sample at the last alarm
        self.changed_at: int | None = None
        self.resting = False
        self.sum = 0.0
        self._since = 0
        self._count, self._mean, self._variance = 0, 0.0, 0.0
        # walked with the draft that is served now
        self._pairs: deque[Pair] = deque(maxlen=RECENT)
        # samples since the change for which it is fresh, and where it began
        self._fresh, self._fresh_since = 0, 0
        # the initial draft was said to be ahead of the draft that is served now
        self._said = False
        self._lengths: list[float] = []

    def add(
        self, number: int, served: Walked, initial: Walked | None, waits: bool = False
    ) -> list[Event]:
        """A sample that just came; `initial` None: that draft is served, or never may be. `waits`:
        it is served, and what is trained waits to be ahead of it: that is no reason to rest."""
        self.samples += 1
        if served[0] < LEAST_STEPS:
            return []
        events, x = [], served[1] / served[0]
        if initial is not None:
            self._pairs.append((number, served, initial))
        self._fresh = max(0, self._fresh - 1)
        if self._fell(number, x):
            self._change("accept_length", number, self._since)
            events.append(Event("changed", self._since))
            self._fresh, self._fresh_since = RECENT, self._since
            self.begin()
        if self.config.rest_samples and not waits:
            self._lengths.append(x)
            events += self._rest(number)
        if not self._said and (ahead := self.ahead()) is not None:
            self._said, since = True, self._pairs[-ahead.requests][0]
            events.append(Event("initial", since))
            if not self._fresh:
                self._change("initial", number, since)
                events += self._work(number)
        return events

    def ahead(self) -> Decision | None:
        """What says that the initial draft is ahead of the served one, if it is."""
        pairs = list(self._pairs)
        if not self._fresh:
            return _ahead(pairs, AT_ONCE, BOUND)
        # the change is dated to a few samples, and some before it may be among them
        since = [pair for pair in pairs if pair[0] >= self._fresh_since]
        return _ahead(since, SOON, 1.0) or _ahead(since[-AT_ONCE:], SOON, 1.0)

    def serve(self) -> None:
        """Another draft is served from now on."""
        self._pairs.clear()
        self._said = False

    def state(self) -> dict[str, Any]:
        """JSON, for a resume checkpoint."""
        names = "samples changed_at resting sum _since _count _mean _variance _fresh _fresh_since"
        state = {name: getattr(self, name) for name in [*names.split(), "_said"]}
        return state | {
            "changes": dict(self.changes),
            "_pairs": list(self._pairs),
            "_lengths": list(self._lengths),
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name in ("_pairs", "_lengths"):
                getattr(self, name).extend(value)
            else:
                setattr(self, name, Counter(value) if name == "changes" else value)

    def _fell(self, number: int, x: float) -> bool:
        """Whether traffic changed, with this sample in it."""
        if self._count >= WARM:
            spread = max(math.sqrt(self._variance), LEAST_SPREAD)
            if self.sum == 0:
                self._since = number
            self.sum = max(0.0, self.sum + min(CLIP, (self._mean - x) / spread) - SLACK)
        self._count += 1
        weight, off = max(1 / self._count, 1 / BASE), x - self._mean
        self._mean += weight * off
        self._variance = (1 - weight) * (self._variance + weight * off * off)
        return self.sum > self.config.limit

    def begin(self) -> None:
        """What was learned until now is of other traffic, or of a draft that servers gave up."""
        self.sum, self._count, self._mean, self._variance = 0.0, 0, 0.0, 0.0
        self._said = False

    def _change(self, cause: str, number: int, since: int) -> None:
        self.changes[cause] += 1
        self.changed_at = number
        log.warning("traffic changed cause=%s sample=%d since=%d", cause, number, since)

    def _rest(self, number: int) -> list[Event]:
        half = self.config.rest_samples
        # an alarm of this very sample, or a rollback before it
        if self._count == 0 or (self.resting and self._count == 1):
            return self._work(number)
        if len(self._lengths) < 2 * half:
            return []
        before, now = np.split(np.array(self._lengths), 2)
        # the next look is half of it later: each sample is in two looks, not in hundreds
        del self._lengths[:half]
        gain, stderr = now.mean() - before.mean(), math.hypot(now.std(), before.std()) / half**0.5
        if self.resting and gain > WAKE_ABOVE * stderr:
            log.info("training works again gain=%.3f stderr=%.3f", gain, stderr)
            return self._work(number)
        if not self.resting and gain <= REST_BELOW * stderr and now.mean() >= BEGUN:
            self.resting = True
            log.info(
                "training rests, nothing gained in samples=%d gain=%.3f stderr=%.3f",
                half, gain, stderr,
            )  # fmt: skip
            return [Event("rests", number)]
        return []

    def _work(self, number: int) -> list[Event]:
        """At full pace, for two stretches of samples at least."""
        self._lengths.clear()
        rested, self.resting = self.resting, False
        return [Event("works", number)] if rested else []


def _ahead(pairs: list[Pair], least: int, bound: float) -> Decision | None:
    """What says that the initial draft is ahead by so many standard errors, of at least so many."""
    if len(pairs) < least:
        return None
    served, initial = (np.array([pair[at] for pair in pairs]) for at in (1, 2))
    mean, stderr = difference(initial, served)
    # Student's t, to its first order
    bound += (bound**3 + bound) / (4 * (len(pairs) - 1))
    if not mean > bound * stderr:
        return None
    return Decision(
        "initial",
        "initial",
        len(pairs),
        served=accept_length(served),
        initial=accept_length(initial),
        stderr=stderr,
    )
