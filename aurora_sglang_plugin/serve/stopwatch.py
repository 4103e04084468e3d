"""How long a piece of work takes on its device, known some time later without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

# measurements that the device has not come to yet
MOST = 64


class Stopwatch:
    """On the CPU work is done when it returns; on CUDA events stand around it in the current
    stream."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        # (amount of work, seconds or events)
        self._pending: deque[tuple[int, float | tuple]] = deque(maxlen=MOST)
        self._amount, self._begin = 0, self._now()
        # what `pause` kept
        self._before_s = 0.0

    def start(self, amount: int) -> None:
        self._amount, self._begin = amount, self._now()

    def pause(self) -> None:
        """In place of `stop`, and on the CPU alone: counts with the next piece of work."""
        self._before_s = self._now() - self._begin

    def stop(self) -> None:
        end = self._now()
        taken = (self._begin, end) if self._cuda else end - self._begin + self._before_s
        self._before_s = 0.0
        self._pending.append((self._amount, taken))

    def finished(self) -> Iterator[tuple[int, float]]:
        """(amount, seconds) of what is done by now; each once."""
        while self._pending:
            amount, taken = self._pending[0]
            if isinstance(taken, tuple):
                begin, end = taken
                if not end.query():
                    return
                taken = begin.elapsed_time(end) / 1e3
            self._pending.popleft()
            yield amount, taken

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
