"""The objective: what a batch's levels cost, and how well they would have drafted.

    L = sum_d gamma^d ( E_accepted[D(p, q)] + lambda * E_rejected[w * D(p, q)] )

E are means over ALL micro-batches and ranks of an update: sums divided by the counts that the
caller adds up (`Batch.counts`), never a mean of means. The level d of a query is its depth; `D` is
one of the distances of aurora_kernels.tree_loss, `w` is 1 or the probability that verification
reaches the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from aurora_kernels.tree_loss import DISTANCES, TreeLoss, tree_loss
from pydantic import AfterValidator, Field
from torch import Tensor

from aurora_sglang_plugin.config import Section
from aurora_trainer.drafts.batch import Batch, Level
from aurora_trainer.drafts.kinds import Draft


def _mixture(distance: dict[str, float]) -> dict[str, float]:
    if not distance or not set(distance) <= set(DISTANCES) or min(distance.values()) < 0:
        raise ValueError(f"expected non-negative weights of some of {', '.join(DISTANCES)}")
    return distance


class LossConfig(Section):
    """The objective's terms.

    The default distance suits SGLang's default verification, which accepts a drafted token with the
    probability that the target gives it, greedy or sampled (docs/learning.md). With
    `--speculative-use-rejection-sampling` the chance is sum min(p, q): tv is its distance.
    """

    # weights of `forward_kl`, `reverse_kl`, `tv`, `greedy`
    distance: Annotated[dict[str, float], AfterValidator(_mixture)] = {
        "forward_kl": 0.5,
        "greedy": 0.5,
    }
    # weight of each deeper level relative to the one above
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.8
    # lambda: weight of the rejected nodes' term
    rejected: Annotated[float, Field(ge=0)] = 0.0
    # w: `uniform`, or `reach`, the probability that verification reaches the node
    rejected_by: Literal["uniform", "reach"] = "uniform"


@dataclass
class Score:
    """Sums over queries with a loss, float64 [depth, 2] (accepted, rejected)."""

    count: Tensor
    # of D, unweighted
    loss: Tensor
    # of the draft's first choice being that of the target
    greedy_match: Tensor
    # of sum min(p, q)
    overlap: Tensor

    def mean(self, name: str) -> Tensor:
        """[depth, 2], NaN if there were no queries."""
        return getattr(self, name) / self.count


def objective(
    draft: Draft, batch: Batch, config: LossConfig, counts: Tensor | None = None
) -> tuple[Tensor, Score]:
    """(L's share of this batch, differentiable, and its Score), with `counts` as `losses` takes
    them.
    """
    result = losses(draft, batch, config, counts)
    return result.loss_sum, score(batch, result)


def losses(
    draft: Draft, batch: Batch, config: LossConfig, counts: Tensor | None = None
) -> TreeLoss:
    """The queries with a loss, level by level; `loss_sum` is L's share of this batch.

    Waits for no device.

    counts: float64 [depth, 2], those of the whole update (None: this batch is all of it). Shares of
        micro-batches add
    up to L, and so do their gradients.
    """
    counts = batch.counts() if counts is None else counts
    state, (norm, head, epsilon) = draft.states(batch), draft.head
    target = torch.cat([level.target[level.rows] for level in batch.levels])
    return tree_loss(
        torch.cat([s[level.rows] for s, level in zip(state, batch.levels, strict=True)]),
        norm,
        head,
        draft.to_draft_ids(batch.topk_ids)[target],
        batch.topk_logits[target],
        batch.logsumexp[target],
        torch.cat([_weight(level, d, config, counts) for d, level in enumerate(batch.levels)]),
        config.distance,
        epsilon,
    )


def _weight(level: Level, depth: int, config: LossConfig, counts: Tensor) -> Tensor:
    accepted, rejected = counts[depth].clamp_min(1).tolist()
    w = level.reach[level.rows] if config.rejected_by == "reach" else 1.0
    weight = torch.where(level.accepted[level.rows], 1.0 / accepted, config.rejected / rejected * w)
    return weight * config.gamma**depth


def score(batch: Batch, result: TreeLoss) -> Score:
    """What the metrics show of the batch's `losses`. One transfer, which waits for the device."""
    loss = result.loss
    columns = torch.stack(
        [torch.ones_like(loss), loss, result.greedy_match.to(loss.dtype), result.acceptance]
    )
    columns = columns.cpu().double()
    batch = batch.on_cpu
    sums = torch.zeros(4, batch.depth, 2, dtype=torch.float64)
    at = 0
    for d, level in enumerate(batch.levels):
        part = columns[:, at : at + len(level.rows)]
        at += len(level.rows)
        accepted = level.accepted[level.rows]
        sums[:, d, 0], sums[:, d, 1] = part[:, accepted].sum(-1), part[:, ~accepted].sum(-1)
    return Score(*sums)
