"""The draft's vocabulary: which target tokens it can propose.

Dimensions: V target vocabulary, VD draft vocabulary. d2t and t2d are those of the plugin's
drafts/eagle3_vocab.py, d2t in int64 with ascending ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_sglang_plugin.drafts.eagle3_vocab import vocabulary_problem


def most_frequent(counts: Tensor, size: int, keep: tuple[int, ...] = ()) -> Tensor:
    """d2t of the `size` most frequent target ids and of those in `keep` (end-of-text tokens, say).

    counts [V] is how often each target id was generated. Ties go to the lower id.
    """
    if not len(keep) <= size <= len(counts):
        raise ValueError(
            f"draft vocabulary of {size}: expected {len(keep)} (tokens to keep) to {len(counts)}"
        )
    outside = [i for i in keep if not 0 <= i < len(counts)]
    if outside:
        raise ValueError(f"tokens to keep {outside}: expected ids from 0 to {len(counts) - 1}")
    rank = counts.to(torch.float64).clone()
    rank[list(keep)] = torch.inf
    ids = torch.argsort(rank, descending=True, stable=True)[:size].sort().values
    return ids - torch.arange(size)


def target_ids(d2t: Tensor) -> Tensor:
    """int64 [VD]: the target id of each draft id."""
    return d2t + torch.arange(len(d2t), device=d2t.device)


def draft_ids(d2t: Tensor, vocab_size: int) -> Tensor:
    """int64 [V]: the draft id of each target id, -1 where the draft has none."""
    ids = d2t.new_full((vocab_size,), -1)
    ids[target_ids(d2t)] = torch.arange(len(d2t), device=d2t.device)
    return ids


def mask(d2t: Tensor, vocab_size: int) -> Tensor:
    """t2d, bool [V]."""
    return draft_ids(d2t, vocab_size) >= 0


def check(d2t: Tensor, draft_vocab_size: int, vocab_size: int) -> None:
    """Raises ValueError unless d2t names draft_vocab_size different target ids."""
    if d2t.dtype != torch.int64 or d2t.shape != (draft_vocab_size,):
        raise ValueError(
            f"d2t is {d2t.dtype} {tuple(d2t.shape)}, expected int64 ({draft_vocab_size},)"
        )
    problem = vocabulary_problem(d2t.cpu().numpy(), vocab_size)
    if problem:
        raise ValueError(problem)
