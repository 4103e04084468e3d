"""What took how long, each measurement once; the CUDA half runs on a GPU only."""

from __future__ import annotations

import time

import torch

from aurora_sglang_plugin.serve.stopwatch import Stopwatch


def test_each_piece_of_work_is_told_once():
    watch = Stopwatch(torch.device("cpu"))
    for amount in (3, 5):
        watch.start(amount)
        time.sleep(0.01)
        watch.stop()
    found = list(watch.finished())
    assert [amount for amount, _ in found] == [3, 5]
    assert all(0.01 <= seconds < 1 for _, seconds in found)
    assert list(watch.finished()) == []


def test_two_pieces_of_one_work():
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        stopwatch.start(0)
        time.sleep(0.02)
        stopwatch.pause()
        stopwatch.start(7)
        stopwatch.stop()
        ((amount, seconds),) = stopwatch.finished()
        assert amount == 7 and 0.02 <= seconds and stopwatch._before_s == 0
