"""KV-slot bookkeeping of SGLang's scheduler on the CPU, in place of the C++ functions of the same
names.

Written from the Triton kernels that SGLang runs on a GPU
(`sglang/kernels/ops/{speculative,kvcache}`) and from the call sites. A slot is a row of the KV
pool; `req_to_token` [requests, positions] names the slot of every position. All tensors live on the
CPU; numpy views share their memory and cost less per call than torch indexing.
"""

import ctypes

import numpy as np
import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Write packed `out_cache_loc` into row r's positions [start[r], end[r]), for every request r
    in turn.
    """
    table, slots = req_to_token.numpy(), out_cache_loc.numpy()
    first = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()
    ):
        table[row, start:end] = slots[first : first + end - start]
        first += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Pack the slots of positions [start[r], end[r]) of every request r into `out_cache_loc`."""
    table, slots = req_to_token.numpy(), out_cache_loc.numpy()
    first = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()
    ):
        slots[first : first + end - start] = table[row, start:end]
        first += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """Pack the topk * num_steps slots that follow each sequence into `out_cache_loc`: lane by lane,
    step by step.
    """
    width = topk * num_steps
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, seq_lens + width, out_cache_loc, pool_len
    )


def build_draft_decode_metadata_cpu(
    req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len
):
    """One row of slots per lane: the sequence's own, then the lane's num_steps draft slots.

    Returns [B * topk, max(seq_lens) + num_steps]; entries past a row's own length are 0.
    """
    table, lens = req_to_token.numpy(), seq_lens.tolist()
    lanes = np.zeros((len(lens), topk, max(lens, default=0) + num_steps), dtype=table.dtype)
    for lane, row, length in zip(lanes, req_pool_indices.tolist(), lens):
        lane[:, :length] = table[row, :length]
        lane[:, length : length + num_steps] = table[
            row, length : length + topk * num_steps
        ].reshape(topk, num_steps)
    return torch.from_numpy(lanes.reshape(len(lens) * topk, -1))


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """Move the slots of accepted nodes to the front; `accept_index` holds global node ids, -1 if
    rejected.
    """
    accepted = accept_index.numpy().ravel()
    accepted = accepted[accepted > -1]
    accept_out_cache_loc.numpy()[: len(accepted)] = out_cache_loc.numpy()[accepted]


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """The last committed token of each request; `accept_lens` includes it."""
    last = accept_lens.numpy().astype(np.int64) - 1 + accept_stride * np.arange(accept_lens.numel())
    bonus_tokens.numpy()[: len(last)] = accept_tokens.numpy().ravel()[last]


def rotate_input_ids_cpu(
    input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None
):
    """Shift each request's tokens left by one and put its new token last (or at `select_index`)."""
    ids, new = input_ids.numpy(), topk_index.numpy().ravel()
    for r, (start, length) in enumerate(zip(extend_start_loc.tolist(), extend_seq_lens.tolist())):
        ids[start : start + length - 1] = ids[start + 1 : start + length].copy()
        if length > 0:
            ids[start + length - 1 if select_index is None else int(select_index[r])] = new[r]


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Move rows of every layer's K and V buffer; all are read before the first is written.

    SGLang gives raw addresses: `data_ptrs` [buffers] and the rows' size in bytes, `strides`
    [buffers].
    """
    source, target = src_loc.numpy(), tgt_loc.numpy()
    if not len(source):
        return
    rows = int(max(source.max(), target.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist()):
        buffer = np.frombuffer(
            (ctypes.c_ubyte * (rows * stride)).from_address(address), dtype=np.uint8
        )
        buffer = buffer.reshape(rows, stride)
        buffer[target] = buffer[source]
