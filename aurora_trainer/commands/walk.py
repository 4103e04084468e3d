"""Walk a draft along committed tokens, as a server's verify steps would: the arithmetic of `evaluate.py`.

Dimensions: R level-0 slots (of a batch, or of one of its samples), S draft steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aurora_trainer.batch import Batch
from aurora_trainer.draft import Draft
from aurora_trainer.loss import LossConfig, losses
from aurora_trainer.sample import Sample

WALK = ("steps", "tokens", "reached", "queries", "matches", "overlap")  # each [S]; `reached` of the walk with S drafts


@dataclass
class Chains:
    """Of one draft, [R, S]: the query is known, its first choice is the committed token, its sum min(p, q)."""

    known: Tensor
    match: Tensor
    overlap: Tensor


def chains(draft: Draft, batch: Batch, on_device: Batch) -> Chains:
    """The dense queries of every level-0 slot; the same slots are known for every draft."""
    found = losses(draft, on_device, LossConfig())
    first_choice = (found.argmax + draft.d2t[found.argmax]).cpu()
    overlap_of = found.acceptance.cpu().float()
    slots = len(batch.tokens)
    starts = batch.slot_start.unique()
    sample_end = torch.cat([starts[1:], torch.tensor([slots])])[torch.bucketize(batch.slot_start, starts)]  # of a slot
    shape = len(batch.levels[0]), batch.depth
    known, match, overlap = torch.zeros(shape, dtype=bool), torch.zeros(shape, dtype=bool), torch.zeros(shape)
    at, slot = 0, batch.levels[0].parent
    for d, level in enumerate(batch.levels):
        part = slice(at, at + len(level.rows))
        at += len(level.rows)
        base = level.base[level.rows]
        follows = slot[base] + d + 1  # the slot that holds the token which the query predicts
        there = follows < sample_end[slot[base]]  # the last slot's own is not committed yet
        token = batch.tokens[follows.clamp_max(slots - 1)]
        known[base, d] = there
        match[base, d] = there & (first_choice[part] == token)
        overlap[base, d] = overlap_of[part]
    return Chains(known, match, overlap)


def walks(match: Tensor, overlap: Tensor, known: Tensor, is_root: Tensor) -> np.ndarray:
    """float64 [len(WALK), S] of one sample; column k is of a walk with k + 1 draft steps, or of level k."""
    size = match.shape[1]
    out = np.zeros((len(WALK), size))
    known_to = known.long().cumprod(1).bool()
    run_to = 1 + match.long().cumprod(1).cumsum(1)
    for k in range(size):
        visited = walk(run_to[:, k], known_to[:, k], is_root)
        out[0, k], out[1, k] = len(visited), sum(visited)
        if k == size - 1:
            out[2] = [sum(run > d + 1 for run in visited) for d in range(size)]
    out[3], out[4] = known.sum(0), (match & known).sum(0)
    out[5] = (overlap.double() * known).sum(0)
    return out


def walk(runs: Tensor, known: Tensor, is_root: Tensor) -> list[int]:
    """Accept lengths of the steps that a server would take over the slots, each [R of a sample].

    It begins at the first root of the server's own, and again at the next one where it came to something unknown.
    """
    starts = (is_root & known).nonzero()[:, 0].tolist()
    lengths, there, at, visited = runs.tolist(), known.tolist(), 0, []
    for start in starts:
        if start < at:
            continue
        at = start
        while at < len(lengths) and there[at]:
            visited.append(lengths[at])
            at += lengths[at]
    return visited


def sampling(overlap: Tensor, known: Tensor) -> np.ndarray:
    whole = overlap[known.all(1)].double()
    return np.array([len(whole), float((1 + whole.cumprod(1).sum(1)).sum())])


def live(sample: Sample, slots: Tensor, counted: Tensor) -> np.ndarray:
    """(steps, tokens) of the sample's trees that hang from the level-0 `slots` that are `counted`."""
    tree = torch.bucketize(torch.arange(len(sample.node_token)), sample.tree_first, right=True) - 1
    lengths = torch.zeros(len(sample.tree_first), dtype=torch.int64).index_add(0, tree, sample.node_accepted.long())
    take = torch.isin(sample.node_slot[sample.tree_first], slots[counted])
    return np.array([float(take.sum()), float(lengths[take].sum())])
