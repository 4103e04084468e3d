"""What is held back for the gate: whose, how long, and with which scores."""

import random
from collections import Counter

import numpy as np
import pytest
from held_sample import held_sample as sample

from aurora_trainer.learn.gate import GateConfig
from aurora_trainer.learn.held_requests import REMEMBERED, HeldRequests


def held_requests(requests: int = 24, hold_every: int = 1) -> HeldRequests:
    return HeldRequests(GateConfig(requests=requests, hold_every=hold_every), Counter())


def test_what_is_held_from_before_a_change_goes_to_training():
    held = held_requests(8, 1)
    for n in range(8):
        held.hold(sample(f"old{n}"), n)
    held.hold(sample("new"), 8)
    assert [s.request for s in held.forget(8)] == [f"old{n}" for n in range(1, 8)]
    assert held.samples == 1 and not held.forget(8)


def test_a_change_by_a_flood_leaves_the_others_what_is_theirs():
    held = held_requests(24, 1)
    for n in range(12):
        held.hold(sample(str(n), domain=("others", "gone")[n % 2]), n)
    for n in range(12, 20):
        held.hold(sample(str(n), domain="others" if n == 15 else "flood"), n)
    assert {s.domain for s in held.forget(12)} == {"gone"}
    assert shares(held) == {"others": 7, "flood": 7}


def test_what_is_held_back():
    held = held_requests(2, 2)
    given = [[s.request for s in held.hold(sample(str(n)))] for n in range(1, 9)]
    # Every other one is held; the third that is held pushes the first one out.
    assert given == [["1"], [], ["3"], [], ["5"], ["2"], ["7"], ["4"]]
    assert held.samples == 2
    held.hold(sample("8", positions=20))
    # another part of a request that is held
    assert held.samples == 3
    # but no request is held without bound
    assert held.hold(sample("8", positions=4000))
    # another server's
    assert [s.request for s in held.hold(sample("8", session="other"))] == ["8"]


def shares(held: HeldRequests) -> dict[str, int]:
    return Counter(request.samples[0].domain for request in held._held.values())


def test_a_flood_is_not_all_that_is_judged():
    held, chance = held_requests(24, 2), random.Random(0)
    for n in range(4000):
        held.hold(sample(str(n), domain="flood" if chance.random() < 0.95 else "others"))
    assert shares(held) == {"flood": 12, "others": 12}


def test_a_rhythm_of_traffic_chooses_nobody():
    """Two domains by turns, and two servers by turns: of all of them some are held."""
    held = held_requests(24, 2)
    for n in range(400):
        which = n % 2
        held.hold(sample(str(n), domain=("code", "chat")[which], session=f"server {which}"))
    assert shares(held) == {"code": 12, "chat": 12}


def test_labels_without_end_are_one_share():
    held = held_requests(24, 2)
    for n in range(4000):
        held.hold(sample(str(n), domain=f"label {n}", session=f"server {n}"))
    assert len(held._held) == 24 and len(held._seen) <= 17 * 17


def test_a_part_that_goes_to_training_leaves_the_held_ones_score():
    """The request is longer than what is held of one."""
    held = held_requests(4, 1)
    first, second = sample("r", positions=1500), sample("r", positions=1000)
    assert held.hold(first) == []
    held.scored(first, {"served": np.array([100.0, 300.0])})
    assert held.hold(second) == [second]
    held.scored(second, {"served": np.array([50.0, 60.0])})
    held.score("served", lambda role, samples: pytest.fail("walked again"))
    assert held.scores("served").tolist() == [[100.0, 300.0]]


def test_a_request_of_which_training_had_a_part_is_not_held():
    """Neither one that was not held at first, nor one that was pushed out while it went on."""
    held = held_requests(2, hold_every=2)
    assert held.hold(sample("a", reason="part")) and held.hold(sample("b", reason="part")) == []
    parts = [sample("a", reason=reason) for reason in ("part", "part", "stop")]
    assert [held.hold(part) for part in parts] == [[part] for part in parts]
    for n in range(4):
        held.hold(sample(f"new{n}"))
    assert "b" not in {key[1] for key in held._held}
    last = sample("b")
    assert held.hold(last) == [last] and len(held) == 2
    # its id comes again, as of another request, and is held as any other
    assert [held.hold(sample(request)) for request in "ab"].count([]) == 0
    assert {("e", "b")} < held._held.keys()


def test_an_owner_that_is_gone_makes_room():
    """Servers start again, as others, and labels come once: the next ones have their own part."""
    held, number = held_requests(8, hold_every=2), 0
    for restarts in range(40):
        for _ in range(REMEMBERED // 8):
            number += 1
            label = f"label-{number}" if number < 64 else "code"
            held.hold(sample(str(number), session=f"server {restarts}", domain=label), number)
    owners = {request.owner for request in held._held.values()}
    # the last ones of REMEMBERED samples, and nobody of long ago
    assert owners <= {("code", f"server {n}") for n in range(31, 40)} and len(held._seen) < 12
    assert ("code", "server 39") in owners


def test_one_request_that_cannot_be_walked_does_not_stop_the_others():
    """It alone is new: that the others were walked with this draft tells whose fault it is."""
    held = held_requests(4)
    for name in "abc":
        held.hold(sample(name))

    def walk(role: str, samples: list) -> np.ndarray:
        if any(s.request == "d" for s in samples):
            raise RuntimeError("selected index k out of range")
        return np.ones((len(samples), 2))

    held.score("served", walk)
    held.hold(sample("d"))
    # the device is at fault, or the draft
    with pytest.raises(ValueError, match="no held request can be walked with the served draft"):
        held.score("served", lambda role, samples: 1 / 0)
    assert len(held) == 4
    held.score("served", walk)
    assert len(held) == 3 and held.scores("served").shape == (3, 2)
