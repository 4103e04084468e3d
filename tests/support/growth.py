"""Grow trees from a sample with our draft as SGLang grows them, to compare node for node with what
it really drew.

With topk > 1 SGLang re-selects the beams at each step by cumulative probability and permutes their
states, but not their KV lanes: lane t always reads what lane t wrote, which may belong to an uncle.
The final tree is the best N - 1 candidates of all steps. Growing along true ancestors would propose
other children, so this follows the lanes.

Letters: G trees, W = topk beams, S draft steps, N tree nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.intake.sample import Sample


@dataclass
class Growth:
    # int64 [G, N], node 0 is the root
    tokens: torch.Tensor
    # int64 [G, N], -1 for the root
    parents: torch.Tensor
    # float [G], the smallest gap that decided anything: tiny if a tie explains a difference
    margin: torch.Tensor
    # nodes whose lane held KV of another branch than their ancestors'
    strayed: int
    # nodes that were queried at depth >= 2: there it can happen
    queried: int


@torch.no_grad()
def grow(drafts: dict[int, Draft], sample: Sample, nodes: int, version: int) -> Growth:
    """The trees that `version` drew from the sample's positions, in the order of sample.tree_first.

    Needs start == 0.

    `drafts` has the draft of every version that wrote a position's KV or drew a tree.
    """
    assert sample.start == 0, "positions before the sample's first are not known"
    draft = drafts[version]
    width, steps = sample.topk, sample.num_steps
    roots = sample.node_position[sample.tree_first[sample.tree_version == version]]  # [G]
    ids = draft.d2t + torch.arange(len(draft.d2t))
    context_kv = _context_kv(drafts, sample)
    state = _position_states(draft, sample, roots, context_kv)
    trees = len(roots)
    context_start = torch.zeros(trees * width, dtype=torch.int64)
    context_end = (roots + 1).repeat_interleave(width)
    lane = torch.arange(trees * width).view(trees, width)

    probs, margin = _best(draft.logits(state).softmax(-1), width)
    scores, choice = probs.values, ids[probs.indices]  # [G, W]
    all_scores, all_tokens = [scores], [choice]
    parent_candidates = [torch.full((trees, 1), -1), torch.arange(width).expand(trees, -1)]
    tokens = choice.flatten()
    state = state.repeat_interleave(width, 0)
    node_kv, lanes = None, []
    # the KV rows that hold a beam's true ancestors
    chain = lane[:, :, None]
    strayed = queried = 0
    for step in range(1, steps):
        own = lane.flatten()[:, None] + (step - 1) * trees * width
        lanes.append(own)
        if step > 1:
            true = torch.cat([chain.flatten(0, 1), own], 1)
            strayed += int((torch.cat(lanes, 1) != true).any(1).sum())
            queried += len(true)
            chain = true.view(trees, width, -1)
        positions = context_end + step - 1
        state, node_kv = draft.nodes(
            tokens,
            state,
            positions,
            context_kv,
            node_kv,
            context_start,
            context_end,
            torch.cat(lanes, 1),
        )
        if step == 1:
            chain = own.view(trees, width, 1)
        probs, gap = _best(draft.logits(state).softmax(-1), width)
        margin = torch.minimum(margin, gap.view(trees, width).amin(1))
        expanded = scores[:, :, None] * probs.values.view(trees, width, width)  # [G, beam, child]
        children = ids[probs.indices].view(trees, width * width)
        best, gap = _best(expanded.flatten(1), width)
        margin = torch.minimum(margin, gap)
        scores = best.values
        offset = width + width * width * (step - 1)
        all_scores.append(expanded.flatten(1))
        all_tokens.append(children)
        parent_candidates.append(best.indices + offset)
        tokens = children.gather(1, best.indices).flatten()
        # the beam that each one left
        source = (best.indices // width + torch.arange(trees)[:, None] * width).flatten()
        state = state[source]
        chain = chain.flatten(0, 1)[source].view(trees, width, -1)

    candidates, gap = _best(torch.cat(all_scores, 1), nodes - 1)
    if width > 1:
        margin = torch.minimum(margin, gap)
    selected = candidates.indices.sort(1).values  # [G, N - 1]
    # candidate ids, -1 for the root
    parent = torch.cat(parent_candidates, 1).gather(1, selected // width)
    position = torch.where(
        parent < 0, 0, 1 + (selected[:, None, :] == parent[:, :, None]).int().argmax(2)
    )
    root = sample.tokens[roots + 1]
    return Growth(
        torch.cat([root[:, None], torch.cat(all_tokens, 1).gather(1, selected)], 1),
        torch.cat([torch.full((trees, 1), -1), position], 1),
        margin,
        strayed,
        queried,
    )


def _context_kv(
    drafts: dict[int, Draft], sample: Sample
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each position's keys and values as the version computed them that wrote them on the
    server.
    """
    positions = torch.arange(len(sample.features))
    mixed = None
    for version in sample.position_version.unique().tolist():
        start = torch.zeros_like(positions)
        # of one layer
        (kv,) = drafts[version].context(
            sample.tokens[1:], sample.features.float(), positions, start
        )[1]
        mine = (sample.position_version == version)[:, None, None]
        mixed = (
            kv
            if mixed is None
            else tuple(torch.where(mine, new, old) for new, old in zip(kv, mixed))
        )
    return [mixed]


def _position_states(
    draft: Draft, sample: Sample, positions: torch.Tensor, context_kv: list
) -> torch.Tensor:
    """What the draft's extend left of these positions [G, H], if it may have attended to other
    versions' KV.
    """
    layer = draft.layers[0]
    state, rope = draft._project(sample.features.float())[positions], draft._rope(positions)
    x = layer.attention_input(draft._embeds(sample.tokens[1 + positions]), state)
    o = draft._attend(
        layer, x, rope, context_kv[0], None, torch.zeros_like(positions), positions + 1, None
    )
    return layer.finish(state, o)


def _best(values: torch.Tensor, k: int) -> tuple[torch.return_types.topk, torch.Tensor]:
    """The k best of each row, and the smallest relative gap between neighbours down to the first
    that lost.
    """
    more = values.topk(min(k + 1, values.shape[1]), -1)
    gap = (more.values[:, :-1] - more.values[:, 1:]) / more.values[:, :-1].clamp_min(1e-30)
    gap = gap.amin(1) if gap.shape[1] else torch.full((len(values),), torch.inf)
    return torch.return_types.topk((more.values[:, :k], more.indices[:, :k])), gap
