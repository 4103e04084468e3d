"""Sampling verification on the CPU: what SGLang calls when a request of the batch has a temperature.

SGLang has these kernels on CUDA only, and therefore takes the argmax on a CPU whatever a request
asks for. `attach` gives its own `eagle_sample` the stand-ins below, and lets it take the branch
that it takes on CUDA. They are written from the CUDA and Triton kernels of the same names
(`sglang/kernels/jit/csrc/speculative/sampling.cuh`, `kernels/ops/speculative/reject_sampling.py`,
FlashInfer's renormalisation).

Dimensions: R rows, V target vocabulary, B requests, N tree nodes (node 0 is the root), S draft
steps. The arguments' names are the call site's, misspelt `retrive` included.
"""

from __future__ import annotations

import logging

import torch
from aurora_kernels.topk_logprobs import topk
from torch import Tensor
from torch.nn.functional import threshold_

from aurora_sglang_plugin.snapshot import parents

logger = logging.getLogger(__name__)

# Among so many of the largest probabilities a nucleus is looked for first, then among 16 times as many.
NUCLEUS = 256
BELOW_ONE = 1 - 2**-24


def attach() -> None:
    """Let SGLang's `eagle_sample` sample on this CPU, with the stand-ins of this file."""
    from sglang.srt.speculative import eagle_utils, spec_utils

    names = "top_k_renorm_prob top_p_renorm_prob".split()
    names += ["tree_speculative_sampling_target_only", "chain_speculative_sampling_triton"]
    missing = [n for n in [*names, "_verify_uses_greedy"] if not hasattr(eagle_utils, n)]
    if missing:
        logger.warning("sampled requests are verified greedily missing_in_sglang=%s", missing)
        return
    for name in names:
        setattr(eagle_utils, name, globals()[name])
    # The draft of a rejection-sampling server draws its proposals with it.
    spec_utils.row_argmax = lambda scores: scores.argmax(-1)
    by_platform = eagle_utils._verify_uses_greedy
    eagle_utils._verify_uses_greedy = lambda **facts: by_platform(**facts | {"is_cpu": False})


