"""What is kept of a row of target logits: the K largest and the log-sum-exp of all.

Dimensions: R rows, V vocabulary, K kept. exp(logits - logsumexp) are the kept probabilities; one
minus their sum is the exact mass of everything that was not kept.

Two kernels, one read of the logits. `topk_groups_kernel` goes over all of them and leaves, of every
GROUP neighbours, the largest, and of every BLOCK, its share of the log-sum-exp.
`topk_select_kernel` has one program a row: the K groups with the largest maxima hold the K largest
logits, so it reads those groups again and chooses among K * GROUP candidates. It chooses by
bisection over the bits of an order-preserving key, not by sorting: a pass of the bisection is a
comparison and a sum. Nothing waits for the host, and shapes depend on R, V and K alone: both can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from aurora_kernels.dispatch import use_kernels
from aurora_kernels.limits import MAX_KEPT
from torch import Tensor

# logits of a program of the first kernel: one vector load after the other is in flight, no loop
BLOCK = 8192


def topk_logprobs(
    logits: Tensor,
    k: int,
    rows: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int32 [R, K], logits [R, K] in the input's dtype, largest first, logsumexp float32 [R])
    of logits [.., V].

    R are all rows, or those that `rows` (int64 [R], on the same device) names. K is min(k, V). Rows
    may lie apart (stride(0) > V). All outputs are finite: -inf becomes the dtype's most negative
    number; only NaN, which counts as the largest, and +inf stay what they are, in the logits and as
    the log-sum-exp. The input is not changed. The kernels keep the lowest ids of equal logits, in
    their order; the reference, whichever torch.topk picks. `out`: where the results are to go.
    """
    if use_kernels(logits) and logits.numel() and 0 < min(k, logits.shape[1]) <= MAX_KEPT:
        return _topk_logprobs(logits, k, rows, out)
    found = topk_logprobs_ref(logits, k, rows)
    if out is None:
        return found
    for place, values in zip(out, found):
        place.copy_(values)
    return out


