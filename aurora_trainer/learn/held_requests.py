"""The requests that the gate judges on: held back from training, so that no draft ever saw them.

Every other request is held until `requests` newer ones were held: of every domain and server alike
(intake/owners.py), and what is too much goes from whoever has most, so that no flood and no rhythm
of traffic is all that is judged. A request that training had a part of is not held any more.

Each is scored by its walk (accept_length.py) with a role's draft, and scores are kept as long as
that draft is the one: those of what is trained are never those of an earlier candidate.

Dimensions: n held requests.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aurora_trainer.intake.owners import Owner, owner_of
from aurora_trainer.intake.sample import RequestKey, Sample
from aurora_trainer.learn.walk_apart import Walk, walk_apart

if TYPE_CHECKING:
    from aurora_trainer.learn.gate import GateConfig

# of one request: the parts of a longer one go to training at once
HELD_POSITIONS = 2048
# samples after which an owner that sent none of them makes room for another: a server that starts
# again is another one, and a client may choose any label
REMEMBERED = 1024
# requests of which training has a part, and more comes
MAX_GOING_ON = 4096


@dataclass
class _Held:
    samples: list[Sample]
    owner: Owner
    # number of the request's first sample
    number: int
    # Steps and tokens by role, of as many of the samples as there were.
    scores: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        return sum(len(s.features) for s in self.samples)


@dataclass
class _Seen:
    """Of one owner: requests, held or not, and the number of the newest one's first sample."""

    requests: int = 0
    newest: int = 0


class HeldRequests:
    """Owns them and their scores. `left_out` counts samples that no walk is possible of
    (`unwalkable`)."""

    def __init__(self, config: GateConfig, left_out: Counter[str]):
        self._config, self._left_out = config, left_out
        # oldest first
        self._held: OrderedDict[RequestKey, _Held] = OrderedDict()
        self._seen: dict[Owner, _Seen] = {}
        self._going_on: OrderedDict[RequestKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def samples(self) -> int:
        return sum(len(h.samples) for h in self._held.values())

    def hold(self, sample: Sample, number: int = 0) -> list[Sample]:
        """Take a new sample, the `number`-th that came; returns what training may have now: the
        sample, or what it pushes out.
        """
        if not self._config.enabled:
            return [sample]
        key = (sample.session, sample.request)
        if key in self._held:
            if self._held[key].positions + len(sample.features) > HELD_POSITIONS:
                return [sample]
            self._held[key].samples.append(sample)
            return []
        if key in self._going_on:
            return self._given(key, [sample])
        owner = self._owner(sample, number)
        seen = self._seen.setdefault(owner, _Seen())
        seen.newest = number
        seen.requests += 1
        if seen.requests % self._config.hold_every:
            return self._given(key, [sample])
        self._held[key] = _Held([sample], owner, number)
        if len(self._held) > self._config.requests:
            return self._let_go(self._first_to_go())
        return []

    def scored(self, sample: Sample, scores: dict[str, np.ndarray]) -> None:
        """Walks of a sample that just came, by role: it is not walked again with those drafts."""
        held = self._held.get((sample.session, sample.request))
        # a later part may have gone to training
        if held is not None and held.samples == [sample]:
            held.scores |= {role: (1, found) for role, found in scores.items()}

    def forget(self, since: int) -> list[Sample]:
        """Traffic changed with the sample of number `since`: returns, for training, what is held
        from before and is not what comes now. If several domains came since then, each of them
        keeps what is its own, so that no flood of one takes the others' place."""
        came = {domain for (domain, _), seen in self._seen.items() if seen.newest >= since}
        kept = came if len(came) > 1 else set()
        old = [
            key
            for key, held in self._held.items()
            if held.number < since and held.owner[0] not in kept
        ]
        return [sample for key in old for sample in self._let_go(key)]

    def serve(self, role: str) -> None:
        """The draft of `role` is served from now on, and its scores with it."""
        for held in self._held.values():
            held.scores.pop("served", None)
            if role in held.scores:
                held.scores["served"] = held.scores[role]

    def score(self, role: str, walk: Walk) -> None:
        """Walk the held requests; scores that are known from before are kept. One that cannot be
        walked is held no longer."""
        if role not in ("served", "initial"):
            for held in self._held.values():
                held.scores.pop(role, None)
        missing = {
            key: held
            for key, held in self._held.items()
            if held.scores.get(role, (0,))[0] < len(held.samples)
        }
        if not missing:
            return
        found = walk_apart(walk, role, [held.samples for held in missing.values()])
        if all(one is None for one in found) and not self._walks(role, walk):
            # a fault of the draft or the device, not of a request
            raise ValueError(f"no held request can be walked with the {role} draft")
        for (key, held), one in zip(missing.items(), found, strict=True):
            if one is None:
                del self._held[key]
                self._left_out["unwalkable"] += len(held.samples)
            else:
                held.scores[role] = (len(held.samples), one.sum(0))

    def scores(self, role: str) -> np.ndarray:
        """float64 [n, 2]: steps and tokens of each held request."""
        return np.stack([held.scores[role][1] for held in self._held.values()])

    def state(self) -> dict[str, Any]:
        """JSON, for a resume checkpoint; held samples are not in it."""
        seen = [[*owner, seen.requests, seen.newest] for owner, seen in self._seen.items()]
        return {"seen": seen, "held": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with no request held."""
        if isinstance(state["seen"], list):
            self._seen = {(domain, server): _Seen(*of) for domain, server, *of in state["seen"]}

    def _walks(self, role: str, walk: Walk) -> bool:
        """Whether one that was walked with the role's draft can be walked again."""
        known = next((held.samples for held in self._held.values() if role in held.scores), None)
        return known is not None and walk_apart(walk, role, [known])[0] is not None

    def _given(self, key: RequestKey, samples: list[Sample]) -> list[Sample]:
        """To training: what comes of that request later is not held."""
        self._going_on.pop(key, None)
        if samples[-1].reason == "part":
            self._going_on[key] = None
            if len(self._going_on) > MAX_GOING_ON:
                self._going_on.popitem(last=False)
        return samples

    def _let_go(self, key: RequestKey) -> list[Sample]:
        return self._given(key, self._held.pop(key).samples)

    def _owner(self, sample: Sample, number: int) -> Owner:
        self._seen = {
            owner: seen for owner, seen in self._seen.items() if number - seen.newest <= REMEMBERED
        }
        return owner_of(sample.domain, sample.session, self._seen)

    def _first_to_go(self) -> RequestKey:
        """The oldest one of an owner that is gone, else of the server that has most, of the domain
        that has most."""
        for key, held in self._held.items():
            if held.owner not in self._seen:
                return key
        owners = [held.owner for held in self._held.values()]
        (domain, _), *_ = Counter(domain for domain, _ in owners).most_common(1)
        (largest, _), *_ = Counter(o for o in owners if o[0] == domain).most_common(1)
        return next(key for key, held in self._held.items() if held.owner == largest)
