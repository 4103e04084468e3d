"""Who keeps what of the optimizer's state: every rank holds the whole draft to compute with, and of
masters, moments and running mean only rows of its own (ZeRO stage 1, Rajbhandari et al., 2020).

A matrix' rows are cut evenly over the ranks. A vector, and a matrix that is updated as a whole
(Muon), belongs to one rank, whichever holds least until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aurora_trainer.ranks import Ranks


class Shards:
    """`shapes` of the parameters by name; those that `whole` says yes to are not cut."""

    def __init__(
        self, ranks: Ranks, shapes: Mapping[str, torch.Size], whole: Callable[[str], bool]
    ):
        self.ranks, self.shapes = ranks, dict(shapes)
        self._bounds: dict[str, list[int]] = {}
        held = [0] * ranks.size
        # the largest first, so that they spread
        for name in sorted(shapes, key=lambda n: (-shapes[n].numel(), n)):
            rows, size = shapes[name][0], shapes[name].numel()
            if ranks.size > 1 and (len(shapes[name]) < 2 or whole(name)):
                owner = held.index(min(held))
                held[owner] += size
                self._bounds[name] = [rows * (r > owner) for r in range(ranks.size + 1)]
            else:
                self._bounds[name] = [rows * r // ranks.size for r in range(ranks.size + 1)]

    def of(self, name: str, rank: int, tensor: Tensor) -> Tensor:
        """The rows of a rank, a view."""
        first, end = self._bounds[name][rank : rank + 2]
        return tensor[first:end]

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows, a view."""
        return self.of(name, self.ranks.rank, tensor)

    def summed(self, name: str, gradient: Tensor) -> Tensor:
        """This rank's rows of the sum over all ranks, added up in float32.

        Alone it is the gradient itself.
        """
        if self.ranks.size == 1:
            return gradient
        parts = [
            self.of(name, rank, gradient).float().contiguous() for rank in range(self.ranks.size)
        ]
        for rank, part in enumerate(parts):
            if len(part):
                self.ranks.reduce_(part, rank)
        return parts[self.ranks.rank]

    def spread_(self, name: str, tensor: Tensor) -> None:
        """In place: every rank's own rows, to all."""
        for rank in range(self.ranks.size if self.ranks.size > 1 else 0):
            rows = self.of(name, rank, tensor)
            if len(rows):
                self.ranks.broadcast_(rows, rank)

    def gathered(self, name: str, rows: Tensor) -> Tensor:
        """At rank 0 the whole tensor, of every rank's rows; elsewhere the rows."""
        if self.ranks.size == 1:
            return rows
        if self.ranks.rank:
            if len(rows):
                self.ranks.send(rows.contiguous(), 0)
            return rows
        whole = torch.empty(self.shapes[name], dtype=rows.dtype, device=rows.device)
        self.own(name, whole).copy_(rows)
        for rank in range(1, self.ranks.size):
            part = self.of(name, rank, whole)
            if len(part):
                self.ranks.receive_(part, rank)
        return whole

    def scatter_(self, name: str, whole: Tensor | None, rows: Tensor) -> None:
        """In place: this rank's rows of what rank 0 has whole (None elsewhere)."""
        if whole is None:
            if len(rows):
                self.ranks.receive_(rows, 0)
            return
        rows.copy_(self.own(name, whole))
        for rank in range(1, self.ranks.size):
            part = self.of(name, rank, whole).to(rows.device, rows.dtype)
            if len(part):
                self.ranks.send(part.contiguous(), rank)
