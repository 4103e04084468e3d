"""What one training step saw and did: the record that metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass

from aurora_trainer.learn.objective import Score
from aurora_trainer.learn.optimizer import Update


@dataclass(frozen=True)
class Step:
    """Accept lengths are (steps, tokens) of walks over samples that were never trained on before:
    of the draft before this step, and after it. None if they were not measured."""

    update: Update
    score: Score
    positions: int
    before: tuple[float, float] | None
    after: tuple[float, float] | None
    # of each sample
    time_ns: list[int]
    # for each sample that had a tree: newest version minus the one that drew its last tree
    staleness: list[int]
