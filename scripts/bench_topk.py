"""Top-K and log-sum-exp of target logits: ours, and torch.topk with torch.logsumexp."""

from __future__ import annotations

from functools import partial

import torch
from aurora_kernels.topk_logprobs import topk_logprobs
from kernel_timing import Bench, relative_error

# rows, V, K, dtype
FIRST = [
    (6, 151_936, 32, torch.bfloat16),
    (96, 151_936, 32, torch.bfloat16),
    (96, 151_936, 32, torch.float32),
    (256, 151_936, 1, torch.bfloat16),
    (256, 151_936, 32, torch.bfloat16),
    (256, 151_936, 128, torch.bfloat16),
    (4096, 32_000, 32, torch.bfloat16),
]
REST: list = []
TINY = [(3, 700, 5, torch.float32)]


def torch_topk(logits: torch.Tensor, k: int):
    top, ids = logits.topk(k, dim=-1)
    return ids, top, torch.logsumexp(logits.float(), dim=-1)


def bench(run: Bench, rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, vocab, device=run.device) * 3).to(dtype)
    setting = f"{rows} rows V={vocab} K={k} {str(dtype)[6:]}"
    expected, top = (
        logits.double().logsumexp(-1),
        logits.sort(dim=-1, descending=True).values[:, :k],
    )
    for side, function in (("ours", topk_logprobs), ("torch.topk + logsumexp", torch_topk)):

        def check(function=function, logits=logits, k=k, expected=expected, top=top):
            ids, kept, logsumexp = function(logits, k)
            exact = torch.equal(kept, top) and torch.equal(logits.gather(1, ids.long()), top)
            return relative_error(logsumexp, expected) if exact else float("inf")

        run.row(
            "topk_logprobs", setting, side, logits.nbytes, partial(function, logits, k), check, 1e-5
        )
