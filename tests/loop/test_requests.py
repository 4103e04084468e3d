"""Every kind of request under wide trees: served, greedy output as a plain server gives it,
captured as it was, and one client's oddities cost nobody else anything.

Servers of their own (`wide`: topk 4, 8 nodes; `widest`: topk 8, 64 nodes), the shared `plain` and
`chain`.
"""

from __future__ import annotations

import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from drafts import disturb
from rig import Loop, generate
from test_capture_reference import check_whole, reference  # noqa: F401
from transformers import AutoTokenizer

SCHEMA = json.dumps({"enum": ["alpha", "beta", 17, None]})
EBNF = 'root ::= ("yes" | "no" | "perhaps") " " [0-9] [0-9]'
SHAPES = {
    "wide": dict(topk=4, num_steps=5, num_draft_tokens=8),
    "widest": dict(topk=8, num_steps=5, num_draft_tokens=64),
}


@pytest.fixture(scope="module")
def shaped(target, taught, tmp_path_factory):
    """The two servers, started at once."""
    folder = tmp_path_factory.mktemp("requests")

    def start(name: str) -> Loop:
        (folder / name).mkdir()
        draft = taught / ("reduced" if name == "wide" else "full")
        return Loop(
            folder / name, target, draft, args=["--enable-return-hidden-states"], **SHAPES[name]
        )

    # its threads must outlive the servers
    with ThreadPoolExecutor(2) as pool:
        loops = dict(zip(SHAPES, pool.map(start, SHAPES)))
        yield loops
        for loop in loops.values():
            loop.stop()


@pytest.fixture(params=SHAPES)
def loop(request, shaped):
    return shaped[request.param]


def prompts(stream, first, count):
    return [stream[first + 211 * i : first + 211 * i + 12 + 9 * i] for i in range(count)]


def texts(target, answers) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(target)
    return [tokenizer.decode(answer["output_ids"], skip_special_tokens=True) for answer in answers]


def test_what_shapes_the_output(loop, plain, stream, target):
    """Grammars of three kinds, bias, stops and free requests in one batch."""
    usual = {"max_new_tokens": 40, "ignore_eos": False}
    free = {"max_new_tokens": 40}
    params = [
        usual | {"json_schema": SCHEMA},
        usual | {"regex": r"[a-z]{3,6} = [0-9]{2}"},
        usual | {"ebnf": EBNF},
        free | {"logit_bias": {"40": 4.0, "41": -4.0}},
        free | {"stop": ["\n\n", "return"], "ignore_eos": False},
        free | {"stop_token_ids": [stream[30100]], "ignore_eos": False},
        free
        | {
            "logit_bias": {},
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
        },
        free,
    ]
    batch = prompts(stream, 31000, len(params))
    expected = generate(plain, batch, params, None)
    answers = loop.generate(batch, params)
    assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in expected]
    schema, regex, ebnf, *_ = texts(target, answers)
    assert json.loads(schema) in ("alpha", "beta", 17, None)
    assert re.fullmatch(r"[a-z]{3,6} = [0-9]{2}", regex) and re.fullmatch(
        r"(yes|no|perhaps) [0-9]{2}", ebnf
    )
    samples = loop.taken([a["rid"] for a in answers])
    for prompt, answer in zip(batch, answers):
        for sample in samples[answer["rid"]]:
            tokens = prompt + answer["output_ids"]
            assert (
                sample.tokens.tolist() == tokens[sample.start : sample.start + len(sample.tokens)]
            )
    (last,) = samples[answers[-1]["rid"]]
    assert last.start + len(last.tokens) == len(batch[-1]) + 40 and not last.node_altered.any()


def test_penalties_are_served(loop, stream):
    """Not a plain server's output: a whole step is judged by the penalties before it
    (output.md).
    """
    names = ("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens")
    params = [
        {"max_new_tokens": 24, name: value} for name, value in zip(names, (0.7, 0.7, 1.2, 12))
    ]
    answers = loop.generate(prompts(stream, 33000, 4), params)
    assert all(len(a["output_ids"]) == 24 for a in answers)
    loop.taken([a["rid"] for a in answers])


