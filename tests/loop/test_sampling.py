"""Sampled requests on real servers: what is generated follows the target's own distribution, after
the first token and within a verify step; greedy requests beside them say what a plain server says.

A server of each rule, on a target with so few tokens that every continuation can be counted.
Goodness of fit is judged by chi-square tests; a right server fails one in a million (FALSE_ALARM).
"""

from __future__ import annotations

import pytest
import torch
from goodness import FALSE_ALARM, continuations, p_value
from models import make_random_draft, make_random_target
from rig import Loop, generate
from transformers import AutoModelForCausalLM

VOCAB, LENGTH, DRAWS = 8, 3, 1200
PROMPT = [1, 2, 3, 4]
KINDS = [
    {"temperature": 1.6},
    {"temperature": 0.7, "repetition_penalty": 1.0, "logit_bias": {}},
    {"temperature": 2.5, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.7},
]
SHAPES = {
    "chain": dict(topk=1, num_steps=3),
    "tree": dict(topk=2, num_steps=3, num_draft_tokens=6),
    "rejection": dict(topk=1, num_steps=3, args=["--speculative-use-rejection-sampling"]),
}
SERVED = ["--skip-tokenizer-init", "--max-running-requests", "64"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directories of a target and a draft of 8 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    target = make_random_target(folder / "target", layers=4, hidden=32, vocab=VOCAB)
    return target, make_random_draft(folder / "draft", target, aux_layer_ids=[0, 1, 2])


@pytest.fixture(scope="module")
def oracle(tiny):
    """By Hugging Face: logits [V] after the prompt and some tokens, and greedy continuations."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).eval()
    logits = {}
    with torch.no_grad():
        prefixes = [[]]
        for _ in range(LENGTH):
            found = model(torch.tensor([PROMPT + p for p in prefixes])).logits[:, -1]
            logits |= {tuple(p): row for p, row in zip(prefixes, found)}
            prefixes = [[*p, token] for p in prefixes for token in range(VOCAB)]

    def greedy(prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    return logits, greedy


def distribution(logits, temperature, top_k=VOCAB, top_p=1.0, **neutral):
    """What a request with these parameters samples from."""
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p[top_k:] = 0
    p[p.cumsum(-1) - p >= top_p * p.sum()] = 0
    return torch.zeros(VOCAB).scatter(0, order, p / p.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_generated_follows_the_target(shape, tiny, oracle, tmp_path):
    logits, greedy = oracle
    requests = [(PROMPT, kind | {"max_new_tokens": LENGTH}) for kind in KINDS] * DRAWS
    # greedy ones in between, and longer
    prompts = [[1 + i % 7, i // 7 % 8, 5, i % 3, i % 8] for i in range(24)]
    for i, prompt in enumerate(prompts):
        requests.insert(
            i * len(requests) // len(prompts), (prompt, {"temperature": 0, "max_new_tokens": 24})
        )

    args = SERVED + SHAPES[shape].get("args", [])
    loop = Loop(tmp_path, *tiny, **(SHAPES[shape] | {"args": args}))
    try:
        answers = loop.generate(
            [prompt for prompt, _ in requests], [params for _, params in requests]
        )
    finally:
        loop.stop()

    said = {id(prompt): answer["output_ids"] for (prompt, _), answer in zip(requests, answers)}
    assert [said[id(prompt)] for prompt in prompts] == [greedy(prompt, 24) for prompt in prompts]
    sampled = [(a, params) for a, (_, params) in zip(answers, requests) if params["temperature"]]
    meta = [a["meta_info"] for a, _ in sampled]
    steps = sum(m["spec_verify_ct"] for m in meta)
    right = sum(m["spec_num_correct_drafts"] for m in meta)
    print(f"{shape}: {right / steps:.2f} drafts accepted in a verify step, of {steps}")
    assert right / steps > 0.1, "the draft is never accepted, and nothing is shown"
    for kind in KINDS:
        drawn = [
            a["output_ids"] for a, params in sampled if params == kind | {"max_new_tokens": LENGTH}
        ]
        assert len(drawn) == DRAWS
        expected = continuations(
            distribution(logits[()], **kind),
            lambda seen, kind=kind: distribution(logits[seen], **kind),
            LENGTH,
        )
        p = p_value(torch.tensor(drawn), expected)
        print(f"{shape}: {kind} p {p:.3f}")
        assert p > FALSE_ALARM, f"{shape} {kind}"


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_greedy_requests_beside_sampled_ones_are_a_plain_servers(name, request, plain, stream):
    loop = request.getfixturevalue(name)
    batch = [stream[35000 + 97 * i : 35000 + 97 * i + 10 + 7 * i] for i in range(12)]
    sampled = [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2},
    ]
    params = [sampled[i // 2 % 3] if i % 2 else {} for i in range(len(batch))]
    expected = [a["output_ids"] for a in generate(plain, batch[::2], {"max_new_tokens": 40}, None)]
    answers = loop.generate(batch, [p | {"max_new_tokens": 40} for p in params])
    assert [a["output_ids"] for a in answers[::2]] == expected
    again = loop.generate(batch, [p | {"max_new_tokens": 40} for p in params])
    assert [a["output_ids"] for a in again[::2]] == expected
    # nobody gave a seed
    assert all(a["output_ids"] != b["output_ids"] for a, b in zip(answers[1::2], again[1::2]))
