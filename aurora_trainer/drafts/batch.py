"""From samples to the levels that one training step computes.

Dimensions: T positions of all samples, Q queries of a level, R of them with a loss, P target rows,
K kept target logits, F feature width.

Level 0 are the positions that propose (the first holds the first generated token). Level d >= 1
holds, of every sample,

    dense     from every level-0 position i, d steps along the true tokens (test-time training): the
              query takes tokens[i + 1 + d] and the state of the query one level up, stands at
              position i + d, and its target is that of position i + d
    rejected  the nodes of depth d of the trees that the server drew and did not accept; their
              parents are rejected nodes, or the dense query of the same position (a node on the
              accepted path computes exactly that), or at depth 1 the position that the tree hangs
              from

A node of depth d is a query at level d, because it proposes depth d + 1; nodes of the server's last
depth never propose, so S levels train everything that a server with S draft steps computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from aurora_sglang_plugin.config import Section
from aurora_trainer.intake.sample import Sample

# of a tensor in the piece that a batch is sent as
ALIGN_BYTES = 256


class BatchConfig(Section):
    """What goes into one step of training."""

    # of a packed batch; a longer sample is a batch of its own
    max_positions: PositiveInt = 4096
    # levels to train; 0: as many as the samples' servers drafted
    depth: Annotated[int, Field(ge=0, le=16)] = 0
    # compute the rejected nodes too, if `loss.rejected` weighs them
    rejected: bool = True


@dataclass
class Level:
    """Queries of one depth.

    At level 0 `parent` is the query's own position and there are no ancestors.
    """

    # int64 [Q]
    tokens: Tensor
    # int64 [Q], row among the previous level's queries
    parent: Tensor
    # int64 [Q], RoPE
    positions: Tensor
    # int64 [Q], first position of the query's sequence
    context_start: Tensor
    # int64 [Q], one past the last position that the query sees
    context_end: Tensor
    # int64 [Q, d], among the queries of levels 1..d in order, own node last
    ancestors: Tensor
    # int64 [Q], row of the batch's target tensors, -1: context only, no loss
    target: Tensor
    # int64 [R], the queries with a loss
    rows: Tensor
    # bool [Q], dense (True) or rejected
    accepted: Tensor
    # int64 [Q], row of level 0 that the query descends from
    base: Tensor
    # float32 [Q], probability that verification reaches a rejected node; 1 where accepted
    reach: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Batch:
    # int64 [T]
    tokens: Tensor
    features: Tensor  # [T, F]
    # int64 [T]
    positions: Tensor
    # int64 [T]
    context_start: Tensor
    levels: list[Level]
    # int64 [P, K], TARGET ids, largest first; -1 where a sample keeps fewer
    topk_ids: Tensor
    # float32 [P, K]
    topk_logits: Tensor
    # float32 [P]
    logsumexp: Tensor
    # int64 [Q of level 0], index of the sample
    base_sample: Tensor
    # bool [Q of level 0], a verify step of the server hung its tree from this position
    base_is_root: Tensor
    # of a batch on another device: as it was packed, on the CPU but for its features
    packed: Batch | None = None

    @property
    def depth(self) -> int:
        return len(self.levels)

    @property
    def on_cpu(self) -> Batch:
        """This batch as it was packed: what is counted on it waits for no other device."""
        return self.packed or self

    def counts(self) -> Tensor:
        """float64 [depth, 2] on the CPU: queries with a loss, accepted and rejected, of each
        level.
        """
        accepted = [level.accepted[level.rows] for level in self.on_cpu.levels]
        return torch.tensor([[a.sum(), (~a).sum()] for a in accepted], dtype=torch.float64)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on another device, made while the caller goes on; on the CPU the batch itself."""
        if torch.device(device).type == "cpu":
            return self.on_cpu
        own = [f.name for f in fields(self) if f.name not in ("levels", "packed")]
        # what pack() got from there is there
        there = {n for n in own if getattr(self, n).device.type == torch.device(device).type}
        tensors = [getattr(self, name) for name in own if name not in there]
        tensors += [getattr(level, f.name) for level in self.levels for f in fields(level)]
        moved = iter(upload(tensors, device))
        batch: dict[str, Any] = {n: getattr(self, n) if n in there else next(moved) for n in own}
        levels = [Level(**{f.name: next(moved) for f in fields(Level)}) for _ in self.levels]
        return Batch(levels=levels, packed=self.on_cpu, **batch)


