"""The gate: is the candidate no worse than the weights being served, on samples that neither was trained on?

Every batch is scored before it is trained on. For sample i, d_i is the candidate's expected accept length minus the
served weights'. Over the last `window_samples` such pairs since the last publication, with mean m, standard deviation s
and count n, the candidate passes when

    n >= min_samples   and   m + z * s / sqrt(n) >= -tolerance

that is, unless it is worse by more than noise explains (a one-sided test that a worse candidate is refused). Pairing
takes the difficulty of the text out of the noise. The window holds scores of earlier candidates too: those since the
last publication, at most a window long; a candidate that has just turned worse is noticed as the window moves on.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import Section

log = logging.getLogger(__name__)


class GateConfig(Section):
    """When a candidate may be published."""

    enabled: bool = True  # false: every finite candidate passes
    window_samples: PositiveInt = 64
    min_samples: PositiveInt = 8
    z: Annotated[float, Field(ge=0)] = 1.64  # 1.64: an equal candidate is refused 1 time in 20
    tolerance: Annotated[float, Field(ge=0)] = 0.0  # accept length that a candidate may lose
    score_every_steps: PositiveInt = 1  # score the served weights on every n-th batch: a forward of its unseen samples


@dataclass(frozen=True)
class Decision:
    """`reason` is a short constant: better, not_worse, off, worse, few_samples, not_finite."""

    passed: bool
    reason: str
    samples: int
    served: float  # mean accept length in the window, nan where it is empty
    candidate: float
    stderr: float  # of the mean difference

    def fields(self) -> dict[str, float | str]:
        """For the manifest and the log."""
        values = {"samples": self.samples, "served": self.served, "candidate": self.candidate, "stderr": self.stderr}
        return {"reason": self.reason} | {k: round(v, 4) for k, v in values.items() if math.isfinite(v)}


class Gate:
    """Owns the window of paired scores and the counts of decisions."""

    def __init__(self, config: GateConfig):
        self.config = config
        self.decisions: Counter[str] = Counter()  # by reason
        self.newest: Decision | None = None
        self._pairs: deque[tuple[float, float]] = deque(maxlen=config.window_samples)

    def record(self, served: Sequence[float], candidate: Sequence[float]) -> None:
        """Expected accept lengths of the same samples under both; pairs that are not finite are left out."""
        for pair in zip(map(float, served), map(float, candidate), strict=True):
            if all(map(math.isfinite, pair)):
                self._pairs.append(pair)

    def decide(self, finite: bool) -> Decision:
        """May the candidate be published? `finite`: all its weights are. Counts and logs the answer."""
        decision = self.newest = self._judge(finite)
        self.decisions[decision.reason] += 1
        log.info("gate %s", " ".join(f"{k}={v}" for k, v in ({"passed": decision.passed} | decision.fields()).items()))
        return decision

    def restart(self) -> None:
        """The served weights changed: pairs with the old ones say nothing about the new."""
        self._pairs.clear()

    def state(self) -> dict[str, Any]:
        """JSON, for a resume checkpoint."""
        return {"pairs": [list(p) for p in self._pairs], "decisions": dict(self.decisions)}

    def restore(self, state: dict[str, Any]) -> None:
        self._pairs.clear()
        self._pairs.extend((a, b) for a, b in state["pairs"])
        self.decisions = Counter(state["decisions"])

    def _judge(self, finite: bool) -> Decision:
        n = len(self._pairs)
        served = sum(a for a, _ in self._pairs) / n if n else math.nan
        candidate = sum(b for _, b in self._pairs) / n if n else math.nan
        differences = [b - a for a, b in self._pairs]
        mean = sum(differences) / n if n else math.nan
        variance = sum((d - mean) ** 2 for d in differences) / (n - 1) if n > 1 else math.nan
        stderr = math.sqrt(variance / n) if n > 1 else math.nan

        def decision(passed: bool, reason: str) -> Decision:
            return Decision(passed, reason, n, served, candidate, stderr)

        if not finite:
            return decision(False, "not_finite")
        if not self.config.enabled:
            return decision(True, "off")
        if n < max(2, self.config.min_samples):
            return decision(False, "few_samples")
        margin = self.config.z * stderr
        if mean + margin < -self.config.tolerance:
            return decision(False, "worse")
        return decision(True, "better" if mean - margin > 0 else "not_worse")
