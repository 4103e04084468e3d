"""What samples say that just came: how often it is wrong, and how soon it is right."""

import json
from pathlib import Path

import numpy as np
import pytest

from aurora_trainer.learn.drift import AT_ONCE, RECENT, WARM, Drift, DriftConfig

LINES = Path(__file__).parents[3] / "docs" / "results" / "lab" / "lines.jsonl"
STEPS = 40.0


def real(arm: str) -> np.ndarray:
    """Accept lengths of a real model's samples, behind the first 72."""
    lines = map(json.loads, LINES.read_text().splitlines())
    line = next(line for line in lines if line["arm"] == arm)
    steps, tokens = np.array(line["steps"][72:]), np.array(line["tokens"][72:])
    return (tokens / np.maximum(steps, 1))[steps >= 4]


def fed(drift: Drift, served, initial=None, first: int = 0) -> list[tuple[int, str, int]]:
    """Events, by the sample at which they came."""
    found = []
    for n, x in enumerate(served, first):
        other = None if initial is None else (STEPS, STEPS * initial[n - first])
        found += [(n, e.kind, e.since) for e in drift.add(n, (STEPS, STEPS * x), other)]
    return found


def changes(found) -> list[int]:
    return [n for n, kind, _ in found if kind == "changed"]


NORMAL = 2.5 + 0.8 * np.random.default_rng(7).standard_normal(4000)
KINDS = {"a real model": real("today"), "normal": NORMAL}


