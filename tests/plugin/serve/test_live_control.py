"""What the worker tells, and what becomes of it: acceptance counts for the version that drafted,
and for requests whose draft's KV is whole and its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from aurora_sglang_plugin.config import PluginConfig, SpeculationConfig
from aurora_sglang_plugin.serve import control as module
from aurora_sglang_plugin.serve.control import Control
from aurora_sglang_plugin.serve.speculation import Speculation

MANIFEST = SimpleNamespace(gate={"reason": "better", "candidate": 2.5})


class Reloader:
    """Counts what it is asked for."""

    def __init__(self):
        self.version, self.agreement, self.control = 0, None, None
        self.exchanges = self.rejects = self.renewals = 0
        self.renewal = SimpleNamespace(renew=self._renew)

    def exchange(self):
        self.exchanges += 1

    def reject(self):
        self.rejects += 1

    def _renew(self):
        self.renewals += 1


@pytest.fixture
def control():
    return Control(PluginConfig(), 3, Reloader(), None)


def swap(control, first=False):
    trusted = control.let_go()
    control.swapped(MANIFEST, first, trusted)
    return trusted


def requests(control, count):
    params = SimpleNamespace(custom_params=None)
    reqs = [SimpleNamespace(sampling_params=params) for _ in range(count)]
    control.prefill(reqs)
    return reqs


def serve(control, accepts, rounds, steps=3, seed=0):
    """Rounds of 8 requests, of 40 rounds each, that accept so many drafts on average."""
    random = np.random.default_rng(seed)
    for n in range(rounds):
        if n % 40 == 0:
            reqs = requests(control, 8)
        control.begin(reqs)
        control.verified(reqs, steps)
        control.step()
        control.judged(random.binomial(steps, accepts / 3, 8).tolist() if steps else [0] * 8, 8)


def test_a_bad_version_is_exchanged_and_rejected(control):
    serve(control, 2.0, 200)
    assert swap(control)
    serve(control, 0.1, 40)
    assert control.reloader.exchanges == 1 and control.holds
    # the cached prefixes are the bad one's
    assert control.reloader.renewals == 1
    serve(control, 2.0, 200)
    assert control.reloader.rejects == 1 and not control.holds
    # the next one may come
    assert swap(control)


def test_a_trial_without_an_answer_ends(control, monkeypatch):
    """Else no version would be swapped in any more."""
    monkeypatch.setattr(module, "LONGEST_TRIAL", 300)
    serve(control, 2.0, 200)
    swap(control)
    serve(control, 0.1, 40)
    assert control.holds
    serve(control, 0.0, 400, steps=0)
    assert not control.holds and control.reloader.rejects == 0
    assert swap(control)


def test_what_another_version_drafted_or_wrote_does_not_count(control):
    serve(control, 2.0, 200)
    old = requests(control, 8)
    control.verified(old, 3)
    swap(control)
    # drawn before the swap
    control.judged([0] * 8, 8)
    assert control.canary.new.steps == 0
    # drawn after it, behind the KV of the version before
    control.verified(old, 3)
    control.judged([0] * 8, 8)
    assert control.canary.new.steps == 0
    new = requests(control, 8)
    control.verified(new, 3)
    control.judged([3] * 8, 8)
    assert control.canary.new.steps == 8


def test_what_another_version_drafted_says_nothing_of_the_one_that_drafts_now():
    speculation = Speculation(SpeculationConfig(), 3, clock=lambda: 0.0)
    control = Control(PluginConfig(), 3, Reloader(), speculation)
    reqs = requests(control, 8)
    control.verified(reqs, 3)
    swap(control)
    control.judged([0] * 8, 8)
    assert speculation.rates.judged == 0
    control.verified(reqs, 3)
    control.judged([0] * 8, 8)
    assert speculation.rates.judged == 8


def test_results_that_got_lost_shift_nothing(control):
    few, many = requests(control, 3), requests(control, 8)
    control.verified(few, 3)
    control.verified(many, 3)
    # the first one's result never came
    control.judged([1] * 8, 8)
    assert control.canary.new.steps == 8
    control.judged([1] * 8, 8)
    assert control.canary.new.steps == 8


def test_a_server_without_a_draft_prefills_cold_and_renews_when_it_begins():
    speculation = Speculation(SpeculationConfig(), 3, has_draft=False, clock=lambda: 0.0)
    control = Control(PluginConfig(), 3, Reloader(), speculation)
    cold = requests(control, 4)
    assert control.mode == "cold"
    control.begin(cold)
    assert speculation.steps == -1 and control.rounds() == {"cold": 1}
    assert swap(control, first=True)
    control.take([3] * 16 + [0])
    assert control.reloader.renewals == 1
    # those that ran cold are not drafted for, until half of the requests are others
    control.begin(cold)
    assert control.mode == "warm"
    control.begin(cold + requests(control, 4))
    assert control.mode == "live"
