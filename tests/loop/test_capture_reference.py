"""What a server captured is what Hugging Face computes of the same target, whatever happened to the
request.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request

import pytest
import torch
from reference import Reference
from rig import generate
from serve import has_gpu

# In 16 bits a batch of other requests rounds otherwise, and near ties are decided otherwise.
same_again = pytest.mark.skipif(has_gpu(), reason="an answer does not repeat in another batch")


@pytest.fixture(scope="session")
def reference(model):
    return Reference(model, (0, 1, 2))


def known(prompt, answer):
    return prompt + answer["output_ids"]


def check_whole(reference, loop, prompt, answer, reason):
    """The request's samples join to everything that the client got, and each is right."""
    samples = loop.taken([answer["rid"]])[answer["rid"]]
    tokens = known(prompt, answer)
    assert answer["meta_info"]["finish_reason"]["type"] == reason
    assert samples and samples[-1].reason == reason
    assert samples[-1].start + len(samples[-1].tokens) == len(tokens), (
        "what was committed, not less, not more"
    )
    for sample in samples:
        assert sample.prompt_len == len(prompt)
        reference.check_sample(sample, tokens)
    return samples


def chunks_of(loop, rid):
    prefills = [m for m in loop.messages if m.header.kind == "prefill" and rid in m.header.requests]
    return [(m, m.header.requests.index(rid)) for m in prefills]


def prompts(stream, first, lengths):
    return [stream[first + 307 * i : first + 307 * i + n] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_batch_of_lengths(name, request, stream, reference):
    loop = request.getfixturevalue(name)
    batch = prompts(stream, 9000, [1, 2, 17, 63, 64, 65, 130, 220])
    params = [{"max_new_tokens": n} for n in (40, 2, 3, 33, 17, 40, 8, 24)]
    answers = loop.generate(batch, params)
    for prompt, answer in zip(batch, answers):
        samples = check_whole(reference, loop, prompt, answer, "length")
        # a token or two that another prompt begins with as well
        cached = answer["meta_info"]["cached_tokens"]
        assert [s.start for s in samples] == [cached]
        chunks = chunks_of(loop, answer["rid"])
        spans = [reference.check_prefill(m, row, known(prompt, answer)) for m, row in chunks]
        assert spans[0][0] == cached < 16 and spans[-1][1] == len(prompt)
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert max(len(chunks_of(loop, a["rid"])) for a in answers) >= 3
    accepted = [int(s.node_accepted.sum()) for a in answers for s in loop.samples[a["rid"]]]
    assert sum(accepted) > sum(len(loop.samples[a["rid"]][0].tree_first) for a in answers), (
        "nothing was ever accepted"
    )


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_cache_hit(name, request, stream, reference):
    loop = request.getfixturevalue(name)
    prompt = stream[15000:15150]
    loop.generate([prompt[:100]], {"max_new_tokens": 4})
    answer = loop.generate([prompt], {"max_new_tokens": 24})[0]
    cached = answer["meta_info"]["cached_tokens"]
    assert cached >= 64
    (sample,) = check_whole(reference, loop, prompt, answer, "length")
    assert sample.start == cached
    again = loop.generate([prompt], {"max_new_tokens": 24})[0]
    assert again["output_ids"] == answer["output_ids"]
    check_whole(reference, loop, prompt, again, "length")


def test_max_tokens_one(chain, stream, reference):
    """Nothing is verified: the prompt's features come, a sample does not."""
    batch = prompts(stream, 16000, [5, 80])
    for prompt, answer in zip(batch, chain.generate(batch, {"max_new_tokens": 1})):
        assert len(answer["output_ids"]) == 1
        assert chain.taken([answer["rid"]])[answer["rid"]] == []
        spans = [
            reference.check_prefill(m, row, known(prompt, answer))
            for m, row in chunks_of(chain, answer["rid"])
        ]
        assert spans[-1][1] == len(prompt)


@same_again
@pytest.mark.parametrize("name", ["chain", "tree"])
def test_stops(name, request, stream, reference, target):
    """The accepted path runs past a stop; what was captured does not."""
    from transformers import AutoTokenizer

    loop = request.getfixturevalue(name)
    batch = prompts(stream, 17000, [30, 40, 50, 60, 70, 80])
    free = loop.generate(batch, {"max_new_tokens": 48})
    token = [a["output_ids"][9 + i] for i, a in enumerate(free)]
    text = [
        AutoTokenizer.from_pretrained(target).decode(a["output_ids"][12 + i : 14 + i])
        for i, a in enumerate(free)
    ]
    usual = {"max_new_tokens": 48, "ignore_eos": False}
    params = [usual | {"stop_token_ids": [t]} for t in token[:3]] + [
        usual | {"stop": t} for t in text[3:]
    ]
    for prompt, whole, answer in zip(batch, free, loop.generate(batch, params)):
        assert answer["output_ids"] == whole["output_ids"][: len(answer["output_ids"])]
        assert len(answer["output_ids"]) < 48
        tokens = known(prompt, answer)
        reference_samples = loop.taken([answer["rid"]])[answer["rid"]]
        if len(answer["output_ids"]) > 1:
            assert reference_samples
            check_whole(reference, loop, prompt, answer, "stop")
        for sample in reference_samples:
            assert sample.start + len(sample.tokens) <= len(tokens)


def test_end_of_text(chain, stream, reference):
    """An end-of-text token that a bias brings about: it ends the request, and is a target as
    any.
    """
    batch = [stream[19000 + 50 * i : 19040 + 50 * i] for i in range(8)]
    for prompt, free in zip(batch, chain.generate(batch, {"max_new_tokens": 60})):
        logits = reference.run(known(prompt, free))[1][len(prompt) - 1 : -1]
        # what the end of text lacks to be the choice
        short = (logits.amax(-1) - logits[:, 0]).tolist()
        first = next((i for i in range(4, 60) if short[i] < min(short[:i]) - 1e-3), None)
        if first is not None:
            break
    assert first is not None, "no prompt comes nearer to its end as it goes on"
    params = {
        "max_new_tokens": 60,
        "ignore_eos": False,
        "logit_bias": {"0": (short[first] + min(short[:first])) / 2},
    }
    answer = chain.generate([prompt], params)[0]
    assert answer["output_ids"] == free["output_ids"][:first] + [0]
    (sample,) = chain.taken([answer["rid"]])[answer["rid"]]
    assert sample.reason == "stop" and not sample.node_altered.any()
    reference.check_sample(sample, known(prompt, answer), judged=edited(sample, params))


END_OF_TEXT = 0
NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
}


