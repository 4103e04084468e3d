"""The one accept length: what the gate, the status and `eval` measure is what a server would
show.
"""

import pytest
import torch
from naive_draft import VARIANTS, make
from random_sample import random_sample

from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.drafts.eagle3_growth import tree_runs
from aurora_trainer.learn.accept_length import chains, expected_walk, walk, walked
from aurora_trainer.learn.objective import LossConfig, losses


def agreeing(draft, sample, share=3):
    """Commit what the draft would draw for two of `share` positions, so that runs of every length
    occur.
    """
    batch = pack([sample], BatchConfig(rejected=False))
    state, _ = draft.context(batch.tokens, batch.features, batch.positions, batch.context_start)
    choice = draft.logits(state).argmax(-1)
    for i in range(sample.prompt_len - 1, len(sample.features) - 1):
        if i % share:
            sample.tokens[i + 2] = choice[i] + draft.d2t[choice[i]]
    return sample


def measure(draft, samples, **packing):
    batch = pack(samples, BatchConfig(rejected=False, **packing))
    found = losses(draft, batch, LossConfig())
    chain = chains(draft, batch, found)
    return batch, chain, walked(draft, batch, samples, chain)


def test_agreement_is_with_the_committed_token_not_with_the_targets_choice():
    """A server that samples commits what the target would not choose; the draft that foretells it
    is accepted.
    """
    draft = make(VARIANTS["plain"], torch.float32)
    sample = agreeing(draft, random_sample(4, prompt_len=3, verifies=30, topk=1))
    _, chain, scores = measure(draft, [sample])
    assert chain.match.any()
    # the target prefers something else everywhere
    other = sample.topk_ids.roll(1, 1)
    sample.topk_ids = other
    _, again, others = measure(draft, [sample])
    assert torch.equal(chain.match, again.match) and (scores == others).all()
    steps, tokens = scores[0]
    assert 1 < tokens / steps < 4


@pytest.mark.parametrize("name", ["plain", "reduced vocabulary"])
def test_each_sample_is_walked_as_its_own_server_draws(name):
    """Chains of two lengths, trees of two shapes and a rejection sampler in one batch, each as if
    it were alone.
    """
    draft = make(VARIANTS[name], torch.float32)
    shapes = [
        dict(topk=1),
        dict(topk=1, num_steps=2),
        dict(topk=2, width=2),
        dict(topk=2, width=3),
        dict(topk=1),
    ]
    samples = [
        agreeing(draft, random_sample(n, verifies=12, **shape)) for n, shape in enumerate(shapes)
    ]
    samples[4].rejection = True
    _, _, together = measure(draft, samples)
    for sample, scores in zip(samples, together):
        batch, chain, alone = measure(draft, [sample])
        assert scores == pytest.approx(alone[0], rel=1e-5)
        if sample.topk > 1:
            nodes = len(sample.node_token) // len(sample.tree_first)
            runs = tree_runs(draft, batch, sample.num_steps, sample.topk, nodes)
            visited = walk(runs, chain.known.all(1), batch.base_is_root)
            assert alone[0].tolist() == [len(visited), sum(visited)]
    excluded = [None if n else sample for n, sample in enumerate(samples)]
    batch = pack(samples, BatchConfig(rejected=False))
    chain = chains(draft, batch, losses(draft, batch, LossConfig()))
    assert (walked(draft, batch, excluded, chain)[1:] == 0).all()


def test_a_row_without_a_target_ends_a_walk_and_the_next_root_begins_one():
    draft = make(VARIANTS["plain"], torch.float32)
    sample = agreeing(draft, random_sample(1, verifies=20, topk=1))
    whole = measure(draft, [sample])[2][0]
    middle = sample.position_node[len(sample.position_node) // 2 :]
    sample.node_altered[middle[middle >= 0][0]] = True
    cut = measure(draft, [sample])[2][0]
    assert 0 < cut[0] < whole[0]


def test_an_expected_walk_with_certainties_is_the_walk():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        size, depth = 40, 3
        match = torch.rand(size, depth, generator=generator) < 0.6
        known = torch.rand(size, generator=generator) < 0.9
        known[-depth:] = False
        roots = torch.rand(size, generator=generator) < 0.4
        visited = walk(1 + match.long().cumprod(1).sum(1), known, roots)
        assert expected_walk(match.float(), known, roots) == pytest.approx(
            (len(visited), sum(visited))
        )


def test_an_expected_walk_is_the_mean_of_walks():
    generator = torch.Generator().manual_seed(1)
    size, depth = 25, 3
    accept = torch.rand(size, depth, generator=generator)
    known = torch.ones(size, dtype=torch.bool)
    known[[9, -3, -2, -1]] = False
    roots = torch.zeros(size, dtype=torch.bool)
    roots[[0, 4, 12, 13, 20]] = True
    steps = tokens = 0
    draws = 4000
    for _ in range(draws):
        match = torch.rand(size, depth, generator=generator) < accept
        visited = walk(1 + match.long().cumprod(1).sum(1), known, roots)
        steps, tokens = steps + len(visited), tokens + sum(visited)
    expected = expected_walk(accept, known, roots)
    assert expected == pytest.approx((steps / draws, tokens / draws), rel=0.02)
