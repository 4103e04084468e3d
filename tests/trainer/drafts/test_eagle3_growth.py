"""Trees grown for many positions at once are those that the loop's tests compare with SGLang's, one
sample at a time.
"""

import growth
import pytest
import torch
from naive_draft import VARIANTS, make
from random_sample import random_sample

from aurora_trainer.drafts import eagle3_growth
from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.drafts.eagle3_growth import tree_runs

S = 3


def packed(samples):
    return pack(samples, BatchConfig(depth=S, rejected=False))


@pytest.mark.parametrize("chunk", [1, 1 << 25])
@pytest.mark.parametrize(("width", "nodes"), [(1, 4), (2, 8), (3, 9)])
@pytest.mark.parametrize("name", ["plain", "reduced vocabulary"])
def test_the_trees_are_the_references(name, width, nodes, chunk, monkeypatch):
    monkeypatch.setattr(eagle3_growth, "CHUNK_LOGITS", chunk)
    draft = make(VARIANTS[name], torch.float32)
    samples = [random_sample(seed, topk=width, num_steps=S, verifies=6) for seed in range(3)]
    batch, grown = packed(samples), []
    monkeypatch.setattr(
        eagle3_growth,
        "_accepted",
        lambda tokens, parents, *_: grown.append((tokens, parents)) or tokens,
    )
    tree_runs(draft, batch, S, width, nodes)
    tokens, parents = (torch.cat(parts) for parts in zip(*grown))
    first = strayed = 0
    for sample in samples:
        want = growth.grow({0: draft}, sample, nodes, 0)
        positions = first + sample.node_position[sample.tree_first]
        rows = [batch.levels[0].parent.tolist().index(position) for position in positions.tolist()]
        torch.testing.assert_close(tokens[rows], want.tokens)
        torch.testing.assert_close(parents[rows], want.parents)
        first, strayed = first + len(sample.features), strayed + want.strayed
    # growing along true ancestors would not have done
    assert width == 1 or strayed > 0


def test_a_chain_is_accepted_as_far_as_it_agrees():
    draft = make(VARIANTS["plain"], torch.float32)
    samples = [random_sample(seed, topk=1, num_steps=S, verifies=8) for seed in range(3)]
    trees = []
    # committed as the draft drew it, up to a place that differs
    for sample in samples:
        grown = growth.grow({0: draft}, sample, S + 1, 0)
        for n, (position, drawn) in enumerate(
            zip(sample.node_position[sample.tree_first].tolist(), grown.tokens.tolist())
        ):
            trees.append((sample, position, drawn, n % (S + 1)))
    for sample, position, drawn, agree in trees:
        if position + 2 + S > len(sample.tokens):
            continue
        alone = random_sample(int(sample.request[1:]), topk=1, num_steps=S, verifies=8)
        alone.tokens[position + 2 : position + 2 + agree] = torch.tensor(
            drawn[1 : 1 + agree], dtype=torch.int64
        )
        if agree < S:
            alone.tokens[position + 2 + agree] = (drawn[1 + agree] + 1) % 50
        batch = packed([alone])
        row = batch.levels[0].parent.tolist().index(position)
        assert int(tree_runs(draft, batch, S, 1, S + 1)[row]) == 1 + agree


def test_a_tree_accepts_along_any_branch():
    #        0
    #      1   2        tokens 1x
    #     3 4   5
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2]])
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])
    for behind, run in (
        ([11, 14, 9], 3),
        ([12, 15, 9], 3),
        ([12, 13, 9], 2),
        ([11, 13, 15], 3),
        ([13, 11, 9], 1),
    ):
        committed = torch.tensor([10, *behind])
        assert int(eagle3_growth._accepted(tokens, parents, committed, torch.tensor([0]), 3)) == run
