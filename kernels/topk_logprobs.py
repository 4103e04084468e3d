"""What is kept of a row of target logits: the K largest and the log-sum-exp of all.

Dimensions: R rows, V vocabulary, K kept. exp(logits - logsumexp) are the kept probabilities; one minus their sum is
the exact mass of everything that was not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [R, K], logits [R, K] in the input's dtype, largest first, logsumexp float32 [R]) of logits [R, V].

    K is min(k, V). All outputs are finite: -inf becomes the dtype's most negative number. The input is not changed.
    """
    return topk_logprobs_ref(logits, k)


def topk_logprobs_ref(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """In chunks of rows, so that temporaries stay below about 128 MiB whatever the batch."""
    rows, vocab = logits.shape
    k, lowest = min(k, vocab), torch.finfo(logits.dtype).min
    ids = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    kept = torch.empty(rows, k, dtype=logits.dtype, device=logits.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    chunk = max(1, (1 << 24) // vocab)
    for at in range(0, rows, chunk):
        part = slice(at, at + chunk)
        top, found = logits[part].topk(k, dim=-1)
        ids[part], kept[part] = found, top.clamp_min(lowest)
        logsumexp[part] = torch.logsumexp(logits[part].float(), dim=-1).clamp_min(torch.finfo(torch.float32).min)
    return ids, kept, logsumexp
