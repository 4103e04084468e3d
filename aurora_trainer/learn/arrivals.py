"""Samples that just came, before anything is trained on them: each is walked with the served draft
and the initial one, and what drift.py makes of it is handed on.

A trainer with time to spare walks each sample when it comes. One that is behind walks them before
its next step, all at once, and of their positions no more than WALKED_PART of those that it trains
on; the others are trained on without having been looked at. Two walks are two passes forward, a
step that trains is about three of each of its positions, so that this costs at most 2/3 of
WALKED_PART of a trainer's time.

A resumed run over a recording follows what the run before it found, at the same samples and steps:
the checkpoint has these events, and the drafts of that time are gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.drift import Drift, DriftConfig, Event
from aurora_trainer.learn.gate import Gate
from aurora_trainer.learn.walk_apart import Walk, walk_apart

# of the positions that are trained on, by a trainer that is behind
WALKED_PART = 1 / 8
# events that a resumed run can follow; samples that wait, if no step is taken
MAX_EVENTS, MAX_WAITING = 4096, 256

# samples that came, steps that were taken
When = tuple[int, int]


class Arrivals:
    """Owns the tests of drift.py, and the samples that they were not told of yet."""

    def __init__(self, config: DriftConfig, gate: Gate, walk: Walk):
        self.enabled = config.enabled and gate.config.enabled
        self.drift = Drift(config)
        self._held, self._walk = gate.held, walk
        # number of the sample, sample; newest last. One that buffer and gate have let go of is
        # looked at no more: it must not take memory here
        self._waiting: deque[tuple[int, weakref.ref[Sample]]] = deque(maxlen=MAX_WAITING)
        # positions that may be walked by a trainer that is behind
        self._credit = 0.0
        self.events: deque[tuple[When, Event]] = deque(maxlen=MAX_EVENTS)
        # of the run before this one, to be followed
        self._before: deque[tuple[When, Event]] = deque()
        self._resting = False

    @property
    def resting(self) -> bool:
        """Whether training steps back, as of the samples that came until now."""
        return self._resting

    def add(self, number: int, sample: Sample) -> None:
        if self.enabled:
            self._waiting.append((number, weakref.ref(sample)))

    def look(self, now: When, initial: bool, behind: bool, waits: bool = False) -> list[Event]:
        """Walk what waits; returns what was found. `initial`: whether that draft is another one
        than the served, and may be served; `waits` as in Drift.add."""
        waiting = [(at, sample) for at, ref in self._waiting if (sample := ref()) is not None]
        self._waiting.clear()
        if behind:
            waiting = self._affordable(waiting)
        if not waiting:
            return []
        samples = [[sample] for _, sample in waiting]
        roles = ("served", "initial") if initial else ("served",)
        found = {role: walk_apart(self._walk, role, samples) for role in roles}
        events = []
        for n, (at, sample) in enumerate(waiting):
            walks = {role: own[n] for role, own in found.items() if own[n] is not None}
            if "served" not in walks:
                continue
            self._held.scored(sample, {role: one[0] for role, one in walks.items()})
            pair = {role: (float(one[0, 0]), float(one[0, 1])) for role, one in walks.items()}
            events += self.drift.add(at, pair["served"], pair.get("initial"), waits)
        self._follow(now, events)
        return events

    def trained(self, positions: int) -> None:
        """A step was taken, on so many positions."""
        self._credit = WALKED_PART * positions + min(0.0, self._credit)

    def replayed(self, now: When) -> list[Event]:
        """What the run before this one found by then, and this one did not follow yet."""
        self._waiting.clear()
        events = []
        while self._before and all(at <= by for at, by in zip(self._before[0][0], now)):
            when, event = self._before.popleft()
            self._follow(when, [event])
            events.append(event)
        return events

    def state(self) -> dict[str, Any]:
        """JSON, for a resume checkpoint."""
        return {
            "drift": self.drift.state(),
            "credit": self._credit,
            "events": [[*when, event.kind, event.since] for when, event in self.events],
        }

    def restore(self, state: dict[str, Any], live: bool) -> None:
        """`live`: go on. Over a recording the samples come again, and `replayed` is asked."""
        self.drift.restore(state["drift"])
        self._credit = state["credit"]
        events = [((at, step), Event(*event)) for at, step, *event in state["events"]]
        if live:
            self.events.extend(events)
            self._resting = self.drift.resting
        else:
            self._before.extend(events)

    def _follow(self, when: When, events: Sequence[Event]) -> None:
        self.events.extend((when, event) for event in events)
        for event in events:
            if event.kind in ("rests", "works"):
                self._resting = event.kind == "rests"

    def _affordable(self, waiting: list[tuple[int, Sample]]) -> list[tuple[int, Sample]]:
        """The newest of them, until the credit is used up."""
        kept: list[tuple[int, Sample]] = []
        for at, sample in reversed(waiting):
            if self._credit <= 0:
                break
            self._credit -= len(sample.features)
            kept.append((at, sample))
        return kept[::-1]
