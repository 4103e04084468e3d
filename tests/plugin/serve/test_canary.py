"""The canary over simulated traffic, whose requests differ more from each other than drafts do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from aurora_sglang_plugin.config import CanaryConfig
from aurora_sglang_plugin.serve.canary import Accepted, Canary, mean

MOST = 3


class Traffic:
    """`size` running requests of 20 to 90 verify steps; request i accepts a draft of a version of
    rate r with probability r + d_i, d_i of a standard deviation of `spread`."""

    def __init__(self, size, seed, spread=0.15):
        self.random, self.size, self.spread = np.random.default_rng(seed), size, spread
        self.left, self.harder = np.zeros(size, int), np.zeros(size)
        self.reqs = [SimpleNamespace() for _ in range(size)]

    def round(self, rate):
        for i in np.flatnonzero(self.left <= 0):
            self.reqs[i] = SimpleNamespace()
            self.left[i] = self.random.integers(20, 90)
            self.harder[i] = self.random.normal(0, self.spread)
        self.left -= 1
        chance = np.clip(rate + self.harder, 0.01, 0.98)[:, None]
        hits = self.random.random((self.size, MOST)) < chance
        return hits.cumprod(1).sum(1).tolist()


def drive(canary, traffic, new, old, steps):
    """Request-steps until the new version was rejected, None if it was not."""
    rates, on = {"new": new, "old": old}, "new"
    for n in range(steps // traffic.size):
        accepted = traffic.round(rates[on])
        action = canary.judged(MOST, accepted, traffic.reqs)
        if action == "exchange":
            on = "old" if on == "new" else "new"
        elif action == "reject":
            assert on == "old"
            return (n + 1) * traffic.size
    return None


def swap(canary):
    trusted = canary.let_go()
    canary.swapped(trusted)
    return trusted


def served(traffic, rate, steps=6000):
    """A canary whose first version served these request-steps, just when another one follows."""
    canary = Canary(CanaryConfig(), MOST)
    assert drive(canary, traffic, rate, rate, steps) is None and swap(canary)
    return canary


@pytest.mark.parametrize("size", [1, 8, 32])
def test_a_useless_draft_goes_within_200_requests(size):
    for seed in range(4):
        traffic = Traffic(size, seed)
        steps = drive(served(traffic, 0.5), traffic, 0.02, 0.5, 200 * 55)
        # 3,000 request-steps are some 55 requests
        assert steps is not None and steps <= 3000


@pytest.mark.parametrize("size", [4, 16])
def test_a_loss_of_a_third_of_a_token_goes(size):
    """Accepted drafts fall from .82 to .49."""
    found = []
    for seed in range(8):
        traffic = Traffic(size, 100 + seed, spread=0.08)
        steps = drive(served(traffic, 0.5), traffic, 0.34, 0.5, 6000)
        found.append(steps or 10**9)
    assert np.median(found) <= 3000 and max(found) <= 6000, found


def test_equal_drafts_stay():
    """Swaps of drafts that are alike, each for some 50 requests."""
    rejected = 0
    for size in (2, 8, 32):
        traffic, canary = Traffic(size, size), Canary(CanaryConfig(), MOST)
        for _ in range(30):
            if canary.trial is None:
                swap(canary)
            rejected += drive(canary, traffic, 0.5, 0.5, 2500) is not None
    assert rejected == 0


def test_a_change_of_traffic_is_no_fault_of_the_draft():
    suspected = 0
    for seed in range(12):
        traffic = Traffic(8, 200 + seed)
        canary = served(traffic, 0.6)
        assert drive(canary, traffic, 0.3, 0.3, 6000) is None
        suspected += canary.suspected
    assert suspected > 6


def test_the_newest_version_that_served_unsuspected_is_what_is_gone_back_to():
    traffic = Traffic(8, 7)
    canary = served(traffic, 0.5)
    trusted = canary.old
    # replaced before it served 8 requests: the older one stays
    drive(canary, traffic, 0.5, 0.5, 8)
    canary.new = Accepted(MOST)
    assert not swap(canary) and canary.old is trusted
    drive(canary, traffic, 0.5, 0.5, 2000)
    assert swap(canary) and canary.old is not trusted
    canary.forget()
    assert not canary.testing and drive(canary, traffic, 0.0, 0.0, 3000) is None


def test_rounds_of_fewer_steps_are_compared_by_what_both_drafted():
    traffic = Traffic(8, 9)
    canary = served(traffic, 0.5)
    for n in range(200):
        accepted = [min(count, 1) for count in traffic.round(0.5)]
        assert canary.judged(1, accepted, traffic.reqs) is None, n
    assert canary.suspected == 0


def test_off():
    traffic = Traffic(8, 3)
    canary = Canary(CanaryConfig(enabled=False), MOST)
    drive(canary, traffic, 0.5, 0.5, 2000)
    swap(canary)
    assert drive(canary, traffic, 0.0, 0.5, 3000) is None


def test_the_error_counts_requests_not_steps():
    per_request = np.array([[10, 5], [30, 21], [20, 8]], float)
    ratio, error = mean(per_request)
    assert ratio == pytest.approx(34 / 60)
    residuals = per_request[:, 1] - ratio * per_request[:, 0]
    assert error == pytest.approx(np.sqrt(1.5 * (residuals**2).sum()) / 60 * 4 / 3)
