"""Draft trees on the CPU: build one from the draft's scores, and verify it greedily.

In place of SGLang's C++ functions of the same names, written from its Triton kernels, which are the
oracle of the tests (`sglang/kernels/ops/speculative/spec_tree.py`). B requests, N tree nodes (node
0 is the root), S draft steps. The arguments' names and order are the call sites', misspelt
`retrive` included.
"""

import numpy as np

# SGLang's TreeMaskMode: a mask [N, N] per request, without the prefix
QLEN_ONLY = 1


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    seq_lens,
    tree_mask,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    topk,
    depth,
    num_nodes,
    tree_mask_mode,
):
    """Link the selected candidates into trees.

    `selected_index` [B, N-1] are ascending candidate ids (the step's candidates are topk children
    of each of topk beams); candidate c hangs from beam c // topk, which is candidate `parent_list[c
    // topk]`, beam 0 is the root. Written in place: `tree_mask` [B*N*N] (node, node-or-ancestor),
    `positions` [B*N], `retrive_index` [B, N] (global node id), `retrive_next_token` (first child)
    and `retrive_next_sibling`, both -1 if there is none.
    """
    if int(tree_mask_mode) != QLEN_ONLY:
        raise NotImplementedError(
            f"the CPU engine builds QLEN_ONLY tree masks, got mode {tree_mask_mode}"
        )
    batch, n = len(seq_lens), num_nodes
    selected = selected_index.numpy()
    beam = selected // topk
    parent, linked = np.zeros_like(beam), np.ones(beam.shape, dtype=bool)
    if beam.any():
        candidate = np.take_along_axis(
            parent_list.numpy(), np.minimum(beam, parent_list.shape[1] - 1), axis=1
        )
        same = selected[:, None, :] == candidate[:, :, None]  # [B, node, possible parent]
        linked = same.any(2) | (beam == 0)
        # [B, N-1] node id of node i+1's parent
        parent = np.where(beam == 0, 0, same.argmax(2) + 1)

    node = np.arange(n)
    retrive_index.numpy()[:] = np.arange(batch * n).reshape(batch, n)
    is_child = (parent[:, None, :] == node[None, :, None]) & linked[:, None, :]  # [B, N, N-1]
    retrive_next_token.numpy()[:] = np.where(is_child.any(2), is_child.argmax(2) + 1, -1)
    younger = (parent[:, :, None] == parent[:, None, :]) & linked[:, :, None] & linked[:, None, :]
    younger &= node[None, 1:, None] < node[None, None, 1:]
    retrive_next_sibling.numpy()[:, 0] = -1
    retrive_next_sibling.numpy()[:, 1:] = np.where(younger.any(2), younger.argmax(2) + 1, -1)

    mask = tree_mask.numpy()[: batch * n * n].reshape(batch, n, n)
    mask[:] = False
    mask[:, :, 0] = True
    level = np.zeros((batch, n), dtype=np.int64)
    ancestor = np.broadcast_to(node[1:], (batch, n - 1))
    alive = np.ones((batch, n - 1), dtype=bool)
    for _ in range(depth):
        b, i = np.nonzero(alive)
        if not len(b):
            break
        mask[b, i + 1, ancestor[b, i]] = True
        level[:, 1:] += alive
        alive = (
            alive
            & (np.take_along_axis(beam, ancestor - 1, 1) != 0)
            & np.take_along_axis(linked, ancestor - 1, 1)
        )
        ancestor = np.where(alive, np.take_along_axis(parent, ancestor - 1, 1), ancestor)
    positions.numpy()[:] = (level + seq_lens.numpy()[:, None]).ravel()


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk from the root along the target's own argmax for as long as a child carries it.

    Written in place: `predicts` [B*N] (the target's token at each node of the path), `accept_index`
    [B, S+1] (global node ids of the path, root first) and `accept_token_num` [B] (drafts that were
    right, bonus token excluded).
    """
    targets, tokens = target_predict.reshape(-1).tolist(), candidates.tolist()
    ids, child, sibling = (
        retrive_index.tolist(),
        retrive_next_token.tolist(),
        retrive_next_sibling.tolist(),
    )
    predicts, accept_index, correct = (
        predicts.numpy(),
        accept_index.numpy(),
        accept_token_num.numpy(),
    )
    for b in range(len(tokens)):
        last, node, count = ids[b][0], 0, 0
        accept_index[b, 0] = last
        while count < accept_index.shape[1] - 1:
            wanted, node = targets[last], child[b][node]
            while node != -1 and tokens[b][node] != wanted:
                node = sibling[b][node]
            if node == -1:
                break
            predicts[last] = wanted
            count, last = count + 1, ids[b][node]
            accept_index[b, count] = last
        correct[b] = count
        predicts[last] = targets[last]
