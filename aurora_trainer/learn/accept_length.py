"""The one accept length: tokens that a verify step commits, its bonus included, of a draft that is
walked along committed tokens as its server would have gone. Gate, status, metrics, `eval` and the
learning curves all measure this.

Speculation is lossless, so the committed tokens of a request do not depend on the draft that served
it: any draft can be walked along them. A step at a position proposes what the server would have
drawn there, a chain of the draft's first choices or with topk > 1 a tree (`tree_runs`); as
much is accepted as its rule accepts, and the walk goes on behind the bonus token.

    match      SGLang's default: a drafted token is accepted with the probability p that the judging
               distribution gives it, and a committed token is a draw from just that. Accepted is
               what agrees with the committed tokens: exact for greedy requests, unbiased for
               those that sample.
    rejection  `--speculative-use-rejection-sampling`: a drafted token is a draw from q, accepted
               with probability sum min(p, q). The walk is an expectation over where it goes: p and
               q at temperature 1, an upper bound in p's tail.

Dimensions: R level-0 positions (of a batch, or of one of its samples), S draft steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from aurora_kernels.tree_loss import TreeLoss
from torch import Tensor

from aurora_trainer.drafts.batch import Batch, BatchConfig, group, pack
from aurora_trainer.drafts.kinds import Draft, tree_runs
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.objective import LossConfig, losses

# steps and tokens of a walk
Walked = tuple[float, float]

# Each [S]; `reached` of the walk with S drafts.
WALK = ("steps", "tokens", "reached", "queries", "matches", "overlap")


@dataclass
class Chains:
    """One draft's, [R, S]: the query's token is known, the first choice agrees with it, and
    sum min(p, q)."""

    known: Tensor
    match: Tensor
    overlap: Tensor


def chains(draft: Draft, batch: Batch, found: TreeLoss) -> Chains:
    """The dense queries of every level-0 position, from the batch's `losses` with this draft. Waits
    for the device. The same positions are known for every draft."""
    first_choice = draft.to_target_ids(found.argmax).cpu()
    overlap_of = found.acceptance.cpu().float()
    batch = batch.on_cpu
    positions = len(batch.tokens)
    starts = batch.context_start.unique()
    ends = torch.cat([starts[1:], torch.tensor([positions])])
    # One past the last position of a position's sample.
    sample_end = ends[torch.bucketize(batch.context_start, starts)]
    shape = len(batch.levels[0]), batch.depth
    known, match = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    overlap = torch.zeros(shape)
    at, position = 0, batch.levels[0].parent
    for d, level in enumerate(batch.levels):
        part = slice(at, at + len(level.rows))
        at += len(level.rows)
        dense = level.accepted[level.rows]
        base = level.base[level.rows][dense]
        # The position that holds the token which the query predicts: the last one's own is not
        # committed yet.
        follows = position[base] + d + 1
        there = follows < sample_end[position[base]]
        token = batch.tokens[follows.clamp_max(positions - 1)]
        known[base, d] = there
        match[base, d] = there & (first_choice[part][dense] == token)
        overlap[base, d] = overlap_of[part][dense]
    return Chains(known, match, overlap)


@torch.no_grad()
def measure(
    draft: Draft, samples: Sequence[Sample], packing: BatchConfig, loss: LossConfig, device: str
) -> np.ndarray:
    """float64 [len(samples), 2]: steps and tokens of each sample's walk with `draft`, which is on
    `device`. A forward pass of all samples, in batches of at most packing.max_positions."""
    packing = packing.model_copy(update={"rejected": False})
    out = [np.zeros((0, 2))]
    for some in group(samples, packing):
        batch = pack(some, packing).to(device)
        out.append(walked(draft, batch, some, chains(draft, batch, losses(draft, batch, loss))))
    return np.concatenate(out)


def walked(
    draft: Draft,
    batch: Batch,
    samples: Sequence[Sample | None],
    chain: Chains,
    depth: int | None = None,
) -> np.ndarray:
    """float64 [len(samples), 2]: steps and tokens of each sample's walk, as its server would draw
    and judge. `batch` was packed from the samples and is on the draft's device; None stands for one
    that is left out.

    depth: draft steps of a chain, None for the server's own; at most the batch's.
    """
    roots, owner = batch.on_cpu.base_is_root, batch.on_cpu.base_sample
    grown: dict[tuple[int, int, int], Tensor] = {}
    out = np.zeros((len(samples), 2))
    for n, sample in enumerate(samples):
        if sample is None:
            continue
        mine = (owner == n).nonzero()[:, 0]
        shape = tree_shape(sample)
        steps = min(depth or shape[0], batch.depth)
        known = chain.known[mine, :steps].all(1)
        if sample.rejection:
            out[n] = expected_walk(chain.overlap[mine, :steps], known, roots[mine])
            continue
        if shape[1] > 1 and shape[2] > 1:
            if shape not in grown:
                grown[shape] = tree_runs(draft, batch, *shape)
            runs = grown[shape][mine]
        else:
            # of a tree that is its root alone, nothing
            runs = 1 + chain.match[mine, :steps].long().cumprod(1).sum(1) * (shape[1] == 1)
        visited = walk(runs, known, roots[mine])
        out[n] = len(visited), sum(visited)
    return out


def tree_shape(sample: Sample) -> tuple[int, int, int]:
    """(num_steps, topk, nodes); a chain's nodes follow from its steps and are not told apart."""
    # SGLang fills every tree
    nodes = len(sample.node_token) // len(sample.tree_first)
    return sample.num_steps, sample.topk, nodes if sample.topk > 1 else 0