def edited(sample, params):
    """What SGLang makes of raw logits: penalties as they stood before each step, for which it
    counts the last token of every step only, then the bias."""
    roots = sample.node_token[sample.tree_first]

    def judged(logits, trees):
        logits = logits.clone()
        for row, tree in zip(logits, trees.tolist()):
            seen = roots[: tree + 1]
            counts = torch.bincount(seen, minlength=row.numel())
            row -= params.get("frequency_penalty", 0) * counts
            row -= params.get("presence_penalty", 0) * (counts > 0)
            scale = torch.where(counts > 0, params.get("repetition_penalty", 1.0), 1.0)
            row.copy_(torch.where(row < 0, row * scale, row / scale))
            for token, bias in params.get("logit_bias", {}).items():
                row[int(token)] += bias
            # one for each step
            if tree + 1 < params.get("min_new_tokens", 0):
                row[END_OF_TEXT] = -torch.inf
        return logits

    return judged


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_the_target_of_a_row_is_the_distribution_that_judged_it(name, request, stream, reference):
    """Penalties and bias are part of it; neutral settings are no settings; nothing is flagged."""
    loop = request.getfixturevalue(name)
    kinds = [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 0.7},
        {"repetition_penalty": 1.3},
        {"logit_bias": {"5": 4.0, "9": -100.0}},
        {"frequency_penalty": -0.4, "repetition_penalty": 1.1, "logit_bias": {"7": 2.0}},
        {
            "logit_bias": {},
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1,
        },
        {"min_new_tokens": 8},
        {},
    ]
    batch = prompts(stream, 20000, [30] * len(kinds))
    answers = loop.generate(batch, [{"max_new_tokens": 24} | kind for kind in kinds])
    for prompt, answer, kind in zip(batch, answers, kinds):
        (sample,) = loop.taken([answer["rid"]])[answer["rid"]]
        tokens = known(prompt, answer)
        try:
            reference.check_sample(sample, tokens, judged=edited(sample, kind))
        except AssertionError as error:
            raise AssertionError(f"{kind} start {sample.start} of {len(prompt)}: {error}") from None
        assert not sample.node_altered.any()
        if any(kind.get(name, neutral) != neutral for name, neutral in NEUTRAL.items()):
            with pytest.raises(AssertionError, match="off by"):
                reference.check_sample(sample, tokens)


