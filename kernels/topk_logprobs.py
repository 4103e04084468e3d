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
    lowest = torch.finfo(logits.dtype).min
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    logsumexp = torch.logsumexp(logits.float(), dim=-1).clamp_min(torch.finfo(torch.float32).min)
    return ids.to(torch.int32), top.clamp_min(lowest), logsumexp
