"""How many tokens to draft at a time: as many as commit most tokens a second, by what rounds of
this very server take and by what its draft is worth. Zero steps are plain decoding.

For each bucket of batch sizes (1, 2, 3-4, 5-8, ...) the count s with the largest A(s) / c(s) is
taken (worth.py). Acceptance is counted for the version that drafts; before it has drafted, its
gate's accept length stands for it. Costs are measured in bursts (bursts.py).

If drafting does not pay over the batch sizes of late, the server is cold: it leaves out all of the
draft's passes, also over prompts, and a round costs what it costs without speculation. A request
that ran cold has holes in its draft's KV: its acceptance never counts, and a server that leaves the
cold drafts once half of the running requests have none.

One rank decides, since clocks differ; others need its `plan` alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

from aurora_sglang_plugin.config import SpeculationConfig
from aurora_sglang_plugin.serve.bursts import EVERY, Bursts
from aurora_sglang_plugin.serve.worth import BUCKETS, COLD, SURE, Rates, bucket, candidate_steps

logger = logging.getLogger(__name__)

# share of what is remembered of use and time that is kept after EVERY rounds
REMEMBER = 1 - EVERY / 512
# rounds in the cold after which a draft is tried once more, however bad it was
RETRY = 20_000
# accept length up to which it is not even measured what drafting costs
HOPELESS = 1.1
# gain or loss up to which costs are measured twice at once
CLOSE = 0.15


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
        # decode rounds by their steps
        self.rounds: Counter[int] = Counter()
        self.rates = Rates(most)
        # request-steps that must be judged before drafting may be given up
        self.probation = 0
        self._clock = clock
        self._graph_sizes: list[int] | None = None
        # the best count of each bucket, in a server that is not cold
        self._choice = list(self.plan)
        self._met = [False] * BUCKETS
        self._bursts = Bursts(config.explore)
        # a count that seems better for the present bucket and was measured once
        self._doubted: int | None = None
        # of late: seconds of decode rounds by bucket, tokens of prompts, and of those that the
        # draft passed over, with the seconds of its passes
        self._decode_s = [0.0] * BUCKETS
        self._prompt_tokens = self._draft_tokens = self._draft_s = 0.0
        self._began: float | None = None
        self._size = self._since = self._count = 0
        # measured gain over the predicted one, of the versions before
        self._trust = 1.0
        # the round in which the server became cold
        self._cold_since = 0
        self._has_draft = has_draft

    @property
    def explored(self) -> int:
        """Decode rounds that bursts took."""
        return self._bursts.explored

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
            seconds = now - self._began
            self._bursts.round(self._size, self.steps, self._since, seconds)
            self._decode_s[bucket(self._size)] += seconds
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
        self._has_draft = True
        self.probation = 0 if self.cold else probation
        return before

    def gain(self) -> float:
        """Tokens a second over those of plain decoding, at the present batch size, as measured."""
        at = bucket(self._size)
        return 1.0 if self.cold else self._value(at, self._choice[at])

    # ---- decisions

    def decide(self) -> list[int]:
        """On the rank that decides, every 8 rounds: the plan from here on, for `apply`."""
        at = bucket(self._size)
        self._decode_s = [seconds * REMEMBER for seconds in self._decode_s]
        self._prompt_tokens *= REMEMBER
        self._draft_tokens *= REMEMBER
        self._draft_s *= REMEMBER
        self._bursts.save()
        cold = self.cold
        if self._bursts.runs:
            self._bursts.end(at)
        elif self._has_draft:
            self._choose(at)
            cold = self._is_cold()
            if cold == self.cold:
                self._explore(at)
        self._foresee()
        plan = [0] * BUCKETS if cold else list(self._choice)
        self._bursts.enter(plan)
        return [*plan, int(cold)]

    def apply(self, plan: Sequence[int]) -> bool:
        """Take a plan. Returns True if the server leaves the cold by it, or falls into it."""
        *self.plan, cold = plan
        changed = bool(cold) != self.cold
        self.cold = bool(cold)
        if changed:
            self._cold_since = self._count
            self.epoch += not self.cold
        return changed

    def _known(self) -> list[int]:
        """Buckets for which it is known what drafting costs."""
        return [at for at, cost in enumerate(self._bursts.costs) if cost.knows(self.most)]

    def _foresee(self) -> None:
        """A batch size of unknown cost has what the nearest one has whose cost is known."""
        known = self._known() or [at for at in range(BUCKETS) if self._met[at]]
        for at in set(range(BUCKETS)) - set(known):
            self._choice[at] = self._choice[min(known, key=lambda b: abs(b - at))]

    def _value(self, at: int, steps: int, errors: float = 0.0) -> float:
        """Tokens a second over those of a cold server, with the draft's passes over prompts."""
        gain = self._gain(at, steps, errors)
        decode_s = sum(self._decode_s)
        if not self._draft_tokens or not decode_s or gain <= 0:
            return gain
        # as long as decoding would have taken with these steps
        decode_s *= (1.0 if self.cold else self._gain(at, self._choice[at])) / gain
        prompts_s = self._prompt_tokens * self._draft_s / self._draft_tokens
        return gain * decode_s / (decode_s + prompts_s)

    def _gain(self, at: int, steps: int, errors: float = 0.0) -> float:
        return self.rates.length(steps, errors) / self._bursts.costs[at].of(steps)

    def _best(self, at: int, among: Sequence[int] = (), errors: float = 0.0) -> int:
        return max(among or self.candidate_steps, key=lambda steps: self._value(at, steps, errors))

    def _hopeful(self, at: int) -> bool:
        """Too few of its drafts were judged to know that it does not pay."""
        best = self._best(at, self.candidate_steps[1:], errors=-1.0)
        return self.rates.judged < SURE and self._value(at, best, errors=-1.0) > 1

    def _choose(self, at: int) -> None:
        now, cost, self._doubted = self._choice[at], self._bursts.costs[at], None
        if not self.rates.known or not cost.knows(self.most):
            return
        best = self._best(at)
        if best == 0 and (self.probation or self._hopeful(at)):
            best = self._best(at, self.candidate_steps[1:], errors=-1.0)
        lead = self._value(at, best) / self._value(at, now) - 1
        if best != now and best > 0 and cost.times(best) == 1 and lead < CLOSE:
            # one burst may have been lucky
            self._doubted = best
            return
        if best > now:
            ahead = self._value(at, best, self._errors())
            if ahead < self._value(at, now) * (1 + self.config.margin):
                return
        if best == now:
            return
        self._choice[at] = best
        logger.info(
            "draft steps requests=%d steps=%d before=%d accept_length=%.2f cost=%.2f",
            self._size, best, now, self.rates.length(best), self._bursts.costs[at].of(best),
        )  # fmt: skip

    def _is_cold(self) -> bool:
        """Whether plain decoding without a pass of the draft commits more tokens a second than the
        best counts do, over the batch sizes of late."""
        if self.cold and self._count - self._cold_since >= RETRY:
            # nothing is known of how good it is today
            self.rates = Rates(self.most)
        if not self.rates.known:
            self._choice = [steps or self.most for steps in self._choice]
            return False
        use = {at: self._decode_s[at] for at in self._known() if self._decode_s[at]}
        if not use:
            return self.cold
        if self.cold:
            best = {at: self._best(at) for at in use}
            value = self._mean_value(use, best, self._errors())
            if value < 1 + self.config.margin:
                return True
            for at, steps in best.items():
                self._choice[at] = steps
            return False
        value = self._mean_value(use, dict(enumerate(self._choice)))
        return value <= 1 and not self.probation and not any(map(self._hopeful, use))

    def _mean_value(
        self, use: dict[int, float], choice: dict[int, int], errors: float = 0.0
    ) -> float:
        """Over buckets that were used for so many seconds."""
        values = sum(use[at] * self._value(at, choice[at], errors) for at in use)
        return values / sum(use.values())

    def _errors(self) -> float:
        """Standard errors by which what was counted must be ahead; an expectation has none."""
        return 1.0 if self.rates.judged else 0.0

    def _explore(self, at: int) -> None:
        """Begin a burst if a decision needs to know what it costs, or if its turn has come."""
        cost, base = self._bursts.costs[at], COLD if self.cold else self._choice[at]
        if self.steps != base or not self._bursts.settled(self._since):
            return
        if self.cold:
            # whatever a round costs, a draft that nobody accepts cannot pay
            hopeful = self.rates.length(self.most) > HOPELESS
            wanted = self.most if hopeful and not cost.knows(self.most) else None
        else:
            wanted = self._unsure(at, base)
        if wanted is not None:
            self._bursts.begin(at, wanted, base, urgent=True)
        elif not self.cold:
            others = [steps for steps in (COLD, *self.candidate_steps) if steps != base]
            wanted = others[self.explored // EVERY % len(others)]
            self._bursts.begin(at, wanted, base, urgent=False)

    def _unsure(self, at: int, base: int) -> int | None:
        """The steps of the burst that a decision waits for: it leaves out the draft's passes, and
        tells the present count from plain decoding, or measures no steps, or the most. Each once,
        and twice where it is close."""
        cost = self._bursts.costs[at]
        for times in (1, 2):
            if cost.times(base) < times:
                return COLD
            for steps in (0, self.most):
                if cost.times(steps) < times:
                    return steps
            if not self.rates.known or abs(self._value(at, self._best(at)) - 1) > CLOSE:
                break
        return self._doubted
