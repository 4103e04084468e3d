"""The gate: which draft should servers have, judged on requests that none of them ever saw?

Some requests are held back from training (held_requests.py). At each decision what is trained
(`live`), its running mean (`mean`, if there is one), the served weights and the initial draft
(`initial`) are walked along them. With A the accept length of all n held requests together (tokens
over steps), and s the standard error of a difference to the served one, paired by request, the
draft of the largest lower bound

    A(draft) - A(served) - z s

is published where that is above 0: `better`, or `initial` if it is the initial one. Else the best
of those that are trained is refused: `worse` where A - A(served) < -WORSE s, `not_better` where
not. Training goes on as it was when the initial draft is published. That draft is what suits
today's traffic, and says nothing of whether the trained one, which has seen some of it, is worth
less as a start; after `give_up_after` answers of `worse` or `not_finite` in a row, against whatever
is served, training goes back to that: a diverged draft does not come back by itself.

The initial draft is what a user had without us, so that doubt is in its favour. Where it is ahead
of what is served, on all held requests or on the newest `min_requests`, a trained draft passes only
if it is ahead of the initial one by ANCHOR s, and at all on the newest; else the initial one does,
if it is ahead on all held requests.
The same is asked of it while the initial one is served. The samples that come are compared as
well, with the served and the initial draft alone (drift.py): where those say that the initial one
is ahead, and no trained one passes here, it is published.

Error rates of one answer at z = 1, for differences of a request with a standard deviation of 0.4
and 24 requests (s = 0.08): a candidate that is worse by 0.1 tokens passes 1 time in 80, an equal
one 1 in 6, one that is better by 0.1 6 times in 10 and by 0.2 9 times in 10; what was refused is
not lost, the candidate trains on. At the first answer, with 8 requests, one that is worse by 0.1
passes 1 time in 20. An equal one costs a swap and no accept length.
tests/trainer/learn/test_gate.py computes these rates, and those of many answers on a window that
moves.

Dimensions: n held requests.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import Section
from aurora_trainer.learn.accept_length import accept_length, difference
from aurora_trainer.learn.held_requests import HeldRequests
from aurora_trainer.learn.walk_apart import Walk

log = logging.getLogger(__name__)

# standard errors: one-sided, 1 equal candidate in 20
WORSE = ANCHOR = 1.64


class GateConfig(Section):
    """When a candidate may be published."""

    # false: every finite candidate passes, no request is held back, and nothing is watched
    enabled: bool = True
    # held back from training until as many newer ones were held: those that a decision rests on.
    # More of them see smaller differences
    requests: PositiveInt = 24
    # fewer held requests refuse (`few_requests`)
    min_requests: PositiveInt = 8
    # 1 request in so many is held back
    hold_every: PositiveInt = 2
    # standard errors that a candidate must be ahead. 1: an equal one passes 1 time in 6
    z: Annotated[float, Field(ge=0)] = 1.0
    # answers of `worse` in a row after which training goes back to the served weights
    give_up_after: PositiveInt = 8


@dataclass(frozen=True)
class Decision:
    """`reason` is one of DECISIONS (metric_families/learning.py), `role` the draft that passes:
    live, mean, initial, or "" for none.

    Accept lengths are nan if none was scored; `candidate` is the best of what is trained.
    """

    role: str
    reason: str
    # that it rests on: those held, or of what comes (drift.py) samples
    requests: int
    served: float = math.nan
    candidate: float = math.nan
    initial: float = math.nan
    # of the difference to the served one, of the draft that passes or else of the candidate
    stderr: float = math.nan

    @property
    def passed(self) -> bool:
        return bool(self.role)

    def fields(self) -> dict[str, float | str]:
        """For the manifest and the log."""
        names = ("requests", "served", "candidate", "initial", "stderr")
        values = {name: getattr(self, name) for name in names}
        finite = {k: round(v, 4) for k, v in values.items() if math.isfinite(v)}
        return {"reason": self.reason} | ({"role": self.role} if self.role else {}) | finite


class Gate:
    """Owns the counts of its decisions, and what it decides on, `held`, which counts in
    `left_out`."""

    def __init__(self, config: GateConfig, left_out: Counter[str] | None = None):
        self.config = config
        self.held = HeldRequests(config, Counter() if left_out is None else left_out)
        # by reason
        self.decisions: Counter[str] = Counter()
        self.newest: Decision | None = None
        self.worse_in_a_row = 0

    def decide(
        self,
        roles: Sequence[str],
        walk: Walk,
        anchor: str = "initial",
        coming: Decision | None = None,
    ) -> Decision:
        """Which draft should be published? `roles`: what is trained and finite, `live` first.

        `walk` scores samples with one of the roles, `served` or `initial`. `anchor`: the role that
        the initial draft has, `served` if that is what is served, "" if it is none that may be.
        `coming`: what samples that come say of it, if they say that it is ahead. Counts and logs
        the answer."""
        decision = self.newest = self._judge(roles, walk, anchor, coming)
        self.decisions[decision.reason] += 1
        worse = decision.reason in ("worse", "not_finite")
        self.worse_in_a_row = self.worse_in_a_row + 1 if worse else 0
        said = {"passed": decision.passed} | decision.fields()
        log.info("gate %s", " ".join(f"{k}={v}" for k, v in said.items()))
        return decision

    @property
    def gives_up(self) -> bool:
        """Whether training should go back to the served weights."""
        return self.worse_in_a_row >= self.config.give_up_after

    def serve(self, role: str) -> None:
        """The draft of `role` is served from now on, and its scores with it."""
        self.worse_in_a_row = 0
        self.held.serve(role)

    def restart(self) -> None:
        """Other weights are served than were scored."""
        self.serve("none")

    def state(self) -> dict[str, Any]:
        """JSON, for a resume checkpoint; held samples are not in it."""
        return {
            "decisions": dict(self.decisions),
            "worse_in_a_row": self.worse_in_a_row,
            **self.held.state(),
        }

    def restore(self, state: dict[str, Any], live: bool) -> None:
        """`live`: go on with no request held; over a recording those come again."""
        self.decisions = Counter(state["decisions"])
        self.worse_in_a_row = state["worse_in_a_row"]
        if live:
            self.held.restore(state)

    def _judge(
        self, roles: Sequence[str], walk: Walk, anchor: str, coming: Decision | None
    ) -> Decision:
        few = coming or Decision("", "few_requests", len(self.held))
        if not roles:
            return coming or Decision("", "not_finite", len(self.held))
        if not self.config.enabled:
            return Decision(roles[-1], "off", len(self.held))
        if len(self.held) < max(2, self.config.min_requests):
            return few
        others = (*roles, "initial") if (initial := anchor == "initial") else roles
        for role in ("served", *others):
            self.held.score(role, walk)
        if len(self.held) < 2:
            return few
        served = self.held.scores("served")
        scores = {role: self.held.scores(role) for role in others}
        ahead = {role: difference(found, served) for role, found in scores.items()}
        # no request has a chain that is known to its end
        if not all(math.isfinite(mean) for mean, _ in ahead.values()):
            return few
        lower = {role: mean - self.config.z * stderr for role, (mean, stderr) in ahead.items()}
        best, trained = max(others, key=lower.__getitem__), max(roles, key=lower.__getitem__)
        passes, first = lower[best] > 0, scores.get(anchor, served)
        leads = not initial or coming is not None or any(self._ahead(first, served, least=0.0))
        if best != "initial" and anchor and leads:
            # in doubt it is the initial one
            if not all(self._ahead(scores[best], first, least=ANCHOR)):
                passes, best = passes and initial and ahead["initial"][0] > 0, "initial"

        def decision(role: str, reason: str) -> Decision:
            return Decision(
                role,
                reason,
                len(self.held),
                served=accept_length(served),
                candidate=accept_length(scores[trained]),
                initial=accept_length(scores["initial"]) if initial else math.nan,
                stderr=ahead[role or trained][1],
            )

        if passes:
            return decision(best, "initial" if best == "initial" else "better")
        if coming is not None:
            return coming
        mean, stderr = ahead[trained]
        return decision("", "worse" if mean < -WORSE * stderr else "not_better")

    def _ahead(self, one: np.ndarray, other: np.ndarray, least: float) -> tuple[bool, bool]:
        """Whether a draft is ahead by so many standard errors, and whether it is at all on the
        newest requests alone: what is held may be of traffic that is over."""
        mean, stderr = difference(one, other)
        newest = slice(-self.config.min_requests, None)
        return mean > least * stderr, difference(one[newest], other[newest])[0] > 0
