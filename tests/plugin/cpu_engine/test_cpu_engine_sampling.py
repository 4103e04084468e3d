"""Sampling verification on the CPU: its rules are SGLang's, its distribution is the target's.

The oracles are SGLang's Triton kernels, interpreted (this file runs itself as a script, once, as
TRITON_INTERPRET must be set before triton is imported), and for trees, whose kernel is CUDA only,
its walk in plain Python. Chi-square tests with fixed seeds judge the distributions; a right rule
fails one of them by chance for one seed in a million (FALSE_ALARM).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from goodness import FALSE_ALARM, continuations, p_value
from trees import NAMED_TREES

from aurora_sglang_plugin.cpu_engine import sampling

CPU_ENV = {
    **os.environ,
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}


def run_sglangs_kernels(path):
    """The oracle: chains verified by rejection, and rows cut, by SGLang's Triton kernels."""
    from sglang.kernels.ops.sampling import renorm_triton
    from sglang.kernels.ops.speculative import reject_sampling

    # it refuses a CPU
    renorm_triton._prepare_probs = lambda probs: probs.float().contiguous()
    found = {}
    probs, top_ks, top_ps = rows_to_cut()
    found["top_k"] = renorm_triton.top_k_renorm_probs_triton(probs, top_ks)
    found["top_p"] = renorm_triton.top_p_renorm_probs_triton(probs, top_ps)
    out, arguments = empty(6, 4), chains(batch=6, nodes=4, vocab=9)
    reject_sampling.chain_speculative_sampling_triton(*out, *arguments)
    found |= dict(zip("predicts path correct".split(), out))
    np.savez(path, **{name: value.numpy() for name, value in found.items()})


def rows_to_cut():
    """Peaked and flat rows, with ties, longer than sampling.NUCLEUS."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 1500, generator=generator) * torch.linspace(0.01, 6, 12)[:, None]
    logits[3:6] = logits[3:6].round()
    top_ks = torch.tensor([2, 5, 1500, 40, 3, 1 << 30, 700, 2, 7, 1499, 20, 300], dtype=torch.int32)
    top_ps = torch.tensor([0.5, 0.9, 1.0, 0.3, 0.95, 0.999, 0.01, 1.0, 0.8, 0.6, 0.7, 0.9999])
    return logits.softmax(1), top_ks, top_ps


def empty(batch, nodes, steps=None):
    int32 = {"dtype": torch.int32}
    path = torch.full((batch, (steps or nodes - 1) + 1), -1, **int32)
    return [torch.zeros(batch * nodes, **int32), path, torch.zeros(batch, **int32)]


def chains(batch, nodes, vocab):
    """Arguments of a verification; the draft is near the target, so that some is accepted."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(batch, nodes, vocab, generator=generator) * 2
    noise = torch.randn(batch, nodes - 1, vocab, generator=generator)
    target, draft = logits.softmax(2), (logits[:, :-1] + noise * 0.5).softmax(2)
    tokens = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(batch, nodes - 1)
    tokens = torch.cat([torch.zeros(batch, 1, dtype=torch.long), tokens], 1)
    index = torch.arange(batch * nodes).view(batch, nodes)
    coins = torch.rand(batch, nodes, generator=generator)
    last = torch.rand(batch, generator=generator)
    return tokens, index, None, None, coins, last, target, draft, 1.0, 1.0, True


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    path = tmp_path_factory.mktemp("oracle") / "sampling.npz"
    env = CPU_ENV | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "support"),
    }
    subprocess.run([sys.executable, __file__, str(path)], check=True, env=env, timeout=300)
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def test_chains_are_verified_as_by_sglangs_kernel(oracle):
    out = empty(6, 4)
    sampling.chain_speculative_sampling_triton(*out, *chains(6, 4, 9))
    for name, mine in zip("predicts path correct".split(), out):
        assert torch.equal(mine, oracle[name]), name
    # the oracle is not trivial
    assert out[2].max() == 3 and out[2].min() < 2


@pytest.mark.parametrize("rule", ["top_k", "top_p"])
def test_rows_are_cut_as_by_sglangs_kernel(rule, oracle):
    probs, top_ks, top_ps = rows_to_cut()
    mine = {
        "top_k": lambda: sampling.top_k_renorm_prob(probs.clone(), top_ks),
        "top_p": lambda: sampling.top_p_renorm_prob(probs.clone(), top_ps),
    }[rule]()
    assert torch.equal(mine > 0, oracle[rule] > 0)
    torch.testing.assert_close(mine, oracle[rule])
    kept = (mine > 0).sum(1)
    if rule == "top_k":
        # ties with the last one stay, as on CUDA
        assert (kept[3:5] > top_ks[3:5]).any() and (kept >= top_ks.clamp(max=1500)).all()
    else:
        assert kept[0] > sampling.NUCLEUS > kept[-2] and kept[6] < 20


