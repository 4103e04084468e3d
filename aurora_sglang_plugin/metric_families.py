"""What a metric is: one declaration of its name, help, labels, what to look for, and how its value
is read.

`metrics.py` declares the server's, `aurora_trainer/metric_families/` the trainer's. `make docs`
prints the tables of docs/metrics.md from them. A label has a bounded list of values, each exported
from the start, so that a rate over a first event is right; a value that is not in the list counts
as "other", because causes also come from other processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import nan
from typing import Any, Literal

OTHER = "other"


@dataclass(frozen=True)
class Family:
    """`help` says what it is (it is exported), `look` when to look at it (docs/metrics.md alone).

    `read` takes the state that `Exported.report` is given and returns a value, or one for each
    value of the label ({cause: value}; of two labels {(role, position): value}); None: not known
    yet. The value is a counter's total, a gauge's value, or a histogram's `Tally`.

    A family with `on` is not read at every report: `read` takes the event that `Exported.happened`
    is given under that name, and returns a counter's growth, a gauge's value, or the list of what
    a histogram observes.

    `labels` maps each label to its values. A counter's name gets `_total`. `bounds` are a
    histogram's buckets.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    look: str = "-"
    read: Callable[[Any], Any] | None = None
    on: str | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    bounds: Sequence[float] = ()


def counter(
    help: str,
    look: str = "-",
    read: Callable[[Any], Any] | None = None,
    on: str | None = None,
    **labels: Sequence[str],
) -> Family:
    return Family("counter", help, look, read, on, labels)


def gauge(
    help: str,
    look: str = "-",
    read: Callable[[Any], Any] | None = None,
    on: str | None = None,
    **labels: Sequence[str],
) -> Family:
    return Family("gauge", help, look, read, on, labels)


def histogram(
    help: str,
    look: str = "-",
    read: Callable[[Any], Any] | None = None,
    on: str | None = None,
    *,
    bounds: Sequence[float],
    **labels: Sequence[str],
) -> Family:
    return Family("histogram", help, look, read, on, labels, bounds)


class Tally:
    """A histogram in plain Python: an observation costs its thread a bisection and two additions,
    no lock.

    One thread observes; another may read, and may see a count without its sum for a moment.
    """

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        # of (previous bound, bound], the last one without bound
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Exported:
    """A table of families registered with prometheus_client, and what was last reported of each
    series.

    `constant` are labels of every series, e.g. {"tp_rank": "0"}.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        registry: Any = None,
        constant: Mapping[str, str] | None = None,
    ):
        # late: see metrics.py
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        self._families = dict(families)
        self._constant = tuple((constant or {}).values())
        self._metrics: dict[str, Any] = {}
        # by name and values
        self._children: dict[tuple[str, ...], Any] = {}
        self._last: dict[tuple[str, ...], Any] = {}
        for name, family in families.items():
            names = [*(constant or {}), *family.labels]
            metric: Any
            about: dict[str, Any] = dict(labelnames=names, registry=registry or REGISTRY)
            if family.kind == "gauge":
                metric = Gauge(name, family.help, multiprocess_mode="mostrecent", **about)
            elif family.kind == "counter":
                metric = Counter(name, family.help, **about)
            else:
                metric = Histogram(name, family.help, buckets=family.bounds, **about)
            for values in product(*family.labels.values()):
                child = self._children[name, *values] = (
                    metric.labels(*self._constant, *values) if names else metric
                )
                if family.kind == "gauge":
                    # not known yet
                    child.set(nan)
            self._metrics[name] = metric

    def report(self, state: Any, before: bool = False) -> None:
        """Read every family without `on` from `state`.

        `before`: only counters, whose totals were reached before this process began.
        """
        for name, family in self._families.items():
            if family.read is None or family.on is not None:
                continue
            found = family.read(state)
            if family.kind == "counter":
                if found is not None:
                    self.count_to(name, found, before)
                continue
            for values, value in () if before else _series(found):
                if family.kind == "gauge":
                    self.set(name, value, *values)
                else:
                    self.load(name, value, *values)

    def happened(self, on: str, event: Any) -> None:
        """Let every family of this `on` take what it reads from `event`."""
        for name, family in self._families.items():
            if family.on != on:
                continue
            for values, value in _series(family.read(event)):
                if family.kind == "counter":
                    self.child(name, *values).inc(value)
                elif family.kind == "gauge":
                    self.set(name, value, *values)
                else:
                    for observed in value:
                        self.child(name, *values).observe(observed)

    def child(self, name: str, *values: str) -> Any:
        """prometheus_client's own object of one series."""
        found = self._children.get((name, *values))
        # not remembered: nobody knows how many values there are
        if found is None:
            found = self._metrics[name].labels(*self._constant, *(OTHER for _ in values))
        return found

    def set(self, name: str, value: float, *values: str) -> None:
        self.child(name, *values).set(value)

    def count_to(
        self, name: str, totals: float | Mapping[str, float], before: bool = False
    ) -> None:
        """A counter moves by what its total, or that of each of its label's values, grew since the
        last call.

        If a total fell (ledger forgotten) the counter stays. `before`: the totals were reached
        before this process began, which counts from 0.
        """
        by_value: dict[tuple[str, ...], float] = {}
        for value, total in totals.items() if isinstance(totals, Mapping) else [(None, totals)]:
            key: tuple[str, ...] = (name,) if value is None else (name, value)
            key = key if key in self._children else (name, OTHER)
            by_value[key] = by_value.get(key, 0) + total
        for key, total in by_value.items():
            if not before and total > self._last.get(key, 0):
                self.child(*key).inc(total - self._last.get(key, 0))
            self._last[key] = total

    def load(self, name: str, tally: Tally, *values: str) -> None:
        """A histogram takes over what `tally` observed since the last call."""
        key, counts, total = (name, *values), list(tally.counts), tally.sum
        old_counts, old_total = self._last.get(key, ([0] * len(counts), 0.0))
        child = self.child(*key)
        # there is no public bulk way
        for bucket, new, old in zip(child._buckets, counts, old_counts, strict=True):
            if new != old:
                bucket.inc(new - old)
        child._sum.inc(total - old_total)
        self._last[key] = counts, total


def _series(found: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(label values, value) of what a reader returned; nothing of None."""
    pairs = found.items() if isinstance(found, Mapping) else [((), found)]
    for values, value in pairs:
        if value is not None:
            yield values if isinstance(values, tuple) else (values,), value
