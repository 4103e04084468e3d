"""How many tokens verify steps committed: of all captured requests, and of the two newest draft
versions by themselves.

Filled on the publisher's thread from arrays that are on the host anyway, once for each message,
whether it is sent or has to wait for a trainer that is not there. Dimensions: b requests of a step,
S draft steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aurora_sglang_plugin.metric_families import Tally

ROLES = ("current", "previous")


class Acceptance:
    """`by_length[n]` counts verify steps of requests that committed n tokens, 1 to S + 1, bonus
    included.
    """

    def __init__(self, num_steps: int):
        self.by_length = np.zeros(num_steps + 2, np.int64)
        self.of_role: dict[str, np.ndarray] = {role: self.by_length.copy() for role in ROLES}
        self._version: dict[str, int] = {role: -1 for role in ROLES}

    def add(self, version: int, accept_lens: Any) -> None:
        """accept_lens: integers [b]; `version` drafted the trees."""
        if version != self._version["current"]:
            # rolled back: what it had accepted before still counts
            back = version == self._version["previous"]
            fresh = self.of_role["previous"] if back else np.zeros_like(self.by_length)
            self.of_role = {"current": fresh, "previous": self.of_role["current"]}
            self._version = {"current": version, "previous": self._version["current"]}
        lens = accept_lens.tolist()
        for length in set(lens):
            if 0 <= length < len(self.by_length):
                steps = lens.count(length)
                self.of_role["current"][length] += steps
                self.by_length[length] += steps

    def lengths(self) -> Tally:
        """All of it as a histogram over 1 to S + 1 tokens."""
        tally = Tally(range(1, len(self.by_length)))
        for length, steps in enumerate(self.by_length.tolist()):
            tally.observe(length, steps)
        return tally


def mean_length(by_length: np.ndarray) -> float:
    """Tokens committed per verify step; nan before the first."""
    steps = by_length.sum()
    return float((by_length * np.arange(len(by_length))).sum() / steps) if steps else float("nan")


def accepted(by_length: np.ndarray) -> list[int]:
    """[S]: how often the draft token at position 1, 2, ... S was accepted."""
    return [int(by_length[position + 1 :].sum()) for position in range(1, len(by_length) - 1)]
