"""Our draft in PyTorch proposes, node for node, what SGLang's draft proposed: positions, positions,
recurrence, masks, d2t and assembly are all in here, and a mistake in any of them shows.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import DRAFT_VOCAB
from drafts import disturb, make_draft
from parity import compare, compare_across, eligible
from serve import has_gpu

from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_rope import inverse_frequencies
from aurora_trainer.intake.assemble import AssembleConfig, Assembler

# A GPU's server drafts in bfloat16, and one choice decides what follows it.
PARITY = 0.9 if has_gpu() else 0.999


def serve(loop, prompts, params):
    answers = loop.generate(prompts, params)
    samples = [
        sample for found in loop.taken([a["rid"] for a in answers]).values() for sample in found
    ]
    return answers, samples


def cut(stream, first, lengths):
    """Prompts at places of their own, so that none hits the cache."""
    return [stream[first + 211 * i : first + 211 * i + n] for i, n in enumerate(lengths)]


def check(loop, samples, version, what, trees=50):
    fit = eligible(samples, version)
    result = compare(loop.draft(version), fit)
    print(f"{what}: {result.text()}; {len(samples) - len(fit)} of {len(samples)} samples excluded")
    assert result.trees >= trees
    assert result.same >= PARITY * result.nodes and not result.unexplained, result.text()
    return result


def test_chain(chain, stream):
    version = chain.settled_version()
    lengths = [3, 40, 63, 64, 65, 100, 128, 129, 200, 257]
    answers, samples = serve(chain, cut(stream, 0, lengths), {"max_new_tokens": 64})
    chunks = [r for m in chain.messages if m.header.kind == "prefill" for r in m.header.requests]
    # prompts of several chunks are among them
    assert max(chunks.count(a["rid"]) for a in answers) >= 3
    check(chain, samples, version, "chain")
    # ... and this would not have passed with another draft, or without attention.
    draft = chain.draft(version)
    draft.layers[0].self_attn.o_proj.weight.data.zero_()
    other = compare(draft, eligible(samples, version))
    assert other.same < 0.9 * other.nodes


def test_tree(tree, stream):
    version = tree.settled_version()
    lengths = [3, 40, 64, 65, 129, 200]
    _, samples = serve(tree, cut(stream, 0, lengths), {"max_new_tokens": 64})
    result = check(tree, samples, version, "tree")
    # else growing along true ancestors would have done as well
    assert result.strayed > 0


def test_a_draft_as_others_publish_it(modern, stream):
    """EAGLE 3.1's norms, yarn, a bias and another family's config: as served so trained, after a
    swap too.
    """
    version = modern.settled_version()
    _, samples = serve(modern, cut(stream, 20000, [3, 40, 100, 200, 257]), {"max_new_tokens": 64})
    check(modern, samples, version, "modern")
    taught, fit = modern.draft(version), eligible(samples, version)
    for excluded in ({"norm_output": False}, {"norm_before_fc": False}):
        draft = modern.draft(version)
        draft.config = replace(taught.config, **excluded)
        other = compare(draft, fit)
        assert other.same < 0.95 * other.nodes, (excluded, other.text())
    draft = modern.draft(version)
    draft.inv_freq = inverse_frequencies(replace(taught.config, rope_scaling=None))
    assert not torch.equal(draft.inv_freq, taught.inv_freq) and taught.rope_magnitude > 1
    other = compare(draft, fit)
    assert other.same < 0.95 * other.nodes, other.text()
    version = modern.publish(disturb(taught, seed=6, size=0.02))
    modern.wait_for_version(version)
    _, samples = serve(modern, cut(stream, 23000, [20, 90, 180]), {"max_new_tokens": 48})
    check(modern, samples, version, "modern after a swap")


def test_after_a_swap(tree, stream, target, tmp_path):
    """Requests that started since are the new version's in every level, another draft vocabulary
    included.
    """
    old = tree.settled_version()
    new = Draft.load(
        make_draft(tmp_path / "draft", target, draft_vocab=DRAFT_VOCAB, seed=5), tree.embed
    )
    assert not torch.equal(new.d2t, tree.draft(old).d2t)
    version = tree.publish(new)
    tree.wait_for_version(version)
    _, samples = serve(tree, cut(stream, 3000, [20, 30, 70, 140]), {"max_new_tokens": 48})
    check(tree, samples, version, "tree after a swap")
    other = compare(tree.draft(old), eligible(samples, version))
    assert other.same < 0.5 * other.nodes
    # one that accepts something
    back = tree.publish(disturb(tree.draft(0), seed=5, size=0.02))
    tree.wait_for_version(back)
    _, samples = serve(tree, cut(stream, 6000, [20, 30, 70]), {"max_new_tokens": 48})
    check(tree, samples, back, "tree swapped back")


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_across_swaps(name, request, stream):
    """Requests that ran while versions changed: each tree is of one version in all its levels, the
    one it names, and each position's KV is of the version that it names."""
    loop = request.getfixturevalue(name)
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(
            serve, loop, cut(stream, 50000, [20, 30, 40, 80]), {"max_new_tokens": 120}
        )
        while not serving.done():
            loop.publish(disturb(loop.draft(0), seed=500 + loop.writer.newest, size=0.15))
            time.sleep(0.3)
        _, samples = serving.result()
    crossed = [s for s in samples if s.start == 0 and len(s.position_version.unique()) > 1]
    assert crossed, "no request ran across a swap"
    result = compare_across(loop.draft, crossed)
    versions = {int(v) for s in crossed for v in s.tree_version}
    print(f"{name} across versions {sorted(versions)}: {result.text()}")
    assert result.same >= PARITY * result.nodes > 0 and not result.unexplained, result.text()
    # the label matters: one version too late is seen
    for sample in crossed:
        sample.tree_version = sample.tree_version.clamp(max=max(versions) - 1) + 1
    late = compare_across(loop.draft, crossed)
    assert late.same < 0.99 * late.nodes


