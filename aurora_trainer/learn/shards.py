"""Who keeps what of the optimizer's state: every rank holds the whole draft to compute with, and of
masters, moments and running mean only rows of its own (ZeRO stage 1, Rajbhandari et al., 2020).

A matrix' rows are cut evenly over the ranks. A vector, and a matrix that is updated as a whole
(Muon), belongs to one rank, whichever holds least until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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

    def summed(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of the sums over all ranks, added up in float32: one message a rank.

        Alone they are the gradients themselves.
        """
        if self.ranks.size == 1:
            return gradients
        own: dict[str, Tensor] = {}
        for rank in range(self.ranks.size):
            parts = self._parts(gradients, rank)
            piece = torch.cat([part.flatten().float() for part in parts.values()])
            self.ranks.reduce_(piece, rank)
            if rank == self.ranks.rank:
                own = dict(zip(parts, _cut(piece, parts.values())))
        return own

    def spread_(self, tensors: dict[str, Tensor]) -> None:
        """In place: every rank's own rows, to all: one message a rank."""
        for rank in range(self.ranks.size if self.ranks.size > 1 else 0):
            parts = self._parts(tensors, rank)
            piece = torch.cat([part.flatten() for part in parts.values()])
            self.ranks.broadcast_(piece, rank)
            if rank != self.ranks.rank:
                for part, new in zip(parts.values(), _cut(piece, parts.values())):
                    part.copy_(new)

    def _parts(self, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        return {name: self.of(name, rank, t) for name, t in tensors.items()}

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


def _cut(piece: Tensor, parts: Iterable[Tensor]) -> list[Tensor]:
    """Views of a piece that was put together from parts, each in its part's shape."""
    shapes = [part.shape for part in parts]
    flat = piece.split([shape.numel() for shape in shapes])
    return [own.view(shape) for own, shape in zip(flat, shapes)]
