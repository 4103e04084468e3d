"""The gate: is the candidate ahead of the weights being served, on requests that it never saw?

Every other request is held back from training until `requests` newer ones were held: of every
domain and server alike, and what is too much goes from whoever has most, so that no flood and no
rhythm of traffic is all that is judged. At each decision the candidate itself, the served weights
and the initial draft are walked along the held requests (accept_length.py), so that a score is
never that of an earlier candidate. With A the accept length of all n held requests together (tokens
over steps), and s the standard error of a difference between two drafts, paired by request,

    passes   where   A(candidate) - A(served) > z s                      `better`
    refused  where   A(candidate) - A(served) < -WORSE s                 `worse`
    refused  else                                                        `not_better`

and where A(initial) - A(served) > ANCHOR s, and the candidate is not ahead of the initial draft,
the initial one is published in its place. After `give_up_after` answers of `worse` in a row
training goes back to the served weights: a diverged draft does not come back by itself.

Error rates of one answer at z = 1.28, for differences of a request with a standard deviation of 0.4
and 24 requests (s = 0.08): a candidate that is worse by 0.1 tokens passes 1 time in 150, an equal
one 1 in 10, one that is better by 0.1 every second time and by 0.2 7 times in 8; what was refused
is not lost, the candidate trains on. At the first answer, with 8 requests, one that is worse by 0.1
passes 1 time in 30. tests/trainer/learn/test_gate.py computes these rates, and those of many
answers on a window that moves.

Dimensions: n held requests.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import Section
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.accept_length import accept_length, difference

log = logging.getLogger(__name__)

# standard errors by which the initial draft is clearly better
ANCHOR = 1.96
WORSE = 1.64
# of one request: the parts of a longer one go to training at once
HELD_POSITIONS = 2048

# domains, and servers of one, that are told apart; all others are one
MAX_SHARES, REST = 16, "(rest)"

# session, request id
Key = tuple[str, str]
# domain, session
Share = tuple[str, str]
# Steps and tokens of each sample's walk, [len(samples), 2], with a draft of that role.
Walk = Callable[[str, list[Sample]], np.ndarray]


class GateConfig(Section):
    """When a candidate may be published."""

    # false: every finite candidate passes, and no request is held back
    enabled: bool = True
    # held back from training until as many newer ones were held: those that a decision rests on.
    # More of them see smaller differences
    requests: PositiveInt = 24
    # fewer held requests refuse (`few_requests`)
    min_requests: PositiveInt = 8
    # 1 request in so many is held back
    hold_every: PositiveInt = 2
    # standard errors that a candidate must be ahead. 1.28: an equal one passes 1 time in 10
    z: Annotated[float, Field(ge=0)] = 1.28
    # answers of `worse` in a row after which training goes back to the served weights
    give_up_after: PositiveInt = 8


@dataclass(frozen=True)
class Decision:
    """`reason` is one of DECISIONS (metric_families/learning.py).

    Accept lengths are nan if none was scored.
    """

    passed: bool
    reason: str
    requests: int
    served: float
    candidate: float
    initial: float
    # of candidate - served
    stderr: float

    def fields(self) -> dict[str, float | str]:
        """For the manifest and the log."""
        names = ("requests", "served", "candidate", "initial", "stderr")
        values = {name: getattr(self, name) for name in names}
        finite = {k: round(v, 4) for k, v in values.items() if math.isfinite(v)}
        return {"reason": self.reason} | finite


@dataclass
class _Held:
    samples: list[Sample]
    share: Share
    # Steps and tokens by role, of as many of the samples as there were.
    scores: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        return sum(len(s.features) for s in self.samples)


class Gate:
    """Owns the requests that are held back, their scores, and the counts of decisions.

    `left_out` counts samples that no walk is possible of (`unwalkable`).
    """

    def __init__(self, config: GateConfig, left_out: Counter[str] | None = None):
        self.config = config
        self.left_out: Counter[str] = Counter() if left_out is None else left_out
        # by reason
        self.decisions: Counter[str] = Counter()
        self.newest: Decision | None = None
        self.worse_in_a_row = 0
        # oldest first
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        # requests of each share, held or not
        self._seen: dict[Share, int] = {}

    @property
    def held(self) -> int:
        """Samples that are held back."""
        return sum(len(h.samples) for h in self._held.values())

    def hold(self, sample: Sample) -> list[Sample]:
        """Take a new sample; returns what training may have now: the sample, or what it pushes
        out.
        """
        if not self.config.enabled:
            return [sample]
        key = (sample.session, sample.request)
        if key in self._held:
            if self._held[key].positions + len(sample.features) > HELD_POSITIONS:
                return [sample]
            self._held[key].samples.append(sample)
            return []
        share = self._share(sample)
        self._seen[share] = self._seen.get(share, 0) + 1
        if self._seen[share] % self.config.hold_every:
            return [sample]
        self._held[key] = _Held([sample], share)
        if len(self._held) > self.config.requests:
            return self._held.pop(self._oldest_of_the_largest()).samples
        return []

    def decide(self, finite: bool, walk: Walk, initial_served: bool = False) -> Decision:
        """May the candidate be published? `finite`: all its weights are.

        `walk` scores samples with the role `candidate`, `served` or, unless that is what is served,
        `initial`. Counts and logs the
        answer."""
        decision = self.newest = self._judge(finite, walk, initial_served)
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
        for held in self._held.values():
            held.scores.pop("served", None)
            if role in held.scores:
                held.scores["served"] = held.scores[role]

    def restart(self) -> None:
        """Other weights are served than were scored."""
        self.serve("none")

    def state(self) -> dict[str, Any]:
        """JSON, for a resume checkpoint; held samples are not in it."""
        return {
            "decisions": dict(self.decisions),
            "worse_in_a_row": self.worse_in_a_row,
            "seen": [[*share, count] for share, count in self._seen.items()],
            "held": self.held,
        }

    def restore(self, state: dict[str, Any], live: bool) -> None:
        """`live`: go on with no request held; over a recording those come again."""
        self.decisions = Counter(state["decisions"])
        self.worse_in_a_row = state["worse_in_a_row"]
        if live and isinstance(state["seen"], list):
            self._seen = {(domain, server): count for domain, server, count in state["seen"]}

    def _share(self, sample: Sample) -> Share:
        domains = {domain for domain, _ in self._seen}
        known = sample.domain in domains or len(domains) < MAX_SHARES
        domain = sample.domain if known else REST
        servers = {server for own, server in self._seen if own == domain}
        known = sample.session in servers or len(servers) < MAX_SHARES
        return domain, sample.session if known else REST

    def _oldest_of_the_largest(self) -> Key:
        """Of the server that has most, of the domain that has most."""
        shares = [held.share for held in self._held.values()]
        (domain, _), *_ = Counter(domain for domain, _ in shares).most_common(1)
        (largest, _), *_ = Counter(s for s in shares if s[0] == domain).most_common(1)
        return next(key for key, held in self._held.items() if held.share == largest)

    def _judge(self, finite: bool, walk: Walk, initial_served: bool) -> Decision:
        def decision(passed: bool, reason: str, *lengths: float) -> Decision:
            return Decision(passed, reason, len(self._held), *(lengths or (math.nan,) * 4))

        if not finite:
            return decision(False, "not_finite")
        if not self.config.enabled:
            return decision(True, "off")
        if len(self._held) < max(2, self.config.min_requests):
            return decision(False, "few_requests")
        roles = ("served", "candidate") if initial_served else ("served", "candidate", "initial")
        for role in roles:
            self._score(role, walk)
        if len(self._held) < 2:
            return decision(False, "few_requests")
        served, candidate = self._scores("served"), self._scores("candidate")
        initial = served if initial_served else self._scores("initial")
        ahead, stderr = difference(candidate, served)
        lengths = (*map(accept_length, (served, candidate, initial)), stderr)
        # no request has a chain that is known to its end
        if not math.isfinite(ahead):
            return decision(False, "few_requests", *lengths)
        anchor, anchor_stderr = difference(initial, served)
        behind_initial = difference(candidate, initial)[0] <= 0
        if anchor > ANCHOR * anchor_stderr and behind_initial:
            return decision(False, "initial", *lengths)
        if ahead > self.config.z * stderr:
            return decision(True, "better", *lengths)
        if ahead < -WORSE * stderr:
            return decision(False, "worse", *lengths)
        return decision(False, "not_better", *lengths)

    def _scores(self, role: str) -> np.ndarray:
        """float64 [n, 2]: steps and tokens of each held request."""
        return np.stack([held.scores[role][1] for held in self._held.values()])

    def _score(self, role: str, walk: Walk) -> None:
        """Walk the held requests; scores that are known from before are kept. One that cannot be
        walked is held no longer."""
        if role == "candidate":
            for held in self._held.values():
                held.scores.pop(role, None)
        missing = [h for h in self._held.values() if h.scores.get(role, (0,))[0] < len(h.samples)]
        if missing:
            try:
                self._walk(role, walk, missing)
            except Exception:
                # one request at a time: whatever one of them is, it costs itself
                log.warning(
                    "gate cannot walk its requests together, walking each alone", exc_info=True
                )
                self._walk_each(role, walk, missing)

    def _walk(self, role: str, walk: Walk, some: Sequence[_Held]) -> None:
        found, at = walk(role, [sample for held in some for sample in held.samples]), 0
        for held in some:
            end = at + len(held.samples)
            held.scores[role] = (len(held.samples), found[at:end].sum(0))
            at = end

    def _walk_each(self, role: str, walk: Walk, some: Sequence[_Held]) -> None:
        failed = []
        for held in some:
            try:
                self._walk(role, walk, [held])
            except Exception:
                failed.append(held)
        # a fault of the draft or the device, not of a request
        if len(failed) == len(some):
            raise ValueError(f"no held request can be walked with the {role} draft")
        for key, held in list(self._held.items()):
            if any(held is one for one in failed):
                del self._held[key]
                self.left_out["unwalkable"] += len(held.samples)