def group(samples: Iterable[Sample], config: BatchConfig) -> Iterator[list[Sample]]:
    """Consecutive samples of at most max_positions positions together; a longer sample comes
    alone.
    """
    held: list[Sample] = []
    positions = 0
    for sample in samples:
        if held and positions + len(sample.features) > config.max_positions:
            yield held
            held, positions = [], 0
        held.append(sample)
        positions += len(sample.features)
    if held:
        yield held


def pack(
    samples: Sequence[Sample], config: BatchConfig, features: Sequence[Tensor] | None = None
) -> Batch:
    """One batch of all `samples` (at least one, of one feature width): on the CPU, but for its
    features where they are given.

    features: each sample's, on a device that they went to once (kept_features.py); None: the
        samples' own.
    """
    depth = config.depth or max(s.num_steps for s in samples)
    own = [_levels(s, depth, config.rejected) for s in samples]
    starts = _starts([len(s.features) for s in samples])
    nodes = _starts([len(s.node_token) for s in samples])
    levels: list[Level] = []
    for d in range(depth):
        rows = [
            _starts([len(levels_of_sample[k]) for levels_of_sample in own])
            for k in (max(d - 1, 0), 0)
        ]
        columns = {f.name: [getattr(o[d], f.name) for o in own] for f in fields(Level)}
        for n in range(len(samples)):
            columns["parent"][n] = columns["parent"][n] + (rows[0][n] if d else starts[n])
            columns["base"][n] = columns["base"][n] + rows[1][n]
            columns["context_start"][n] = columns["context_start"][n] + starts[n]
            columns["context_end"][n] = columns["context_end"][n] + starts[n]
            target = columns["target"][n]
            columns["target"][n] = torch.where(target >= 0, target + nodes[n], target)
        level = Level(**{name: torch.cat(parts) for name, parts in columns.items()})
        if d:
            before = sum(map(len, levels[1:]))
            own_node = torch.arange(before, before + len(level))[:, None]
            level.ancestors = torch.cat([levels[-1].ancestors[level.parent], own_node], 1)
        levels.append(level)
    targets: dict[str, Any] = _keep_used_targets(samples, levels)
    for level in levels:
        level.rows = (level.target >= 0).nonzero()[:, 0]
    return Batch(
        tokens=torch.cat([s.tokens[1:] for s in samples]),
        features=torch.cat([s.features for s in samples] if features is None else list(features)),
        positions=torch.cat([s.start + torch.arange(len(s.features)) for s in samples]),
        context_start=torch.cat(
            [torch.full((len(s.features),), at) for s, at in zip(samples, starts, strict=False)]
        ),
        levels=levels,
        **targets,
        base_sample=torch.cat([torch.full((len(o[0]),), n) for n, o in enumerate(own)]),
        base_is_root=torch.cat(
            [
                torch.isin(o[0].parent, s.node_position[s.tree_first])
                for s, o in zip(samples, own, strict=True)
            ]
        ),
    )