def test_a_row_of_temperature_0_keeps_its_argmax_alone():
    probs = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.1, 0.2, 0.3, 0.4]])
    cut = sampling.top_k_renorm_prob(probs.clone(), torch.tensor([1, 2], dtype=torch.int32))
    assert torch.equal(cut[0], torch.tensor([0.0, 1, 0, 0]))
    torch.testing.assert_close(cut[1], torch.tensor([0, 0, 3, 4]) / 7)
    assert torch.equal(sampling.top_p_renorm_prob(cut.clone(), torch.tensor([0.1, 1.0])), cut)


def test_a_nucleus_ends_where_probabilities_underflow():
    probs = torch.zeros(2, 5000)
    probs[:, :2] = torch.tensor([0.75, 0.2499999])
    cut = sampling.top_p_renorm_prob(probs.clone(), torch.tensor([0.99999999, 0.9999999]))
    assert torch.isfinite(cut).all() and ((cut > 0).sum(1) == 2).all()
    cut = sampling.top_k_renorm_prob(probs.clone(), torch.tensor([7, 1 << 30], dtype=torch.int32))
    assert torch.isfinite(cut).all() and ((cut > 0).sum(1) == 2).all()


# Trees


def links(parents):
    """First children and next siblings [N] of a tree, -1 if there is none, as SGLang keeps them."""
    child, sibling = [-1] * len(parents), [-1] * len(parents)
    newest = {}
    for node, parent in enumerate(parents[1:], 1):
        if parent in newest:
            sibling[newest[parent]] = node
        else:
            child[parent] = node
        newest[parent] = node
    return torch.tensor(child), torch.tensor(sibling)


def trees(parents, batch, vocab, seed):
    """Arguments of a verification of trees of one shape, whose siblings carry different tokens."""
    generator, n = torch.Generator().manual_seed(seed), len(parents)
    tokens = torch.zeros(batch, n, dtype=torch.long)
    for node in range(n):
        brood = [i for i, parent in enumerate(parents) if parent == node]
        shuffled = torch.rand(batch, vocab, generator=generator).argsort(1)
        tokens[:, brood] = shuffled[:, : len(brood)]
    child, sibling = (x.expand(batch, n).contiguous() for x in links(parents))
    index = torch.arange(batch * n).view(batch, n)
    coins = torch.rand(batch, n, generator=generator)
    last = torch.rand(batch, generator=generator)
    logits = torch.randn(batch, n, vocab, generator=generator) * 2
    for node, parent in enumerate(parents[1:], 1):
        # what is drafted is likely
        logits[torch.arange(batch), parent, tokens[:, node]] += 1.5
    target = logits.softmax(2)
    return [tokens, index, child, sibling, coins, last, target, torch.zeros_like(target)]


def walk(tokens, index, child, sibling, coins, last, target, draft, single, acc, columns):
    """SGLang's `TreeSpeculativeSamplingTargetOnly`, thread for thread, of one request."""
    predicts, path, node, together, coin = {}, [int(index[0])], 0, 0.0, coins[0]
    left = target[0].clone()
    while len(path) < columns:
        at = int(child[node])
        while at != -1:
            p = target[node, tokens[at]]
            together += p
            if p > 0 and (coin < together / max(acc, 1e-9) or p >= single):
                predicts[path[-1]] = int(tokens[at])
                path.append(int(index[at]))
                node, together, coin, left = at, 0.0, coins[at], target[at].clone()
                break
            left[tokens[at]] = 0
            at = int(sibling[at])
        if at == -1:
            break
    reached = left.cumsum(0)
    predicts[path[-1]] = int((reached > last * reached[-1]).nonzero()[0])
    return predicts, path


@pytest.mark.parametrize(
    "single, acc", [(1.0, 1.0), (0.4, 1.0), (1.0, 0.5), (0.3, 0.7), (0.0, 0.0)]
)
@pytest.mark.parametrize("name", NAMED_TREES)
def test_trees_are_verified_as_by_sglangs_kernel(name, single, acc):
    parents, batch, vocab = NAMED_TREES[name], 20, 10
    arguments = trees(parents, batch, vocab, seed=len(parents))
    # a distribution of few tokens, and one of a single token, as top-k leaves them
    arguments[6][:10] = sampling.top_k_renorm_prob(
        arguments[6][:10].flatten(0, 1),
        torch.tensor([1, 3, 1, 2, 9] * 2).repeat_interleave(len(parents)),
    ).view(10, len(parents), vocab)
    depth = 8
    out = empty(batch, len(parents), depth)
    sampling.tree_speculative_sampling_target_only(*out, *arguments, single, acc)
    for b in range(batch):
        predicts, path = walk(*(x[b] for x in arguments), single, acc, depth + 1)
        assert out[1][b].tolist() == path + [-1] * (depth + 1 - len(path))
        assert out[2][b] == len(path) - 1
        assert {i: int(out[0][i]) for i in path} == predicts
    if name != "root_only":
        assert out[2].max() > 0


