"""Grow the trees that SGLang would draw with a draft, from the positions of a batch, and see what
would be accepted.

With topk > 1 SGLang re-selects the beams at each step by cumulative probability and permutes their
states, but not their KV lanes: lane t always reads what lane t wrote, which may belong to an uncle.
The final tree is the best N - 1 candidates of all steps. Training uses true ancestors; what a
server would accept follows the lanes, as it does.

Dimensions: G trees, W = topk beams, S draft steps, N tree nodes, T positions, H hidden, VD draft
    vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_trainer.drafts.batch import Batch
from aurora_trainer.drafts.eagle3 import KV, Draft

# logits alive at a time
CHUNK_LOGITS = 1 << 25


@torch.no_grad()
def tree_runs(draft: Draft, batch: Batch, steps: int, width: int, nodes: int) -> Tensor:
    """int64 [R] on the CPU: accept length, bonus included, of the tree that hangs from each level-0
    position.

    `batch` is on the draft's device. The path is compared with the tokens that follow the position
    in the batch; a position with fewer than `steps` of them in its own sequence gives a number
    without meaning.
    """
    positions = batch.levels[0].parent
    state, context_kv = draft.context(
        batch.tokens, batch.features, batch.positions, batch.context_start, positions
    )
    size = max(1, CHUNK_LOGITS // (width * len(draft.d2t)))
    runs = []
    for at in range(0, len(positions), size):
        part = slice(at, at + size)
        tokens, parents = _grow(
            draft, batch, positions[part], state[part], context_kv, steps, width, nodes
        )
        runs.append(_accepted(tokens, parents, batch.tokens, positions[part], steps))
    return torch.cat(runs).cpu() if runs else torch.zeros(0, dtype=torch.int64)


def _grow(
    draft: Draft,
    batch: Batch,
    positions: Tensor,
    state: Tensor,
    context_kv: KV,
    steps: int,
    width: int,
    nodes: int,
) -> tuple[Tensor, Tensor]:
    """(tokens, parents) int64 [G, N] of the trees of `positions` [G], whose states [G, H] are
    given; -1 is a root.
    """
    trees, device = len(positions), positions.device
    ids = draft.d2t + torch.arange(len(draft.d2t), device=device)
    of_beam = positions.repeat_interleave(width)
    context_start, context_end, position = (
        batch.context_start[of_beam],
        of_beam + 1,
        batch.positions[of_beam],
    )
    tree = torch.arange(trees, device=device)[:, None]
    lane = torch.arange(trees * width, device=device)

    best = _probabilities(draft, state).topk(width, -1)
    scores, tokens = best.values, ids[best.indices]  # [G, W]
    all_scores, all_tokens = [scores], [tokens]
    # The candidate that each group of W candidates hangs from, -1 the root.
    above = [
        torch.full((trees, 1), -1, device=device),
        torch.arange(width, device=device).expand(trees, -1),
    ]
    tokens, state, node_kv, lanes = tokens.flatten(), state.repeat_interleave(width, 0), None, []
    for step in range(1, steps):
        lanes.append(lane[:, None] + (step - 1) * trees * width)
        state, node_kv = draft.nodes(
            tokens,
            state,
            position + step,
            context_kv,
            node_kv,
            context_start,
            context_end,
            torch.cat(lanes, 1),
        )
        best = _probabilities(draft, state).topk(width, -1)
        # [G, W * W]
        expanded = (scores[:, :, None] * best.values.view(trees, width, width)).flatten(1)
        children = ids[best.indices].view(trees, width * width)
        kept = expanded.topk(width, -1)
        all_scores.append(expanded)
        all_tokens.append(children)
        above.append(kept.indices + width + width * width * (step - 1))
        scores, tokens = kept.values, children.gather(1, kept.indices).flatten()
        # of the beam that each one left
        state = state[(kept.indices // width + tree * width).flatten()]

    # [G, N - 1] of all candidates
    chosen = torch.cat(all_scores, 1).topk(nodes - 1, -1).indices.sort(1).values
    parent = torch.cat(above, 1).gather(1, chosen // width)
    parent = torch.where(
        parent < 0, 0, 1 + (chosen[:, None, :] == parent[:, :, None]).int().argmax(2)
    )
    root = torch.full((trees, 1), -1, device=device)
    # the position holds it
    root_token = batch.tokens[positions][:, None]
    return torch.cat([root_token, torch.cat(all_tokens, 1).gather(1, chosen)], 1), torch.cat(
        [root, parent], 1
    )


def _accepted(
    tokens: Tensor, parents: Tensor, committed: Tensor, positions: Tensor, steps: int
) -> Tensor:
    """int64 [G]: 1 + the nodes on the path that agrees with the tokens `committed` [T] behind each
    position.
    """
    at = torch.zeros_like(positions)
    run, going = torch.ones_like(positions), torch.ones_like(positions, dtype=torch.bool)
    for d in range(steps):
        follows = committed[(positions + 1 + d).clamp_max(len(committed) - 1)]
        child = (parents == at[:, None]) & (tokens == follows[:, None])
        going = going & child.any(1)
        run += going
        at = torch.where(going, child.int().argmax(1), at)
    return run


def _probabilities(draft: Draft, state: Tensor) -> Tensor:
    """float32 [.., VD]"""
    return draft.logits(state).float().softmax(-1)