def _levels(s: Sample, depth: int, rejected: bool) -> list[Level]:
    """The levels of one sample, every index local to it, without `ancestors` and `rows`."""
    length = len(s.features)
    positions = torch.arange(min(max(s.prompt_len - 1 - s.start, 0), length), length)
    position_target = torch.where(s.has_target, s.position_node, -1)
    reach = _reach(s) if rejected else None
    first = length - len(positions)
    # node -> its row in the current level, -1 if it is none there
    query = torch.full((len(s.node_token),), -1)
    levels = []
    for d in range(depth):
        dense = positions[: max(len(positions) - d, 0)]
        rows = torch.arange(len(dense))
        token, parent, hangs = s.tokens[dense + 1 + d], rows if d else dense, dense
        target, base, probability = position_target[dense + d], rows, torch.ones(len(dense))
        if rejected and 1 <= d < s.num_steps:
            node = (
                (s.node_depth == d)
                & ~s.node_accepted
                & ~s.node_altered
                & (s.node_position >= first)
            ).nonzero()[:, 0]
            above = s.node_parent[node]
            on_path = torch.where(
                s.node_position[node] + d - 1 < length, s.node_position[node] - first, -1
            )
            node_parent = torch.where(s.node_accepted[above], on_path, query[above])
            node, node_parent = node[node_parent >= 0], node_parent[node_parent >= 0]
            query = torch.full_like(query, -1)
            query[node] = torch.arange(len(dense), len(dense) + len(node))
            token, parent = torch.cat([token, s.node_token[node]]), torch.cat([parent, node_parent])
            hangs, target = torch.cat([hangs, s.node_position[node]]), torch.cat([target, node])
            base, probability = (
                torch.cat([base, s.node_position[node] - first]),
                torch.cat([probability, reach[node]]),
            )
        accepted = torch.arange(len(token)) < len(dense)
        levels.append(
            Level(
                tokens=token, parent=parent, positions=s.start + hangs + d,
                context_start=torch.zeros_like(hangs),
                context_end=hangs + 1, ancestors=hangs.new_empty((len(hangs), 0)), target=target,
                rows=hangs[:0],
                accepted=accepted, base=base, reach=probability,
            )
        )  # fmt: skip
    return levels


def _reach(s: Sample) -> Tensor:
    """float32 [M]: the target's probability (at temperature 1) of the path from the root to each
    node.

    A token that is not among its parent's kept ones counts 0.
    """
    reach = torch.ones(len(s.node_token))
    for d in range(1, int(s.node_depth.max()) + 1 if len(reach) else 0):
        node = (s.node_depth == d).nonzero()[:, 0]
        parent = s.node_parent[node]
        p = (s.topk_logits[parent] - s.logsumexp[parent, None]).exp()
        reach[node] = reach[parent] * (p * (s.topk_ids[parent] == s.node_token[node, None])).sum(
            -1
        ).clamp_max(1)
    return reach


def _keep_used_targets(samples: Sequence[Sample], levels: list[Level]) -> dict[str, Tensor]:
    """The target tensors of the nodes that some query has as its target; the levels are renumbered
    to them.
    """
    k = max(s.topk_ids.shape[1] for s in samples)
    used = torch.zeros(sum(len(s.node_token) for s in samples), dtype=torch.bool)
    for level in levels:
        used[level.target[level.target >= 0]] = True
    number = torch.where(used, used.cumsum(0) - 1, -1)
    for level in levels:
        level.target = (
            torch.where(level.target >= 0, number[level.target], -1)
            if len(number)
            else level.target
        )
    lowest = torch.finfo(torch.float32).min
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(s.topk_ids, (0, k - s.topk_ids.shape[1]), value=-1) for s in samples])
    logits = torch.cat(
        [pad(s.topk_logits, (0, k - s.topk_logits.shape[1]), value=lowest) for s in samples]
    )
    logsumexp = torch.cat([s.logsumexp for s in samples])
    return {
        "topk_ids": ids[used],
        "topk_logits": logits[used].float(),
        "logsumexp": logsumexp[used].float(),
    }


def _starts(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def upload(tensors: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """Copies on `device`, sent as one piece from pinned memory, which nothing waits for."""
    at = _starts([-(-t.nbytes // ALIGN_BYTES) * ALIGN_BYTES for t in tensors])
    pin = torch.device(device).type == "cuda"
    piece = torch.empty(at[-1], dtype=torch.uint8, pin_memory=pin)

    def parts(of: Tensor) -> list[Tensor]:
        return [of[n : n + t.nbytes].view(t.dtype).view(t.shape) for n, t in zip(at, tensors)]

    for part, tensor in zip(parts(piece), tensors):
        part.copy_(tensor)
    return parts(piece.to(device, non_blocking=True))