def test_what_is_asked_for_beside_the_output(loop, plain, stream):
    """Log-probabilities, hidden states, several answers, a label."""
    batch = prompts(stream, 34000, 3)
    greedy = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    body = {
        "input_ids": batch,
        "sampling_params": greedy,
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    ours, theirs = (server.post("/generate", body) for server in (loop.server, plain))
    for mine, other in zip(ours, theirs):
        assert mine["output_ids"] == other["output_ids"]
        found, expected = (
            [t[0] for t in a["meta_info"]["output_token_logprobs"]] for a in (mine, other)
        )
        assert found == pytest.approx(expected, abs=1e-3)
    body["sampling_params"] = greedy | {"temperature": 0.9, "top_p": 0.9}
    for answer in loop.server.post("/generate", body):
        said = answer["meta_info"]["output_token_logprobs"]
        assert [t[1] for t in said] == answer["output_ids"] and len(said) == 20
        assert all(-50 < t[0] <= 1e-5 for t in said)
    body = {"input_ids": batch, "sampling_params": greedy, "return_hidden_states": True}
    for mine, other in zip(loop.server.post("/generate", body), theirs):
        assert mine["output_ids"] == other["output_ids"] and mine["meta_info"]["hidden_states"]
    several = greedy | {"n": 3, "custom_params": {"aurora_domain": "several"}}
    answers = loop.server.post("/generate", {"input_ids": batch[0], "sampling_params": several})
    assert [a["output_ids"] for a in answers] == [theirs[0]["output_ids"]] * 3
    loop.taken([a["meta_info"]["id"] for a in answers])


def test_odd_ids_and_opt_outs_cost_their_own_requests_only(loop, stream):
    before = loop.metrics()
    out = [{"aurora_capture": value} for value in (False, "false", 0, None)]
    custom = [*out, None, None, {"aurora_capture": True}]
    rids = [*(uuid.uuid4().hex for _ in out), "x" * 2000, "é" * 128, uuid.uuid4().hex]
    params = [{"max_new_tokens": 12, "custom_params": c} for c in custom]
    answers = loop.generate(prompts(stream, 35000, len(rids)), params, rids)
    assert all(len(a["output_ids"]) == 12 for a in answers)
    samples = loop.taken(rids[-2:])
    assert all(samples[rid] for rid in rids[-2:])
    ledger = loop.quiet()
    assert ledger["lost"] == ledger["rejected"] == 0
    seen = {rid for m in loop.messages for rid in m.header.requests}
    assert not seen & {*rids[:-2]}
    found = loop.metrics()
    grown = {n: found[n] - before.get(n, 0) for n in found if n.startswith("aurora_excluded")}
    assert (
        grown["aurora_excluded_requests{opt_out}"] == 4
        and grown["aurora_excluded_requests{request_id}"] == 1
    )
    assert found["aurora_capture_errors"] == 0


def test_conversations_whose_cached_prefix_grows(chain, plain, stream, reference):  # noqa: F811
    """Three clients take turns; each prompt is the conversation so far and something new. What the
    cache held is not captured again, what was computed is, and the output is a plain server's."""
    talks = [stream[36000 + 400 * i : 36040 + 400 * i] for i in range(3)]
    cached_before = [0, 0, 0]
    before = chain.quiet()
    for turn in range(5):
        answers = chain.generate(talks, {"max_new_tokens": 24})
        expected = generate(plain, talks, {"max_new_tokens": 24}, None)
        assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in expected]
        for i, (talk, answer) in enumerate(zip(talks, answers)):
            cached = answer["meta_info"]["cached_tokens"]
            if turn:
                assert cached > cached_before[i] and cached >= len(talk) - 50
            cached_before[i] = cached
            (sample,) = check_whole(reference, chain, talk, answer, "length")
            assert sample.start == cached
            told = talk + answer["output_ids"]
            talks[i] = told + stream[37500 + 60 * turn + 20 * i : 37520 + 60 * turn + 20 * i]
    ledger = chain.quiet()
    assert (ledger["lost"], ledger["rejected"]) == (before["lost"], before["rejected"])


def test_a_better_draft_has_cached_prefixes_computed_again(chain, plain, stream):
    """Once, for new requests, with the same output; a version that is hardly better changes
    nothing."""
    # its first tokens are nobody else's
    prompt = [1013, 997, 1021, *stream[39000:39150]]
    expected = generate(plain, [prompt], {"max_new_tokens": 24}, None)[0]["output_ids"]

    def cached():
        answer = chain.generate([prompt], {"max_new_tokens": 24})[0]
        assert answer["output_ids"] == expected
        return answer["meta_info"]["cached_tokens"]

    assert cached() < 16 and cached() > 100
    for served, better in ((1.3, 1.31), (1.31, 1.6), (1.6, 1.65)):
        draft = disturb(chain.draft(0), seed=int(1000 * better), size=0.02)
        gate = {"reason": "better", "served": served, "candidate": better}
        before = chain.metrics()["aurora_prefix_renewals"]
        chain.wait_for_version(chain.publish(draft, gate))
        assert chain.metrics()["aurora_prefix_renewals"] - before == (better == 1.6)
        assert (cached() < 16) == (better == 1.6) and cached() > 100, better