def walk(runs: Tensor, known: Tensor, is_root: Tensor) -> list[int]:
    """Accept lengths of the steps that a server would take over the positions, each [R of a
    sample].

    It begins at the first root of the server's own, and again at the next one if it came to
    something unknown.
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


def expected_walk(accept: Tensor, known: Tensor, is_root: Tensor) -> tuple[float, float]:
    """Expected (steps, tokens) of a walk in which position i accepts its d-th draft with
    probability `accept` [R of a sample, S], given that it accepted those before.

    With probabilities of 0 and 1 it is `walk`. A root begins a walk as far as none is under way.
    """
    size, depth = accept.shape
    reach = torch.cat([torch.ones(size, 1), accept.clamp(0, 1).cumprod(1)], 1).double()
    # [R, S + 1]: the step commits 1, 2, ... S + 1 tokens.
    ends = torch.cat([reach[:, :-1] - reach[:, 1:], reach[:, -1:]], 1).numpy()
    there, roots = known.tolist(), is_root.tolist()
    # the probability that a step begins here
    at = np.zeros(size + depth + 2)
    # the probability that a step passes over it
    under_way = np.zeros(size + depth + 2)
    steps = tokens = 0.0
    for i in range(size):
        if not there[i]:
            continue
        if roots[i]:
            at[i] = max(at[i], 1.0 - under_way[i])
        if at[i] == 0:
            continue
        steps += at[i]
        tokens += at[i] * float(reach[i].sum())
        at[i + 1 : i + depth + 2] += at[i] * ends[i]
        under_way[i + 1 : i + depth + 1] += at[i] * (1 - ends[i].cumsum()[:-1])
    return steps, tokens


def walks(match: Tensor, overlap: Tensor, known: Tensor, is_root: Tensor) -> np.ndarray:
    """float64 [len(WALK), S] of one sample; column k is of a walk with k + 1 draft steps as a
    chain, or of level k."""
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


def sampling(overlap: Tensor, known: Tensor) -> np.ndarray:
    """(positions, tokens) with rejection sampling, at every position whose chain is known."""
    whole = overlap[known.all(1)].double()
    return np.array([len(whole), float((1 + whole.cumprod(1).sum(1)).sum())])


def live(sample: Sample, positions: Tensor, counted: Tensor) -> np.ndarray:
    """(steps, tokens) of the sample's own trees that drafted, those that hang from the level-0
    `positions` that are `counted`."""
    tree = torch.bucketize(torch.arange(len(sample.node_token)), sample.tree_first, right=True) - 1
    accepted = sample.node_accepted.long()
    lengths = torch.zeros(len(sample.tree_first), dtype=torch.int64).index_add(0, tree, accepted)
    sizes = torch.bincount(tree, minlength=len(sample.tree_first))
    take = torch.isin(sample.node_position[sample.tree_first], positions[counted]) & (sizes > 1)
    return np.array([float(take.sum()), float(lengths[take].sum())])


def accept_length(scores: np.ndarray) -> float:
    """Tokens over steps of scores [n, 2]; nan without a step."""
    steps, tokens = scores.sum(0)
    return float(tokens / steps) if steps else math.nan


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(accept length of a - that of b, its standard error), scores [n, 2] of the same n requests.

    Ratios of sums, the error by linearisation: request i contributes (tokens - A steps) / mean
    steps, for a minus for b. nan if a draft has no step.
    """
    lengths = accept_length(a), accept_length(b)
    if not all(map(math.isfinite, lengths)):
        return math.nan, math.nan
    parts = [(s[:, 1] - length * s[:, 0]) / s[:, 0].mean() for s, length in zip((a, b), lengths)]
    stderr = float(np.std(parts[0] - parts[1], ddof=1)) / math.sqrt(len(a))
    return lengths[0] - lengths[1], stderr
