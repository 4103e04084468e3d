"""A batch, dealt to the ranks: each gets whole samples, about as many positions as every other.

The batch is one rank's, whatever the number of ranks: they change how long an update takes, and not
what it learns. A share travels as an order (ranks.py). A sample stays with the rank that it was
first dealt to and travels once, however often it is trained on.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from aurora_trainer.intake.sample import Sample
from aurora_trainer.ranks import Order

LEARN = "learn"
TENSORS = tuple(f.name for f in fields(Sample) if "Tensor" in str(f.type))
OTHERS = tuple(f.name for f in fields(Sample) if f.name not in TENSORS)


@dataclass(frozen=True)
class RankShare:
    """What one rank trains on in one update."""

    # may be none
    samples: list[Sample]
    # of `samples`, those that were never trained on
    unseen: list[int]
    # levels of the whole batch
    depth: int
    # whether the draft is walked along the unseen samples before the update, and again after it
    before: bool
    after: bool
    # the dealer's, of `samples`
    numbers: list[int] = field(default_factory=list)
    # of `numbers`, those that the rank does not have yet
    new: list[int] = field(default_factory=list)
    # that it has and will not be asked for again
    gone: list[int] = field(default_factory=list)

    def order(self) -> Order:
        sent = [s for s, number in zip(self.samples, self.numbers) if number in self.new]
        tensors = {f"{n}.{name}": getattr(s, name) for n, s in enumerate(sent) for name in TENSORS}
        about = {f.name: getattr(self, f.name) for f in fields(RankShare) if f.name != "samples"}
        samples = [{name: getattr(s, name) for name in OTHERS} for s in sent]
        return Order(LEARN, {"samples": samples} | about, tensors)


def share_of(order: Order, held: dict[int, Sample]) -> RankShare:
    """What `order` was made from; `held` are the samples that this rank has, by number."""
    about = dict(order.about)
    for n, (number, other) in enumerate(zip(about["new"], about.pop("samples"))):
        # of its own: what came is one piece
        own: dict[str, Any] = {name: order.tensors[f"{n}.{name}"].clone() for name in TENSORS}
        held[number] = Sample(**other, **own)
    for number in about["gone"]:
        del held[number]
    return RankShare(samples=[held[number] for number in about["numbers"]], **about)


class Dealer:
    """Knows which rank has which sample."""

    def __init__(self, ranks: int):
        self._ranks = ranks
        # rank and number of every sample that lives, by its id
        self._at: dict[int, tuple[int, int]] = {}
        self._count = 0
        self._gone: list[list[int]] = [[] for _ in range(ranks)]

    def deal(
        self, samples: Sequence[Sample], unseen: Sequence[Sample], depth: int, before: bool,
        after: bool,
    ) -> list[RankShare]:  # fmt: skip
        """A share for each rank: what was dealt before to whom has it, then the longest first, each
        to whom has fewest positions."""
        positions = [0] * self._ranks
        for sample in samples:
            if id(sample) in self._at:
                positions[self._at[id(sample)][0]] += len(sample.features)
        fresh = [s for s in samples if id(s) not in self._at]
        for sample in sorted(fresh, key=lambda s: -len(s.features)):
            rank = positions.index(min(positions))
            positions[rank] += len(sample.features)
            self._at[id(sample)] = rank, self._count
            weakref.finalize(sample, self._forget, id(sample)).atexit = False
            self._count += 1
        never, first = {id(s) for s in unseen}, {id(s) for s in fresh}
        shares = []
        for rank in range(self._ranks):
            # in the order of the batch
            own = [s for s in samples if self._at[id(s)][0] == rank]
            shares.append(
                RankShare(
                    own, [n for n, s in enumerate(own) if id(s) in never], depth, before, after,
                    numbers=[self._at[id(s)][1] for s in own],
                    new=[self._at[id(s)][1] for s in own if id(s) in first],
                    gone=self._gone[rank],
                )
            )  # fmt: skip
            self._gone[rank] = []
        return shares

    def _forget(self, key: int) -> None:
        rank, number = self._at.pop(key)
        self._gone[rank].append(number)
