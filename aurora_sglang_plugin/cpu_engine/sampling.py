"""Sampling verification on the CPU: what SGLang calls when a request of the batch samples.

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

# torch's stub of the module leaves it out
from torch.nn.functional import threshold_  # type: ignore[attr-defined]

from aurora_sglang_plugin.serve.snapshot import parents

logger = logging.getLogger(__name__)

# So many of the largest probabilities are looked at first; a wider nucleus is found by bisection.
NUCLEUS = 256
BELOW_ONE = 1 - 2**-24
TINY = torch.finfo(torch.float32).tiny


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
    """Keep the `top_ks` [R] largest of each row of `probs` [R, V], and ties with the last.

    Returns probabilities again; float32 `probs` are overwritten. A `top_ks` of 1 is SGLang's
    temperature 0: of equal largest ones the first is kept, as argmax does.
    """
    cut, greedy = top_ks < probs.shape[1], top_ks <= 1
    if not cut.any():
        return probs
    first = probs.argmax(1) if greedy.any() else None
    width = int(top_ks[cut].max())
    threshold = topk(probs, width)[0].gather(1, (top_ks.clamp(max=width).long() - 1)[:, None])
    _keep(probs, threshold.masked_fill_(~cut[:, None], 0.0))
    if first is not None:
        probs[greedy] = 0.0
        probs[greedy, first[greedy]] = 1.0
    return probs


def top_p_renorm_prob(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Keep the fewest largest of each row of `probs` [R, V] that reach `top_ps` [R], and ties.

    Returns probabilities again; float32 `probs` are overwritten.
    """
    width, cut = min(NUCLEUS, probs.shape[1]), top_ps < 1
    largest = topk(probs, width)[0]
    short = (largest.cumsum(1) < top_ps[:, None]).sum(1)
    threshold = largest.gather(1, short.clamp(max=width - 1)[:, None])
    wide = (short == width) & cut
    if wide.any() and width < probs.shape[1]:
        threshold[wide] = _wide_nucleus(probs[wide], top_ps[wide, None], threshold[wide])
    return _keep(probs, threshold.masked_fill_(~cut[:, None], 0.0))


def _wide_nucleus(probs: Tensor, top_ps: Tensor, above: Tensor) -> Tensor:
    """The largest threshold [r, 1] that leaves a mass of `top_ps` [r, 1]; `above` leaves less.

    Bisects the bits of the threshold, whose order is that of positive floats: 30 passes at most;
    sorting a row costs 100.
    """
    high, scaled = above.view(torch.int32), torch.empty_like(probs)
    low = torch.zeros_like(high)
    while (high - low > 1).any():
        middle = (low + high) // 2
        unit = middle.view(torch.float32).clamp(min=TINY)
        threshold_(torch.div(probs, unit, out=scaled), BELOW_ONE, 0.0)
        enough = scaled.sum(1, keepdim=True) * unit >= top_ps
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)


def _keep(probs: Tensor, threshold: Tensor) -> Tensor:
    """Write zeros where `probs` are below the row's `threshold` [R, 1]; the rest sums to 1
    again.
    """
    # In units of its threshold one number serves every row, and torch has a fast pass for that.
    threshold_(probs.div_(threshold.clamp(min=TINY)), BELOW_ONE, 0.0)
    return probs.div_(probs.sum(1, keepdim=True))


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
    parent = torch.from_numpy(parents(retrive_next_token.numpy(), retrive_next_sibling.numpy()))
    p, coin = (
        _of_parent(target_probs, parent, candidates),
        uniform_samples.gather(1, parent.clamp(min=0)),
    )
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
    """Rejection sampling of chains (`--speculative-use-rejection-sampling`), written like trees.

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
    """A node's token in its parent's distribution: [B, N] of probs [B, N, V]; 0 without parent."""
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
    """Write the path of nodes that are `accepted` [B, N] by their parents; returns its last,
    [B].
    """
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
    """Draw [B] ids by `coins` [B] from `weights` [B, V], or from `otherwise` if these are all 0."""
    nothing = weights.sum(1, keepdim=True) <= 0
    cdf = torch.where(nothing, otherwise, weights).cumsum(1)
    total = cdf[:, -1:].contiguous()
    # the first id whose interval ends beyond the coin; rounding may put the coin beyond them all
    found = torch.searchsorted(cdf, coins[:, None] * total, right=True)
    return torch.minimum(found, torch.searchsorted(cdf, total))[:, 0]
