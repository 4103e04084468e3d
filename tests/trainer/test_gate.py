"""The gate: a worse draft is refused, an equal or better one passes, at the rates that the test promises."""

import math
import random

import pytest

from aurora_trainer.gate import Gate, GateConfig


def scores(rng: random.Random, n: int, gain: float) -> tuple[list[float], list[float]]:
    """Accept lengths of n texts of very different difficulty (sd 0.8), the candidate's noise (sd 0.3) and gain."""
    served = [max(1.0, rng.gauss(2.5, 0.8)) for _ in range(n)]
    return served, [s + rng.gauss(gain, 0.3) for s in served]


def pass_rate(gain: float, n: int = 64, **config) -> float:
    rng, passed = random.Random(7), 0
    for _ in range(400):
        gate = Gate(GateConfig(window_samples=n, **config))
        gate.record(*scores(rng, n, gain))
        passed += gate.decide(finite=True).passed
    return passed / 400


def test_better_passes_equal_nearly_always_worse_hardly_ever():
    assert pass_rate(+0.2) == 1.0
    assert 0.91 < pass_rate(0.0) < 0.98  # z = 1.64: one-sided 5%
    assert pass_rate(-0.2) < 0.01
    assert pass_rate(-0.05, tolerance=0.1) > 0.99


def test_pairing_takes_the_texts_difficulty_out_of_the_noise():
    rng = random.Random(1)
    served, candidate = scores(rng, 64, -0.2)
    paired, unpaired = Gate(GateConfig()), Gate(GateConfig())
    paired.record(served, candidate)
    unpaired.record(served, sorted(candidate, key=lambda _: rng.random()))
    assert not paired.decide(finite=True).passed
    assert paired.decide(finite=True).stderr < 0.4 * unpaired.decide(finite=True).stderr


def test_reasons_and_counts():
    gate = Gate(GateConfig(min_samples=8))
    assert gate.decide(finite=True).reason == "few_samples"
    assert math.isnan(gate.decide(finite=True).served)
    gate.record([2.0] * 8, [2.5] * 8)
    better = gate.decide(finite=True)
    assert better.passed and better.reason == "better" and better.samples == 8
    assert better.fields() == {"reason": "better", "samples": 8, "served": 2.0, "candidate": 2.5, "stderr": 0.0}
    refused = gate.decide(finite=False)
    assert not refused.passed and refused.reason == "not_finite"
    gate.restart()
    gate.record([2.0] * 8, [2.0] * 8)
    assert gate.decide(finite=True).reason == "not_worse"
    gate.record([2.0] * 64, [1.9] * 64)
    assert gate.decide(finite=True).reason == "worse"
    assert gate.decisions == {"few_samples": 2, "better": 1, "not_finite": 1, "not_worse": 1, "worse": 1}


def test_the_window_forgets():
    gate = Gate(GateConfig(window_samples=16))
    gate.record([2.0] * 100, [3.0] * 100)
    gate.record([2.0] * 16, [1.5] * 16)
    assert gate.decide(finite=True).reason == "worse"


def test_off_passes_everything_that_is_finite():
    gate = Gate(GateConfig(enabled=False))
    assert gate.decide(finite=True).reason == "off"
    assert not gate.decide(finite=False).passed


def test_scores_that_are_not_finite_are_left_out():
    gate = Gate(GateConfig(min_samples=2))
    gate.record([2.0, float("nan"), 2.0, 2.0], [2.1, 2.0, float("inf"), 2.3])
    assert gate.decide(finite=True).samples == 2


def test_state_round_trip():
    gate = Gate(GateConfig())
    gate.record([2.0, 3.0], [2.5, 3.1])
    gate.decide(finite=True)
    again = Gate(GateConfig())
    again.restore(gate.state())
    assert again.state() == gate.state()


def test_unequal_lengths_are_a_programming_error():
    with pytest.raises(ValueError):
        Gate(GateConfig()).record([1.0], [1.0, 2.0])
