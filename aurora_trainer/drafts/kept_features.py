"""Features go to the device once, and a batch gathers them there.

They are nearly all of a sample, and it is trained on about eight times: without this each batch
copies them twice on the host (packed, then pinned) and sends them again. They stay as long as their
sample lives: the buffer's `max_bytes`, shared by the ranks, bounds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from aurora_trainer.drafts.batch import upload
from aurora_trainer.intake.sample import Sample


class KeptFeatures:
    """Of samples that were asked for; on the CPU nothing is kept."""

    def __init__(self, device: str):
        self.device = device
        # by the id of a sample that lives
        self._held: dict[int, Tensor] = {}

    def of(self, samples: Sequence[Sample]) -> list[Tensor] | None:
        """Each sample's, on the device; None: they are the samples' own."""
        if torch.device(self.device).type == "cpu":
            return None
        for sample in samples:
            if id(sample) not in self._held:
                (self._held[id(sample)],) = upload([sample.features], self.device)
                weakref.finalize(sample, self._held.pop, id(sample), None).atexit = False
        return [self._held[id(sample)] for sample in samples]

    def clear(self) -> None:
        """Give their memory back; what is asked for again is sent again."""
        self._held.clear()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._held.values())