def topk_logprobs_ref(
    logits: Tensor, k: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """In chunks of rows: temporaries stay below about 128 MiB whatever the batch, and on a CPU,
    where each new page of memory costs more than the sum over it, below 32."""
    if rows is not None:
        logits = logits.index_select(0, rows)
    count, vocab = logits.shape
    k, lowest = min(k, vocab), torch.finfo(logits.dtype).min
    ids = torch.empty(count, k, dtype=torch.int32, device=logits.device)
    kept = torch.empty(count, k, dtype=logits.dtype, device=logits.device)
    logsumexp = torch.empty(count, dtype=torch.float32, device=logits.device)
    chunk = max(1, (1 << (24 if logits.is_cuda else 22)) // vocab)
    for at in range(0, count, chunk):
        part = slice(at, at + chunk)
        top, found = topk(logits[part], k)
        ids[part], kept[part] = found, top.clamp_min(lowest)
        logsumexp[part] = torch.logsumexp(logits[part].float(), dim=-1).clamp_min(
            torch.finfo(torch.float32).min
        )
    return ids, kept, logsumexp


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits.topk(k), on a CPU among the groups with the K largest maxima, which hold it: selecting
    among V / 16 maxima and 16 K candidates costs less than among V. A group is a column of [16, V /
    16]: maxima of rows are vectorised."""
    groups = logits.shape[1] // 16
    if logits.is_cuda or groups < 4 * k:
        return logits.topk(k, dim=-1)
    maxima = logits[:, : 16 * groups].unflatten(1, (16, groups)).amax(1)
    chosen = maxima.topk(k, dim=-1, sorted=False).indices
    candidates = (chosen[:, :, None] + torch.arange(16) * groups).flatten(1)
    rest = torch.arange(16 * groups, logits.shape[1]).expand(len(logits), -1)
    candidates = torch.cat([candidates, rest], dim=1)
    top, found = logits.gather(1, candidates).topk(k, dim=-1)
    return top, candidates.gather(1, found)


def _topk_logprobs(
    logits: Tensor, k: int, rows: Tensor | None, out: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    device, k = logits.device, min(k, logits.shape[1])
    count = len(logits) if rows is None else len(rows)
    ids, kept, logsumexp = out or (
        torch.empty(count, k, dtype=torch.int32, device=device),
        torch.empty(count, k, dtype=logits.dtype, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
    )
    if count:
        for kernel, grid, arguments, constexprs, options in _launches(
            logits, rows, ids, kept, logsumexp
        ):
            kernel[grid](**arguments, **constexprs, **options)
    return ids, kept, logsumexp


def _launches(
    logits: Tensor, rows: Tensor | None, ids: Tensor, kept: Tensor, logsumexp: Tensor
) -> Iterator[tuple]:
    """(kernel, grid, arguments, constexprs, options) of both kernels."""
    vocab, (count, k) = logits.shape[1], ids.shape
    k_pow2 = max(2, triton.next_power_of_2(k))
    block, group = min(BLOCK, max(512, triton.next_power_of_2(vocab))), group_size(vocab, k_pow2)
    splits = triton.cdiv(vocab, block)
    # those beyond the vocabulary have a maximum of -inf and come last
    groups = splits * (block // group)
    groups_pow2 = max(k_pow2, triton.next_power_of_2(groups))
    group_max = torch.empty(count, groups, dtype=logits.dtype, device=logits.device)
    # the maximum, the sum; both begin at 16 bytes, whatever the count: one variant of the kernels
    shares = 4 * triton.cdiv(count * splits, 4)
    share = torch.empty(2, shares, dtype=torch.float32, device=logits.device)
    shared = dict(
        logits=logits, row_stride=logits.stride(0), rows=rows, vocab=vocab, group_max=group_max
    )
    shared |= dict(share_max=share[0], share_sum=share[1])
    constexprs = dict(BLOCK=block, GROUP=group)
    # 32 logits a thread; the bisection keeps as many keys in its threads' registers
    yield (
        topk_groups_kernel,
        (count * splits,),
        shared,
        constexprs,
        dict(num_warps=max(1, block // 1024)),
    )
    constexprs |= dict(
        K=k, K_POW2=k_pow2, GROUPS_POW2=groups_pow2, SPLITS_POW2=triton.next_power_of_2(splits)
    )
    constexprs |= dict(
        KEY_SHIFT={torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[logits.dtype]
    )
    warps = min(8, max(1, max(groups_pow2, k_pow2 * group) // 1024))
    shared = shared | dict(ids=ids, kept=kept, logsumexp=logsumexp)
    yield topk_select_kernel, (count,), shared, constexprs, dict(num_warps=warps)


def group_size(vocab: int, k: int) -> int:
    """The GROUP that leaves the select kernel least to look at: a key per group, then K * GROUP
    candidates.
    """
    return min(
        (8, 16, 32, 64, 128, 256),
        key=lambda size: triton.next_power_of_2(triton.cdiv(vocab, size)) + k * size,
    )


@triton.jit
def topk_groups_kernel(
    logits,
    row_stride,
    rows,
    vocab,
    group_max,
    share_max,
    share_sum,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program: one BLOCK of one row."""
    splits = tl.cdiv(vocab, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row, split = pid // splits, (pid % splits).to(tl.int32)
    source = row if rows is None else tl.load(rows + row)
    group = split * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + source * row_stride + column, mask=column < vocab, other=-float("inf")).to(
        tl.float32
    )
    # a maximum ignores NaN; the sum below does not
    top = tl.max(tl.where(x != x, float("inf"), x), axis=1)
    tl.store(
        group_max + row * (splits * (BLOCK // GROUP)) + group, top.to(group_max.dtype.element_ty)
    )
    most: tl.constexpr = 3.4028234663852886e38
    # finite: inf - inf would be NaN
    top = tl.minimum(tl.maximum(tl.max(top, axis=0), -most), most)
    tl.store(share_max + pid, top)
    tl.store(share_sum + pid, tl.sum(tl.exp(x - top)))


@triton.jit
def topk_select_kernel(
    logits, row_stride, rows, vocab, group_max, share_max, share_sum, ids, kept, logsumexp,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    SPLITS_POW2: tl.constexpr, KEY_SHIFT: tl.constexpr,
):  # fmt: skip
    """Program: one row.

    Its outputs `ids` and `kept` are also where its threads hand each other what they chose.
    """
    most: tl.constexpr = 3.4028234663852886e38
    splits = tl.cdiv(vocab, BLOCK)
    groups = splits * (BLOCK // GROUP)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_POW2)
    part_max = tl.load(share_max + row * splits + split, mask=split < splits, other=-most)
    part_sum = tl.load(share_sum + row * splits + split, mask=split < splits, other=0.0)
    top = tl.max(part_max, axis=0)
    total = top + tl.log(tl.sum(part_sum * tl.exp(part_max - top)))
    tl.store(logsumexp + row, tl.where(total < -most, -most, total))

    group = tl.arange(0, GROUPS_POW2)
    x = tl.load(group_max + row * groups + group, mask=group < groups, other=0.0).to(tl.float32)
    key = tl.where(group < groups, _ordered(x, KEY_SHIFT), 0)
    chosen, place = _largest(key, K, KEY_SHIFT)
    tl.store(ids + row * K + place, group, mask=chosen)
    tl.debug_barrier()

    source = row if rows is None else tl.load(rows + row)
    candidate = tl.arange(0, K_POW2 * GROUP)
    real = candidate // GROUP < K
    column = (
        tl.load(ids + row * K + candidate // GROUP, mask=real, other=0) * GROUP + candidate % GROUP
    )
    real &= column < vocab
    x = tl.load(logits + source * row_stride + column, mask=real, other=0.0).to(tl.float32)
    key = tl.where(real, _ordered(x, KEY_SHIFT), 0)
    chosen, place = _largest(key, K, KEY_SHIFT)
    place += row * K
    lowest: tl.constexpr = (
        -65504.0 if KEY_SHIFT == 13 else (-3.3895313892515355e38 if KEY_SHIFT == 16 else -most)
    )
    x = tl.where(x < lowest, lowest, x)
    # the groups were read
    tl.debug_barrier()
    tl.store(ids + place, column, mask=chosen)
    tl.store(kept + place, x.to(kept.dtype.element_ty), mask=chosen)
    tl.debug_barrier()

    # the K chosen are in the order of their ids; each one's place is the number of those that come
    # before it
    position = tl.arange(0, K_POW2)
    column = tl.load(ids + row * K + position, mask=position < K, other=0)
    y = tl.load(kept + row * K + position, mask=position < K, other=0.0)
    key = tl.where(position < K, _ordered(y.to(tl.float32), KEY_SHIFT), 0)
    before = (key[None, :] > key[:, None]) | (
        (key[None, :] == key[:, None]) & (position[None, :] < position[:, None])
    )
    place = row * K + tl.sum(before.to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(ids + place, column, mask=position < K)
    tl.store(kept + place, y, mask=position < K)


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):
    """uint32 keys > 0 in the order of float32 x; -0 equals 0, NaN is the largest.

    SHIFT bits that the dtype of x does
    not have are cut off."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    bits = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, bits) >> SHIFT


@triton.jit
def _largest(key, K: tl.constexpr, SHIFT: tl.constexpr):
    """(whether it is one of the K largest; of equal ones, the first, how many of those stand before
    it) of every key. Keys of 0 are chosen only if nothing else is left."""
    # the largest number that K keys reach
    threshold = tl.full((), 0, tl.uint32)
    one = tl.full((), 1, tl.uint32)
    bit, count = 31 - SHIFT, 0
    # exactly K: the rest of the bits changes nothing
    while (bit >= 0) & (count != K):
        higher = threshold | (one << bit)
        reach = tl.sum((key >= higher).to(tl.int32))
        threshold = tl.where(reach >= K, higher, threshold)
        count = tl.where(reach >= K, reach, count)
        bit -= 1
    above, equal = key > threshold, key == threshold
    room = K - tl.sum(above.to(tl.int32))
    # both in one scan: there are fewer keys
    counts = tl.cumsum(above.to(tl.int32) * 65536 + equal.to(tl.int32))
    n_equal = counts % 65536
    chosen = above | (equal & (n_equal <= room))
    return chosen, counts // 65536 + tl.minimum(n_equal, room) - 1
