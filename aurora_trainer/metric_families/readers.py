"""How the value of a metric is found: in the status record, or in what just happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aurora_trainer.learn.step_record import Step

WHEN = ("before", "after")
NODES = ("accepted", "rejected")


def at(path: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads status["a"]["b"] of "a.b"; None if the status has none."""

    def read(status: Mapping[str, Any]) -> Any:
        found: Any = status
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return read


@dataclass(frozen=True)
class Trained:
    """on="step": a training step that took `seconds`; `now_s` is the wall clock, or a recording's
    own.
    """

    step: Step
    seconds: float
    now_s: float


@dataclass(frozen=True)
class Written:
    """on="publish", on="checkpoint": files that took `seconds` to write, or were not written."""

    seconds: float
    whole: bool = True


def if_applied(figure: str) -> Callable[[Trained], float | None]:
    """Reads a figure of the step's update; None if the update was skipped."""
    return lambda event: getattr(event.step.update, figure) if event.step.update.applied else None


def not_finite(event: Trained) -> dict[str, int]:
    update = event.step.update
    if update.applied:
        return {}
    return {"gradient" if math.isfinite(update.loss) else "loss": 1}


def accept_lengths(event: Trained) -> dict[str, list[float]]:
    found = zip(WHEN, (event.step.before, event.step.after), strict=True)
    return {when: [walk[1] / walk[0]] for when, walk in found if walk is not None and walk[0]}


def by_depth(figure: str) -> Callable[[Trained], dict[tuple[str, str], float]]:
    """Reads a sum of the step's score at each depth, for accepted and for rejected nodes."""

    def read(event: Trained) -> dict[tuple[str, str], float]:
        if not event.step.update.applied:
            return {}
        return {
            (str(depth), nodes): value
            for depth, both in enumerate(getattr(event.step.score, figure).tolist(), 1)
            for nodes, value in zip(NODES, both, strict=True)
            if value > 0 and math.isfinite(value)
        }

    return read
