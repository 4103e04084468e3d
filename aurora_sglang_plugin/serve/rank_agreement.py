"""Tensor-parallel ranks agree on the step of a swap, by a reduction that is started early and read
late.

    step k      every rank offers the version that it has staged (0: none), and one of them a plan
    step k + m  every rank reads the answer: the version, if all offered the same, FAILED, if any
                rank said so, else 0; the plan

All ranks count the same steps, so they swap at the same one. Reading m steps later makes the wait
empty in practice; it is kept, because a rank that went on without the answer would draft with other
weights than its peers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

INTERVAL_STEPS = 8
# a version that was noticed so long ago here, and is not on every rank, is told of
RANKS_DIFFER_S = 30.0


class Agreement:
    """`group` is the ranks' CPU (gloo) group; calls are made in the same order on every rank.

    A plan is `plan_size` numbers; ranks that have none offer NOTHING in each place.
    """

    NOTHING = 1 << 30
    # offered in place of a version by a rank whose swap raised
    FAILED = -1

    def __init__(self, group: dist.ProcessGroup, plan_size: int = 0):
        self._group = group
        self._steps = 0
        # of the last offer: the version, and when it was noticed
        self._offered, self._since = 0, 0.0
        self._told_of = 0
        self._work: dist.Work | None = None
        self._extremes = torch.zeros(2 + plan_size, dtype=torch.int64)

    def due(self) -> bool:
        """Count a step; True where this one offers."""
        self._steps += 1
        return self._steps % INTERVAL_STEPS == 1

    def offer(self, version: int, plan: Sequence[int] = (), since: float = 0.0) -> None:
        """`since`: when the version was noticed (monotonic)."""
        assert self._work is None
        self._offered, self._since = version, since
        plan = plan or [self.NOTHING] * (len(self._extremes) - 2)
        self._extremes.copy_(torch.tensor([version, -version, *plan]))
        self._work = dist.all_reduce(self._extremes, dist.ReduceOp.MIN, self._group, async_op=True)

    def answer(self) -> tuple[int, list[int]] | None:
        """At the last step before the next offer: the agreed version, 0 for none or FAILED, and the
        plan, empty for none. At other steps None.
        """
        if self._work is None or self._steps % INTERVAL_STEPS:
            return None
        version = self._read()
        if not version and self._offered > 0:
            self._tell_of_ranks_that_differ()
        plan = self._extremes[2:].tolist()
        return version, plan if all(number < self.NOTHING for number in plan) else []

    def ask(self, version: int) -> bool:
        """Offer and wait: whether all ranks have the same version (before serving)."""
        self.offer(version)
        return self._read() == version

    def _tell_of_ranks_that_differ(self) -> None:
        if self._offered != self._told_of and time.monotonic() - self._since > RANKS_DIFFER_S:
            self._told_of = self._offered
            log.warning(
                "draft version=%d is ready on this rank and not on every other: it is not swapped"
                " in; expected every rank to see the same weights.directory", self._offered,
            )  # fmt: skip

    def _read(self) -> int:
        self._work.wait()
        self._work = None
        smallest, largest = int(self._extremes[0]), -int(self._extremes[1])
        return smallest if smallest in (largest, self.FAILED) else 0
