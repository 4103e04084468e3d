"""What one training step saw and did: the record that metrics are made of, and the scores of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_trainer.batch import Batch
from aurora_trainer.loss import Score
from aurora_trainer.optimize import Update
from aurora_trainer.sample import Sample


@dataclass(frozen=True)
class Step:
    """Accept lengths are (sum, count) over slots that were never trained on before: of the draft before this step, and
    after it (on every metrics.rescore_every_steps-th batch, else None)."""

    update: Update
    score: Score
    slots: int
    before: tuple[float, int]
    after: tuple[float, int] | None
    time_ns: list[int]  # of each sample
    staleness: list[int]  # of each sample that had a tree: newest version minus the one that drew its last tree


def slots_of(batch: Batch, samples: list[Sample], some: list[Sample]) -> torch.Tensor:
    """bool [Q of level 0]: the slots of `some` of the batch's samples."""
    chosen = {id(s) for s in some}
    return torch.tensor([id(s) in chosen for s in samples])[batch.on_cpu.base_sample]


def sample_scores(batch: Batch, scored: Score, samples: int) -> list[float]:
    """Each sample's mean accept length over its slots, nan where no slot's chain is known to its end."""
    known = scored.run >= 0
    owner, run = batch.on_cpu.base_sample[known], scored.run[known].double()
    total = torch.zeros(samples, dtype=torch.float64).index_add(0, owner, run)
    count = torch.zeros(samples, dtype=torch.float64).index_add(0, owner, torch.ones_like(run))
    return (total / count).tolist()
