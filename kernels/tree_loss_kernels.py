"""Triton kernels of tree_loss: the norm with its backward pass, and the distances with their
gradients.

Dimensions: R rows, H hidden, VD draft vocabulary, V target vocabulary, K kept target logits.

The products with the head are cuBLAS's (tree_loss.py); here is everything between them. One program
reads one row of logits, a tile at a time; rows are addressed in int64, columns in int32. Formulas
are in README.md of this folder.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from aurora_kernels.tree_loss_ref import LOG_P_FLOOR, MIN_COVERED, P_TAIL_FLOOR
from triton.runtime.jit import JITFunction

# finite: differences with it are never NaN
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LOG_P_FLOOR = tl.constexpr(LOG_P_FLOOR)
_P_TAIL_FLOOR = tl.constexpr(P_TAIL_FLOOR)
_MIN_COVERED = tl.constexpr(MIN_COVERED)


def blocks(kernel: JITFunction, capability: tuple[int, int] | None) -> dict[str, int]:
    """Launch parameters on a GPU of this capability; None: the interpreter, with small tiles so
    that tests cross them.

    No measurement on a GPU stands behind the sizes yet. By the compiler's count of registers (40 to
    48 a thread) five programs or more that read a row of logits fit on a multiprocessor, each with
    4 kB of loads in flight per operand.
    """
    name = kernel.__name__
    if name == "norm_weight_bwd_kernel":
        return (
            {"BLOCK_R": 2, "BLOCK": 8}
            if capability is None
            else {"BLOCK_R": 32, "BLOCK": 64, "num_warps": 4}
        )
    if capability is None:
        return {"BLOCK": 16}
    if name.startswith("norm"):
        return {"BLOCK": 2048, "num_warps": 4}
    return {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def norm_fwd_kernel(x, g, y, scale, H, eps, BLOCK: tl.constexpr):
    """y = g x r and r = (mean(x^2) + eps)^-1/2 of one row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        squares += part * part
    r = 1.0 / tl.sqrt(tl.sum(squares, 0) / H + eps)
    tl.store(scale + row, r)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        weight = tl.load(g + cols, mask=cols < H, other=0.0).to(tl.float32)
        tl.store(y + row * H + cols, (part * r * weight).to(y.dtype.element_ty), mask=cols < H)


@triton.jit
def norm_bwd_kernel(dy, x, g, scale, H, BLOCK: tl.constexpr):
    """dx = r (g dy - x r mean(g dy x r)) of one row, in the place of dy."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(scale + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * H + cols, mask=cols < H, other=0.0)
        products += tl.load(g + cols, mask=cols < H, other=0.0).to(tl.float32) * grad * part * r
    mean = tl.sum(products, 0) / H
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * H + cols, mask=cols < H, other=0.0)
        grad *= tl.load(g + cols, mask=cols < H, other=0.0).to(tl.float32)
        tl.store(dy + row * H + cols, r * (grad - part * r * mean), mask=cols < H)


@triton.jit
def norm_weight_bwd_kernel(
    dy, x, scale, dg, R, H, rows_each, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    """dg[group, cols] = sum of dy x r over the group's rows_each rows: partial sums, so that no
    order is left open.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    sums = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    for start in range(0, rows_each, BLOCK_R):
        within = start + tl.arange(0, BLOCK_R)
        row = group * rows_each + within
        real = (within < rows_each) & (row < R)
        mask = real[:, None] & (cols < H)[None, :]
        at = row[:, None] * H + cols[None, :]
        part = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(scale + row, mask=real, other=0.0)
        sums += tl.load(dy + at, mask=mask, other=0.0) * part * r[:, None]
    tl.store(dg + group * H + cols, tl.sum(sums, 0), mask=cols < H)


@triton.jit
def _fold(x, top, total):
    """Running maximum and sum of exp(x - maximum), each column of a tile for itself."""
    e = tl.exp(-tl.abs(x - top))
    return tl.maximum(x, top), tl.where(x > top, total * e + 1.0, total + e)


@triton.jit
def _row_statistics(row, n, BLOCK: tl.constexpr):
    """(maximum, sum of exp(x - maximum), first argmax) of row[:n]; (lowest, 0, ..) if all of it
    is -inf.
    """
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row + cols, mask=cols < n, other=-float("inf"))
        first = tl.where(x > top, cols, first)
        top, total = _fold(x, top, total)
    best = tl.max(top, 0)
    return best, tl.sum(total * tl.exp(top - best), 0), tl.min(tl.where(top == best, first, n), 0)