def test_a_coin_beyond_what_rounding_left_still_draws_a_token_of_the_target():
    """Siblings hold all of the mass, and sum to a little less than 1."""
    tokens = torch.tensor([[0, 1, 2]])
    p = torch.tensor([0.0, 0.7, 0.29999995, 0.0]).expand(1, 3, 4).contiguous()
    child, sibling, index = (
        torch.tensor([[1, -1, -1]]),
        torch.tensor([[-1, 2, -1]]),
        torch.arange(3)[None],
    )
    coins = torch.full((1, 3), 1 - 2**-24)
    out = empty(1, 3, 1)
    arguments = (tokens, index, child, sibling, coins, coins[:, 0], p, torch.zeros_like(p))
    sampling.tree_speculative_sampling_target_only(*out, *arguments)
    assert out[2].tolist() == [0] and int(out[0][0]) in (1, 2)


# Distributions. The target is a Markov chain over V tokens: a row for each token.

V, DRAWS, LENGTH = 6, 8000, 3
# topk 2, 3 steps
TREE = [-1, 0, 0, 1, 1, 2, 3]


def target_rows(temperature=1.0, top_k=1 << 30, top_p=1.0):
    """[V, V] the distributions after each token, as SGLang's `eagle_sample` makes them."""
    logits = torch.randn(V, V, generator=torch.Generator().manual_seed(5)) * 1.5
    probs = (logits / temperature).softmax(1)
    probs = sampling.top_k_renorm_prob(probs, torch.full((V,), top_k, dtype=torch.int32))
    return sampling.top_p_renorm_prob(probs, torch.full((V,), top_p))


def draw(rule, rows, seed):
    """Verify drafts that start at token 0; returns the tokens that follow, [DRAWS, LENGTH].

    What a verification does not reach is drawn from the chain itself.
    """
    torch.manual_seed(seed)
    draft = (
        rows.clamp(min=1e-3).log() + torch.randn(V, V, generator=torch.Generator().manual_seed(6))
    ).softmax(1)
    parents = torch.tensor([-1, 0, 1, 2] if rule == "chain" else TREE)
    n = len(parents)
    tokens = torch.zeros(DRAWS, n, dtype=torch.long)
    if rule == "chain":
        for i in range(1, n):
            tokens[:, i] = torch.multinomial(draft[tokens[:, i - 1]], 1)[:, 0]
    else:
        favourites = draft.topk(2).indices
        for i in range(1, n):
            older = sum(int(parents[j] == parents[i]) for j in range(1, i))
            tokens[:, i] = favourites[tokens[:, parents[i]], older]
    child, sibling = (x.expand(DRAWS, n).contiguous() for x in links(parents.tolist()))
    index, coins, last = (
        torch.arange(DRAWS * n).view(DRAWS, n),
        torch.rand(DRAWS, n),
        torch.rand(DRAWS),
    )
    out = empty(DRAWS, n, 3)
    arguments = (tokens, index, child, sibling, coins, last, rows[tokens])
    if rule == "chain":
        sampling.chain_speculative_sampling_triton(*out, *arguments, draft[tokens[:, :-1]])
    else:
        sampling.tree_speculative_sampling_target_only(*out, *arguments, torch.zeros(DRAWS, n, V))
    predicts, path, correct = out
    result = torch.zeros(DRAWS, LENGTH + 1, dtype=torch.long)
    for step in range(LENGTH):
        verified = predicts[path[:, step].clamp(min=0).long()].long()
        free = torch.multinomial(rows[result[:, step]], 1)[:, 0]
        result[:, step + 1] = torch.where(step <= correct, verified, free)
    assert 0.3 < correct.float().mean() < 2.9 and (correct == 3).any()
    return result[:, 1:]


def goodness(rule, rows, seed=0):
    expected = continuations(rows[0], lambda seen: rows[seen[-1]], LENGTH)
    return p_value(draw(rule, rows, seed), expected)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 3},
    {"temperature": 1.4, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 4, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rule", ["tree", "chain"])
def test_what_is_generated_follows_the_target(rule, settings):
    assert goodness(rule, target_rows(**settings)) > FALSE_ALARM


def by_draft(probs, parent, tokens):
    """A broken rule: children are accepted with another probability than the target's."""
    return 0.5 * sampling_of_parent(probs, parent, tokens) + 0.05


def redraw(weights, otherwise, coins):
    """A broken rule: what was refused may come back."""
    return sampling_draw(otherwise, otherwise, coins)


def reuse(*arguments):
    """A broken rule: the coin that refused the children also draws the next token."""
    arguments = list(arguments)
    arguments[8] = arguments[7][:, 0]
    return sampling_tree(*arguments)


sampling_of_parent, sampling_draw = sampling._of_parent, sampling._draw
sampling_tree = sampling.tree_speculative_sampling_target_only


@pytest.mark.parametrize(
    "rule, name, broken",
    [
        ("tree", "_of_parent", by_draft),
        ("chain", "_of_parent", by_draft),
        ("tree", "_draw", redraw),
        ("chain", "_draw", redraw),
        ("tree", "tree_speculative_sampling_target_only", reuse),
    ],
)
def test_a_broken_rule_is_found_out(rule, name, broken, monkeypatch):
    monkeypatch.setattr(sampling, name, broken)
    assert goodness(rule, target_rows()) < FALSE_ALARM


if __name__ == "__main__":
    run_sglangs_kernels(sys.argv[1])