@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_are_rarer_than_one_in_ten_thousand_samples(kind):
    rng, samples, alarms = np.random.default_rng(0), 40_000, 0
    for _ in range(4):
        drift = Drift(DriftConfig(rest_samples=0))
        alarms += len(changes(fed(drift, rng.choice(KINDS[kind], samples // 4))))
        assert drift.changes["accept_length"] <= 4
    assert alarms <= 4


def test_learning_is_no_alarm():
    """A curve like the reference's, up by 0.2 at each doubling, and one that leaps."""
    rng = np.random.default_rng(1)
    n = np.arange(2000)
    for curve in (1.1 + 0.2 * np.log2(1 + n / 50), np.where(n < 40, 1.0, 3.0)):
        assert not changes(fed(Drift(DriftConfig()), curve + 0.3 * rng.standard_normal(2000)))


@pytest.mark.parametrize("fall, within", [(1.0, 40), (2.0, 10), (3.0, 6)])
def test_a_fall_is_seen_soon_and_dated(fall, within):
    delays, off = [], []
    for seed in range(40):
        rng, drift = np.random.default_rng(seed), Drift(DriftConfig())
        fed(drift, 3 + 0.5 * rng.standard_normal(200))
        found = fed(drift, 3 - fall * 0.5 + 0.5 * rng.standard_normal(100), first=200)
        at, kind, since = next(event for event in found if event[1] == "changed")
        delays.append(at - 199)
        off.append(abs(since - 200))
    assert np.median(delays) <= within and np.median(off) <= 3, (delays, off)


def test_the_first_samples_of_a_draft_are_no_alarm():
    drift = Drift(DriftConfig())
    assert not fed(drift, [5.0] * 10 + [1.0] * (WARM - 10))


def test_short_samples_say_nothing():
    drift = Drift(DriftConfig())
    fed(drift, [3.0] * 100)
    for n in range(100, 200):
        assert not drift.add(n, (3.0, 3.0), (3.0, 9.0))
    assert drift.sum == 0 and drift.samples == 200


def ahead(gain: float, seed: int, samples: int = RECENT, drift: Drift | None = None):
    """Events of samples in which the initial draft is better by `gain`, with noise of 0.3."""
    rng = np.random.default_rng(seed)
    served = 2 + 0.4 * rng.standard_normal(samples)
    initial = served + gain + 0.3 * rng.standard_normal(samples)
    return fed(drift or Drift(DriftConfig()), served, initial)


def test_the_initial_draft_is_said_to_be_ahead_at_once_and_once():
    at = [[n for n, kind, _ in ahead(0.5, seed) if kind == "initial"] for seed in range(50)]
    assert all(len(found) == 1 for found in at)
    assert np.median([found[0] + 1 for found in at]) == AT_ONCE
    drift = Drift(DriftConfig())
    ahead(0.5, 0, drift=drift)
    said = drift.ahead()
    assert said.role == said.reason == "initial" and said.initial > said.served + 0.3
    assert said.fields().keys() == {"reason", "role", "requests", "served", "initial", "stderr"}
    assert drift.changes == {"initial": 1}
    drift.serve()
    assert drift.ahead() is None


def test_a_draft_that_is_equal_or_worse_is_hardly_said_to_be_ahead():
    """Of 24 samples, looked at after each from the 8th on."""
    equal = sum(bool(ahead(0.0, seed)) for seed in range(150)) / 150
    worse = sum(bool(ahead(-0.1, seed)) for seed in range(150)) / 150
    assert equal < 0.3 and worse < 0.1, (equal, worse)


def test_after_an_alarm_less_is_asked():
    """Of the samples since the change alone: those before it were better with the served one."""
    soon = []
    for seed in range(40):
        rng, drift = np.random.default_rng(seed), Drift(DriftConfig())
        x = 3 + 0.4 * rng.standard_normal(60)
        fed(drift, x, x - 1.0)
        x = 1.7 + 0.3 * rng.standard_normal(40)
        found = fed(drift, x, x + 0.3 + 0.3 * rng.standard_normal(40), first=60)
        assert [kind for _, kind, _ in found][0] == "changed"
        # the change is counted once
        assert sum(drift.changes.values()) == 1
        soon += [n - 59 for n, kind, _ in found if kind == "initial"][:1]
    assert len(soon) >= 38 and np.median(soon) <= 8 and max(soon) <= 20


def test_it_does_not_rest_while_what_is_trained_waits():
    """The initial draft is served, and accepts what it accepts."""
    x = 2 + 0.3 * np.random.default_rng(0).standard_normal(2000)
    waiting = Drift(DriftConfig())
    for n, length in enumerate(x):
        assert not waiting.add(n, (30.0, 30 * float(length)), None, waits=True)
    assert not waiting.resting


def test_a_rollback_wakes_it():
    rng, drift = np.random.default_rng(3), Drift(DriftConfig(rest_samples=96))
    fed(drift, 2 + 0.3 * rng.standard_normal(300), None)
    assert drift.resting
    drift.begin()
    found = fed(drift, 2 + 0.3 * rng.standard_normal(3), None, first=300)
    assert [kind for _, kind, _ in found] == ["works"] and not drift.resting


def test_training_rests_where_nothing_is_gained_and_works_again():
    rng = np.random.default_rng(3)
    drift = Drift(DriftConfig(rest_samples=96))
    found = fed(drift, 2.5 + 0.3 * rng.standard_normal(96 * 6))
    # at the second look at the latest, here
    assert [kind for _, kind, _ in found] == ["rests"] and found[0][0] < 3 * 96 and drift.resting
    # a gain
    found = fed(drift, 3.2 + 0.3 * rng.standard_normal(200), first=600)
    assert [kind for _, kind, _ in found] == ["works"] and not drift.resting
    fed(drift, 3.2 + 0.3 * rng.standard_normal(500), first=800)
    assert drift.resting
    # a change of traffic
    found = fed(drift, 1.5 + 0.3 * rng.standard_normal(12), first=1300)
    assert {"changed", "works"} <= {kind for _, kind, _ in found} and not drift.resting


def test_what_still_learns_or_has_not_begun_does_not_rest():
    rng = np.random.default_rng(4)
    drift = Drift(DriftConfig())
    n = np.arange(1200)
    # +0.2 at each doubling
    curve = 1.2 + 0.2 * np.log2(1 + n / 50)
    assert not fed(drift, curve[:700] + 0.3 * rng.standard_normal(700))
    flat = Drift(DriftConfig())
    assert not fed(flat, 1.0 + 0.05 * rng.random(2000))
    never = Drift(DriftConfig(rest_samples=0))
    assert not fed(never, 2.5 + 0.3 * rng.standard_normal(2000))


def test_state_round_trip():
    rng = np.random.default_rng(5)
    whole, first = (Drift(DriftConfig(rest_samples=40)) for _ in range(2))
    x = np.concatenate([3 + 0.4 * rng.standard_normal(150), 1.6 + 0.4 * rng.standard_normal(150)])
    initial = np.full(300, 2.0)
    expected = fed(whole, x, initial)
    found = fed(first, x[:140], initial[:140])
    second = Drift(DriftConfig(rest_samples=40))
    second.restore(json.loads(json.dumps(first.state())))
    found += fed(second, x[140:], initial[140:], first=140)
    assert found == expected and {kind for _, kind, _ in found} >= {"changed", "initial", "rests"}
    assert json.dumps(second.state()) == json.dumps(whole.state())
