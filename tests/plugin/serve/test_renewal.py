"""Cached prefixes are given up when the draft has learned much since they were written, and not
otherwise.
"""

from types import SimpleNamespace

import pytest

from aurora_sglang_plugin.config import SwapConfig
from aurora_sglang_plugin.serve.renewal import Renewal


def gate(served, candidate, reason="better", **more):
    return {"reason": reason, "served": served, "candidate": candidate, **more}


def counts(gates, cached=True, **config):
    renewal = Renewal(SwapConfig(**config))
    found = []
    for number, each in enumerate(gates):
        renewal.serve(each, cached=cached or number > 0)
        found.append(renewal.count)
    return found


def test_each_gain_of_a_tenth_renews():
    steps = [gate(1.2, 1.25), gate(1.25, 1.31), gate(1.32, 1.33), gate(1.3, 1.47)]
    assert counts(steps) == [0, 0, 1, 2]
    # what little was learned of a good draft gives nothing up
    assert counts([gate(2.8, 2.85), gate(2.85, 2.9), gate(2.9, 3.0), gate(3.0, 2.5)]) == [0] * 4


def test_a_version_that_lay_there_wrote_what_is_cached():
    steps = [gate(1.2, 1.5), gate(1.5, 1.55), gate(1.55, 1.7)]
    assert counts(steps, cached=False) == [0, 0, 1]
    assert counts(steps) == [1, 1, 2]


def test_the_initial_draft_may_come_back():
    steps = [gate(1.9, 1.5), gate(1.4, 1.3, "initial", initial=2.0)]
    assert counts(steps) == [0, 0]
    assert counts([gate(1.2, 1.25), gate(1.25, 1.1, "initial", initial=2.0)]) == [0, 1]


@pytest.mark.parametrize("gates", [[{}, {}], [{"reason": "off"}], [gate("much", "more")]])
def test_versions_that_say_nothing_give_nothing_up(gates):
    assert counts(gates)[-1] == 0
    assert counts([gate(1.0, 9.0)], renew_prefixes_at=0) == [0]


def test_requests_are_told_apart_by_their_key():
    renewal = Renewal(SwapConfig(renew_prompt_tokens=10))

    def key(tokens, own=None):
        req = SimpleNamespace(origin_input_ids=list(range(tokens)), extra_key=own)
        renewal.mark(req)
        return req.extra_key

    assert key(5) is None and key(5, "lora") == "lora"
    renewal.serve(gate(1.0, 2.0))
    assert key(10) == "|aurora1" and key(10, "lora") == "lora|aurora1"
    # computing a long prompt again costs more than it brings
    assert key(11) is None and key(11, "lora") == "lora"
    renewal.serve(gate(2.0, 4.0))
    assert key(10) == "|aurora2"
