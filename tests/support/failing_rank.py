"""Faults of one rank: python failing_rank.py sample REQUEST (or: update NUMBER) replay ...

That runs the trainer as `python -m aurora_trainer replay ...`, and what is named fails in it.
"""

import sys
from collections.abc import Callable
from typing import Any

from aurora_trainer.learn import learner
from aurora_trainer.learn.optimizer import Optimizer


def without(request: str) -> Callable[..., Any]:
    """`pack`, which cannot take this request's samples."""
    pack = learner.pack

    def refusing(samples, *rest):
        if any(sample.request == request for sample in samples):
            raise IndexError("index out of range in self")
        return pack(samples, *rest)

    return refusing


def until(number: int) -> Callable[..., Any]:
    """`Optimizer.step`, of which that call raises."""
    step, calls = Optimizer.step, []

    def raising(*given):
        calls.append(1)
        if len(calls) == number:
            raise MemoryError("as on a device that is full")
        return step(*given)

    return raising


if __name__ == "__main__":
    what, which = sys.argv[1:3]
    del sys.argv[1:3]
    if what == "sample":
        learner.pack = without(which)
    else:
        Optimizer.step = until(int(which))

    from aurora_trainer.cli import app

    app(prog_name="aurora-trainer")