@triton.jit
def topk_loss_kernel(
    z, dz, topk_ids, topk_logits, logsumexp, weight, loss_out, acceptance_out, argmax_out,
    VD, K, z_stride, dz_stride, forward_kl, reverse_kl, tv, greedy,
    GRADS: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row against K kept target logits and one bucket for the rest; dz = weight * d(loss) /
    d(logits).

    The kept logits are taken out of z (which is overwritten), so that what is summed over the row
    is the tail alone. KP is a power of two from K on; the distances' names hold their shares of the
    mixture. dz may be z.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    k = tl.arange(0, KP)
    ids = tl.load(topk_ids + row * K + k, mask=k < K, other=-1)
    real = ids >= 0
    log_p = tl.load(topk_logits + row * K + k, mask=k < K, other=0.0).to(tl.float32) - tl.load(
        logsumexp + row
    )
    mass = tl.where(k < K, tl.exp(log_p), 0.0)
    kept = tl.sum(real.to(tl.int32), 0)
    raw_tail = tl.where(kept == VD, 0.0, tl.maximum(1.0 - tl.sum(mass, 0), 0.0))
    raw_p = tl.where(real, mass, 0.0)
    covered = tl.sum(raw_p, 0) + raw_tail
    floor = tl.maximum(covered, _MIN_COVERED)
    p, p_tail = raw_p / floor, raw_tail / floor

    z_kept = tl.load(z + ids, mask=real, other=-float("inf"))
    # every thread has read its kept logits before one of them overwrites them
    tl.debug_barrier()
    tl.store(z + ids, tl.full([KP], -float("inf"), tl.float32), mask=real)
    tl.debug_barrier()
    tail_top, tail_sum, tail_first = _row_statistics(z, VD, BLOCK)

    kept_top = tl.max(z_kept, 0)
    kept_first = tl.min(tl.where(real & (z_kept == kept_top), ids, VD), 0)
    top = tl.maximum(tail_top, kept_top)
    argmax = tl.where(kept_top == top, kept_first, VD)
    argmax = tl.where((tail_top == top) & (tail_first < argmax), tail_first, argmax)
    tl.store(argmax_out + row, argmax)

    e = tl.exp(z_kept - top)
    e_tail = tail_sum * tl.exp(tail_top - top)
    total = tl.sum(e, 0) + e_tail
    q, q_tail = e / total, e_tail / total
    lse = top + tl.log(total)
    log_q = tl.where(real, z_kept - lse, 0.0)
    # a tail's sum holds its maximum's own 1
    log_q_tail = tail_top - lse + tl.log(tl.maximum(tail_sum, 1.0))
    # not >: NaN is to show
    log_q_tail = tl.where(tail_sum != 0.0, log_q_tail, 0.0)
    acceptance = tl.sum(tl.minimum(raw_p, q), 0) + tl.minimum(raw_tail, q_tail)
    tl.store(acceptance_out + row, tl.minimum(acceptance, 1.0))

    entropy = tl.sum(p * tl.log(tl.maximum(p, _TINY)), 0) + p_tail * tl.log(
        tl.maximum(p_tail, _TINY)
    )
    loss = forward_kl * (entropy - tl.sum(p * log_q, 0) - p_tail * log_q_tail)
    log_p = tl.maximum(log_p, _LOG_P_FLOOR) - tl.log(floor)
    part = q * (log_q - log_p)
    part_tail = q_tail * (log_q_tail - tl.log(tl.maximum(p_tail, _P_TAIL_FLOOR)))
    loss += reverse_kl * (tl.sum(part, 0) + part_tail)
    loss += tv * (1.0 - tl.sum(tl.minimum(p, q), 0) - tl.minimum(p_tail, q_tail))
    label = tl.where(real & (k == 0), 1.0, 0.0)
    loss -= greedy * tl.sum(label * log_q, 0)
    taught = covered > _MIN_COVERED
    tl.store(loss_out + row, tl.where(taught, loss, 0.0))

    if GRADS:
        dz += row * dz_stride
        w = tl.where(taught, tl.load(weight + row), 0.0)
        a = reverse_kl * part - forward_kl * p - tv * tl.where(q < p, q, 0.0) - greedy * label
        a_tail = (
            reverse_kl * part_tail
            - forward_kl * p_tail
            - tv * tl.where(q_tail < p_tail, q_tail, 0.0)
        )
        a_sum = tl.sum(a, 0) + a_tail
        factor = w * (a_tail - q_tail * a_sum) / tl.maximum(tail_sum, 1.0)
        for start in range(0, VD, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(z + cols, mask=cols < VD, other=-float("inf"))
            tl.store(
                dz + cols, (factor * tl.exp(x - tail_top)).to(dz.dtype.element_ty), mask=cols < VD
            )
        # the tail's zeros at the kept tokens are written before their gradients
        tl.debug_barrier()
        tl.store(dz + ids, (w * (a - q * a_sum)).to(dz.dtype.element_ty), mask=real)


@triton.jit
def exact_loss_kernel(
    z, dz, t, target_ids, draft_ids, weight, loss_out, acceptance_out, argmax_out, label_out,
    VD, V, z_stride, dz_stride, t_stride, forward_kl, reverse_kl, tv, greedy,
    REDUCED: tl.constexpr, SUMS: tl.constexpr, GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of draft logits z against one row of target logits t; dz = weight * d(loss) /
    d(logits).

    REDUCED: draft token j is target token target_ids[j], and draft_ids is the inverse, -1 if
    there is none; without it they are the same. SUMS: reverse_kl or tv is in the mixture, whose
    gradients need a sum over the row first. dz may be z.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    t_top, t_sum, label = _row_statistics(t, V, BLOCK)
    t_lse = t_top + tl.log(t_sum)
    z_top, z_sum, argmax = _row_statistics(z, VD, BLOCK)
    z_lse = z_top + tl.log(z_sum)
    p_lse = t_lse
    covered = tl.full([], 1.0, tl.float32)
    if REDUCED:
        p_top = tl.full([BLOCK], _LOWEST, tl.float32)
        p_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VD, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            ids = tl.load(target_ids + cols, mask=cols < VD, other=0)
            p_top, p_sum = _fold(
                tl.load(t + ids, mask=cols < VD, other=-float("inf")), p_top, p_sum
            )
        best = tl.max(p_top, 0)
        p_lse = best + tl.log(tl.sum(p_sum * tl.exp(p_top - best), 0))
        covered = tl.exp(p_lse - t_lse)
        label = tl.load(draft_ids + label)
    tl.store(argmax_out + row, argmax)
    tl.store(label_out + row, label)
    known = label >= 0
    taught = covered > _MIN_COVERED
    w = 0.0
    if GRADS:
        dz += row * dz_stride
        w = tl.where(taught, tl.load(weight + row), 0.0)
    hard = tl.where(known, greedy, 0.0)
    log_q_label = tl.load(z + label, mask=known, other=0.0) - z_lse
    a_sum = -forward_kl - hard
    # z may be overwritten from here on
    tl.debug_barrier()

    accepted = tl.zeros([BLOCK], tl.float32)
    losses = tl.zeros([BLOCK], tl.float32)
    # of the part of a = dL / d log q that p does not determine
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VD, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        log_p, log_q, p, q = _both(z, t, target_ids, cols, VD, z_lse, p_lse, REDUCED)
        accepted += tl.minimum(covered * p, q)
        losses += forward_kl * p * (log_p - log_q)
        if SUMS:
            part = reverse_kl * q * (log_q - log_p)
            losses += part + tv * tl.maximum(p - q, 0.0)
            sums += part - tv * tl.where(q < p, q, 0.0)
        elif GRADS:
            a = -forward_kl * p - hard * tl.where(cols == label, 1.0, 0.0)
            tl.store(dz + cols, (w * (a - q * a_sum)).to(dz.dtype.element_ty), mask=cols < VD)
    tl.store(acceptance_out + row, tl.minimum(tl.sum(accepted, 0), 1.0))
    loss = tl.sum(losses, 0) - hard * log_q_label
    tl.store(loss_out + row, tl.where(taught, loss, 0.0))
    if GRADS and SUMS:
        a_sum += tl.sum(sums, 0)
        for start in range(0, VD, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            log_p, log_q, p, q = _both(z, t, target_ids, cols, VD, z_lse, p_lse, REDUCED)
            a = reverse_kl * q * (log_q - log_p) - tv * tl.where(q < p, q, 0.0)
            a -= forward_kl * p + hard * tl.where(cols == label, 1.0, 0.0)
            tl.store(dz + cols, (w * (a - q * a_sum)).to(dz.dtype.element_ty), mask=cols < VD)


@triton.jit
def _both(z, t, target_ids, cols, VD, z_lse, p_lse, REDUCED: tl.constexpr):
    """log p, log q, p and q of a tile's columns; p = q = 0 beyond the row."""
    ids = tl.load(target_ids + cols, mask=cols < VD, other=0) if REDUCED else cols
    log_p = tl.load(t + ids, mask=cols < VD, other=0.0) - p_lse
    log_q = tl.load(z + cols, mask=cols < VD, other=0.0) - z_lse
    return (
        log_p,
        log_q,
        tl.where(cols < VD, tl.exp(log_p), 0.0),
        tl.where(cols < VD, tl.exp(log_q), 0.0),
    )


def padded(k: int) -> int:
    """KP of K kept logits: four sizes up to 128, so that few kernels are compiled."""
    return max(16, triton.next_power_of_2(k))
