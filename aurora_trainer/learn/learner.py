"""What every rank does of learning: it holds the draft, its rows of the optimizer's state, and
trains on its share of a batch.

Rank 0 calls these methods, and tells the other ranks to call them with it (follower.py). The loss
and its gradient are sums over the shares, each query weighed by the counts of the whole batch
(objective.py), so that the ranks together learn what one would.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from aurora_kernels.tree_loss import TreeLoss
from torch import Tensor

from aurora_trainer.drafts.batch import Batch, pack
from aurora_trainer.drafts.kept_features import KeptFeatures
from aurora_trainer.drafts.kinds import Draft
from aurora_trainer.learn.accept_length import Walked, chains, walked
from aurora_trainer.learn.objective import Score, losses, score
from aurora_trainer.learn.optimizer import Optimizer, Update
from aurora_trainer.learn.running_mean import RunningMean
from aurora_trainer.learn.shares import RankShare
from aurora_trainer.ranks import Ranks

if TYPE_CHECKING:
    from aurora_trainer.config import TrainerConfig

log = logging.getLogger(__name__)

NOWHERE: Walked = (0.0, 0.0)


@dataclass(frozen=True)
class Learned:
    """One update, over all ranks. Walks are None if they were not asked for, and `after` too if it
    could not be taken."""

    update: Update
    score: Score
    before: Walked | None
    after: Walked | None


class Learner:
    """`start` comes first."""

    draft: Draft
    optimizer: Optimizer
    mean: RunningMean

    def __init__(self, config: TrainerConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        rejected = bool(config.loss.rejected) and config.batch.rejected
        self.features = KeptFeatures(config.model.device)
        self.packing = config.batch.model_copy(update={"rejected": rejected})

    def start(self, draft: Draft) -> None:
        """Train `draft` from here on: its float32 weights become the masters of what computes."""
        if self.leads_others:
            self.ranks.tell("start", {"draft": draft.config.to_json()}, draft.checkpoint())
        with self.ranks.together():
            model, config = self.config.model, self.config.optimizer
            masters = {n: p.detach() for n, p in draft.named_parameters()}
            self.draft = draft.compute_in(model.device, getattr(torch, model.compute_dtype))
            width = draft.config.hidden_size
            self.optimizer = Optimizer(self.draft, config, masters, width, self.ranks)
            self.mean = RunningMean(config.average, self.optimizer.masters)

    @property
    def leads_others(self) -> bool:
        return self.ranks.size > 1 and not self.ranks.rank

    def learn(self, shares: list[RankShare]) -> Learned | None:
        """One update; None if the batch has no targets. Rank 0 has all shares, the others theirs.

        What raises at one rank before the update raises at all of them: then call `give_up`.
        """
        if self.leads_others:
            with self.ranks.together():
                self.ranks.tell_each([share.order() for share in shares[1:]])
        share, ranks = shares[0], self.ranks
        batch: Batch | None = None
        empty = torch.zeros(share.depth, 2, dtype=torch.float64)

        def packed() -> Tensor:
            nonlocal batch
            if share.samples:
                batch = self._packed(share)
            return (batch.counts() if batch else empty).flatten()

        counts = ranks.sum_of(packed, empty.numel()).view_as(empty)
        if not counts.any():
            # nothing to learn: an update would only be the momentum's
            return None

        def computed() -> Tensor:
            if batch is None or not batch.counts().any():
                return torch.zeros(3 + 4 * empty.numel(), dtype=torch.float64)
            # Everything is queued on the device before anything is read from it.
            result = losses(self.draft, batch, self.config.loss, counts)
            result.loss_sum.backward()
            s = score(batch, result)
            sums = torch.stack([s.count, s.loss, s.greedy_match, s.overlap])
            walk = self._walk(batch, share, result) if share.before else NOWHERE
            loss = result.loss_sum.detach().cpu().double()
            return torch.cat([loss[None], torch.tensor(walk).double(), sums.flatten()])

        figures = ranks.sum_of(computed, 3 + 4 * empty.numel())
        with ranks.together():
            update = self.optimizer.step(figures[0])
            if update.applied:
                self.mean.update(self.optimizer.masters, self.optimizer.updates)
        before = (float(figures[1]), float(figures[2])) if share.before else None
        after = None
        if share.after:

            @torch.no_grad()
            def again() -> Tensor:
                if batch is None or not batch.counts().any():
                    return torch.zeros(2, dtype=torch.float64)
                result = losses(self.draft, batch, self.config.loss, counts)
                return torch.tensor(self._walk(batch, share, result), dtype=torch.float64)

            try:
                steps, tokens = ranks.sum_of(again, 2).tolist()
                after = (steps, tokens)
            except Exception:
                # at all ranks alike. The batch is learnt: it must not be tried again
                log.warning("batch not walked again after its update", exc_info=True)
        return Learned(update, Score(*figures[3:].view(4, -1, 2)), before, after)

    def give_up(self) -> None:
        """The update that raised is over: no gradient stays."""
        self.draft.zero_grad(set_to_none=True)
        # the device may be full
        self.features.clear()
        if self.config.model.device == "cuda":
            torch.cuda.empty_cache()

    def begin_again(self) -> None:
        """Traffic changed: the schedule and the mean begin again."""
        if self.leads_others:
            self.ranks.tell("begin_again")
        with self.ranks.together():
            self.optimizer.warm_up_again()
            self.mean.restart(self.optimizer.masters, self.optimizer.updates)

    def mean_draft(self) -> Draft:
        """At rank 0, a draft that holds the mean, to be scored; elsewhere its own draft."""
        if not self.mean.weights or self.ranks.size == 1:
            return self.mean.draft(self.draft)
        if self.leads_others:
            self.ranks.tell("mean_draft")
        with self.ranks.together():
            whole = self._whole(self.mean.weights)
            if not self.ranks.rank:
                return self.mean.draft(self.draft, whole)
            for _ in whole:
                pass
            return self.draft

    def finite(self, most: float) -> list[str]:
        """Roles, `live` and `mean`, whose weights are all finite and no larger than `most`."""
        if self.leads_others:
            self.ranks.tell("finite", {"most": most})
        with self.ranks.together():
            held = self._held()
            # NaN is in no bound
            beyond = [
                any(not (rows.abs() <= most).all() for rows in weights.values())
                for weights in held.values()
            ]
            found = self.ranks.sum_(torch.tensor(beyond, dtype=torch.float64)).tolist()
            return [role for role, ranks in zip(held, found) if not ranks]

    def weights(self, role: str) -> dict[str, Tensor]:
        """At rank 0, the weights of that role, whole and in float32."""
        held = self._held()[role]
        if self.ranks.size == 1:
            return held
        if self.leads_others:
            self.ranks.tell("weights", {"role": role})
        with self.ranks.together():
            # the device holds one of them at a time
            return {name: whole.cpu() for name, whole in self._whole(held)}

    def snapshot(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """At rank 0, what `restore` goes on from, copied to the memory of the last snapshot."""
        if self.leads_others:
            self.ranks.tell("snapshot")
        with self.ranks.together():
            draft = ((f"draft/{n}", p.detach()) for n, p in self.draft.named_parameters())
            optimizer = ((f"optimizer/{n}", t) for n, t in self.optimizer.whole())
            average = ((f"average/{n}", t) for n, t in self._whole(self.mean.weights))
            tensors = chain(draft, optimizer, average)
            if not self.ranks.rank:
                return copied(held, tensors)
            for _ in tensors:
                pass
            return held

    def restore(
        self, tensors: dict[str, Tensor], optimizer: dict[str, Any], mean_began: int, whose: str
    ) -> None:
        """Go on from a snapshot's tensors (none but at rank 0), the state of its optimizer, and the
        updates at which its mean began.

        Raises ValueError for those of something else.
        """
        draft, own, mean = (_under(tensors, part) for part in ("draft", "optimizer", "average"))
        if not self.ranks.rank:
            self.draft.load_checkpoint(draft, whose)
            self.optimizer.check(own, optimizer)
            if not mean:
                # one that was off begins now
                mean, mean_began = _under(own, "master", "."), optimizer["updates"]
            self.ranks.tell("restore", {"optimizer": optimizer, "mean_began": mean_began})
        with self.ranks.together(), torch.no_grad():
            self.optimizer.load_state_dict(None if self.ranks.rank else own, optimizer)
            self.mean.began = mean_began
            for name, rows in self.mean.weights.items():
                self.optimizer.shards.scatter_(name, mean.get(name), rows)

    def _packed(self, share: RankShare) -> Batch:
        packing = self.packing.model_copy(update={"depth": share.depth})
        return pack(share.samples, packing, self.features.of(share.samples)).to(
            self.features.device
        )

    def _held(self) -> dict[str, dict[str, Tensor]]:
        """By role, this rank's rows of what may be published."""
        held = {"live": self.optimizer.masters}
        return held | ({"mean": self.mean.weights} if self.mean.weights else {})

    def _whole(self, rows: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, own in rows.items():
            yield name, self.optimizer.shards.gathered(name, own)

    @torch.no_grad()
    def _walk(self, batch: Batch, share: RankShare, found: TreeLoss) -> Walked:
        """Steps and tokens of the walk over a share's unseen samples."""
        if not share.unseen:
            return NOWHERE
        some = [s if n in share.unseen else None for n, s in enumerate(share.samples)]
        walks: np.ndarray = walked(self.draft, batch, some, chains(self.draft, batch, found))
        steps, tokens = walks.sum(0)
        return float(steps), float(tokens)


def copied(held: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors' values on the CPU, in the memory of the last snapshot: new memory would cost
    several times as long. The last one must be written by then.
    """
    before = dict(held)
    held.clear()
    for name, t in tensors:
        own = before.pop(name, None)
        if own is not None and own.shape == t.shape and own.dtype == t.dtype:
            held[name] = own.copy_(t)
        else:
            held[name] = t.to("cpu", copy=True)
    return held


def _under(tensors: dict[str, Tensor], part: str, mark: str = "/") -> dict[str, Tensor]:
    head = part + mark
    return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
