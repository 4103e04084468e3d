"""How many tokens verify steps committed: of all captured requests, and of the two newest draft
versions by themselves.

Filled on the publisher's thread from arrays that are on the host anyway, once for each message,
whether it is sent or has to wait for a trainer that is not there. Dimensions: b requests of a step,
S draft steps.
"""

from __future__ import annotations

from typing import Any

from aurora_sglang_plugin.metric_families import Tally

ROLES = ("current", "previous")


class Acceptance:
    """`by_length[n]` counts verify steps of requests that committed n tokens, 1 to S + 1, bonus
    included.
    """

    def __init__(self, num_steps: int):
        self.by_length = [0] * (num_steps + 2)
        self.of_role: dict[str, list[int]] = {role: self.by_length.copy() for role in ROLES}
        self._version: dict[str, int] = {role: -1 for role in ROLES}

    def add(self, version: int, accept_lens: Any) -> None:
        """accept_lens: an array of integers [b]; `version` drafted the trees."""
        if version != self._version["current"]:
            # rolled back: what it had accepted before still counts
            back = version == self._version["previous"]
            fresh = self.of_role["previous"] if back else [0] * len(self.by_length)
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
        for length, steps in enumerate(self.by_length):
            tally.observe(length, steps)
        return tally


def mean_length(by_length: list[int]) -> float:
    """Tokens committed per verify step; nan before the first."""
    steps = sum(by_length)
    tokens = sum(length * count for length, count in enumerate(by_length))
    return tokens / steps if steps else float("nan")


def accepted(by_length: list[int]) -> list[int]:
    """[S]: how often the draft token at position 1, 2, ... S was accepted."""
    return [sum(by_length[position + 1 :]) for position in range(1, len(by_length) - 1)]
