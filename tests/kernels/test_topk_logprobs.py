import math

import pytest
import torch
from aurora_kernels.topk_logprobs import topk_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "vocab", "k"), [(0, 5, 2), (1, 1, 1), (7, 33, 4), (3, 5, 9), (4, 2117, 9)]
)
def test_kept_logits_and_logsumexp(rows, vocab, k, dtype):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    ids, top, logsumexp = topk_logprobs(logits, k)
    assert ids.dtype == torch.int32 and ids.shape == top.shape == (rows, min(k, vocab))
    assert torch.equal(logits, before)
    assert torch.equal(logits.gather(1, ids.long()), top)
    assert torch.equal(top, logits.sort(-1, descending=True).values[:, :k])
    torch.testing.assert_close(
        logsumexp.double(), logits.double().logsumexp(-1), atol=1e-5, rtol=1e-5
    )


def test_masked_logits_come_out_finite():
    ids, top, logsumexp = topk_logprobs(
        torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf] * 3]), 2
    )
    assert top.isfinite().all() and logsumexp.isfinite().all()
    assert top[0, 0] == 0 and logsumexp[0] == 0 and top[0, 1] == torch.finfo(torch.float32).min


def test_large_logits_do_not_overflow():
    _, top, logsumexp = topk_logprobs(torch.tensor([[1e4, -1e4, 1e4]]), 3)
    assert logsumexp[0].item() == pytest.approx(1e4 + math.log(2)) and top[0].tolist() == [
        1e4,
        1e4,
        -1e4,
    ]
