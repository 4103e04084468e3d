"""How many tokens to draft at a time: as many as commit most tokens a second, by what rounds of
this very server take and by what its draft is worth. Zero steps are plain decoding.

For each bucket of batch sizes (1, 2, 3-4, 5-8, ...) the count s with the largest A(s) / c(s) is
taken (worth.py). Acceptance is counted for the version that drafts; before it has drafted, its
gate's accept length stands for it. Costs are measured in bursts of 8 rounds between rounds of the
present count: for a batch size that is new at once, later for at most `explore` of all rounds.

If no bucket in use is worth drafting, the server is cold: it leaves out all of the draft's passes,
also over prompts, and a round costs what it costs without speculation. A request that ran cold has
holes in its draft's KV: its acceptance never counts, and a server that leaves the cold drafts once
half of the running requests have none.

One rank decides, since clocks differ; others need its `plan` alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from aurora_sglang_plugin.config import SpeculationConfig
from aurora_sglang_plugin.serve.worth import (
    BUCKETS,
    COLD,
    SURE,
    Cost,
    Rates,
    bucket,
    candidate_steps,
)

logger = logging.getLogger(__name__)

# rounds between two decisions, and of a burst
EVERY = 8
# rounds after a change whose time says nothing: the launch of one overlaps the other
SETTLE = 2
# bursts for a batch size that is new, which `explore` does not bound
TRIES = 6
# share of rounds in buckets worth drafting, below which the server goes cold
WARM_SHARE = 0.05
# rounds after which a draft that was given up is tried once more
RETRY = 20_000


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


class Speculation:
    """SGLang's AdaptiveSpecPolicy, and what the worker asks. All calls are the scheduler thread's.

    `most` is --speculative-num-steps; `has_draft` False: nothing drafts before a version came.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        most: int,
        has_draft: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.config, self.most = config, most
        self.candidate_steps = candidate_steps(most)
        # by bucket, the steps of its next rounds; and whether prompts get no draft's pass either
        self.plan: list[int] = [most if has_draft else 0] * BUCKETS
        self.cold = not has_draft
        # requests whose prompt ran in an earlier one have holes in their draft's KV
        self.epoch = 0
        # steps of the round that runs
        self.steps = most if has_draft else COLD
        # decode rounds by their steps, and those of them that a burst took
        self.rounds: Counter[int] = Counter()
        self.explored = 0
        self.rates = Rates(most)
        # request-steps that must be judged before drafting may be given up
        self.probation = 0
        self._clock = clock
        self._graph_sizes: list[int] | None = None
        # what the plan is without a burst
        self._choice = list(self.plan)
        self._met = [False] * BUCKETS
        self._cost = [Cost() for _ in range(BUCKETS)]
        self._tries = [0] * BUCKETS
        # rounds of late, by bucket
        self._use = [0.0] * BUCKETS
        # of late: seconds of decode rounds, tokens of prompts, and of those that the draft passed
        # over, with the seconds of its passes
        self._decode_s = self._prompt_tokens = self._draft_tokens = self._draft_s = 0.0
        self._log: deque[_Round] = deque(maxlen=8 * EVERY)
        self._began: float | None = None
        self._size = self._since = self._count = 0
        self._burst: _Burst | None = None
        self._budget = 0.0
        # measured gain over the predicted one, of the versions before
        self._trust = 1.0
        # the round in which the present version was given up
        self._given_up: int | None = None
        self._has_draft = has_draft

    # ---- SGLang's protocol

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._graph_sizes = cuda_graph_bs

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return self._graph_sizes

    def get_steps_for_batch(self, batch_size: int) -> int:
        return max(0, self.steps)

    # ---- the worker's calls

    def begin(self, size: int, warm: int) -> bool:
        """A decode round of `size` requests begins, `warm` of which have all of their draft's KV.

        Returns True every 8 rounds: then it is time to decide."""
        now = self._clock()
        if self._began is not None:
            self._log.append(_Round(self._size, self.steps, self._since, now - self._began))
            self._decode_s += now - self._began
        self._began = now
        at = bucket(size)
        self._met[at] = True
        steps = self.plan[at]
        if self.cold:
            steps = steps or COLD
        elif steps > 0 and 2 * warm < size:
            steps = 0
        self._since = self._since + 1 if steps == self.steps else 0
        self._size, self.steps = size, steps
        self.rounds[steps] += 1
        self._use[at] += 1
        self._count += 1
        return self._count % EVERY == 0

    def begin_plain(self) -> None:
        """A decode round begins that must not draft, and says nothing of the others."""
        self.interrupted()
        self.steps, self._since = COLD if self.cold else 0, 0
        self.rounds[self.steps] += 1

    def interrupted(self) -> None:
        """Something else than a decode round runs until the next one."""
        self._began = None

    def judged(self, steps: int, accepted: Sequence[int]) -> None:
        """Drafts of the present version that were accepted, in a round of `steps` > 0."""
        self.rates.add(steps, accepted)
        self.probation = max(0, self.probation - len(accepted))

    def prefilled(self, tokens: int, draft_s: float | None) -> None:
        """Tokens of prompts, and what the draft's pass over them took; None: there was none."""
        self._prompt_tokens += tokens
        if draft_s is not None:
            self._draft_tokens += tokens
            self._draft_s += draft_s

    def expect(self, predicted: float) -> Rates:
        """What is expected of a version that its gate gave this accept length; nan: as much as of
        the present one."""
        if math.isnan(predicted):
            present = self.rates
            return Rates(self.most, present.length(self.most) if present.known else math.nan)
        return Rates(self.most, 1 + (max(1.0, predicted) - 1) * self._trust)

    def serve(self, rates: Rates, probation: int = 0) -> Rates:
        """Another version drafts; returns what is known of the one before."""
        before, self.rates = self.rates, rates
        if before.judged >= SURE and before.predicted > 1:
            gain = (before.length(self.most, prior=False) - 1) / (before.predicted - 1)
            self._trust *= min(1.25, max(0.5, gain))
            self._trust = min(1.25, max(0.1, self._trust))
        self._has_draft, self._given_up = True, None
        self.probation = 0 if self.cold else probation
        return before

    def gain(self) -> float:
        """Tokens a second over those of plain decoding, at the present batch size, as measured."""
        return self._value(bucket(self._size), self._choice[bucket(self._size)])

    # ---- decisions

    def decide(self) -> list[int]:
        """On the rank that decides, every 8 rounds: the plan from here on, for `apply`."""
        at = bucket(self._size)
        keep = 1 - EVERY / 2048
        self._use = [use * keep for use in self._use]
        self._decode_s *= keep
        self._prompt_tokens *= keep
        self._draft_tokens *= keep
        self._draft_s *= keep
        self._budget = min(self._budget + EVERY * self.config.explore, 2.0 * EVERY)
        if self._burst is not None:
            self._end_burst(at)
        elif self._has_draft:
            self._choose(at)
            self._explore(at)
        self._foresee()
        plan = list(self._choice)
        if self._burst is not None and not self._burst.ended:
            self.explored += EVERY
            plan[self._burst.bucket] = self._burst.steps
        cold = self._is_cold()
        if cold and not self.cold:
            self._given_up = self._count
        return [*plan, int(cold)]

    def apply(self, plan: Sequence[int]) -> bool:
        """Take a plan. Returns True if the server leaves the cold by it, or falls into it."""
        *self.plan, cold = plan
        changed = bool(cold) != self.cold
        self.cold = bool(cold)
        if changed and not self.cold:
            self.epoch += 1
        return changed

    def _foresee(self) -> None:
        """A batch size of unknown cost has what the nearest one has whose cost is known."""
        known = [b for b in range(BUCKETS) if self._cost[b].knows(self.most)]
        known = known or [b for b in range(BUCKETS) if self._met[b]]
        for at in set(range(BUCKETS)) - set(known):
            self._choice[at] = self._choice[min(known, key=lambda b: abs(b - at))]

    def _value(self, at: int, steps: int, errors: float = 0.0) -> float:
        """Tokens a second over those of plain decoding, with the draft's passes over prompts."""
        if steps == 0:
            return 1.0
        gain = self.rates.length(steps, errors) / self._cost[at].of(steps)
        if not self._draft_tokens or not self._decode_s:
            return gain
        # as long as decoding would have taken with these steps
        now = self._choice[at]
        gain_now = self.rates.length(now) / self._cost[at].of(now) if now else 1.0
        decode_s = self._decode_s * gain_now / gain
        prompts_s = self._prompt_tokens * self._draft_s / self._draft_tokens
        return gain * decode_s / (decode_s + prompts_s) if gain > 0 else gain

    def _choose(self, at: int) -> None:
        if self._given_up is not None:
            if self._count - self._given_up < RETRY:
                return
            # nothing is known of how good it is today
            self._given_up, self.rates = None, Rates(self.most)
            self._choice = [self.most] * BUCKETS
            return
        now, drafting = self._choice[at], self.candidate_steps[1:]
        if not self.rates.known or not self._cost[at].knows(self.most):
            return
        best = max(self.candidate_steps, key=lambda steps: self._value(at, steps))
        if best == 0 and now > 0:
            hopeful = self.rates.judged < SURE and self._value(at, now, errors=-1.0) > 1
            if self.probation or hopeful:
                best = max(drafting, key=lambda steps: self._value(at, steps))
        if best > now:
            ahead = self._value(at, best, errors=1.0)
            if ahead < self._value(at, now) * (1 + self.config.margin):
                return
        if best == now:
            return
        self._choice[at] = best
        logger.info(
            "draft steps requests=%d steps=%d before=%d accept_length=%.2f cost=%.2f",
            self._size, best, now, self.rates.length(best), self._cost[at].of(best),
        )  # fmt: skip

    def _is_cold(self) -> bool:
        worth = sum(use for use, steps in zip(self._use, self._choice) if steps)
        return worth <= WARM_SHARE * sum(self._use)

    def _explore(self, at: int) -> None:
        """Begin a burst if a decision needs to know what it costs, or if its turn has come."""
        cost, now = self._cost[at], self._choice[at]
        cold = now == 0 and self._is_cold()
        base = COLD if cold else now
        settled = self.steps == base and self._since >= SETTLE + EVERY - 1
        if not settled or cold != self.cold:
            return
        wanted = None
        if cold:
            # whatever a round costs, a draft that nobody accepts cannot pay
            hopeful = self.rates.known and self.rates.length(self.most) > 1.1
            if hopeful and self._given_up is None and not cost.knows(self.most):
                wanted = self.most
        elif not cost.knows(base):
            # the one burst that leaves out the draft's passes: what plain decoding takes
            wanted = COLD
        elif not cost.knows(0) and base > 0:
            wanted = 0
        elif not cost.knows(self.most):
            wanted = self.most
        elif self._budget >= EVERY:
            others = [steps for steps in self.candidate_steps if steps != now]
            wanted = others[self.explored // EVERY % len(others)]
        if wanted is None or (self._tries[at] >= TRIES and self._budget < EVERY):
            return
        self._tries[at] += 1
        self._budget = max(0.0, self._budget - EVERY)
        self._burst = _Burst(at, wanted, base)

    def _end_burst(self, at: int) -> None:
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
        cost = self._cost[burst.bucket]
        if burst.steps == COLD:
            cost.add(burst.base, 1 / ratio)
        elif burst.steps == 0 and cost.knows(0):
            cost.add(burst.base, cost.of(0) / ratio)
        elif cost.knows(burst.base):
            cost.add(burst.steps, ratio * cost.of(burst.base))
