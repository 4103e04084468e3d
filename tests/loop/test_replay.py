"""Our draft in PyTorch proposes, node for node, what SGLang's draft proposed: slots, positions, recurrence, masks,
d2t and assembly are all in here, and a mistake in any of them shows.
"""

from __future__ import annotations

from parity import compare, eligible

PARITY = 0.999


def serve(loop, prompts, params):
    answers = loop.generate(prompts, params)
    samples = [sample for found in loop.taken([a["rid"] for a in answers]).values() for sample in found]
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
    version = chain.metrics()["aurora_draft_version"]
    lengths = [3, 40, 63, 64, 65, 100, 128, 129, 200, 257]
    answers, samples = serve(chain, cut(stream, 0, lengths), {"max_new_tokens": 64})
    chunks = [r for m in chain.messages if m.header.kind == "prefill" for r in m.header.requests]
    assert max(chunks.count(a["rid"]) for a in answers) >= 3  # prompts of several chunks are among them
    check(chain, samples, version, "chain")
    # ... and this would not have passed with another draft, or without attention.
    draft = chain.draft(version)
    draft.layers[0].self_attn.o_proj.weight.data.zero_()
    other = compare(draft, eligible(samples, version))
    assert other.same < 0.9 * other.nodes


def test_tree(tree, stream):
    version = tree.metrics()["aurora_draft_version"]
    lengths = [3, 40, 64, 65, 129, 200]
    _, samples = serve(tree, cut(stream, 0, lengths), {"max_new_tokens": 64})
    result = check(tree, samples, version, "tree")
    assert result.strayed > 0  # else growing along true ancestors would have done as well
