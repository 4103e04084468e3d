"""Compare the trees of samples with those that our draft grows from the same positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from growth import grow
from serve import has_gpu

from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.intake.sample import Sample

# Relative gap of probabilities below which float32 may decide either way, or bfloat16, in which a
# GPU's server computes.
TIE = 0.1 if has_gpu() else 1e-4


@dataclass
class Parity:
    trees: int = 0
    # roots are not counted
    nodes: int = 0
    same: int = 0
    strayed: int = 0
    queried: int = 0
    # trees that differ because a choice was a tie
    tied: int = 0
    unexplained: list[tuple] = field(default_factory=list)

    def text(self) -> str:
        return (
            f"{self.same} of {self.nodes} nodes in {self.trees} trees are the same, {self.tied}"
            f" trees differ by ties, {len(self.unexplained)} unexplained {self.unexplained[:2]};"
            f" lanes strayed for {self.strayed} of {self.queried} nodes of depth 2 and more"
        )


def eligible(samples: Iterable[Sample], version: int) -> list[Sample]:
    """Those without a cache hit, whose every position and tree comes from one version."""
    return [
        s
        for s in samples
        if s.start == 0
        and (s.position_version == version).all()
        and (s.tree_version == version).all()
    ]


def compare(draft: Draft, samples: Iterable[Sample]) -> Parity:
    """Samples of one version, which `draft` may or may not be."""
    result = Parity()
    for sample in samples:
        version = int(sample.tree_version[0])
        _compare({version: draft}, sample, version, result)
    return result


def compare_across(draft_of: Callable[[int], Draft], samples: Iterable[Sample]) -> Parity:
    """Samples without a cache hit that ran across swaps: every tree with the version that drew it,
    every position's KV with the one that wrote it."""
    result = Parity()
    for sample in samples:
        drafts = {
            v: draft_of(v)
            for v in {*sample.position_version.tolist(), *sample.tree_version.tolist()}
        }
        for version in sample.tree_version.unique().tolist():
            _compare(drafts, sample, version, result)
    return result


def _compare(drafts: dict[int, Draft], sample: Sample, version: int, result: Parity) -> None:
    drawn = sample.tree_version == version
    # SGLang fills every tree
    tokens = sample.node_token.view(len(drawn), -1)[drawn]
    parents = sample.node_parent.view(len(drawn), -1)[drawn]
    parents = torch.where(parents < 0, -1, parents - sample.tree_first[drawn, None])
    trees = len(tokens)
    growth = grow(drafts, sample, tokens.shape[1], version)
    same = (tokens == growth.tokens) & (parents == growth.parents)
    result.trees += trees
    result.nodes += same.numel() - trees
    result.same += int(same[:, 1:].sum())
    result.strayed += growth.strayed
    result.queried += growth.queried
    for i in torch.where(~same.all(1))[0].tolist():
        if growth.margin[i] < TIE:
            result.tied += 1
        else:
            found = (
                tokens[i].tolist(),
                parents[i].tolist(),
                growth.tokens[i].tolist(),
                growth.parents[i].tolist(),
            )
            result.unexplained.append((sample.request, i, float(growth.margin[i]), *found))
