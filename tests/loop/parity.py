"""Compare the trees of samples with those that our draft grows from the same slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from growth import grow

from aurora_trainer.draft import Draft
from aurora_trainer.sample import Sample

TIE = 1e-4  # relative gap of probabilities below which float32 may decide either way


@dataclass
class Parity:
    trees: int = 0
    nodes: int = 0  # roots are not counted
    same: int = 0
    strayed: int = 0
    queried: int = 0
    tied: int = 0  # trees that differ, where a choice was a tie
    unexplained: list[tuple] = field(default_factory=list)

    def text(self) -> str:
        return (
            f"{self.same} of {self.nodes} nodes in {self.trees} trees are the same, {self.tied} trees differ by ties, "
            f"{len(self.unexplained)} unexplained {self.unexplained[:2]}; "
            f"lanes strayed for {self.strayed} of {self.queried} nodes of depth 2 and more"
        )


def eligible(samples: Iterable[Sample], version: int) -> list[Sample]:
    """Those without a cache hit, whose every slot and tree comes from one version."""
    return [
        s for s in samples if s.start == 0 and (s.slot_version == version).all() and (s.tree_version == version).all()
    ]


def compare(draft: Draft, samples: Iterable[Sample]) -> Parity:
    result = Parity()
    for sample in samples:
        trees = len(sample.tree_first)
        tokens = sample.node_token.view(trees, -1)  # SGLang fills every tree
        parents = sample.node_parent.view(trees, -1)
        parents = torch.where(parents < 0, -1, parents - sample.tree_first[:, None])
        growth = grow(draft, sample, tokens.shape[1])
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
                found = (tokens[i].tolist(), parents[i].tolist(), growth.tokens[i].tolist(), growth.parents[i].tolist())
                result.unexplained.append((sample.request, i, float(growth.margin[i]), *found))
    return result