def top_k_renorm_prob(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Keep the `top_ks` [R] largest of each row of `probs` [R, V], and all that equal the last of them.

    Returns probabilities again; `probs` is overwritten. A `top_ks` of 1 is SGLang's temperature 0:
    of equal largest ones the first is kept, as argmax does.
    """
    vocab = probs.shape[1]
    greedy, cut = top_ks <= 1, top_ks < vocab
    if greedy.any():
        rows = greedy.nonzero()[:, 0]
        best = probs[rows].argmax(1)
        probs[rows] = 0.0
        probs[rows, best] = 1.0
    rows = (cut & ~greedy).nonzero()[:, 0]
    if len(rows):
        kept = top_ks[rows].long()
        largest = _largest(probs[rows], int(kept.max()))
        _keep(probs, rows, largest.gather(1, kept[:, None] - 1))
    return probs


def top_p_renorm_prob(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Keep the fewest largest of each row of `probs` [R, V] that reach `top_ps` [R] together, and ties.

    Returns probabilities again; `probs` is overwritten.
    """
    rows, width = (top_ps < 1).nonzero()[:, 0], NUCLEUS
    while len(rows):
        largest = _largest(probs[rows], width)
        width = largest.shape[1]
        short = (largest.cumsum(1) < top_ps[rows, None]).sum(1)
        found = (short < width) | (width == probs.shape[1])
        threshold = largest.gather(1, short.clamp(max=width - 1)[:, None])
        _keep(probs, rows[found], threshold[found])
        rows, width = rows[~found], 16 * width
    return probs


def _largest(probs: Tensor, k: int) -> Tensor:
    """The K = min(k, V) largest of each row, in order: [R, K]."""
    if k < probs.shape[1]:
        return topk(probs, k)[0]
    return probs.sort(1, descending=True).values


def _keep(probs: Tensor, rows: Tensor, threshold: Tensor) -> None:
    """Write zeros where `rows` [r] of `probs` are below their `threshold` [r, 1]; what is kept sums to 1 again."""
    # In units of the threshold one number serves all rows, and torch has a fast pass for that.
    part = probs[rows] / threshold.clamp(min=torch.finfo(probs.dtype).tiny)
    threshold_(part, BELOW_ONE, 0.0)
    probs[rows] = part / part.sum(1, keepdim=True)


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Walk each tree as if every node's token had been sampled from the target's distribution.

    A node's coin falls into the interval of at most one child: child after child takes the width
    of its probability in `target_probs` [B, N, V]. If it falls beyond all of them, the next token
    is drawn from what is left of the distribution. Written in place, as by the greedy verification:
    `predicts` [B*N], `accept_index` [B, S+1] (global node ids, -1 beyond the path) and
    `accept_token_num` [B], which excludes the bonus token. Coins are in [0, 1): `uniform_samples`
    [B, N] and `uniform_samples_for_final_sampling` [B].
    """
    parent = parents(retrive_next_token, retrive_next_sibling)
    p, coin = _of_parent(target_probs, parent, candidates), uniform_samples.gather(1, parent.clamp(min=0))
    sibling = (parent[:, :, None] == parent[:, None, :]).tril()
    # [B, N] a node and its older siblings together
    reached = (sibling * p[:, None, :]).sum(2)
    passes = (coin < reached / max(threshold_acc, 1e-9)) | (p >= threshold_single)
    passes &= (p > 0) & (parent >= 0)
    accepted = passes & ~(sibling.tril(-1) & passes[:, None, :]).any(2)

    out = (predicts, accept_index, accept_token_num)
    last = _write_path(*out, accepted, parent, candidates, retrive_index)
    rows = torch.arange(len(last))
    left = target_probs[rows, last]
    refused = parent == last[:, None]
    left[refused.nonzero()[:, 0], candidates[refused]] = 0.0
    bonus = _draw(left, target_probs[rows, last], uniform_samples_for_final_sampling)
    predicts[retrive_index[rows, last]] = bonus.to(predicts.dtype)


def chain_speculative_sampling_triton(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
    *,
    block_verification: bool = False,
) -> None:
    """Rejection sampling of chains (`--speculative-use-rejection-sampling`); written as by the tree's.

    A token that the draft sampled with probability q (`draft_probs` [B, S, V]) is kept with
    min(1, p/q); after the first that is not, the next token is drawn from max(0, p - q).
    """
    if block_verification:
        raise NotImplementedError("the CPU engine has no block verification")
    batch, n = candidates.shape
    parent = torch.arange(-1, n - 1).expand(batch, n)
    p = _of_parent(target_probs, parent, candidates)
    q = torch.zeros_like(p)
    q[:, 1:] = draft_probs.gather(2, candidates[:, 1:, None])[:, :, 0]
    coin = uniform_samples.gather(1, parent.clamp(min=0))
    accepted = (coin * q < p) & (q > 0) & (q <= 1)

    out = (predicts, accept_index, accept_token_num)
    last = _write_path(*out, accepted, parent, candidates, retrive_index)
    rows = torch.arange(batch)
    q = draft_probs[rows, last.clamp(max=n - 2)]
    # nothing was drafted behind the last node
    q = torch.where((q >= 0) & (q <= 1) & (last < n - 1)[:, None], q, 0.0)
    p = target_probs[rows, last]
    bonus = _draw((p - q).clamp_(min=0), p, uniform_samples_for_final_sampling)
    predicts[retrive_index[rows, last]] = bonus.to(predicts.dtype)


def _of_parent(probs: Tensor, parent: Tensor, tokens: Tensor) -> Tensor:
    """Each node's own token in its parent's distribution: [B, N] of probs [B, N, V]; 0 where there is no parent."""
    rows = torch.arange(len(parent))[:, None]
    return torch.where(parent >= 0, probs[rows, parent.clamp(min=0), tokens], 0.0)


def _write_path(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    accepted: Tensor,
    parent: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
) -> Tensor:
    """Write the nodes that are `accepted` [B, N] by their parents, from the root on; returns the last ones, [B]."""
    path = torch.zeros_like(accepted)
    path[:, 0] = True
    for _ in range(accept_index.shape[1] - 1):
        path |= accepted & path.gather(1, parent.clamp(min=0))
    rows, nodes = path.nonzero(as_tuple=True)
    depth = path.cumsum(1) - 1
    # parents come before children
    accept_index[rows, depth[rows, nodes]] = retrive_index[rows, nodes].to(accept_index.dtype)
    accept_token_num.copy_(depth[:, -1])
    rows, nodes = rows[nodes > 0], nodes[nodes > 0]
    predicts[retrive_index[rows, parent[rows, nodes]]] = candidates[rows, nodes].to(predicts.dtype)
    return (path * torch.arange(path.shape[1])).amax(1)


def _draw(weights: Tensor, otherwise: Tensor, coins: Tensor) -> Tensor:
    """One id per row, [B], drawn with `weights` [B, V] by `coins` [B]; from `otherwise` where all weights are 0."""
    nothing = weights.sum(1, keepdim=True) <= 0
    cdf = torch.where(nothing, otherwise, weights).cumsum(1)
    total = cdf[:, -1:].contiguous()
    # the first id whose interval ends beyond the coin; rounding may put the coin beyond them all
    found = torch.searchsorted(cdf, coins[:, None] * total, right=True)
    return torch.minimum(found, torch.searchsorted(cdf, total))[:, 0]
