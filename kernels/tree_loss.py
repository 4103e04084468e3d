"""Final norm, draft head and the distance to the target's distribution, fused over chunks of rows.

Dimensions: R rows (queries with a target), H hidden, VD draft vocabulary, V target vocabulary, Ht
the target's hidden size, K kept target logits.

Logits exist for one chunk of rows at a time. cuBLAS multiplies, Triton does everything between the
products (tree_loss_kernels.py); off CUDA the references run (tree_loss_ref.py). Gradients are
computed in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import triton
from aurora_kernels.dispatch import use_kernels
from aurora_kernels.tree_loss_kernels import (
    blocks,
    exact_loss_kernel,
    norm_bwd_kernel,
    norm_fwd_kernel,
    norm_weight_bwd_kernel,
    padded,
    topk_loss_kernel,
)
from aurora_kernels.tree_loss_ref import (
    DISTANCES,
    TreeLoss,
    check_vocabularies,
    draft_ids_of,
    shares_of,
    tree_loss_exact_ref,
    tree_loss_ref,
)
from torch import Tensor

__all__ = ["DISTANCES", "TreeLoss", "tree_loss", "tree_loss_exact"]

# Logits alive at a time, the draft's and an exact target's together: with fewer, adding up the
# head's gradient chunk by chunk costs more (README, "Chunks and products").
CHUNK_LOGITS = 1 << 29
# partial sums of the norm weight's gradient
WEIGHT_GROUPS = 64


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
    """Distances between softmax(head_weight @ rms_norm(state)) and the targets, and their weighted
    sum.

    state [R, H] pre-norm; norm_weight [H]; head_weight [VD, H]; topk_ids int64 [R, K], DRAFT ids,
    largest logit first, -1 if the draft has no such token, no id twice in a row; topk_logits [R,
    K]; logsumexp [R] over the target's whole vocabulary; weight [R]; eps of the norm. distance: one
    of DISTANCES, or a mixture such as {"forward_kl": 0.5, "tv": 0.5}. Raises ValueError for a
    distance that does not exist.
    """
    if not (use_kernels(state) and use_kernels(head_weight)):
        return tree_loss_ref(
            state, norm_weight, head_weight, topk_ids, topk_logits, logsumexp, weight, distance, eps
        )
    shares = shares_of(distance)
    topk_ids, topk_logits, logsumexp = (
        t.contiguous() for t in (topk_ids, topk_logits, logsumexp.float())
    )
    k = topk_ids.shape[1]

    def score(
        part: slice, z: Tensor, dz: Tensor, row_weight: Tensor, out: TreeLoss, grads: bool
    ) -> None:
        _launch(
            topk_loss_kernel, (len(z),), z, dz, topk_ids[part], topk_logits[part], logsumexp[part],
            row_weight,
            out.loss[part], out.acceptance[part], out.argmax[part],
            z.shape[1], k, z.stride(0), dz.stride(0), *shares, GRADS=grads, KP=padded(k),
        )  # fmt: skip

    result = _fused(state, norm_weight, head_weight, weight, eps, score, head_weight.shape[0])
    return result._replace(greedy_match=result.argmax == topk_ids[:, 0])


def tree_loss_exact(
    state: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    target_state: Tensor,
    target_head: Tensor,
    target_ids: Tensor | None,
    weight: Tensor,
    distance: str | Mapping[str, float],
    eps: float,
) -> TreeLoss:
    """`tree_loss` to the target's whole distribution softmax(target_head @ target_state); nothing
    is approximate.

    target_state [R, Ht], the target's last hidden state after its own final norm; target_head [V,
    Ht]; target_ids int64 [VD], the target's id of every draft id, none twice, or None if both
    are the same vocabulary. The target gets no gradients. The rest is as in `tree_loss`; its greedy
    label is the argmax over all of V, and `acceptance` is exact.
    """
    target = target_state, target_head, target_ids
    if not (use_kernels(state) and use_kernels(head_weight) and use_kernels(target_head)):
        return tree_loss_exact_ref(state, norm_weight, head_weight, *target, weight, distance, eps)
    shares = shares_of(distance)
    check_vocabularies(head_weight, target_head, target_ids)
    target_state = target_state.detach().to(target_head.dtype)
    target_head, vocab = target_head.detach(), len(target_head)
    draft_ids = None if target_ids is None else draft_ids_of(target_ids, vocab).int()
    target_ids = None if target_ids is None else target_ids.int()
    label = torch.empty(len(state), dtype=torch.int64, device=state.device)
    flags = {"REDUCED": target_ids is not None, "SUMS": bool(shares[1] or shares[2])}
    buffer: list[Tensor] = []

    def score(
        part: slice, z: Tensor, dz: Tensor, row_weight: Tensor, out: TreeLoss, grads: bool
    ) -> None:
        # the first chunk is the longest
        if not buffer:
            buffer.append(_logits(len(z), vocab, torch.float32, z.device))
        t = buffer[0][: len(z)]
        _product(target_state[part], target_head.T, t)
        _launch(
            exact_loss_kernel, (len(z),), z, dz, t, target_ids, draft_ids, row_weight,
            out.loss[part], out.acceptance[part], out.argmax[part], label[part],
            z.shape[1], vocab, z.stride(0), dz.stride(0), t.stride(0), *shares, GRADS=grads,
            **flags,
        )  # fmt: skip

    result = _fused(state, norm_weight, head_weight, weight, eps, score, len(head_weight) + vocab)
    return result._replace(greedy_match=result.argmax == label)


def _fused(
    state, norm_weight, head_weight, weight, eps: float, score: Callable, logits_per_row: int
) -> TreeLoss:
    """The result without greedy_match. score(part, z, dz, weight, result, grads) fills the result's
    rows `part` from logits z [r, VD], and dz with weight * d(loss) / dz."""
    inputs = state, norm_weight, head_weight
    grads = tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)
    loss_sum, loss, acceptance, argmax = _FusedTreeLoss.apply(
        *inputs, weight, eps, grads, score, logits_per_row
    )
    return TreeLoss(loss_sum, loss, None, acceptance, argmax)


class _FusedTreeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, norm_weight, head_weight, weight, eps, grads, score, logits_per_row):
        with torch.cuda.device_of(state):
            (rows, hidden), vocab, device = state.shape, len(head_weight), state.device
            x, g, weight = state.contiguous(), norm_weight.contiguous(), weight.float()
            loss, acceptance, r = (
                torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3)
            )
            out = TreeLoss(
                None, loss, None, acceptance, torch.empty(rows, dtype=torch.int64, device=device)
            )
            y = torch.empty(rows, hidden, dtype=head_weight.dtype, device=device)
            _launch(norm_fwd_kernel, (rows,), x, g, y, r, hidden, eps)
            # Until the backward pass gradients are in units of the largest weight: float16 lacks
            # small numbers.
            unit = torch.cat(
                [weight.abs(), weight.new_full((1,), torch.finfo(torch.float32).tiny)]
            ).max()
            row_weight = weight / unit
            want_dy, want_dw = grads[0] or grads[1], grads[2]
            dy = torch.empty(rows, hidden, dtype=torch.float32, device=device) if want_dy else None
            dw = torch.zeros(vocab, hidden, dtype=torch.float32, device=device) if want_dw else None
            chunk = _chunk(rows, logits_per_row)
            whole_z = _logits(chunk, vocab, torch.float32, device)
            whole_dz = whole_z
            if any(grads) and head_weight.dtype != torch.float32:
                whole_dz = _logits(chunk, vocab, head_weight.dtype, device)
            for at in range(0, rows, chunk):
                part = slice(at, min(at + chunk, rows))
                z, dz = whole_z[: part.stop - at], whole_dz[: part.stop - at]
                _product(y[part], head_weight.T, z)
                score(part, z, dz, row_weight[part], out, any(grads))
                if want_dy:
                    _product(dz, head_weight, dy[part])
                if want_dw:
                    _add_product(dz.T, y[part], dw)
            dg = None
            if grads[1]:
                each = max(1, triton.cdiv(rows, WEIGHT_GROUPS))
                dg = torch.empty(
                    triton.cdiv(rows, each), hidden, dtype=torch.float32, device=device
                )
                groups = len(dg)
                _launch(
                    norm_weight_bwd_kernel,
                    lambda sizes: (triton.cdiv(hidden, sizes["BLOCK"]), groups),
                    dy, x, r, dg, rows, hidden, each,
                )  # fmt: skip
                dg = dg.sum(0)
            if grads[0]:
                _launch(norm_bwd_kernel, (rows,), dy, x, g, r, hidden)
            ctx.save_for_backward(unit, dy if grads[0] else None, dg, dw)
            ctx.dtypes = state.dtype, norm_weight.dtype, head_weight.dtype
            ctx.mark_non_differentiable(loss, acceptance, out.argmax)
            return (loss * weight).sum(), loss, acceptance, out.argmax

    @staticmethod
    def backward(ctx, grad, *_):
        unit, *grads = ctx.saved_tensors
        factor = grad * unit
        scaled = (
            g if g is None else torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype))
            for g, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None


def _chunk(rows: int, logits_per_row: int) -> int:
    """Rows of a chunk: as many as the buffers hold, in whole tiles of a product's 128 rows."""
    most = max(1, CHUNK_LOGITS // logits_per_row)
    return min(rows, most // 128 * 128 or most) or 1


def _logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, vocab] whose rows start at multiples of 32 bytes, as cuBLAS's fast kernels want it."""
    return torch.empty(rows, triton.cdiv(vocab, 16) * 16, dtype=dtype, device=device)[:, :vocab]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, float32, without rounding the sums to the factors' dtype on the way."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        # the interpreter: torch has no such product on a CPU
        torch.mm(a.float(), b.float(), out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, float32. On CUDA torch can do it for half factors since 2.10."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)


def _launch(kernel, grid, *args, **constexprs) -> None:
    """Run with the launch parameters of `blocks`; nothing if there are no rows."""
    device = args[0].device
    sizes = blocks(
        kernel, torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    )
    if len(args[0]):
        kernel[grid](*args, **constexprs, **sizes)