def test_opt_out(chain, stream):
    prompt = stream[21000:21090]
    params = {"max_new_tokens": 16}
    out, also = chain.generate(
        [prompt, prompt[:50]], [params | {"custom_params": {"aurora_capture": False}}, params]
    )
    assert chain.taken([also["rid"]])[also["rid"]]
    chain.quiet()
    assert not [m for m in chain.messages if out["rid"] in m.header.requests]


def test_same_id_again(chain, stream, reference):
    batch = prompts(stream, 22000, [70, 35])
    first = chain.generate(batch[:1], {"max_new_tokens": 20}, ["again"])[0]
    check_whole(reference, chain, batch[0], first, "length")
    chain.forget("again")
    second = chain.generate(batch[1:], {"max_new_tokens": 20}, ["again"])[0]
    chain.taken(["again"])
    one, two = chain.samples["again"]
    reference.check_sample(one, known(batch[0], first))
    reference.check_sample(two, known(batch[1], second))
    assert two.attempt > one.attempt and two.start + len(two.tokens) == len(known(batch[1], second))


def test_several_of_one_prompt(tree, stream, reference):
    prompt = stream[23000:23060]
    params = {"temperature": 0, "n": 3, "max_new_tokens": 16, "ignore_eos": True}
    answers = tree.server.post("/generate", {"input_ids": prompt, "sampling_params": params})
    assert len(answers) == 3
    for answer in answers:
        answer["rid"] = answer["meta_info"]["id"]
        check_whole(reference, tree, prompt, answer, "length")


def post(server, path, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def stream_answer(server, body):
    """The last event of a streamed answer."""
    last = None
    with post(server, "/generate", body | {"stream": True}) as response:
        for line in response:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
    return last | {"rid": last["meta_info"]["id"]}


def test_streaming(chain, stream, reference):
    prompt = stream[24000:24050]
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    answer = stream_answer(
        chain.server, {"input_ids": prompt, "sampling_params": params, "rid": "streamed"}
    )
    check_whole(reference, chain, prompt, answer, "length")


@same_again
def test_abort(tree, stream, reference):
    prompt = stream[25000:25080]
    params = {"temperature": 0, "max_new_tokens": 700, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "rid": "aborted"}
    answers = []
    client = threading.Thread(target=lambda: answers.append(stream_answer(tree.server, body)))
    client.start()
    time.sleep(1.0)
    post(tree.server, "/abort_request", {"rid": "aborted"}).close()
    client.join(30)
    (answer,) = answers
    assert 1 < len(answer["output_ids"]) < 700
    samples = tree.taken(["aborted"])["aborted"]
    assert samples[-1].reason == "abort"
    whole = tree.generate([prompt], {"max_new_tokens": 700})[0]["output_ids"]
    assert (
        samples[-1].start + len(samples[-1].tokens) >= len(prompt) + len(answer["output_ids"]) - 1
    )
    reference.check_sample(samples[-1], prompt + whole)


@same_again
def test_mixed_chunks_retraction_and_long_prompts(mixed, plain, stream, reference):
    """Everything at once: steps of one token in extend batches, re-prefills, and features of a
    prompt's tail only.
    """
    lengths = [150, 33, 120, 64, 200, 90, 40, 170, 60, 130]
    batch = prompts(stream, 26000, lengths)
    params = {"max_new_tokens": 60}
    expected = [a["output_ids"] for a in generate(plain, batch, params, None)]
    answers = mixed.generate(batch, params)
    assert [a["output_ids"] for a in answers] == expected
    mixed.quiet()
    retracted = plain_steps = 0
    for prompt, answer in zip(batch, answers):
        tokens = known(prompt, answer)
        samples = mixed.taken([answer["rid"]])[answer["rid"]]
        assert samples[-1].reason == "length"
        assert samples[-1].start + len(samples[-1].tokens) == len(tokens)
        for sample in samples:
            reference.check_sample(sample, tokens, rejected=8)
            # max_prompt_features
            assert sample.start >= len(prompt) - 100
            generated = sample.position_node[max(0, len(prompt) - 1 - sample.start) :]
            plain_steps += int((generated < 0).sum())
        retracted += sum(s.reason == "retract" for s in samples)
    sent = {m.header.kind: m.dtype("aux_hidden_states") for m in mixed.messages
            if m.header.kind in ("prefill", "verify")}  # fmt: skip
    assert sent == {"prefill": "float8", "verify": "float8"}
    ends = [r for m in mixed.messages if m.header.kind == "end" for r in m.header.reasons]
    assert "retract" in ends
    assert plain_steps > 0, "no token came from a mixed chunk"
    print(
        f"mixed: {retracted} samples ended by retraction, {plain_steps} positions of mixed chunks"
    )
