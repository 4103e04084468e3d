"""Waiting, but not for ever: for a condition, for what a receiver gets."""

import time


def until(condition, timeout_s=15.0):
    end = time.monotonic() + timeout_s
    while not (value := condition()) or isinstance(value, str):
        assert time.monotonic() < end, value
        time.sleep(0.01)


def values(receiver, count, timeout_s=10.0):
    """The number that each of the next messages carries."""
    return [int(receiver.get(timeout_s).arrays["committed_lens"][0]) for _ in range(count)]
