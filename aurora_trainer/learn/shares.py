"""A batch, dealt to the ranks: each gets whole samples, about as many positions as every other.

The batch is one rank's, whatever the number of ranks: they change how long an update takes, and not
what it learns. A share travels as an order (ranks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from aurora_trainer.intake.sample import Sample
from aurora_trainer.ranks import Order

LEARN = "learn"
TENSORS = tuple(f.name for f in fields(Sample) if "Tensor" in str(f.type))
OTHERS = tuple(f.name for f in fields(Sample) if f.name not in TENSORS)


@dataclass(frozen=True)
class Share:
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

    def order(self) -> Order:
        about = [{name: getattr(s, name) for name in OTHERS} for s in self.samples]
        tensors = {
            f"{n}.{name}": getattr(s, name) for n, s in enumerate(self.samples) for name in TENSORS
        }
        rest = dict(unseen=self.unseen, depth=self.depth, before=self.before, after=self.after)
        return Order(LEARN, {"samples": about} | rest, tensors)


def share_of(order: Order) -> Share:
    """What `Share.order` was made from."""
    about = dict(order.about)
    samples = [
        Sample(**other, **{name: order.tensors[f"{n}.{name}"] for name in TENSORS})
        for n, other in enumerate(about.pop("samples"))
    ]
    return Share(samples=samples, **about)


def deal(
    samples: Sequence[Sample],
    unseen: Sequence[Sample],
    ranks: int,
    depth: int,
    before: bool,
    after: bool,
) -> list[Share]:
    """A share for each rank: the longest samples first, each to whom has fewest positions."""
    new = {id(s) for s in unseen}
    mine: list[list[int]] = [[] for _ in range(ranks)]
    positions = [0] * ranks
    for n in sorted(range(len(samples)), key=lambda n: -len(samples[n].features)):
        rank = positions.index(min(positions))
        mine[rank].append(n)
        positions[rank] += len(samples[n].features)
    shares = []
    for numbers in mine:
        # in the order of the batch
        own = [samples[n] for n in sorted(numbers)]
        known = [n for n, s in enumerate(own) if id(s) in new]
        shares.append(Share(own, known, depth, before, after))
    return shares