def test_cache_hits(chain, stream):
    """Positions of a cached prefix are known from the request that computed them: then the draft
    proposes what the server's did. Without them such requests cannot be replayed; where they stand
    must be right.
    """
    version = chain.settled_version()
    # its first tokens are nobody else's: else they would be cached, and unknown
    first = [1011, 998, 1003, *stream[8000:8177]]
    hits = [first[:n] + stream[8500 : 8500 + 20 * i] for i, n in enumerate((60, 100, 150, 180))]
    chain.generate([first], {"max_new_tokens": 2})
    answers, samples = serve(chain, hits, {"max_new_tokens": 24})
    assert eligible(samples, version) == [] and len(samples) == len(hits)
    for prompt, answer, sample in zip(hits, answers, samples):
        tokens = prompt + answer["output_ids"]
        cached = answer["meta_info"]["cached_tokens"]
        assert sample.start == cached >= 50 and sample.prompt_len == len(prompt)
        assert sample.tokens.tolist() == tokens[cached:]
        roots = sample.start + sample.node_position[sample.tree_first] + 1
        assert sample.node_token[sample.tree_first].tolist() == [tokens[i] for i in roots]
        # every generated position has a target
        assert (sample.position_node[len(prompt) - cached - 1 : -1] >= 0).all()
    assembler = Assembler(AssembleConfig(part_positions=1 << 16))
    rids = {answer["rid"] for answer in answers}
    whole = [s for m in chain.messages for s in assembler.add(m) if s.request in rids]
    assert [s.start for s in whole] == [0] * len(hits)
    for prompt, answer, sample in zip(hits, answers, sorted(whole, key=lambda s: s.prompt_len)):
        assert sample.tokens.tolist() == prompt + answer["output_ids"]
    check(chain, whole, version, "cache hits", trees=20)
    print(f"chain: {len(samples)} samples with cache hits, all aligned")
