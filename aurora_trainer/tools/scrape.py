"""Read /metrics pages and compute what a human asks of them: totals, rates between two pages, means
and quantiles.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0

# name -> (labels, value) of each series
Samples = dict[str, list[tuple[dict[str, str], float]]]


@dataclass
class Page:
    """Aurora's part of some /metrics pages, read at once."""

    at_s: float
    samples: Samples

    def series(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        return [
            (ls, v)
            for ls, v in self.samples.get(name, [])
            if labels.items() <= ls.items() and v == v
        ]

    def total(self, name: str, **labels: str) -> float:
        return sum(v for _, v in self.series(name, **labels))

    def largest(self, name: str, **labels: str) -> float | None:
        return max((v for _, v in self.series(name, **labels)), default=None)

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Totals by a label's values, in their order on the page."""
        sums: dict[str, float] = {}
        for ls, v in self.series(name, **labels):
            sums[ls[label]] = sums.get(ls[label], 0.0) + v
        return sums


@dataclass
class Figures:
    """Two pages: levels of the newer one, rates between them."""

    old: Page
    new: Page

    def rate(self, name: str, **labels: str) -> float:
        """Growth per second; 0 if there is only one page, or the process began anew between
        them.
        """
        seconds, grown = (
            self.new.at_s - self.old.at_s,
            self.new.total(name, **labels) - self.old.total(name, **labels),
        )
        return max(0.0, grown) / seconds if seconds > 0 else 0.0

    def mean(self, name: str, **labels: str) -> float | None:
        """A histogram's mean: between the pages, or since the start if nothing happened between
        them.
        """
        for old in (self.old, Page(0, {})):
            count = self.new.total(f"{name}_count", **labels) - old.total(f"{name}_count", **labels)
            if count > 0:
                return (
                    self.new.total(f"{name}_sum", **labels) - old.total(f"{name}_sum", **labels)
                ) / count
        return None

    def quantile(self, q: float, name: str, **labels: str) -> float | None:
        """A histogram's quantile since the start: the bound of the bucket that holds it."""
        buckets = sorted(
            (float(le), n) for le, n in self.new.by("le", f"{name}_bucket", **labels).items()
        )
        if not buckets or not buckets[-1][1]:
            return None
        bound = next(le for le, n in buckets if n >= q * buckets[-1][1])
        return bound if bound < float("inf") else buckets[-2][0]


def fetch(urls: Sequence[str]) -> Page:
    """Aurora's metrics of all pages together.

    Raises ValueError for a page that cannot be read or has none of them.
    """
    samples: Samples = {}
    for url in urls:
        address = url if "://" in url else f"http://{url}"
        address = address if address.endswith("/metrics") else address.rstrip("/") + "/metrics"
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
                text = response.read().decode()
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise ValueError(f"{address}: {getattr(error, 'reason', error)}") from None
        own = [line for line in text.splitlines() if line.startswith(("aurora_", "# TYPE aurora_"))]
        if not own:
            raise ValueError(
                f"{address}: no metric of Aurora; expected a server with AURORA and"
                " --enable-metrics"
            )
        for family in text_string_to_metric_families("\n".join(own) + "\n"):
            for s in family.samples:
                samples.setdefault(s.name, []).append((s.labels, s.value))
    return Page(time.monotonic(), samples)
