"""Samples that wait to be looked at: none is kept for that alone."""

import weakref

import numpy as np
from random_sample import random_sample

from aurora_trainer.learn.arrivals import Arrivals
from aurora_trainer.learn.drift import DriftConfig
from aurora_trainer.learn.gate import Gate, GateConfig


def test_what_buffer_and_gate_let_go_of_takes_no_memory_while_it_waits():
    walked = []

    def walk(role: str, samples: list) -> np.ndarray:
        walked.extend(s.request for s in samples)
        return np.full((len(samples), 2), 8.0)

    arrivals = Arrivals(DriftConfig(), Gate(GateConfig()), walk)
    samples = [random_sample(seed, verifies=4, topk=1, width=1) for seed in range(6)]
    for number, sample in enumerate(samples):
        arrivals.add(number, sample)
    there = [weakref.ref(sample) for sample in samples]
    del samples[:4], sample
    assert [ref() is None for ref in there] == [True] * 4 + [False] * 2
    arrivals.look((6, 0), initial=False, behind=False)
    assert walked == ["r4", "r5"] and arrivals.drift.samples == 2


def test_samples_that_cannot_be_walked_are_left_out_and_do_not_fill_the_log(caplog):
    def walk(role: str, samples: list) -> np.ndarray:
        if any(s.topk > 1 for s in samples):
            raise IndexError("selected index k out of range")
        return np.full((len(samples), 2), 8.0)

    arrivals = Arrivals(DriftConfig(), Gate(GateConfig()), walk)
    for turn in range(20):
        samples = [random_sample(turn, verifies=2, topk=topk, width=1) for topk in (1, 2)]
        for sample in samples:
            arrivals.add(turn, sample)
        arrivals.look((turn, 0), initial=False, behind=False)
    assert arrivals.drift.samples == 20 and len(caplog.records) <= 1
