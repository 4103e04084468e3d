"""What capture takes of a prompt: features of its last tokens, and ids of a cached prefix."""

from __future__ import annotations

import pytest
from test_capture import F, make_capture, prefill_step, request


def test_a_prefill_that_fits_no_buffer_is_sent_in_several_messages():
    capture = make_capture(pinned_buffer_bytes=6 * (F * 4 + 64))
    reqs = [request(str(i), prompt=range(4)) for i in range(3)] + [request("long", prompt=range(9))]
    prefill_step(capture, reqs, [0] * 4, [4, 2, 3, 9])
    assert [fields["requests"] for _, _, fields in capture.publisher.items] == [
        ["0", "1"],
        ["2"],
        ["long"],
    ]
    positions = [s.build()["positions"][1].tolist() for _, s, _ in capture.publisher.items]
    assert positions == [[0, 0], [0], [0]] and not capture.boundary.errors


def test_prefill_of_a_batch():
    out = {"aurora_capture": False}
    reqs = [
        request("a", range(4)),
        request("b", range(9), custom_params=out),
        request("c", range(30)),
    ]
    capture = make_capture()
    prefill_step(capture, reqs, [0, 2, 10], [4, 3, 5])
    ((kind, snapshot, fields),) = capture.publisher.items
    assert (kind, fields["requests"], fields["extend_version"]) == ("prefill", ["a", "c"], 2)
    arrays = {name: array.tolist() for name, (_, array) in snapshot.build().items()}
    assert (
        arrays["positions"] == [0, 0]
        and arrays["extend_lens"] == [4, 15]
        and arrays["feature_lens"] == [4, 5]
        and arrays["prompt_lens"] == [4, 30]
    )
    # the ids of the cached prefix, as the request has them
    assert arrays["input_ids"] == [100, 101, 102, 103, *range(10), 107, 108, 109, 110, 111]
    assert arrays["next_tokens"] == [104, 112]
    assert [row[0] // F for row in arrays["aux_hidden_states"]] == [0, 1, 2, 3, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("prefix", "extend", "taken"),
    [(0, 20, 0), (20, 20, 8), (40, 20, 20), (0, 60, 28), (32, 1, 1), (31, 1, 0), (60, 3, 3)],
)
def test_max_prompt_features(prefix, extend, taken):
    """The last 28 tokens of a prompt of 60; what was generated is always taken."""
    capture = make_capture(max_prompt_features=28)
    prefill_step(capture, [request("a", range(60))], [prefix], [extend])
    assert capture.prompt_tokens_skipped == extend - taken
    if not taken:
        assert capture.publisher.items == []
        return
    arrays = {
        name: array.tolist() for name, (_, array) in capture.publisher.items[0][1].build().items()
    }
    # ids of a cached prefix as far as the bound allows
    cached = {40: 8, 60: 28}.get(prefix, 0)
    first = prefix + extend - taken
    assert arrays["positions"] == [first - cached] and arrays["feature_lens"] == [taken]
    expected = [*range(first - cached, first), *range(100 + extend - taken, 100 + extend)]
    assert arrays["input_ids"] == expected


def test_prompts_are_sampled_apart():
    """Of one captured request in four the prompt, whole or not at all; of all of them what was
    generated. The share is the same among the requests that `sample_rate` leaves."""
    capture = make_capture(prompt_sample_rate=0.25, sample_rate=0.5)
    reqs = [request(f"r{n}", range(20), range(3)) for n in range(800)]
    captured = [req for req in reqs if capture.sampled(req)]
    prefill_step(capture, reqs, [0] * 800, [12] * 800)
    ((_, _, first),) = capture.publisher.items
    capture.publisher.items.clear()
    prefill_step(capture, reqs, [12] * 800, [8] * 800)
    ((_, _, second),) = capture.publisher.items
    assert first["requests"] == second["requests"]
    assert 0.18 < len(first["requests"]) / len(captured) < 0.32
    assert capture.prompt_tokens_skipped == 20 * (len(captured) - len(first["requests"]))
    capture.publisher.items.clear()
    # after a retraction: a generated token is computed with a chunk, and its features are sent
    prefill_step(capture, reqs, [20] * 800, [1] * 800)
    assert capture.publisher.items[0][2]["requests"] == [req.rid for req in captured]


def test_ids_of_a_cached_prefix_travel_once():
    """With the first chunk of a request, and again after it was retracted; never what was left out
    on purpose, or generated."""
    capture, req = make_capture(max_prompt_features=40), request("a", range(60), range(9))

    def sent(prefix, extend):
        capture.publisher.items.clear()
        prefill_step(capture, [req], [prefix], [extend])
        arrays = capture.publisher.items[0][1].build()
        lens = (arrays[n][1].tolist()[0] for n in ("extend_lens", "feature_lens"))
        return [arrays["positions"][1][0], *lens]

    assert sent(30, 10) == [20, 20, 10]
    assert sent(40, 20) == [40, 20, 20]
    # a step of a mixed chunk
    assert sent(60, 1) == [60, 1, 1]
    assert sent(50, 10) == [20, 40, 10]
    assert sent(62, 3) == [62, 3, 3] and not capture.boundary.errors
