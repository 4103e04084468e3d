"""Final norm, draft head and the distance to the target's distribution, fused over chunks of rows.

Dimensions: R rows (queries with a target), H hidden, VD draft vocabulary, K kept target logits.
"""

from __future__ import annotations

from collections.abc import Mapping

from aurora_kernels.tree_loss_ref import DISTANCES, TreeLoss, tree_loss_ref
from torch import Tensor

__all__ = ["DISTANCES", "TreeLoss", "tree_loss"]


def tree_loss(
    state: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    topk_ids: Tensor,
    topk_logits: Tensor,
    logsumexp: Tensor,
    weight: Tensor,
    distance: str | Mapping[str, float],
    eps: float,
) -> TreeLoss:
    """Distances between softmax(head_weight @ rms_norm(state)) and the targets, and their weighted sum.

    state [R, H] pre-norm; norm_weight [H]; head_weight [VD, H]; topk_ids int64 [R, K], DRAFT ids, largest logit first,
    -1 where the draft has no such token, no id twice in a row; topk_logits [R, K]; logsumexp [R] over the target's
    whole vocabulary; weight [R]; eps of the norm. distance: one of DISTANCES, or a mixture such as
    {"forward_kl": 0.5, "tv": 0.5}. Raises ValueError for a distance that does not exist.
    """
    return tree_loss_ref(state, norm_weight, head_weight, topk_ids, topk_logits, logsumexp, weight, distance, eps)
