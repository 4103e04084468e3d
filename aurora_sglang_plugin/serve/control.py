"""What the server decides about its draft while it serves: how many tokens to draft, and whether
the version that was swapped in may stay.

    begin     before each round            how many steps it drafts (speculation.py)
    verified  after the target's verify    remembers what the round was
    judged    once its result is on the    acceptance of the version, and of the request-steps that
              host, some rounds later      count; may ask for an exchange of versions (canary.py)
    step      between verify and the       carries the exchange out, on every rank at the same step
              draft's extend

All calls are the scheduler thread's.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aurora_sglang_plugin.config import PluginConfig
from aurora_sglang_plugin.serve.audit import Audit, is_audit
from aurora_sglang_plugin.serve.canary import Canary
from aurora_sglang_plugin.serve.rank_agreement import Agreement
from aurora_sglang_plugin.serve.speculation import Speculation
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.serve.worth import BUCKETS, COLD, Rates
from aurora_sglang_plugin.weights.manifest import Manifest

logger = logging.getLogger(__name__)

# request-steps that a new version drafts at least, however little it accepts: the canary needs them
PROBATION = 2048
# decode rounds after which a trial without an answer ends: versions wait for it
LONGEST_TRIAL = 4096
# rounds whose results are not on the host yet
IN_FLIGHT = 16


@dataclass(frozen=True)
class _Verified:
    # swaps and exchanges before its trees were drawn
    drawn_after: int
    steps: int
    reqs: list[Any]
    # which of them have all of their draft's KV; None: all
    warm: list[bool] | None


class Control:
    """`speculation` is None if the step count is fixed: by the configuration, for trees, or because
    SGLang cannot change it."""

    def __init__(
        self,
        config: PluginConfig,
        most: int,
        reloader: Reloader,
        speculation: Speculation | None,
        decides: bool = True,
    ):
        self.most, self.reloader, self.speculation = most, reloader, speculation
        self.canary = Canary(config.canary, most)
        self._decides = decides
        self._in_flight: deque[_Verified] = deque(maxlen=IN_FLIGHT)
        self._changes = 0
        # if the step count is fixed
        self._rounds: Counter[int] = Counter()
        self._exchange = False
        self._trial_rounds = 0
        # what is known of the version that could be gone back to
        self._other_rates: Rates | None = None
        # on the rank that audits
        self.audit: Audit | None = None
        # a request that is decoded again runs
        self._auditing = False
        reloader.control = self

    @property
    def mode(self) -> str:
        """live, warm (plain decoding, the draft's KV is written) or cold (no pass of the draft)."""
        if self.speculation is None:
            return "live" if self.most else "warm"
        return "cold" if self.speculation.cold else "live" if self.speculation.steps else "warm"

    def rounds(self) -> dict[str, int]:
        """Decode rounds by their draft steps, as aurora_decode_rounds_total names them."""
        rounds = self._rounds if self.speculation is None else self.speculation.rounds
        return {
            "cold" if steps == COLD else str(steps): count for steps, count in dict(rounds).items()
        }

    # ---- the worker's calls

    def begin(self, reqs: Sequence[Any]) -> None:
        """A decode round of these requests."""
        if self.speculation is None:
            self._rounds[self.most] += 1
            return
        if self.audit is not None:
            self.audit.round_at = time.monotonic()
        if self._auditing and self._alone(reqs):
            self.speculation.begin_plain()
            return
        warm = self._warm(reqs)
        due = self.speculation.begin(len(reqs), len(reqs) if warm is None else sum(warm))
        if due and self.reloader.agreement is None:
            self.take(self.speculation.decide())

    def prefill(self, reqs: Sequence[Any]) -> None:
        """A prefill of these requests, or of some of their chunks, runs next."""
        for req in reqs:
            if not hasattr(req, "aurora_since"):
                req.aurora_since = self._changes
        self._auditing = self._auditing or any(map(is_audit, reqs))
        if self.audit is not None:
            self.audit.round_at = time.monotonic()
        if self.speculation is None:
            return
        self.speculation.interrupted()
        for req in reqs:
            if self.speculation.cold:
                req.aurora_epoch = -1
            elif not hasattr(req, "aurora_epoch"):
                req.aurora_epoch = self.speculation.epoch

    def idle(self) -> None:
        if self.speculation is not None:
            self.speculation.interrupted()

    def verified(self, reqs: Sequence[Any], steps: int) -> None:
        """The round that `begin` began was queued; before `step`."""
        self._in_flight.append(_Verified(self._changes, steps, list(reqs), self._warm(reqs)))
        self._trial_rounds = self._trial_rounds + 1 if self.canary.trial is not None else 0
        rests = self.speculation is not None and self.speculation.cold
        if self._trial_rounds > LONGEST_TRIAL or (self._trial_rounds and rests):
            # Nothing drafts, or hardly anybody asks: what drafts now stays, and nobody is rejected.
            self.canary.forget()
            logger.warning("draft trial ended without an answer version=%d", self.reloader.version)

    def judged(self, accepted: list[int], size: int) -> None:
        """The oldest round in flight: how many drafts each of its requests accepted."""
        while self._in_flight:
            round_ = self._in_flight.popleft()
            if len(round_.reqs) == size == len(accepted):
                break
        else:
            return
        if round_.steps <= 0 or round_.drawn_after != self._changes:
            return
        reqs = round_.reqs
        if round_.warm is not None:
            kept = [n for n, warm in enumerate(round_.warm) if warm]
            accepted, reqs = [accepted[n] for n in kept], [reqs[n] for n in kept]
        if not accepted:
            return
        if self.speculation is not None:
            self.speculation.judged(round_.steps, accepted)
        # A version drafts badly behind KV that another one wrote, whichever of them is bad.
        own = [n for n, req in enumerate(reqs) if req.aurora_since == self._changes]
        action = self.canary.judged(
            round_.steps, [accepted[n] for n in own], [reqs[n] for n in own]
        )
        if action == "exchange":
            self._exchange = True
        elif action == "reject":
            self.reloader.reject()
            # there is nothing to go back to until the next version
            self._other_rates = None

    def step(self) -> None:
        """Between verify and the draft's extend, on every rank."""
        if self._exchange:
            self._exchange = False
            self.reloader.exchange()
            # the trial is of what it drafts behind its own KV
            self.reloader.renewal.renew()
            self._changes += 1
            if self.speculation is not None and self._other_rates is not None:
                self._other_rates = self.speculation.serve(self._other_rates, self._probation())

    # ---- the reloader's calls

    @property
    def holds(self) -> bool:
        """No version may be swapped in: the trial of another one runs."""
        return self.canary.trial is not None or self._exchange

    def let_go(self) -> bool:
        """A version is about to be swapped in, and nothing `holds`. Returns whether what drafts
        replaces what would be gone back to, and nothing is gone back to until then."""
        return self.canary.let_go()

    def swapped(self, manifest: Manifest, first: bool, trusted: bool) -> None:
        """`manifest`'s version drafts from now on; `first`: nothing drafted before; `trusted` as
        `let_go` said."""
        self._changes += 1
        self.canary.swapped(trusted)
        if first:
            self.canary.forget()
        if self.speculation is not None:
            length = manifest.gate.get(
                "initial" if manifest.gate.get("reason") == "initial" else "candidate"
            )
            expected = self.speculation.expect(
                float(length) if isinstance(length, (int, float)) else float("nan")
            )
            before = self.speculation.serve(expected, self._probation())
            if trusted:
                self._other_rates = before

    def forget(self) -> None:
        """A swap was undone, and there is no version to go back to."""
        self.canary.forget()
        self._other_rates = None
        self._changes += 1

    def propose(self) -> list[int]:
        """For the ranks' agreement: the plan of the rank that decides, else what never wins."""
        if self.speculation is None or not self._decides:
            return [Agreement.NOTHING] * (BUCKETS + 1)
        return self.speculation.decide()

    def take(self, plan: Sequence[int]) -> None:
        """What the deciding rank planned."""
        if self.speculation is None or not self.speculation.apply(plan):
            return
        cold = self.speculation.cold
        logger.info("draft %s", "rests: plain decoding is faster" if cold else "works again")
        if not cold:
            # what was cached meanwhile has no draft's KV
            self.reloader.renewal.renew()

    # ----

    def _alone(self, reqs: Sequence[Any]) -> bool:
        """Whether only requests that are decoded again run. Others are not made to wait for them:
        they draft, and the answer counts for nothing if it differs."""
        audits = sum(map(is_audit, reqs))
        self._auditing = audits > 0
        if self.audit is not None and 0 < audits < len(reqs):
            self.audit.disturbed = True
        return 0 < audits == len(reqs)

    def _probation(self) -> int:
        """Request-steps after which the canary has seen what it needs."""
        return PROBATION if self.canary.config.enabled and self.canary.old is not None else 0

    def _warm(self, reqs: Sequence[Any]) -> list[bool] | None:
        """Which of them have all of their draft's KV; None: all."""
        speculation = self.speculation
        if speculation is None or (speculation.epoch == 0 and not speculation.cold):
            return None
        epoch = speculation.epoch
        warm = [getattr(req, "aurora_epoch", -1) == epoch for req in reqs]
        return None if all(warm) else warm
