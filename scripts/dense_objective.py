"""The trainer's objective as one would write it first in PyTorch: dense masks, whole logits,
autograd.

The yardstick of bench_trainer_cpu.py. It shares with the trainer what is not in question (the
draft's layers, the packed batch with its indices) and does the rest plainly:
scaled_dot_product_attention with a boolean mask [Q, T + M] of every level, head -> logits [Q, V] ->
log_softmax -> distances by autograd. Only the default distance and full draft vocabularies are
written.

Dimensions: T positions, Q queries of a level, M nodes of all levels so far, R queries with a loss,
K kept logits, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora_trainer.drafts.batch import Batch
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.learn.objective import LossConfig


class DenseDraft(Draft):
    """A draft whose queries see all positions and nodes of the batch, but for a mask."""

    def _attend(
        self, layer, x, rope, context_kv, node_kv, context_start, context_end, ancestors
    ) -> Tensor:
        q, (k, v) = layer.self_attn.query(x, rope), context_kv
        positions = torch.arange(len(k), device=k.device)
        mask = (positions >= context_start[:, None]) & (positions < context_end[:, None])
        if node_kv is not None:
            k, v = (torch.cat([a, b]) for a, b in zip(context_kv, node_kv, strict=True))
            nodes = torch.zeros(
                len(q), len(node_kv[0]), dtype=torch.bool, device=k.device
            ).scatter_(1, ancestors, True)
            mask = torch.cat([mask, nodes], 1)
        # repeated rather than enable_gqa: with it the CPU has no fused kernel, and scores of all
        # heads are kept
        k, v = (a.repeat_interleave(q.shape[1] // a.shape[1], 1) for a in (k, v))
        heads_first = (a.transpose(0, 1)[None] for a in (q, k, v))
        o = F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, scale=self.config.head_dim**-0.5
        )
        return o[0].transpose(0, 1)


def dense_loss(draft: DenseDraft, batch: Batch, config: LossConfig, counts: Tensor) -> Tensor:
    """L's share of `batch`, with `counts` as aurora_trainer.learn.objective.losses takes them."""
    assert set(config.distance) <= {"forward_kl", "greedy"} and config.rejected_by == "uniform"
    total = torch.zeros(())
    for depth, (state, level) in enumerate(zip(draft.states(batch), batch.levels, strict=True)):
        target = level.target[level.rows]
        log_q = F.log_softmax(draft.logits(state[level.rows]), -1)  # [R, V]
        log_q_kept = log_q.gather(1, batch.topk_ids[target])  # [R, K]
        log_q_tail = torch.log1p(-log_q_kept.exp().sum(-1).clamp_max(1 - 1e-6))
        p = (batch.topk_logits[target] - batch.logsumexp[target, None]).exp()
        p_tail = (1 - p.sum(-1)).clamp_min(0)
        forward_kl = (p * (p.clamp_min(1e-30).log() - log_q_kept)).sum(-1)
        forward_kl = forward_kl + p_tail * (p_tail.clamp_min(1e-30).log() - log_q_tail)
        terms = {"forward_kl": forward_kl, "greedy": -log_q_kept[:, 0]}
        distance = sum(share * terms[name] for name, share in config.distance.items())
        accepted = level.accepted[level.rows]
        for weight, rows, count in (
            (1.0, accepted, counts[depth, 0]),
            (config.rejected, ~accepted, counts[depth, 1]),
        ):
            if weight and rows.any():
                total = total + config.gamma**depth * weight / float(count) * distance[rows].sum()
    return total
