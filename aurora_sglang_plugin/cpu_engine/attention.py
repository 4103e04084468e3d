"""Attention over SGLang's paged KV pool on the CPU, in place of the C++ ops that its `intel_amx`
backend calls.

A batch is gathered into [B, L] slots and attended to by one call. Query heads that share a KV head
are stacked along the query axis, so that keys and values are never repeated. B requests (or draft
lanes), N queries each, L keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head size. Pool buffers
are [slots, Hkv, D].
"""

import torch
import torch.nn.functional as F

# requests with the same number of queries, up to this many, are attended to in one call
BATCHED_QUERIES = 64


def decode_attention_cpu(
    q,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    out,
    k,
    v,
    cache_loc,
    attn_logits,
    req_to_token,
    req_pool_indices,
    seq_lens,
    scaling,
    logit_cap,
    is_cross_attention,
    sliding_window,
    encoder_lens,
    sinks,
):
    """One query per row, q and out [B, Hq, D]: store k and v [B, Hkv, D] at `cache_loc`, attend to
    `seq_lens` keys.
    """
    _refuse(k_scale, v_scale, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks)
    if k is not None:
        k_buffer[cache_loc] = k.view(-1, *k_buffer.shape[1:])
        v_buffer[cache_loc] = v.view(-1, *v_buffer.shape[1:])
    slots, visible = _gather_slots(req_to_token, req_pool_indices, seq_lens)
    bias = _bias(visible, q.dtype)[:, None, None, :]
    _attend(q[:, None], k_buffer, v_buffer, slots, bias, scaling, out[:, None])


def extend_attention_cpu(
    q,
    k,
    v,
    out,
    k_buffer,
    v_buffer,
    k_scale,
    v_scale,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_seq_lens,
    extend_start_loc,
    max_extend_len,
    scaling,
    logit_cap,
    is_cross_attention,
    sliding_window,
    encoder_lens,
    sinks,
    tree_mask,
    is_causal,
):
    """The last `extend_seq_lens` positions of each sequence query all of it; q and out [T, Hq, D]
    are packed.

    Keys and values of these positions are already in the pool (the backend stored them). Causal, or
    for a verify step with branches `tree_mask` [B*N*N], True if node i may see node j.
    """
    _refuse(k_scale, v_scale, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks)
    if not is_causal:
        raise NotImplementedError("the CPU engine has causal attention only")
    counts = extend_seq_lens.tolist()
    batch, n = len(counts), max(counts)
    if tree_mask is not None and tree_mask.numel() != batch * n * n:
        raise NotImplementedError("the CPU engine takes QLEN_ONLY tree masks only")
    if min(counts) == n <= BATCHED_QUERIES:
        slots, visible = _gather_slots(req_to_token, req_pool_indices, seq_lens)
        if n == 1:
            # a verify step that drafted nothing: it sees all, like decoding
            bias = _bias(visible, q.dtype)[:, None, None, :]
            _attend(q[:, None], k_buffer, v_buffer, slots, bias, scaling, out[:, None])
            return
        query = torch.arange(n)
        if tree_mask is None:
            # [B, N] the last key that a query may see
            last = (seq_lens - n)[:, None] + query
            visible = torch.arange(slots.shape[1]) <= last[:, :, None]
        else:
            visible = visible[:, None, :].repeat(1, n, 1)
            # [B, 1, N] where the tree's own keys stand
            columns = (seq_lens - n)[:, None, None] + query
            visible.scatter_(2, columns.expand(batch, n, n), tree_mask.view(batch, n, n))
        groups = q.shape[1] // k_buffer.shape[1]
        bias = _bias(visible, q.dtype)[:, None].repeat(1, 1, groups, 1)  # [B, 1, G*N, L]
        shape = (batch, n, *q.shape[1:])
        _attend(q.view(shape), k_buffer, v_buffer, slots, bias, scaling, out.view(*shape[:3], -1))
        return
    lens, starts, rows = seq_lens.tolist(), extend_start_loc.tolist(), req_pool_indices.tolist()
    for length, count, start, row in zip(lens, counts, starts, rows):
        slots = req_to_token[row, :length]
        keys = k_buffer.index_select(0, slots).transpose(0, 1)[None]  # [1, Hkv, L, D]
        values = v_buffer.index_select(0, slots).transpose(0, 1)[None]
        query = q[start : start + count].transpose(0, 1)[None]
        bias = None
        if count != length:
            visible = torch.arange(length) <= torch.arange(length - count, length)[:, None]
            bias = _bias(visible, q.dtype)
        result = F.scaled_dot_product_attention(
            query, keys, values, bias, is_causal=bias is None, scale=scaling, enable_gqa=True
        )
        out[start : start + count] = result[0].transpose(0, 1)


def _gather_slots(req_to_token, req_pool_indices, seq_lens):
    """Slots [B, L] of whole sequences and which of them exist, bool [B, L].

    Padding repeats the sequence's own first slot: another request's rows are never read, whatever
    they hold.
    """
    longest = int(seq_lens.max())
    slots = req_to_token[:, :longest].index_select(0, req_pool_indices)
    visible = torch.arange(longest) < seq_lens[:, None]
    return torch.where(visible, slots, slots[:, :1]), visible


def _bias(visible, dtype):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _attend(q, k_buffer, v_buffer, slots, bias, scaling, out):
    """softmax(q k' * scaling + bias) v for q and out [B, N, Hq, D], slots [B, L], bias broadcast to
    [B, 1, G*N, L].
    """
    batch, n, q_heads, _ = q.shape
    kv_heads = k_buffer.shape[1]
    groups = q_heads // kv_heads
    keys = (
        k_buffer.index_select(0, slots.view(-1))
        .view(batch, -1, *k_buffer.shape[1:])
        .transpose(1, 2)
    )
    values = (
        v_buffer.index_select(0, slots.view(-1))
        .view(batch, -1, *v_buffer.shape[1:])
        .transpose(1, 2)
    )
    query = (
        q.view(batch, n, kv_heads, groups, -1)
        .permute(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, groups * n, -1)
    )
    result = F.scaled_dot_product_attention(query, keys, values, bias, scale=scaling)
    out.view(batch, n, kv_heads, groups, -1).copy_(
        result.view(batch, kv_heads, groups, n, -1).permute(0, 3, 1, 2, 4)
    )


def _refuse(k_scale, v_scale, logit_cap, is_cross_attention, sliding_window, encoder_lens, sinks):
    asked = {
        "scaled KV caches": k_scale != 1.0 or v_scale != 1.0,
        "logit caps": bool(logit_cap),
        "cross attention": is_cross_attention or encoder_lens is not None,
        "sliding windows": sliding_window > 0,
        "attention sinks": sinks is not None,
    }
    if any(asked.values()):
        names = ", ".join(name for name, present in asked.items() if present)
        raise NotImplementedError(
            f"the CPU engine has no {names}; serve this model with a real sgl_kernel"
        )
